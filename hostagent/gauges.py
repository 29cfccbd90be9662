"""What a scrape shows of the moment, read from memory alone: no call to a hypervisor, a file or the store."""

from __future__ import annotations

import time
from datetime import datetime

from events.bus import Bus
from hostagent.live import Live
from hostagent.metrics import JobGauge, Snapshot
from hostagent.nbd.chains import Chains
from hostagent.nbd.exports import Exports
from hostagent.nbd.watch import Watch
from hostagent.store import Store
from jobs.engine import Engine
from jobs.model import Job


class Gauges:
    def __init__(
        self, *, store: Store, engine: Engine, chains: Chains, exports: Exports, watch: Watch, live: Live, bus: Bus
    ) -> None:
        self._store = store
        self._engine = engine
        self._chains = chains
        self._exports = exports
        self._watch = watch
        self._live = live
        self._bus = bus
        self._pending = 0
        self._oldest: datetime | None = None
        self._grants: dict[str, int] = {}

    async def refresh(self) -> None:
        """Read what only the store knows; after events, so that a scrape need not."""
        self._pending, self._oldest, self._grants = await self._store.access_gauges()

    def snapshot(self) -> Snapshot:
        chains = [chain for chain in self._chains.all() if chain.daemon]
        daemons = {"running": sum(c.answers for c in chains), "unresponsive": sum(not c.answers for c in chains)}
        exports: dict[str, int] = {}
        for record in self._exports.active():
            mode = "rw" if record.writable else "ro"
            exports[mode] = exports.get(mode, 0) + 1
        return Snapshot(
            taken=time.time(),
            jobs=[self._job(job) for job in self._engine.active()],
            exports=exports,
            grants=self._grants,
            daemons={**daemons, "orphan": len(self._chains.orphans)},
            libvirt_connected=self._live.status.connected,
            libvirt=self._live.version,
            qmp_connected=sum(chain.answers for chain in chains),
            revocations_pending=self._pending,
            oldest_pending=self._oldest.timestamp() if self._oldest else None,
            changed_files=len({drift.path for drift in self._watch.found}),
            dropped={**self._bus.dropped, "libvirt": self._live.hypervisor.dropped},
        )

    def _job(self, job: Job) -> JobGauge:
        view = self._engine.view(job.id)
        return JobGauge(
            target=job.drive.target if job.drive else job.before.top.path,
            domain=job.drive.name if job.drive else "",
            operation=job.spec.operation.value,
            state=job.state.value,
            cur=job.cursor.cur,
            end=job.cursor.end,
            bandwidth=job.bandwidth,
            stalled=view.stalled if view else 0.0,
        )
