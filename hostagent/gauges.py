"""What a scrape shows of the moment, read from memory alone: no call to a hypervisor, a file or the store."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from datetime import datetime
from pathlib import Path

from events.bus import Bus
from hostagent.api.projection.projection import Projection
from hostagent.live import Live
from hostagent.looks import Looks
from hostagent.metrics import JobGauge, Room, Snapshot
from hostagent.nbd.chains import Chains
from hostagent.nbd.exports import Exports
from hostagent.nbd.watch import Watch
from hostagent.store import Store
from jobs.engine import Engine
from jobs.errors import JobError
from jobs.model import Job, State

log = logging.getLogger(__name__)

MOVING = frozenset({State.STARTING, State.RUNNING, State.COMPLETING, State.ABORTING})
"""The states in which a job is to get on by itself; in the others it waits for a slot, for somebody, or for contact."""


class Gauges:
    """`folder` is the store's, `min_free` store.min_free, `interval` metrics.refresh in seconds."""

    def __init__(
        self,
        *,
        store: Store,
        engine: Engine,
        chains: Chains,
        exports: Exports,
        watch: Watch,
        live: Live,
        bus: Bus,
        folder: Path,
        min_free: int,
        interval: float,
        projection: Projection,
    ) -> None:
        self._store = store
        self._engine = engine
        self._chains = chains
        self._exports = exports
        self._watch = watch
        self._live = live
        self._bus = bus
        self._folder = folder
        self._min_free = min_free
        self._interval = interval
        self._looks = Looks(interval)
        self._room: Room | None = None
        self._projection = projection
        self._pending = 0
        self._oldest: datetime | None = None
        self._grants: dict[str, int] = {}

    async def refresh(self) -> None:
        """Read what only the store knows; after events, so that a scrape need not."""
        self._pending, self._oldest, self._grants = await self._store.access_gauges()

    async def run(self) -> None:
        """See to what no event tells of, until cancelled."""
        while True:
            with contextlib.suppress(JobError):  # of the store: whoever needs it says so
                await self.refresh()
            await self._chains.forget_ended_orphans()
            try:
                self._room = await self._looks.look("store", lambda: room(self._folder))
            except OSError as error:
                if self._room is not None:
                    log.warning("the store's file system cannot be looked at", extra={"fields": {"error": str(error)}})
                self._room = None
            await asyncio.sleep(self._interval)

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
            libvirt_configured=self._live.wanted,
            libvirt=self._live.version,
            qmp_connected=sum(chain.answers for chain in chains),
            revocations_pending=self._pending,
            oldest_pending=self._oldest.timestamp() if self._oldest else None,
            orphaned_exports=sum(len(orphan.exports) for orphan in self._chains.orphans),
            store=self._room,
            min_free=self._min_free,
            changed_files=len({drift.path for drift in self._watch.found}),
            dbus_connected=self._projection.state.connected,
            dropped={
                **self._bus.dropped,
                "libvirt": self._live.hypervisor.dropped,
                "dbus": self._projection.dropped,
            },
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
            stalled=view.stalled if view and job.state in MOVING else 0.0,
        )


def room(folder: Path) -> Room:
    """What the store's files take, and what is free beside them. Blocking."""
    used = sum(file.stat().st_blocks * 512 for file in folder.glob("hostagent.db*"))
    found = os.statvfs(folder)
    return Room(used, found.f_bavail * found.f_frsize)
