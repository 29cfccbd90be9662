"""Jobs that somebody else has started on guests' disks: followed to their end, and never interfered with.

libvirt says of them what it says of ours: that one runs and how far it is, and, to who listens, that it ended. What
they are to leave of the chain it does not say. So the chain is read when the job is gone, and that alone tells whether
it completed. What a pull has left needs the same proof as that of a pull of ours, which our own driver gives.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, Protocol, TypeVar

from events.model import DiskJobEvent, DiskJobKind, DomainEvent, HypervisorEvent
from events.normalize import OPERATIONS
from hostagent.drivers.domain_claims import DomainClaims
from hostagent.drivers.libvirt import BlockJobInfo
from hostagent.guests import chain
from hostagent.guests.disks import Disks, drive_of
from hostagent.guests.holding import Holding
from hostagent.images.member import ChainLimits
from hostagent.nbd.headers import Headers
from jobs import pull
from jobs.errors import JobError
from jobs.model import Chain, Cursor, Drive, FileId, Holder, Job, JobSpec, Operation, Plan
from jobs.ports import BlockDriver, Contact, Deletion, Observation, Phase

P = ParamSpec("P")
T = TypeVar("T")

LOOK_AGAIN = 0.1
"""Seconds between two looks at a chain that does not show yet what an event told."""


class Guests(BlockDriver, Protocol):
    """Our own jobs' driver, which proves what a pull has left."""

    def recover(self, job: Job) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """`limits` for the top of a chain; `file_timeout` and `agree_timeout` (until libvirt's chain shows what it has
    told) in seconds."""

    limits: ChainLimits
    file_timeout: float
    agree_timeout: float


@dataclass(slots=True)
class _Known:
    """`run` is the guest's run in which the job was seen, `said` what libvirt told of its end, `ready` that a mirror is
    in sync; `pulls` that our own driver has heard of it."""

    drive: Drive
    run: int | None = None
    said: str | None = None
    ready: bool = False
    pulls: bool = False


