"""Prometheus metrics, from memory alone: a scrape reads one snapshot and calls neither a hypervisor nor the store.

METRICS is the whole list; names and labels are public (a contract test compares it with the documents). Gauges come
from the snapshot, so a series lives exactly as long as what it describes. Counters and histograms are told what
happened, on the loop's thread. No label holds a job's id; `domain` is empty for an offline image, whose path is
`target_device`.
"""

from __future__ import annotations

import bisect
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs.model import TERMINAL, Operation, State

PREFIX = "hostagent_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # every Prometheus since 2014 reads it

# A job may be over at once (nothing left to copy) or take a day.
JOB_SECONDS = (0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0, 86400.0)
# From an event's own time to our handling of it: milliseconds, unless the loop or the store is stuck.
LAG_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
# From a job's end to files that can no longer be opened: removing one ACL takes about a millisecond.
REVOCATION_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# A storage daemon answers after about 10 ms; a loaded host or a slow disk needs seconds.
EXPORT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# Most calls take under a millisecond; one on a busy domain waits up to 30 s for it.
CALL_SECONDS = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 35.0)

_JOB = ("domain", "target_device", "operation")


class Entry(NamedTuple):
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: dict[str, Entry] = {
    "build_info": Entry("gauge", "Always 1; the versions are in the labels.", ("version", "libvirt", "qemu")),
    "libvirt_connected": Entry("gauge", "Whether the connection to libvirt is up."),
    "libvirt_configured": Entry("gauge", "Whether there is to be one (libvirt.uri)."),
    "libvirt_call_seconds": Entry(
        "histogram", "Calls to libvirt, by how they ended: ok, error or timeout.", ("call", "result"), CALL_SECONDS
    ),
    "dbus_connected": Entry("gauge", "Whether the agent is on the message bus."),
    "qmp_connected": Entry("gauge", "Storage daemons whose monitor is connected."),
    "snapshot_timestamp_seconds": Entry("gauge", "When the data of these gauges were taken."),
    "storage_daemons": Entry("gauge", "Storage daemons by state.", ("state",)),
    "block_job_cursor_bytes": Entry("gauge", "How far an active job is.", _JOB),
    "block_job_end_bytes": Entry("gauge", "Where an active job's cursor ends; it may grow.", _JOB),
    "block_job_bandwidth_limit_bytes_per_second": Entry("gauge", "An active job's limit; 0 is no limit.", _JOB),
    "block_job_stalled_seconds": Entry("gauge", "For how long a job has not moved that should; else 0.", _JOB),
    "block_jobs": Entry("gauge", "Jobs that have not ended, by state.", ("operation", "state")),
    "block_jobs_finished_total": Entry("counter", "Jobs that have ended, by outcome.", ("operation", "outcome")),
    "block_job_duration_seconds": Entry(
        "histogram", "From a job's creation to its proven end.", ("operation", "outcome"), JOB_SECONDS
    ),
    "block_job_event_lag_seconds": Entry("histogram", "From an event to its handling.", (), LAG_SECONDS),
    "changed_files": Entry("gauge", "Open files that somebody else has cut, deleted or replaced."),
    "access_grants": Entry("gauge", "Files that the hypervisor user may open through us.", ("mode",)),
    "access_revocations_total": Entry("counter", "Files taken back, or not.", ("trigger", "result")),
    "access_revocation_lag_seconds": Entry(
        "histogram", "From the end of the need to the file's proven revocation.", (), REVOCATION_SECONDS
    ),
    "access_revocations_pending": Entry("gauge", "Files that are still to be taken back."),
    "access_revocation_oldest_seconds": Entry("gauge", "How long the oldest of them has waited; 0 when none does."),
    "nbd_exports": Entry("gauge", "Exports that run.", ("mode",)),
    "nbd_exports_orphaned": Entry("gauge", "Exports of storage daemons that no record of the agent's names."),
    "nbd_export_start_seconds": Entry("histogram", "From the request to a ready export.", (), EXPORT_SECONDS),
    "events_total": Entry("counter", "Events by where they came from.", ("source", "type")),
    "events_dropped_total": Entry("counter", "Records that a slow subscriber has missed.", ("subscriber",)),
    "reconciles_total": Entry("counter", "Comparisons of the store with the world.", ("result",)),
    "store_bytes": Entry("gauge", "What the store takes on its file system."),
    "store_free_bytes": Entry("gauge", "What is free beside it."),
    "store_min_free_bytes": Entry("gauge", "What must be free for new work to be taken (store.min_free)."),
    "api_refused_total": Entry("counter", "Callers, connections and requests that were turned away.", ("reason",)),
    "audit_lost_total": Entry("counter", "Lines of the audit that could not be written."),
}


