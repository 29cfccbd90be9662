"""The BlockDriver of guests' disks: pulls, which libvirt runs in the guest's own QEMU.

libvirt tells that a job ended, but neither why it failed nor, to who was away, that it did; and a job leaves nothing
behind by which it could be known. So a job that libvirt does not know (any more) is judged by the chain, and what was
ours to end is remembered before it is asked for. Nothing here asks for all of a domain's disks, as
virConnectGetAllDomainStats does: with QEMU below 10.2 that can crash the guest while a pull ends (docs/qemu.md).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from events.model import DiskErrorEvent, DiskJobEvent, DomainEvent, HypervisorEvent, QemuJobEvent
from hostagent.drivers.domain_claims import DomainClaims
from hostagent.guests import chain, ends
from hostagent.guests.disks import PULL, Disks, drive_of, stopped
from hostagent.guests.durable import Durable
from hostagent.guests.finding import Finder, Found, claimant, look_at
from hostagent.guests.holding import Holding
from hostagent.guests.proof import Proof
from hostagent.guests.pulling import LOOK, Pulling
from hostagent.images.member import ChainLimits
from hostagent.nbd.operations import at_most, preflight, room
from jobs import pull
from jobs.errors import JobError
from jobs.model import Chain, Cursor, Drive, FileId, Holder, Job, JobSpec, Layer, Plan, State
from jobs.ports import Contact, Deletion, Observation, Phase

T = TypeVar("T")

WAITS = "QEMU has pulled all, and holds some of it in memory until the guest flushes its disk (sync) or is shut down"
SOON = 10.0
"""Seconds in which a guest that lives flushes its disk; nobody need be told before."""
TRIES, TRY_AGAIN = 4, 0.25
"""Looks at what a guest that is gone has written, and seconds between them."""
END_TOLD = 1.0
"""Seconds to be told how a guest ended that is gone, or a job."""
REST = 5
"""Times as long as a look at an image's tables took until the next one; less for the first ones."""

FULL = 1 << 20
"""Bytes: a file system with less free is what a failed pull has filled."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`limits` for the top of a chain; `file_timeout` in seconds."""

    limits: ChainLimits
    file_timeout: float


@dataclass(slots=True)
class _Known:
    """What is remembered of a job while it lives: `ours` says that a pull on its disk is this job's, `sure` that what
    runs there now was begun by us or had the chain that ours has, and has not been heard to end, `pausing` that we
    have ended it to go on later, `doubted` that once it was not there, and nothing said why, `said` what libvirt told
    of its end or of a failed request, `word` QEMU's own reason, `ended` how the guest did; `run` is the guest's run
    that it works in. `waits` says why it is not done although QEMU's part is, `since` when, and `again` when to look
    anew, after so many `looks`; `foreseeing` finds out, while it runs, what its end must have written."""

    drive: Drive
    run: int | None = None
    waits: str | None = None
    since: float = 0.0
    again: float = 0.0
    looks: int = 0
    ours: bool = False
    sure: bool = False
    pausing: bool = False
    doubted: bool = False
    said: str | None = None
    word: str | None = None
    ended: str | None = None
    foreseeing: asyncio.Task[None] | None = None