class ExternalDriver:
    """A BlockDriver that only looks. `hint` is told which job to look at."""

    def __init__(
        self,
        disks: Disks,
        claims: DomainClaims,
        guests: Guests,
        headers: Headers,
        settings: Settings,
        *,
        holding: Holding,
        hint: Callable[[str], None],
    ) -> None:
        self._disks = disks
        self._claims = claims
        self._guests = guests
        self._headers = headers
        self._settings = settings
        self._holding = holding
        self._hint = hint
        self._jobs: dict[str, _Known] = {}

    def follow(self, job: Job, said: str | None = None) -> None:
        """Know the job from now on, and keep ours off its domain as far as none of ours is there. `said` is what
        libvirt has told of its end already. Idempotent."""
        drive = drive_of(job)
        known = self._jobs.setdefault(job.id, _Known(drive, said=said))
        with contextlib.suppress(JobError):
            self._claims.claim(drive.uuid, drive.name, f"job {job.id}")
            if job.spec.operation is Operation.PULL and not known.pulls:
                self._guests.recover(job)
                known.pulls = True

    def refuse(self, drive: Drive) -> None:
        """A JobError busy that names the job on the disk."""
        for job, known in self._jobs.items():
            if (known.drive.uuid, known.drive.target) == (drive.uuid, drive.target):
                message = f"job {job}, which somebody else has started, works on {drive}"
                raise JobError("busy", message, remedy=f"wait for it (`hostagent job watch {job}`)")

    # Looks

    async def prepare(self, job: Job) -> Mapping[str, Any]:
        self.follow(job)
        return {}

    async def observe(self, job: Job) -> Observation:
        known = self._jobs.setdefault(job.id, _Known(drive_of(job)))
        try:
            run, found = await self._disks.look(known.drive)
        except JobError:
            return Observation(Contact.UNRESPONSIVE)
        known.run = known.run or run
        if run is None or run != known.run:
            return await self._without_guest(job)
        if found is not None and OPERATIONS.get(found.type) == job.spec.operation:
            return await self._running(job, known, found)
        return await self._ended(job, known)

    async def _running(self, job: Job, known: _Known, found: BlockJobInfo) -> Observation:
        cursor = Cursor(found.cur, found.end)
        mirrors = job.spec.operation is not Operation.PULL
        if mirrors and not known.ready and found.cur == found.end:  # the event may have come before we did
            try:
                mirror = (await self._disks.describe(known.drive)).mirror
            except JobError:
                return Observation(Contact.UNRESPONSIVE)
            known.ready = mirror is not None and mirror.ready
        return Observation(Contact.ALIVE, Phase.READY if known.ready else Phase.RUNNING, cursor)

    async def _ended(self, job: Job, known: _Known) -> Observation:
        """The guest runs, and has no such job any more."""
        try:
            after = await self._chain_after(job, known)
        except JobError as error:
            if error.code == "not_found":  # detached: what its image is now nobody can have seen
                return Observation(Contact.ALIVE, error=f"{known.drive} was detached while the job ran")
            return Observation(Contact.UNRESPONSIVE)
        if job.spec.operation is Operation.PULL:
            return await self._pulled(job, known, after)
        if after is None:
            return self._without_effect(job, known)
        return Observation(Contact.ALIVE, proven=True, after=after)

    async def _pulled(self, job: Job, known: _Known, after: Chain | None) -> Observation:
        if after is None and len(job.before.layers) == 1 and known.said == "completed":
            return Observation(Contact.ALIVE, proven=True)  # of an image that stands on nothing
        if after is None:
            return self._without_effect(job, known)
        seen = await self._guests.observe(replace(job, after=after))
        return replace(seen, after=after)

    def _without_effect(self, job: Job, known: _Known) -> Observation:
        what = f"somebody's {job.spec.operation} of {known.drive}"
        if known.said == "cancelled":
            text = f"{what} was aborted, by whoever started it or another; the chain is what it was"
            return Observation(Contact.ALIVE, error=text, cancelled=True)
        told = f"libvirt told: {known.said}" if known.said else "libvirt told no reason"
        log = f"/var/log/libvirt/qemu/{known.drive.name}.log"
        text = f"{what} ended, and the chain is what it was; {told}; see the guest's log ({log})"
        return Observation(Contact.ALIVE, error=text)

    async def _chain_after(self, job: Job, known: _Known) -> Chain | None:
        """The chain that the job has left, without what others have put on top of it since; None when it has changed
        nothing."""
        deadline = asyncio.get_running_loop().time() + self._settings.agree_timeout
        while True:
            disk = await self._disks.describe(known.drive)
            if disk.top is not None and disk.top.index is None:  # it has ended since, and libvirt knows the top alone
                raise JobError("unresponsive", f"domain {known.drive.name} ended just now")
            files = await self._files(chain.files_of, disk)
            kept = tuple(layer for layer in job.before.layers if layer.file in files)
            if job.before.top.file not in files:
                with contextlib.suppress(JobError):  # over to what is no file of this host: nothing is said of that
                    return await self._files(chain.read_chain, disk, self._settings.limits)
                return None
            if len(kept) < len(job.before.layers) and job.spec.operation is not Operation.COPY:
                return Chain(kept)
            late = asyncio.get_running_loop().time() > deadline
            if late or known.said in ("failed", "cancelled"):
                return None
            await asyncio.sleep(LOOK_AGAIN)

    async def _without_guest(self, job: Job) -> Observation:
        """The QEMU that ran it is gone: of a pull the header tells. What else may have ended in that moment is left
        unsaid."""
        top = job.before.top
        if job.spec.operation is not Operation.PULL:
            text = f"domain {drive_of(job).name} ended while somebody's {job.spec.operation} of {top.path} ran"
            return Observation(Contact.DEAD, error=f"{text}; see its definition for where the disk stands now")
        try:
            name, path = await self._headers.backing(top)
        except (FileNotFoundError, NotADirectoryError, JobError):
            return Observation(Contact.DEAD)
        except (TimeoutError, OSError):
            return Observation(Contact.UNRESPONSIVE)
        below = next((layer for layer in job.before.layers[1:] if layer.path == path), None)
        after = pull.after(job.before, below)
        if after == job.before or (name is not None and below is None):
            return Observation(Contact.DEAD)
        seen = await self._guests.observe(replace(job, after=after))
        return replace(seen, after=after if seen.proven else None)

    async def _files(self, look: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        try:
            return await asyncio.wait_for(asyncio.to_thread(look, *args, **more), self._settings.file_timeout)
        except TimeoutError:
            raise JobError("unresponsive", "the files of the disk do not answer") from None

    async def audit(self, job: Job) -> tuple[str, ...]:
        return await self._guests.audit(job)

    # The end

    async def conclude(self, job: Job, record: Callable[[tuple[Holder, ...]], Awaitable[Job]]) -> None:
        """As of a job of ours, so that what the chain lost is closed."""
        if job.spec.operation is Operation.PULL:
            await self._guests.conclude(job, record)
        else:
            await self._holding.conclude(job, lambda: record(()))

    async def drop(self, job: Job) -> None:
        await self._holding.end(job)

    async def leave(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        await self._guests.leave(job)

    # What libvirt tells: hints

    def event(self, event: HypervisorEvent) -> None:
        if not isinstance(event, DiskJobEvent | DomainEvent):
            return
        for job, known in list(self._jobs.items()):
            if known.drive.uuid != event.domain:
                continue
            if isinstance(event, DiskJobEvent) and event.disk == known.drive.target:
                if event.kind is DiskJobKind.READY:
                    known.ready = True
                else:
                    known.said = event.reason or "completed"
            self._hint(job)

    def resync(self) -> None:
        for job in list(self._jobs):
            self._hint(job)

    # What is not ours to do

    async def plan(self, spec: JobSpec, *, preview: bool = False) -> Plan:
        raise JobError("internal", "a job of somebody else's cannot be planned")

    async def turn(self, job: Job) -> None: ...

    async def check(self, job: Job) -> tuple[str, ...]:
        return ()

    async def start(self, job: Job) -> None: ...

    async def advance(self, job: Job, stop: asyncio.Event) -> int:
        return job.cursor.cur

    async def rest(self, job: Job) -> None: ...

    async def finalize(self, job: Job) -> None: ...

    async def complete(self, job: Job) -> None: ...

    async def seal(self, job: Job) -> None: ...

    async def harden(self, job: Job) -> None: ...

    async def name(self, job: Job) -> None: ...

    async def discard(self, job: Job) -> bool:
        return False

    async def delete_dropped(self, job: Job, needed: Collection[FileId]) -> Deletion:
        return Deletion()

    async def cancel(self, job: Job, *, force: bool = False) -> None: ...

    async def pause(self, job: Job) -> None: ...

    async def resume(self, job: Job) -> None: ...

    async def set_speed(self, job: Job, bandwidth: int) -> None: ...
