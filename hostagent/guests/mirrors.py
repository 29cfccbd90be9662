"""The BlockDriver of copies and commits of guests' disks, which libvirt runs in the guest's own QEMU.

What a job did is read from the disk as libvirt describes it: a guest that has gone over to the target says so there.
Where the disk stays what it was (a finished copy, a commit that keeps the overlay), QEMU's own last word is the only
proof: it flushes the target before it says that all went well. libvirt's says less: "cancelled", whether the last bytes
came through or not. A word that is not heard is no success.

What a guest may have gone over to is never deleted: it may have what the guest wrote since, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from events.model import DiskErrorEvent, DiskJobEvent, DomainEvent, HypervisorEvent, QemuJobEvent
from hostagent.drivers.domain_claims import DomainClaims
from hostagent.drivers.domain_xml import Disk
from hostagent.drivers.libvirt import BlockJobInfo
from hostagent.guests import chain
from hostagent.guests.disks import ACTIVE_COMMIT, COPY, Disks, drive_of, stopped
from hostagent.guests.finding import Finder, claimant, look_at
from hostagent.guests.holding import Holding
from hostagent.guests.work import Work
from hostagent.images.member import ChainLimits
from jobs.errors import JobError
from jobs.model import Chain, Completion, Cursor, Drive, FileId, Holder, Job, JobSpec, Operation, Plan, State
from jobs.ports import Contact, Deletion, Observation, Phase

log = logging.getLogger(__name__)

T = TypeVar("T")

MIRRORED = (COPY, ACTIVE_COMMIT)
"""Block jobs that libvirt shows with a mirror."""
ENDED_AT = 2
"""Looks after which a job that libvirt knows half of is ended: the first may have come between two of its steps."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`agree_timeout`: seconds until QEMU's last word has come; the others as in the configuration, [libvirt]."""

    limits: ChainLimits
    file_timeout: float
    agree_timeout: float
    pivot_attempts: int
    pivot_wait: float


@dataclass(slots=True)
class _Known:
    """What is remembered of a job while it lives: `ours` says that a block job on its disk is this job's; `run` is the
    guest's run that it works in; `word` QEMU's last one, `said` libvirt's or of a failed request; `refused` how often
    the guest did not go over, and `again` when it is asked anew; `shown` that libvirt has shown the whole job, `half`
    how often it knew half of it only; `interrupted` that an event may have been missed."""

    drive: Drive
    operation: Operation
    run: int | None = None
    ours: bool = False
    word: QemuJobEvent | None = None
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    said: str | None = None
    refused: int = 0
    again: float = 0.0
    shown: bool = False
    half: int = 0
    interrupted: bool = False


