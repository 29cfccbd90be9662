"""What the data daemon counts, in the names of the agent's metrics (contract.md); served on its control socket."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hostagent.data.backends.base import ImageBackend
from hostagent.data.tickets import Tickets

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "transfer_bytes_total": ("counter", "Bytes of images that were moved.", ("direction", "backend")),
    "tickets": ("gauge", "Tickets in force, by state: active, idle, expired, canceled.", ("state",)),
    "data_connections": ("gauge", "Clients that are connected.", ("service",)),
    "data_connections_refused_total": ("counter", "Clients that found the house full.", ("reason",)),
    "data_requests_total": ("counter", "Requests by how they went: ok, refused, failed.", ("service", "result")),
    "data_revocations_total": ("counter", "Revocations of tickets by how they went: done, timeout.", ("result",)),
    "data_unmapped_total": ("counter", "Reads of images that could not be read directly, and came by NBD.", ()),
    "data_dirty_fallbacks_total": ("counter", "Answers that called everything dirty for want of a bitmap.", ()),
}


class Metrics(Collector):
    """Counters are told what happened, from any thread; gauges are read when they are asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self.tickets: Tickets | None = None
        self.connections: Callable[[], dict[str, int]] = dict

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name, *labels] += by

    def counted(self, direction: str, backend: ImageBackend) -> Callable[[int], None]:
        kind = backend.kind
        return lambda number: self.count("transfer_bytes_total", direction, kind, by=number)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            counts = dict(self._counts)
        gauges: dict[str, dict[tuple[str, ...], int]] = {
            "tickets": self._states(),
            "data_connections": {(k,): v for k, v in self.connections().items()},
        }
        for name, (kind, text, labels) in METRICS.items():
            full = "hostagent_" + name
            family: CounterMetricFamily | GaugeMetricFamily
            if kind == "counter":
                family = CounterMetricFamily(full.removesuffix("_total"), text, labels=labels)
                values = {key[1:]: value for key, value in counts.items() if key[0] == name}
                if not labels:
                    values.setdefault((), 0)
            else:
                family = GaugeMetricFamily(full, text, labels=labels)
                values = gauges[name]
            for key, value in sorted(values.items()):
                family.add_metric(list(key), value)
            yield family

    def _states(self) -> dict[tuple[str, ...], int]:
        found: Counter[tuple[str, ...]] = Counter({(s,): 0 for s in ("active", "idle", "expired", "canceled")})
        for ticket in self.tickets.all() if self.tickets else []:
            found[(ticket.state,)] += 1
        return found
