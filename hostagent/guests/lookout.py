"""Finds the block jobs that somebody else starts on guests' disks.

libvirt does not tell that a job has begun. So the disks of running domains are looked at now and then; one that began
and completed between two looks is known by its event, and by the chain from before it. What was shorter than that and
changed nothing, or came and went while libvirtd was away, is not found.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from events.model import DiskJobEvent, DiskJobKind, HypervisorEvent
from events.normalize import OPERATIONS
from hostagent.drivers.domain_xml import Disk, Domain
from hostagent.drivers.domains import Domains
from hostagent.drivers.hypervisor import Hypervisor
from hostagent.drivers.libvirt import BlockJobInfo, DomainRef
from hostagent.guests import chain
from hostagent.guests.network_disks import uri_of
from hostagent.images.member import ChainLimits
from hostagent.looks import Looks
from jobs.errors import JobError
from jobs.model import EXTERNAL, Chain, Cursor, Drive, Job, JobSpec, Operation, State
from jobs.ports import Clock

log = logging.getLogger(__name__)

AT_ONCE = 4
"""Domains that are asked at a time: a QEMU that hangs keeps one of libvirt's workers, and holds up no other here."""

REMEMBERED = 1000
"""Ends of jobs, in whose light a look that began before them is old."""

REST = (State.QUEUED, State.WAITING)
"""States in which a job of ours has nothing on its disk, and somebody else's may be there."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`sample` and `file_timeout` in seconds; `most` jobs are followed at a time."""

    limits: ChainLimits
    sample: float
    file_timeout: float
    most: int