class Mirrors:
    """`works` knows what a job does; `hint` is told which job to look at."""

    def __init__(
        self,
        disks: Disks,
        claims: DomainClaims,
        finder: Finder,
        works: Callable[[JobSpec], Work],
        *,
        settings: Settings,
        holding: Holding,
        hint: Callable[[str], None],
    ) -> None:
        self._disks = disks
        self._claims = claims
        self._finder = finder
        self._work = works
        self._settings = settings
        self._holding = holding
        self._hint = hint
        self._jobs: dict[str, _Known] = {}

    # Before the job

    async def plan(self, spec: JobSpec, *, preview: bool = False) -> Plan:
        found = await self._finder.find(spec)
        limits = replace(self._settings.limits, top_anywhere=spec.anywhere)
        look = asyncio.to_thread(chain.read_chain, found.disk, limits)
        before = await _within(look, self._settings.file_timeout)
        if spec.synchronous_writes:
            self._disks.refuse_asynchronous()
        plan = await self._work(spec).plan(spec, found, before)
        if spec.completion is Completion.FINISH and plan.after == plan.before:
            self._disks.refuse_deaf()
        return plan

    async def turn(self, job: Job) -> None:
        await self._claims.take(drive_of(job).uuid, claimant(job))

    async def prepare(self, job: Job) -> Mapping[str, Any]:
        drive = drive_of(job)
        self._claim(job)
        if job.started is not None:
            return {}
        if not await self._disks.contact() and not self._jobs[job.id].ours:
            remedy = f"start libvirtd, then start the {job.spec.operation} again"
            raise JobError("unavailable", "libvirt is not connected", remedy=remedy)
        disk = await self._disks.describe(drive)
        if not await self._shows(disk, job.before) and not await self._work(job.spec).proven(job, disk):
            message = f"the chain of {drive} is not what it was when the job was planned"
            remedy = f"look at it, and start the {job.spec.operation} again"
            await self._disks.fail_as(drive, JobError("image_changed", message, remedy=remedy))
        await self._holding.begin(job)
        return await self._work(job.spec).make_ready(job)

    async def check(self, job: Job) -> tuple[str, ...]:
        """Nothing: the tables of an image that a guest writes cannot be checked."""
        return ()

    # The job

    async def start(self, job: Job) -> None:
        known, drive, work = self._jobs[job.id], drive_of(job), self._work(job.spec)
        runs, found = await self._disks.look(drive)
        if runs is None:
            raise stopped(drive)
        known.run = known.run or runs
        disk = await self._disks.describe(drive)
        if found is not None:
            if self._is_half(job, known, found, disk):
                raise JobError("unresponsive", f"libvirt knows half of the {job.spec.operation} of {drive}, it seems")
            if not self._is_ours(job, found, disk) or not (known.ours or job.started):
                raise JobError("busy", f"{drive} has a block job of somebody else's", remedy=look_at(drive))
        elif job.started is None and not await work.proven(job, disk):
            known.word, known.said = None, None
            known.heard.clear()
            try:
                await work.begin(job, disk)
            except JobError as error:
                known.ours = known.ours or error.code in ("unresponsive", "unavailable")  # it may have begun
                if error.code not in ("job_failed", "invalid"):  # of a guest that ends libvirt forgets the chain first
                    raise
                await self._disks.fail_as(drive, error)
        known.ours = True

    async def observe(self, job: Job) -> Observation:
        drive, known = drive_of(job), self._of(job)
        await self._work(job.spec).hasten(job)
        try:
            runs, found = await self._disks.look(drive)
            disk = await self._describe(drive)
            if found is not None and disk is not None and self._is_half(job, known, found, disk):
                known.half += 1
                if known.half == ENDED_AT:
                    await self._disks.abort(drive)
                return Observation(Contact.ALIVE, Phase.RUNNING, Cursor(found.cur, found.end))
            if found is not None and disk is not None and self._is_ours(job, found, disk):
                known.run, known.shown = known.run or runs, known.shown or disk.mirror is not None
                if known.word is None:
                    known.heard.clear()
                ready = disk.mirror is not None and disk.mirror.ready
                cursor = Cursor(found.cur, found.end)
                return Observation(Contact.ALIVE, Phase.READY if ready else Phase.RUNNING, cursor)
            if disk is None and runs is not None:  # it was detached; or the guest ended since, and was undefined before
                runs, _ = await self._disks.look(drive)
            elif disk is not None and disk.layers[0].index is None:
                runs = None  # that is its definition: it has ended since the look
        except JobError:
            return Observation(Contact.UNRESPONSIVE)
        proven = await self._proven(job, disk)
        if proven is None:
            return Observation(Contact.UNRESPONSIVE)
        if proven:
            return Observation(Contact.ALIVE, proven=True)
        gone = runs is None or known.run not in (None, runs)
        never = job.started is None and not known.ours  # nobody will say anything of it
        told = never or (gone and job.completion is not Completion.FINISH)
        if not told and not known.heard.is_set() and await self._word(known) is None:
            return await self.observe(job)  # a libvirtd that has just come back may have found the job by now
        word = known.word
        if word is not None and word.good and job.completion is Completion.FINISH:
            return Observation(Contact.ALIVE, Phase.CONCLUDED)
        told = word is not None and word.error is not None  # that is the reason, whatever the guest did then
        if gone or (not told and await self._disks.ends(drive)):
            return Observation(Contact.DEAD, error=_without_guest(job, known))
        return Observation(Contact.ALIVE, Phase.ABSENT, None, _why(job, known, disk))

    async def _proven(self, job: Job, disk: Disk | None) -> bool | None:
        """A file that is gone or replaced says no. None when it cannot be asked now."""
        work = self._work(job.spec)
        try:
            return await work.named(job) if disk is None else await work.proven(job, disk)
        except JobError as error:
            log.warning("what would prove it cannot be read", extra={"fields": {"job": job.id, "error": str(error)}})
            return None if error.code in ("unresponsive", "unavailable") else False

    async def complete(self, job: Job) -> None:
        """Only a mirror that is in sync is asked for its end: of any other, an end would be a cancelling."""
        drive, known = drive_of(job), self._of(job)
        disk = await self._describe(drive)
        if disk is None or disk.mirror is None or not disk.mirror.ready:
            return
        if job.completion is Completion.FINISH:
            await self._work(job.spec).end(job, self._disks.abort(drive))
        elif (now := asyncio.get_running_loop().time()) >= known.again:
            try:
                await self._disks.pivot(drive)
            except JobError as error:
                if error.code in ("unresponsive", "unavailable"):
                    raise
                self._refused(job, known, error, now)

    def _refused(self, job: Job, known: _Known, error: JobError, now: float) -> None:
        """QEMU lets a job go on only when nothing drains it, so once is no answer."""
        settings = self._settings
        known.again = now + settings.pivot_wait * 2**known.refused
        known.refused += 1
        if known.refused >= settings.pivot_attempts:
            message = f"{known.drive} did not go over, asked {known.refused} times (libvirt.pivot_attempts): "
            remedy = f"see the guest's log, then start the {job.spec.operation} again"
            raise JobError("pivot_refused", message + error.message, remedy=remedy) from error

    async def cancel(self, job: Job, *, force: bool = False) -> None:
        """Asked for, and not waited for: a look tells when it is gone. The QEMU of a guest is never killed."""
        if force:
            await self._work(job.spec).cut(job)
            return
        known, drive = self._jobs.get(job.id), drive_of(job)
        if known is None or not (known.ours or job.started):
            return
        _, found = await self._disks.look(drive)
        disk = await self._describe(drive)
        if found is None or disk is None:
            return
        if self._is_ours(job, found, disk) or self._is_half(job, known, found, disk):
            await self._work(job.spec).end(job, self._disks.abort(drive))

    async def pause(self, job: Job) -> None:
        remedy = f"slow it down: hostagent job speed {job.id} 1MiB/s"
        what = "a copy or a commit" if job.spec.operation is Operation.COPY else f"a {job.spec.operation}"
        raise JobError("not_supported", f"libvirt cannot pause {what} of a guest's disk", remedy=remedy)

    async def resume(self, job: Job) -> None:
        await self.pause(job)

    async def set_speed(self, job: Job, bandwidth: int) -> None:
        await self._disks.set_speed(drive_of(job), bandwidth)

    async def audit(self, job: Job) -> tuple[str, ...]:
        if job.completion is Completion.FINISH:
            self._disks.refuse_deaf()
        return await self._work(job.spec).audit(job)

    async def seal(self, job: Job) -> None:
        await self._work(job.spec).seal(job)

    async def discard(self, job: Job) -> bool:
        """`over`: a pivot was asked for, and QEMU said that it was done, or may have when nobody could hear it."""
        drive, known = drive_of(job), self._of(job)
        runs, _ = await self._disks.look(drive) if job.started else (None, None)
        disk = await self._describe(drive) if job.started else None
        word = known.word
        missed = runs is None or runs != known.run or (known.interrupted and word is None)
        untold = missed or (word is not None and word.good)
        over = job.completion is Completion.PIVOT and untold
        return await self._work(job.spec).discard(job, disk, over=over)

    # Nothing: increments are pulls, groups are of images, and QEMU ends these jobs without a finalize

    async def advance(self, job: Job, stop: asyncio.Event) -> int:
        raise JobError("not_supported", f"a {job.spec.operation} has no increments")

    async def rest(self, job: Job) -> None: ...

    async def finalize(self, job: Job) -> None: ...

    async def harden(self, job: Job) -> None: ...

    async def name(self, job: Job) -> None: ...

    async def delete_dropped(self, job: Job, needed: Collection[FileId]) -> Deletion:
        return await self._work(job.spec).delete_dropped(job, needed)

    # After the job

    async def conclude(self, job: Job, record: Callable[[tuple[Holder, ...]], Awaitable[Job]]) -> None:
        self._work(job.spec).release(job)  # who sees that it has ended may use its target
        await self._holding.conclude(job, lambda: record(()))

    async def drop(self, job: Job) -> None:
        """libvirt has closed what the chain lost."""
        await self._holding.end(job)

    async def leave(self, job: Job) -> None:
        self._work(job.spec).release(job)
        self._jobs.pop(job.id, None)
        self._claims.release(drive_of(job).uuid, claimant(job))

    def recover(self, job: Job) -> None:
        """After a restart: of a job that has begun, a block job that runs on the disk is its own."""
        if job.state is not State.QUEUED and not job.state.terminal:
            known = self._claim(job)
            known.ours = known.interrupted = True
            try:
                self._work(job.spec).claim(job)
            except JobError as error:
                log.warning("a lease was lost", extra={"fields": {"job": job.id, "error": error.message}})

    def _claim(self, job: Job) -> _Known:
        drive = drive_of(job)
        self._claims.claim(drive.uuid, drive.name, claimant(job))
        return self._of(job)

    def _of(self, job: Job) -> _Known:
        return self._jobs.setdefault(job.id, _Known(drive_of(job), job.spec.operation))

    # What libvirt tells: hints, and QEMU's last word

    def event(self, event: HypervisorEvent) -> None:
        if isinstance(event, DiskJobEvent | QemuJobEvent | DomainEvent | DiskErrorEvent):
            for job, known in list(self._jobs.items()):
                if known.drive.uuid == event.domain:
                    _note(known, event)
                    self._hint(job)

    def resync(self) -> None:
        self._disks.reconnected()
        for job, known in list(self._jobs.items()):
            known.interrupted = True
            self._hint(job)

    async def _word(self, known: _Known) -> QemuJobEvent | None:
        """It comes before libvirt says that the job is gone, but by another connection. Waited for once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.agree_timeout):
                await known.heard.wait()
        known.heard.set()
        return known.word

    # The disk

    async def _describe(self, drive: Drive) -> Disk | None:
        """As libvirt has it now, or will start it with; None when it has it no more."""
        try:
            return await self._disks.describe(drive)
        except JobError as error:
            if error.code == "not_found":
                return None
            raise

    def _is_half(self, job: Job, known: _Known, found: BlockJobInfo, disk: Disk) -> bool:
        """A libvirtd that is killed when a job begins (9.0) has the job when it comes back, and not its mirror: it can
        neither say where that leads nor let the guest go over."""
        if not known.ours or known.shown or job.ready is not None or disk.mirror is not None:
            return False
        runs = bool(disk.layers) and disk.layers[0].index is not None
        work = self._work(job.spec)
        return runs and found.type in MIRRORED and found.type in work.types and work.is_mirrored(job)

    def _is_ours(self, job: Job, found: BlockJobInfo, disk: Disk) -> bool:
        work = self._work(job.spec)
        return found.type in work.types and work.is_ours(job, disk)

    async def _shows(self, disk: Disk, wanted: Chain) -> bool:
        found = await _within(asyncio.to_thread(chain.files_of, disk), self._settings.file_timeout)
        return found == [layer.file for layer in wanted.layers]


async def _within(look: Awaitable[T], timeout: float) -> T:
    """What a look at files says."""
    try:
        return await asyncio.wait_for(look, timeout)
    except TimeoutError:
        message = f"the files of the disk do not answer within {timeout:g} s (libvirt.file_timeout)"
        raise JobError("unresponsive", message, remedy="see whether their storage hangs") from None


def _note(known: _Known, event: HypervisorEvent) -> None:
    if isinstance(event, QemuJobEvent) and event.disk == known.drive.target:
        if event.operation == known.operation:
            known.word = event
            known.heard.set()
    elif isinstance(event, DiskJobEvent) and event.disk == known.drive.target:
        known.said = event.reason or known.said
    elif isinstance(event, DiskErrorEvent):
        known.said = f"a request of the guest failed ({event.reason or 'input/output error'}) on {event.path}"


def _why(job: Job, known: _Known, disk: Disk | None) -> str:
    """Why the job is gone from a guest that runs, and did not do what was asked."""
    drive, word = known.drive, known.word
    what = f"the {job.spec.operation} of {drive}"
    if word is not None and word.error is not None:
        return f"{what} ended: {word.error}"
    if known.half >= ENDED_AT:
        return f"{what} was ended: libvirt was killed when it began, and does not know its target any more"
    if word is not None and word.good and job.completion is Completion.PIVOT:
        return (
            f"QEMU says that {drive} has gone over to {job.after.top.path}, and libvirt shows {job.before.top.path}. "
            f"Both are kept: the domain's definition must name {job.after.top.path} before it is started again"
        )
    other = _other(disk) if disk is not None and word is None and known.said is None else None
    if other is not None and other != job.before.top.path:
        return (
            f"{what}: libvirt was killed when it ended, and shows {other} now, which may not be what the guest's QEMU "
            f"writes. All files are kept. See with `lsof` which of {other} and {job.before.top.path} QEMU has open: "
            "the domain's definition must name that one before it is started again"
        )
    if word is not None or known.said == "cancelled":
        return f"{what} was ended by somebody else (`virsh blockjob --abort`, or another program)"
    if job.completion is Completion.PIVOT and known.interrupted and word is None:
        return (
            f"{what} ended when nobody could hear how: the guest may have gone over to {job.after.top.path}, though "
            f"libvirt shows {job.before.top.path}. Both are kept. See with `lsof` which of them QEMU has open: the "
            "domain's definition must name that one before it is started again"
        )
    said = f"libvirt told: {known.said}" if known.said else "neither libvirt nor QEMU was heard to say how"
    return f"{what} ended, and {said}; see the guest's log (/var/log/libvirt/qemu/{drive.name}.log)"


def _other(disk: Disk) -> str | None:
    """What libvirt shows that the disk is, or goes over to, where no job runs on it."""
    layer = disk.mirror.layer if disk.mirror is not None else next(iter(disk.layers), None)
    return layer.path if layer is not None else None


def _without_guest(job: Job, known: _Known) -> str | None:
    """What its user must know before the guest is started again; None for nothing."""
    drive, word = known.drive, known.word
    lost = f"or libvirt was killed then and has lost it (see `pgrep -af guest={drive.name}`)"
    if job.completion is not Completion.PIVOT:
        end = f"domain {drive.name} ended while the job ran, {lost}; its disk is {job.before.top.path}, as before"
        return end if known.interrupted else None
    new = job.after.top.path
    went = "had gone over" if word is not None and word.good else "may have gone over"
    return (
        f"domain {drive.name} ended while {drive} was to go over to {new}, {lost}: it {went}, and libvirt's definition "
        f"does not say so. Compare {new} with {job.before.top.path} before it is started again: one lacks what it "
        "wrote last"
    )