@dataclass(frozen=True, slots=True)
class JobGauge:
    """One job that has not ended. `target` is the image's path, or a live disk's target beside its `domain`."""

    target: str
    operation: str
    state: str
    cur: int
    end: int
    bandwidth: int
    stalled: float
    domain: str = ""


class Room(NamedTuple):
    """Bytes of a file system: what we use, and what is free for us."""

    used: int
    free: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of the agent at `taken` (Unix time), as far as gauges show it. `store` is None while its file system
    does not answer."""

    taken: float
    jobs: Sequence[JobGauge] = ()
    exports: Mapping[str, int] = field(default_factory=dict)
    grants: Mapping[str, int] = field(default_factory=dict)
    daemons: Mapping[str, int] = field(default_factory=dict)
    qmp_connected: int = 0
    libvirt_connected: bool = False
    libvirt_configured: bool = False
    dbus_connected: bool = False
    libvirt: str = ""
    revocations_pending: int = 0
    changed_files: int = 0
    oldest_pending: float | None = None
    orphaned_exports: int = 0
    store: Room | None = None
    min_free: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)


class Histogram:
    """Counts of observations, by upper bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> list[tuple[str, float]]:
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))

    @property
    def sum(self) -> float:
        return self._sum


Labels = tuple[str, ...]