class GuestDriver:
    """`hint` is told which job to look at."""

    def __init__(
        self,
        disks: Disks,
        claims: DomainClaims,
        pulling: Pulling,
        proof: Proof,
        file: Durable,
        *,
        settings: Settings,
        finder: Finder,
        hint: Callable[[str], None],
        holding: Holding,
    ) -> None:
        self._disks = disks
        self._claims = claims
        self._pulling = pulling
        self._proof = proof
        self._file = file
        self._settings = settings
        self._finder = finder
        self._hint = hint
        self._holding = holding
        self._jobs: dict[str, _Known] = {}

    # Before the job

    async def plan(self, spec: JobSpec, *, preview: bool = False) -> Plan:
        found = await self._finder.find(spec)
        _refuse(found)
        limits = replace(self._settings.limits, top_anywhere=spec.anywhere)
        before = await self._files(lambda: chain.read_chain(found.disk, limits))
        base = await self._files(lambda: chain.resolve_base(found.disk, before, spec.base))
        after = pull.after(before, base)
        need, free = _need(before, after), await self._free(before.top)
        warnings = (*found.warnings, *preflight(spec, need, free, "the overlay"))
        space = {"space": {"need": need, "free": free}}
        return Plan(before, after, before.top.virtual_size, warnings, space, drive=found.drive)

    async def turn(self, job: Job) -> None:
        drive = drive_of(job)
        await self._claims.take(drive.uuid, claimant(job))

    async def prepare(self, job: Job) -> Mapping[str, Any]:
        drive = drive_of(job)
        self._claim(job)
        if job.started is not None:
            return {}
        if not await self._disks.contact() and not self._jobs[job.id].ours:
            remedy = "start libvirtd, then start the pull again"
            raise JobError("unavailable", "libvirt is not connected", remedy=remedy)
        disk = await self._disks.describe(drive)
        found = await self._files(lambda: chain.files_of(disk))
        if found not in ([layer.file for layer in job.before.layers], [layer.file for layer in job.after.layers]):
            message = f"the chain of {drive} is not what it was when the job was planned"
            remedy = "look at it, and start the pull again"
            await self._disks.fail_as(drive, JobError("image_changed", message, remedy=remedy))
        await self._holding.begin(job)
        return {}

    async def check(self, job: Job) -> tuple[str, ...]:
        """Nothing: the tables of an image that a guest writes cannot be checked."""
        return ()

    # The job

    async def start(self, job: Job) -> None:
        known, drive = self._jobs[job.id], drive_of(job)
        runs, found = await self._disks.look(drive)
        if runs is None:
            raise stopped(drive)
        known.run = known.run or runs
        if found is not None:
            mine = found.type == PULL and (known.ours or job.started is not None) and await self._is_ours(job)
            if not mine and (job.started is None or job.incremental):
                raise _somebodys(drive)
        elif (job.started is None or job.incremental) and not await self._proof.of_running(job):
            await self._begin(job)

    async def _begin(self, job: Job) -> None:
        known = self._jobs[job.id]
        known.pausing, known.said, known.word = False, None, None
        try:
            await self._pulling.begin(job)
        except JobError as error:
            known.ours = known.ours or error.code == "unresponsive"  # it may have begun
            if error.code != "job_failed":
                raise
            await self._disks.fail_as(drive_of(job), error)
        known.ours = known.sure = True

    async def advance(self, job: Job, stop: asyncio.Event) -> int:
        known = self._jobs[job.id]
        _, found = await self._disks.look(drive_of(job))
        if found is not None and not (known.ours and await self._is_ours(job)):
            raise _somebodys(drive_of(job))
        known.ours, known.said, known.word, known.ended = True, None, None, None
        try:
            return await self._pulling.advance(job, stop)
        except JobError as error:
            if error.code != "job_failed":
                raise
            await _until_told(lambda: known.ended is not None or _explained(known))
            if known.ended is not None:
                raise stopped(drive_of(job)) from error
            raise JobError("job_failed", await self._why(job)) from error

    async def rest(self, job: Job) -> None:
        """Nothing runs, and nothing is open for the job; the domain stays its own between two increments."""
        self._claim(job)
        self._jobs[job.id].ours = self._jobs[job.id].sure = False

    async def observe(self, job: Job) -> Observation:
        drive, known = drive_of(job), self._jobs.get(job.id)
        if job.started is None and not (known is not None and known.ours):
            return Observation(Contact.ALIVE)  # it never ran: what runs there is somebody else's
        try:
            runs, found, disk = await self._disks.look_closely(drive)
            mine = found is not None and found.type == PULL and await self._is_ours(job)
        except JobError:
            # Of a paused job nothing runs, so nothing of it is unknown while libvirt is away.
            paused = job.state is State.PAUSED
            return Observation(Contact.ALIVE, Phase.PAUSED) if paused else Observation(Contact.UNRESPONSIVE)
        if found is not None and mine:
            if known is not None:
                known.doubted = False
            self._foresee(job, known)
            return Observation(Contact.ALIVE, Phase.RUNNING, None if job.incremental else Cursor(found.cur, found.end))
        if runs is None or (known is not None and known.run not in (None, runs)):
            return await self._without_guest(job)
        proven = await self._proof.of_running(job, disk)
        if proven is None:
            return Observation(Contact.UNRESPONSIVE)
        pausing = known is not None and known.pausing and job.state in (State.RUNNING, State.UNKNOWN)
        if not proven and (job.state is State.PAUSED or pausing):
            return Observation(Contact.ALIVE, Phase.PAUSED)
        if not proven:
            try:
                runs, _ = await self._disks.look(drive)
            except JobError:
                return Observation(Contact.UNRESPONSIVE)
            if runs is None:  # it ended since the first look, which is no end of the job's own
                return await self._without_guest(job)
            if known is not None and not known.doubted:
                known.doubted = True
                await _until_told(lambda: _explained(known))
                if not _explained(known):
                    return await self.observe(job)  # a libvirtd that has just come back may have found the job by now
        if proven and not _rests(known):
            self._holding.foresee(drive)
        if proven and not await self._durable(job, known):
            if job.intent != "abort":
                return Observation(Contact.ALIVE, Phase.PENDING, Cursor(job.cursor.end, job.cursor.end))
            proven = False
        error = None if proven else await self._why(job)
        return Observation(Contact.ALIVE, Phase.ABSENT, None, error, proven)

    def _foresee(self, job: Job, known: _Known | None) -> None:
        if known is not None and known.foreseeing is None:
            known.foreseeing = asyncio.create_task(self._file.foresee(job), name=f"foresee {job.id}")

    async def _is_ours(self, job: Job) -> bool:
        """Of a pull that runs on the disk. While one runs the chain stays what it is: where it is not what ours has,
        ours has ended. One that somebody else began on the same chain when ours had failed, while we were away, looks
        no different: libvirt says of a block job neither who began it nor when."""
        known = self._jobs.get(job.id)
        if known is not None and known.sure:
            return True
        if job.incremental and not (known is not None and known.ours):
            return False  # between two increments
        disk = await self._disks.describe(drive_of(job))
        files = await self._files(lambda: chain.files_of(disk))
        before = [layer.file for layer in job.before.layers]
        found = files == before
        if not found and len(files) == len(before) and None in files:
            remedy = "see that they are there, and their storage answers"
            raise JobError("unresponsive", f"not all files of {drive_of(job)} can be looked at", remedy=remedy)
        if known is not None:
            known.sure = found
        return found

    async def _without_guest(self, job: Job) -> Observation:
        """The QEMU that pulled is gone, in order or not: the file tells."""
        proven = await self._proof.of_header(job)
        if proven is None:
            return Observation(Contact.UNRESPONSIVE)
        if not (proven and job.dropped):
            return Observation(Contact.DEAD, error=None if proven else await self._how_ended(job), proven=proven)
        try:
            lost = await self._lost(job)
            what = f"{lost} bytes of it were not written"
        except JobError as failure:
            lost, what = None, f"whether all of it was written cannot be said: {failure.message}"
        if lost == 0:
            return Observation(Contact.DEAD, proven=True)
        top, base = job.before.layers[:2]
        error = (
            f"QEMU ended just as the pull did: {top.path} names its former backing file no more, and {what}. "
            "Stand it on that again before it is used: "
            f"qemu-img rebase -u -f {top.format} -F {base.format} -b {base.path} {top.path}"
        )
        return Observation(Contact.DEAD, error=error)

    async def _lost(self, job: Job) -> int:
        """As the guest is gone, libvirt takes the files from QEMU's user: perhaps just between our look at whether it
        may open them and its opening them."""
        for _ in range(TRIES - 1):
            with contextlib.suppress(JobError):
                return await self._file.missing(job, running=False)
            await asyncio.sleep(TRY_AGAIN)
        return await self._file.missing(job, running=False)

    async def _how_ended(self, job: Job) -> str:
        known, drive = self._jobs.get(job.id), drive_of(job)
        if known is not None:
            await _until_told(lambda: known.ended is not None)
        how = (known.ended if known else None) or "ended"
        return f"domain {drive.name} {how} while the job ran; the image still stands on its backing files"

    async def _durable(self, job: Job, known: _Known | None) -> bool:
        """Whether the pull that QEMU has done is on the file. Maps of large images take long: not at every look."""
        clock = asyncio.get_running_loop().time
        if _rests(known) and job.intent != "abort":
            return False
        began = clock()
        try:
            lost = await self._file.missing(job, running=True)
            waits = WAITS if lost else None
        except JobError as error:
            waits = f"{WAITS}, and it cannot be seen: {error.message}"
        if known is not None:
            known.since = known.since if known.waits else began
            known.looks = known.looks + 1 if waits else 0
            known.waits, known.again = waits, clock() + min(known.looks, REST) * (clock() - began)
        return waits is None

    async def _why(self, job: Job) -> str:
        """libvirt gives no reason for a failure: QEMU's own, or what can be found instead where that was not heard."""
        known, drive = self._jobs.get(job.id), drive_of(job)
        if known is not None and not known.doubted:
            await _until_told(lambda: _explained(known))
        said, word = (known.said, known.word) if known else (None, None)
        if word is not None:
            return f"the pull of {drive} ended: {word}"
        if said == "cancelled":
            return f"the pull of {drive} was aborted by somebody else (`virsh blockjob --abort`, or another program)"
        try:
            await self._disks.describe(drive)
        except JobError as error:
            if error.code == "not_found":
                return f"{drive} was detached from its guest while the job ran"
        free = await self._free(job.before.top)
        if free is not None and free < FULL:
            return f"the pull of {drive} ended, and there is no space left beside {job.before.top.path}"
        what = f"libvirt told: {said}" if said else "libvirt gave no reason"
        log = f"/var/log/libvirt/qemu/{drive.name}.log"
        return f"the pull of {drive} ended before it was done; {what}; see the guest's log ({log})"

    async def cancel(self, job: Job, *, force: bool = False) -> None:
        """Asked for, and not waited for: a look tells when it is gone. The QEMU of a guest is never killed."""
        if force:
            remedy = "wait; or end the guest itself, which loses what it has not flushed"
            raise JobError("not_supported", "a guest is not killed for a job", remedy=remedy)
        known, drive = self._jobs.get(job.id), drive_of(job)
        if known is None or not (known.ours or job.started):
            return
        _, found = await self._disks.look(drive)
        if found is not None and found.type == PULL and await self._is_ours(job):
            await self._disks.abort(drive)

    async def pause(self, job: Job) -> None:
        known = self._jobs[job.id]
        known.pausing = True
        try:
            await self._pulling.end(job)
        except JobError as error:
            known.pausing = error.code in ("unresponsive", "unavailable")  # it may end all the same
            raise

    async def resume(self, job: Job) -> None:
        if not self._disks.connected:
            raise JobError("unavailable", "libvirt is not connected", remedy="start libvirtd, then resume again")
        await self._begin(job)

    async def set_speed(self, job: Job, bandwidth: int) -> None:
        if job.state is State.PAUSED:
            return  # it begins with it when it is resumed
        await self._disks.set_speed(drive_of(job), bandwidth)

    # What an offline job is asked before and after its end: QEMU ends a guest's pull by itself

    async def audit(self, job: Job) -> tuple[str, ...]:
        known = self._jobs.get(job.id)
        if known is None or known.waits is None or asyncio.get_running_loop().time() < known.since + SOON:
            return ()
        return (known.waits,)

    async def finalize(self, job: Job) -> None: ...

    async def complete(self, job: Job) -> None: ...

    async def seal(self, job: Job) -> None: ...

    async def harden(self, job: Job) -> None: ...

    async def name(self, job: Job) -> None: ...

    async def discard(self, job: Job) -> bool:
        return False

    async def delete_dropped(self, job: Job, needed: Collection[FileId]) -> Deletion:
        return Deletion()

    # After the job

    async def conclude(self, job: Job, record: Callable[[tuple[Holder, ...]], Awaitable[Job]]) -> None:
        """An image whose header names its base no more, though the pull is not proven, still depends on it. So it has
        rows before the job's own go."""
        if job.dropped and job.state is not State.COMPLETED and await self._proof.of_header(job) is not False:
            await self._holding.leave_unproven(job, job.dropped)
        await self._holding.conclude(job, lambda: record(()))

    async def drop(self, job: Job) -> None:
        """libvirt has closed what the chain lost."""
        await self._holding.end(job)

    async def leave(self, job: Job) -> None:
        known = self._jobs.pop(job.id, None)
        if known is not None and known.foreseeing is not None:
            known.foreseeing.cancel()
        self._claims.release(drive_of(job).uuid, claimant(job))

    def recover(self, job: Job) -> None:
        """After a restart: of a job that has begun, a pull that runs on the disk is its own, unless the chain says
        otherwise. Between two increments none is."""
        if job.state is not State.QUEUED and not job.state.terminal:
            self._claim(job)
            self._jobs[job.id].ours = job.state is not State.WAITING

    def _claim(self, job: Job) -> None:
        drive = drive_of(job)
        self._claims.claim(drive.uuid, drive.name, claimant(job))
        self._jobs.setdefault(job.id, _Known(drive))

    # What libvirt tells: hints

    def event(self, event: HypervisorEvent) -> None:
        if isinstance(event, DiskJobEvent | QemuJobEvent | DomainEvent | DiskErrorEvent):
            for job, known in list(self._jobs.items()):
                if known.drive.uuid == event.domain:
                    _note(known, event)
                    self._hint(job)

    def resync(self) -> None:
        self._disks.reconnected()
        for job in list(self._jobs):
            self._hint(job)

    # Files

    async def _files(self, look: Callable[[], T]) -> T:
        """What a look at files says, within libvirt.file_timeout."""
        timeout = self._settings.file_timeout
        try:
            return await asyncio.wait_for(asyncio.to_thread(look), timeout)
        except TimeoutError:
            message = f"the files of the disk do not answer within {timeout:g} s (libvirt.file_timeout)"
            raise JobError("unresponsive", message, remedy="see whether their storage hangs") from None

    async def _free(self, top: Layer) -> int | None:
        return None if top.device else await room(Path(top.path).parent, self._settings.file_timeout)