class Lookout:
    """`active` are all jobs that have not ended, or whose end is being settled; `adopt` is told of a new one, and of
    what libvirt has said of its end."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        domains: Domains,
        settings: Settings,
        *,
        clock: Clock,
        active: Callable[[], list[Job]],
        adopt: Callable[[Job, str | None], Awaitable[None]],
    ) -> None:
        self._hypervisor = hypervisor
        self._domains = domains
        self._settings = settings
        self._clock = clock
        self._active = active
        self._adopt = adopt
        self._asked: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._taking = asyncio.Lock()
        self._looks = Looks(settings.file_timeout)
        self._ended: dict[Drive, tuple[str, float]] = {}
        self._settled: deque[tuple[Drive, float]] = deque(maxlen=REMEMBERED)
        self._full = False
        domains.told = self._changed

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await asyncio.sleep(self._settings.sample)
                if self._hypervisor.status.connected:
                    self._sample()
        finally:
            for task in self._asked.values():
                task.cancel()
            await asyncio.gather(*self._asked.values(), return_exceptions=True)

    # Jobs that run

    def _sample(self) -> None:
        since = asyncio.get_running_loop().time() - self._settings.file_timeout
        self._ended = {drive: one for drive, one in self._ended.items() if one[1] > since}
        ours = {job.drive.uuid for job in self._active() if job.drive and not job.external and job.state not in REST}
        for ref, described in self._domains.running():
            if ref.uuid not in ours:  # one operation on a domain, and no more questions than that needs
                self._later(ref.uuid, self._ask(ref, described))

    def _later(self, key: str, work: Awaitable[None]) -> None:
        if (before := self._asked.get(key)) is not None and not before.done():
            asyncio.ensure_future(work).cancel()
            return
        task = asyncio.ensure_future(work)
        self._asked[key] = task
        task.add_done_callback(lambda done: self._done(key, done))

    def _done(self, key: str, task: asyncio.Future[None]) -> None:
        if self._asked.get(key) is task:
            del self._asked[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            level = logging.INFO if isinstance(error, JobError) else logging.ERROR
            log.log(level, "somebody's jobs cannot be looked for", extra={"fields": {"of": key, "error": str(error)}})

    async def _ask(self, ref: DomainRef, described: Domain) -> None:
        drives = [Drive(ref.uuid, ref.name, disk.target) for disk in described.disks if disk.top is not None]
        targets = [drive.target for drive in drives if not self._taken(drive)]
        if not targets:
            return
        async with self._turns:
            began = asyncio.get_running_loop().time()
            jobs = await self._running(ref, targets)
            if jobs:
                described = await self._domains.describe(ref)
                still = await self._running(ref, list(jobs))  # else the chain may be what it has left
                jobs = {target: info for target, info in jobs.items() if target in still}
        for disk in described.disks:
            if (info := jobs.get(disk.target)) is not None:
                await self._take(ref, disk, info, began)

    async def _running(self, ref: DomainRef, targets: list[str]) -> dict[str, BlockJobInfo]:
        found = await self._hypervisor.call(
            "block_jobs", lambda s: {target: s.block_job(ref.uuid, target) for target in targets}, domain=ref
        )
        return {target: info for target, info in found.items() if info is not None and _operation(info)}

    # Jobs that have ended

    def event(self, event: HypervisorEvent) -> None:
        """Before the domain is read anew because of it."""
        if isinstance(event, DiskJobEvent) and event.kind is DiskJobKind.COMPLETED:
            drive = Drive(event.domain, event.name, event.disk)
            if event.operation in set(Operation) and not self._taken(drive):
                self._ended[drive] = event.operation, asyncio.get_running_loop().time()

    def resync(self) -> None:
        self._ended.clear()

    def settled(self, job: Job) -> None:
        """A job has ended: what the domain was before that is no news any more."""
        if job.drive is not None:
            self._settled.append((job.drive, asyncio.get_running_loop().time()))
            self._domains.forget(job.drive.uuid)

    def _changed(self, ref: DomainRef, before: Domain, now: Domain) -> None:
        was = {disk.target: disk for disk in before.disks}
        for disk in now.disks:
            drive = Drive(ref.uuid, ref.name, disk.target)
            ended, old = self._ended.pop(drive, None), was.get(disk.target)
            if ended is None or old is None or self._taken(drive):
                continue
            left = {layer.path for layer in disk.layers}
            if any(layer.path not in left for layer in old.layers):
                if ended[0] == Operation.PULL:  # it leaves the top: a new one is a snapshot's, made since the last look
                    known = {layer.path for layer in old.layers}
                    old = replace(old, layers=(*(one for one in disk.layers if one.path not in known), *old.layers))
                info = BlockJobInfo(_TYPES[ended[0]], 0, 0, 0)
                self._later(f"{drive}", self._take(ref, old, info, ended[1], said="completed"))

    # Both

    async def _take(
        self, ref: DomainRef, disk: Disk, info: BlockJobInfo, began: float, said: str | None = None
    ) -> None:
        """`began` is when it was seen, on the loop's clock."""
        drive = Drive(ref.uuid, ref.name, disk.target)
        before = await self._looks.look(f"{drive}", lambda: chain.read_chain(disk, self._settings.limits))
        async with self._taking:  # it may be found as it runs, and by its end, at once
            known = self._taken(drive) or any(one == drive and began <= when for one, when in self._settled)
            if not known and self._room():
                await self._adopt(self._job(drive, disk, info, before), said)

    def _job(self, drive: Drive, disk: Disk, info: BlockJobInfo, before: Chain) -> Job:
        now, operation = self._clock.now(), Operation(OPERATIONS[info.type])
        mirror = disk.mirror.layer if disk.mirror else None
        dest = (uri_of(mirror) or mirror.path) if mirror is not None else None
        spec = JobSpec(operation, target=str(drive), dest=dest, bandwidth=info.bandwidth)
        return Job(
            id=str(uuid.uuid4()),
            spec=spec,
            state=State.RUNNING,
            created=now,
            since=now,
            started=now,
            before=before,
            after=before,
            origin=EXTERNAL,
            cursor=Cursor(info.cur, info.end or before.top.virtual_size),
            bandwidth=info.bandwidth,
            drive=drive,
        )

    def _taken(self, drive: Drive) -> bool:
        """Whether what runs on the disk is known: somebody else's, or one of ours that has begun."""
        return any(
            job.drive is not None
            and (job.drive.uuid, job.drive.target) == (drive.uuid, drive.target)
            and (job.external or job.state not in REST)
            for job in self._active()
        )

    def _room(self) -> bool:
        full = sum(job.external for job in self._active()) >= self._settings.most
        if full and not self._full:
            log.warning("more jobs of somebody else's than libvirt.external_jobs: further ones are not shown")
        self._full = full
        return not full


def _operation(info: BlockJobInfo) -> bool:
    return OPERATIONS.get(info.type) in set(Operation)


_TYPES = {"pull": 1, "copy": 2, "commit": 3}
"""virDomainBlockJobType"""