class Metrics(Collector):
    """Tell it what happens; `render` is what /metrics answers. Use it from the loop's thread only."""

    def __init__(
        self, snapshot: Callable[[], Snapshot], *, version: str, qemu: str = "", refusals: Iterable[str] = ()
    ) -> None:
        """`refusals` are the reasons that `refused` may be told."""
        self._snapshot = snapshot
        self._version, self._qemu = version, qemu
        self._counters: dict[str, Counter[Labels]] = defaultdict(Counter)
        self._histograms: dict[str, dict[Labels, Histogram]] = {
            name: {} if entry.labels else {(): Histogram(entry.buckets)}
            for name, entry in METRICS.items()
            if entry.kind == "histogram"
        }
        for operation in Operation:  # from zero on, so that `increase()` sees the first failure
            for outcome in TERMINAL:
                self._counters["block_jobs_finished_total"][operation, outcome] = 0
        for reason in refusals:
            self._counters["api_refused_total"][reason,] = 0
        self._counters["audit_lost_total"][()] = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def job_finished(self, operation: str, outcome: str, seconds: float) -> None:
        self._count("block_jobs_finished_total", operation, outcome)
        self._observe("block_job_duration_seconds", seconds, operation, outcome)

    def event_lag(self, seconds: float) -> None:
        self._observe("block_job_event_lag_seconds", seconds)

    def revocation(self, trigger: str, result: str) -> None:
        self._count("access_revocations_total", trigger, result)

    def revocation_lag(self, seconds: float) -> None:
        """From the end of a job, as it was seen, to the proof that what it dropped is settled."""
        self._observe("access_revocation_lag_seconds", seconds)

    def export_started(self, seconds: float) -> None:
        self._observe("nbd_export_start_seconds", seconds)

    def libvirt_call(self, call: str, result: str, seconds: float) -> None:
        self._observe("libvirt_call_seconds", seconds, call, result)

    def event(self, source: str, type: str) -> None:
        self._count("events_total", source, type)

    def reconcile(self, result: str) -> None:
        self._count("reconciles_total", result)

    def refused(self, reason: str) -> None:
        self._count("api_refused_total", reason)

    def audit_lost(self) -> None:
        self._count("audit_lost_total")

    def render(self) -> tuple[bytes, str]:
        """The exposition, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not call `collect` to learn our names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot()
        gauges = _gauges(now, build=(self._version, now.libvirt, self._qemu))
        counters: dict[str, Mapping[Labels, float]] = {
            **self._counters,
            "events_dropped_total": _by_one_label(now.dropped),
        }
        for name, entry in METRICS.items():
            match entry.kind:
                case "gauge":
                    yield _gauge_family(name, entry, gauges.get(name, {}))
                case "counter":
                    yield _counter_family(name, entry, counters.get(name, {}))
                case _:
                    yield _histogram_family(name, entry, self._histograms[name])

    def _count(self, name: str, *labels: str) -> None:
        self._counters[name][labels] += 1

    def _observe(self, name: str, value: float, *labels: str) -> None:
        series = self._histograms[name]
        if labels not in series:
            series[labels] = Histogram(METRICS[name].buckets)
        series[labels].observe(max(0.0, value))  # a clock that was set back is no negative duration


def _gauges(now: Snapshot, *, build: Labels) -> dict[str, dict[Labels, float]]:
    waited = 0.0 if now.oldest_pending is None else max(0.0, time.time() - now.oldest_pending)
    return {
        "build_info": {build: 1},
        "libvirt_connected": {(): int(now.libvirt_connected)},
        "libvirt_configured": {(): int(now.libvirt_configured)},
        "dbus_connected": {(): int(now.dbus_connected)},
        "qmp_connected": {(): now.qmp_connected},
        "snapshot_timestamp_seconds": {(): now.taken},
        "storage_daemons": _by_one_label(now.daemons),
        "block_jobs": _job_counts(now.jobs),
        "changed_files": {(): now.changed_files},
        "access_grants": _by_one_label(now.grants),
        "access_revocations_pending": {(): now.revocations_pending},
        "access_revocation_oldest_seconds": {(): waited},
        "nbd_exports": _by_one_label(now.exports),
        "nbd_exports_orphaned": {(): now.orphaned_exports},
        "store_bytes": {(): now.store.used} if now.store else {},
        "store_free_bytes": {(): now.store.free} if now.store else {},
        "store_min_free_bytes": {(): now.min_free},
        **_job_series(now.jobs),
    }


def _by_one_label(counts: Mapping[str, int]) -> dict[Labels, float]:
    return {(name,): count for name, count in counts.items()}


def _job_counts(jobs: Sequence[JobGauge]) -> dict[Labels, float]:
    active = [state for state in State if not state.terminal]
    counts: dict[Labels, float] = {(operation, state): 0 for operation in Operation for state in active}
    for job in jobs:
        counts[job.operation, job.state] = counts.get((job.operation, job.state), 0) + 1
    return counts


def _job_series(jobs: Sequence[JobGauge]) -> dict[str, dict[Labels, float]]:
    """One series for each disk and operation: a job that is queued behind another one on the same disk has none."""
    shown: dict[Labels, JobGauge] = {}
    for job in sorted(jobs, key=lambda job: job.state == State.QUEUED):
        shown.setdefault((job.domain, job.target, job.operation), job)
    return {
        "block_job_cursor_bytes": {key: job.cur for key, job in shown.items()},
        "block_job_end_bytes": {key: job.end for key, job in shown.items()},
        "block_job_bandwidth_limit_bytes_per_second": {key: job.bandwidth for key, job in shown.items()},
        "block_job_stalled_seconds": {key: job.stalled for key, job in shown.items()},
    }


def _gauge_family(name: str, entry: Entry, series: Mapping[Labels, float]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, entry.help, labels=entry.labels)
    for labels, value in series.items():
        family.add_metric(_printable(labels), value)
    return family


def _counter_family(name: str, entry: Entry, series: Mapping[Labels, float]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, entry.help, labels=entry.labels)
    for labels, value in series.items():
        family.add_metric(_printable(labels), value)
    return family


def _histogram_family(name: str, entry: Entry, series: Mapping[Labels, Histogram]) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, entry.help, labels=entry.labels)
    for labels, histogram in series.items():
        family.add_metric(_printable(labels), histogram.buckets(), histogram.sum)
    return family


def _printable(labels: Labels) -> list[str]:
    """Paths need not be UTF-8, the exposition must be."""
    return [label.encode("utf-8", "backslashreplace").decode() for label in labels]