def _refuse(found: Found) -> None:
    if found.disk.layers[0].format == "raw":
        message = f"the image of {found.drive} is raw: it stands on nothing"
        value = str(found.drive)
        raise JobError("invalid", message, field="target", value=value, remedy="there is nothing to pull")


def _somebodys(drive: Drive) -> JobError:
    return JobError("busy", f"{drive} has a block job of somebody else's", remedy=look_at(drive))


def _note(known: _Known, event: HypervisorEvent) -> None:
    known.ended = ends.said(event) or known.ended
    if isinstance(event, QemuJobEvent) and event.disk == known.drive.target:
        known.word = event.error or known.word
    elif isinstance(event, DiskJobEvent) and event.disk == known.drive.target:
        known.said, known.sure = event.reason or known.said, False
    elif isinstance(event, DiskErrorEvent):
        known.said = f"a request of the guest failed ({event.reason or 'input/output error'}) on {event.path}"


def _rests(known: _Known | None) -> bool:
    """Whether it is not yet time to look again at what its end must have written."""
    if known is None or known.waits is None:
        return False
    return asyncio.get_running_loop().time() < known.again


def _explained(known: _Known) -> bool:
    """Whether what was heard says all of why its job ended."""
    return known.word is not None or known.said == "cancelled"


async def _until_told(told: Callable[[], bool]) -> None:
    """libvirt tells of an end at about the time at which it can be seen."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_TOLD):
            while not told():  # noqa: ASYNC110 - it may have been told before
                await asyncio.sleep(LOOK)


def _need(before: Chain, after: Chain) -> int:
    """Bytes that the pull may write: what is allocated in the layers that it takes in."""
    if before.top.device:
        return at_most(before.top.virtual_size)
    stays = {layer.file for layer in after.layers}
    taken = [layer for layer in before.layers[1:] if layer.file not in stays]
    if any(layer.device for layer in taken):
        return before.top.virtual_size
    return min(sum(layer.allocated for layer in taken), before.top.virtual_size)
