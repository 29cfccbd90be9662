"""What the parts of the agent tell, brought to whoever wants to know: the engine, exports, metrics, the event bus, and
who waits at the API. Nothing here waits for anybody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from events import cloudevents, normalize
from events.bus import Bus
from events.model import Event, HostEvent, HostEventKind, JobEventKind, Record, now
from hostagent import sdnotify
from hostagent.api.changes import Changes
from hostagent.api.trouble import Trouble, trouble_of
from hostagent.drain import Drain
from hostagent.gauges import Gauges
from hostagent.images.drift import Drift
from hostagent.metrics import Metrics
from hostagent.nbd.exports import Exports
from hostagent.nbd.operations import job_id
from hostagent.nbd.prepared import PreparedChain
from hostagent.records import ExportRecord
from hostagent.store import Store
from jobs.engine import Engine
from jobs.model import Job, State
from jobs.outcome import job_event

log = logging.getLogger(__name__)

REFRESH = 0.1
"""Seconds in which events are gathered, until what a scrape shows of the store is read again."""


class News:
    """`later` runs what must not be waited for. The parts are given to it as they are made, all before anything is told
    of them; `settled` is for who follows guests, when a job has ended, `trouble` for who shows troubles, once there is
    somebody, `status` says in a line what the agent does, and `touched` is for who shows objects: the kind, the
    id and the state of one that has changed."""

    store: Store
    metrics: Metrics
    engine: Engine
    exports: Exports
    drain: Drain
    gauges: Gauges

    def __init__(self, bus: Bus, changes: Changes, later: Callable[[Coroutine[Any, Any, Any]], None]) -> None:
        self._bus = bus
        self._changes = changes
        self._later = later
        self._refreshing = False
        self.settled: Callable[[Job], None] = lambda job: None
        self.status: Callable[[], str] = lambda: "starting"
        self.trouble: Callable[[Trouble], None] = lambda trouble: None
        self.touched: Callable[[str, str, str], None] = lambda kind, id, state: None

    # Storage daemons (hostagent.nbd.chains.Sink)

    def qmp_event(self, chain: PreparedChain, name: str, data: Mapping[str, Any]) -> None:
        self.metrics.event("qmp", name)
        if found := normalize.job_of(name, data):
            self.engine.hint(job_id(found))

    def daemon_gone(self, chain: PreparedChain) -> None:
        self.exports.daemon_gone(chain)
        self._hint(chain)

    async def moved(self, chain: PreparedChain) -> None:
        await self.exports.moved(chain)

    def responsive(self, chain: PreparedChain, answers: bool) -> None:
        kind = HostEventKind.CONNECTED if answers else HostEventKind.UNRESPONSIVE
        daemon = chain.daemon.id if chain.daemon else ""
        reason = None if answers else f"storage daemon of {chain.path} (pid {chain.pid}) does not answer"
        log.warning("storage daemon %s", kind, extra={"fields": {"daemon": daemon, "path": chain.path}})
        self.record(HostEvent(kind, f"storage-daemon/{daemon}", reason))
        self._hint(chain)

    def _hint(self, chain: PreparedChain) -> None:
        for user in chain.users:
            if user.kind == "job":
                self.engine.hint(user.id)
            else:
                self._changes.tell(f"export {user.id}")

    # Jobs (jobs.ports.Observer)

    def job_finished(self, operation: str, outcome: str, seconds: float) -> None:
        self.metrics.job_finished(operation, outcome, seconds)

    def event_lag(self, seconds: float) -> None:
        self.metrics.event_lag(seconds)

    def reconcile(self, result: str) -> None:
        self.metrics.reconcile(result)

    def revocation_lag(self, seconds: float) -> None:
        self.metrics.revocation_lag(seconds)
        log.info("access settled", extra={"fields": {"lag_seconds": round(seconds, 6)}})

    def job_changed(self, job: Job) -> None:
        self._changes.tell(f"job {job.id}")
        self.touched("job", job.id, job.state)
        self.drain.job_changed(job)
        if job.state.terminal:
            self.settled(job)
        if job.state is State.RUNNING:
            self._bus.publish(Record(0, now(), job_event(job, JobEventKind.PROGRESS)))

    # The others

    def export_changed(self, record: ExportRecord) -> None:
        self._changes.tell(f"export {record.id}")
        self.touched("export", record.id, record.state)

    def data_daemon(self, answers: bool, why: str | None) -> None:
        kind = HostEventKind.CONNECTED if answers else HostEventKind.DISCONNECTED
        self.record(HostEvent(kind, "data-daemon", why))

    def drifted(self, drift: Drift) -> None:
        self.trouble(Trouble(now(), "a file that is in use", str(drift), drift.remedy))

    def not_whole(self, path: str, remedy: str) -> None:
        self.trouble(Trouble(now(), path, "it stands no more on what it needs, and is not whole", remedy))

    def record(self, event: Event) -> None:
        """Something that belongs to no job: stored, and published then."""
        self._later(self.store.record([event]))

    def publish(self, record: Record) -> None:
        """What was stored."""
        self.metrics.event("agent", cloudevents.type_of(record.event))
        self._bus.publish(record)
        self.touched("grants", "", "")  # whatever happened may have moved some
        if (trouble := trouble_of(record.event, now())) is not None:
            self.trouble(trouble)
        if not self._refreshing:
            self._refreshing = True
            self._later(self._refresh())

    async def _refresh(self) -> None:
        await asyncio.sleep(REFRESH)
        self._refreshing = False
        await self.gauges.refresh()
        sdnotify.status(self.status())
