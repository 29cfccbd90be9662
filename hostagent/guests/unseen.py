"""What images keep of chains that got shorter while nobody looked: proven, and then let go of.

A block job of somebody else's that began and ended while the agent or libvirtd was away leaves no event, and no trace
but a chain that has lost layers, which the image keeps then (holding.py). Here it is found out whether it still needs
them, when all is read anew and by timer: neither libvirt nor the image's header may name them, and the tables on the
files must have all that they held. That is the proof of any pull, and of a guest that is off the whole truth. Of a
commit below the top, which leaves nothing in the image, it is that what was below reads the same without them.

What is proven is recorded as the job that it was, and given back by it as by any other; of a disk that went over to
another image nobody can say how, and only access is settled. What is not proven stays open, and its row says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from events.model import DiskJobEvent, DomainEvent, HypervisorEvent
from hostagent.drivers.libvirt import DomainRef
from hostagent.guests.driver import REST, WAITS
from hostagent.guests.durable import Durable
from hostagent.guests.holding import AFTER_JOB, KIND
from hostagent.guests.strands import Strand, chain_of, layer_of, strands
from hostagent.images.member import ChainLimits
from hostagent.looks import Late, Looks
from hostagent.records import AccessRow
from jobs.errors import JobError
from jobs.model import EXTERNAL, Chain, Cursor, Drive, FileId, Holder, Job, JobSpec, Layer, Operation, Revocation, State
from jobs.ports import AccessResult, Clock

log = logging.getLogger(__name__)

TRIGGER = "unseen"
MOST_TRIES = 16
"""Looks at an image after each of which it is waited twice as long for the next."""
FOUND = "it was over when it was found: it began and ended while the agent or libvirtd was away"


class Rows(Protocol):
    async def access_rows(self, files: Sequence[FileId] | None = None) -> list[AccessRow]: ...

    async def explain_rows(self, ids: Sequence[str], reason: str) -> None: ...


class Access(Protocol):
    async def delete(self, rows: Sequence[AccessRow], *, trigger: str) -> dict[FileId, AccessResult]: ...


class Renewing(Protocol):
    async def renew(self, drive: Drive) -> DomainRef | None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """`limits` for what headers name; in seconds `file_timeout`, `interval` between two looks, and `patience` until a
    loss is looked at: jobs that were seen are settled by themselves."""

    limits: ChainLimits
    file_timeout: float
    interval: float
    patience: float


@dataclass(frozen=True, slots=True)
class _Loss:
    """A strand, and the layers above it, the image first, whose `tables` tell what they have of it.
    `whole`: all that the chain has was there before, but for the image. `state`: of the files that are compared."""

    strand: Strand
    tables: tuple[Layer, ...]
    whole: bool
    state: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """The image's chain, and what it has lost; `moot` are files that it stands on again, and the disk
    has, if one has the image."""

    chain: tuple[Layer, ...]
    losses: tuple[_Loss, ...]
    moot: tuple[AccessRow, ...]


@dataclass(slots=True)
class _Known:
    """What is remembered of an image: when to look at it `again`, after how many `tries`; in which state the files
    of a strand, named by its top, were when they were compared in vain; and which alarms this process gave."""

    again: float = 0.0
    tries: int = 0
    compared: dict[FileId, tuple[object, ...]] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()


class Unseen:
    """`ready` says whether libvirt can be asked; `active` are the jobs that have not ended, or whose end is settled;
    `record` takes a job that has ended and the rows that go with it; `alarm` is told of images that are not whole."""

    def __init__(
        self,
        holding: Renewing,
        rows: Rows,
        access: Access,
        file: Durable,
        settings: Settings,
        *,
        clock: Clock,
        ready: Callable[[], bool],
        active: Callable[[], list[Job]],
        record: Callable[[Job, tuple[str, ...]], Awaitable[None]],
        alarm: Callable[[str, str], None],
    ) -> None:
        self._holding = holding
        self._rows = rows
        self._access = access
        self._file = file
        self._settings = settings
        self._looks = Looks(settings.file_timeout)
        self._clock = clock
        self._ready = ready
        self._active = active
        self._record = record
        self._alarm = alarm
        self._known: dict[Holder, _Known] = {}
        self._wake = asyncio.Event()

    # What libvirt tells: hints

    def event(self, event: HypervisorEvent) -> None:
        if isinstance(event, DiskJobEvent):  # what its chain loses is young for some time yet
            asyncio.get_running_loop().call_later(AFTER_JOB, self._wake.set)
        elif isinstance(event, DomainEvent):
            self._wake.set()

    def resync(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                wait = await self._round()
            except Exception:  # a task root
                log.exception("a fault of the agent")
                wait = self._settings.interval
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            self._wake.clear()

    async def _round(self) -> float:
        """Seconds until the next."""
        waits = [self._settings.interval]
        try:
            rows = await self._rows.access_rows() if self._ready() else []
            images = sorted({row.holder for row in rows if row.lost})
            self._known = {image: known for image, known in self._known.items() if image in images}
            for image in images:
                waits.append(await self._judge(image, rows))
        except JobError as error:
            log.warning("what images keep cannot be judged", extra={"fields": {"error": error.message}})
        return max(0.05, min(waits))

    async def _judge(self, image: Holder, rows: Sequence[AccessRow]) -> float:
        known, clock = self._known.setdefault(image, _Known()), asyncio.get_running_loop().time
        disks = _disks(image, rows)
        if (wait := self._wait(image, rows, disks, known)) > 0:
            return wait
        began = clock()
        try:
            await self._settle(image, disks, known)
        except JobError as error:
            lost = [row for row in rows if row.holder == image and row.lost]
            await self._say(lost, _unsaid(image, error))
        except Exception:  # the others are judged all the same
            log.exception("a fault of the agent", extra={"fields": {"path": image.id}})
        pause = min(self._settings.interval, self._settings.patience * 2.0**known.tries)
        known.tries = min(known.tries + 1, MOST_TRIES)
        wait = max(pause, REST * (clock() - began))
        known.again = clock() + wait
        return wait

    def _wait(self, image: Holder, rows: Sequence[AccessRow], disks: Sequence[Drive], known: _Known) -> float:
        """Seconds until it may be looked at. Not while a job works there, or may still be found as others are."""
        places = {(disk.uuid, disk.target) for disk in disks}
        for job in self._active():
            place = (job.drive.uuid, job.drive.target) if job.drive else None
            if job.state is not State.QUEUED and (place in places or job.before.top.path == image.id):
                return self._settings.interval
        youngest = max(row.since for row in rows if row.holder == image and row.lost)
        age = (self._clock.now() - youngest).total_seconds()
        return max(known.again - asyncio.get_running_loop().time(), self._settings.patience - age)

    # The proof

    async def _settle(self, image: Holder, disks: Sequence[Drive], known: _Known) -> None:
        domains = [await self._holding.renew(disk) for disk in disks]  # what libvirt names is in their rows then
        runs = any(domain is not None and domain.active for domain in domains)
        rows = await self._rows.access_rows()
        disks, found = _disks(image, rows), await self._look(image, rows)
        lost = {row.file: row for row in rows if row.holder == image}
        if found.moot:
            await self._access.delete(found.moot, trigger=TRIGGER)
        operations: list[Operation] = []
        unproven: list[_Loss] = []
        mends: list[str] = []
        tops = {loss.strand.layers[0].file for loss in found.losses}
        known.compared = {file: state for file, state in known.compared.items() if file in tops}
        for loss in found.losses:
            of_strand = [lost[layer.file] for layer in loss.strand.layers]
            try:
                operation, lacks = await self._proven(found, loss, known)
            except JobError as error:
                unproven.append(loss)
                await self._say(of_strand, _unsaid(image, error))
                continue
            if operation is not None:
                operations.append(operation)
                continue
            unproven.append(loss)
            mends += [] if runs else [_mend(loss)]
            await self._say(of_strand, _why(found.chain, loss, lacks, runs=runs))
        for mend in mends:
            if mend not in known.alarms:
                self._alarm(image.id, mend)
        known.alarms = tuple(mends)
        # Of two strands that stand on one layer, one may need it.
        proven = [lost[file] for file in sorted(_files(found.losses) - _files(unproven))]
        if operations and len(found.losses) == 1 and len(disks) == 1 and _is_job(found.losses[0], proven):
            job = self._job(operations[0], disks[0], found.chain, found.losses[0].strand)
            log.info("a job that nobody saw", extra={"fields": {"job": job.id, "path": image.id}})
            await self._record(job, tuple(row.id for row in proven))
        elif proven:
            await self._access.delete(proven, trigger=TRIGGER)

    async def _proven(self, found: _Found, loss: _Loss, known: _Known) -> tuple[Operation | None, int]:
        """What it was, and how many bytes the image lacks for a pull."""
        chain, strand = found.chain, loss.strand
        if strand.on == 0:  # QEMU writes it all down before it goes over; or somebody went back, and does not need it
            return Operation.COMMIT, 0
        if not loss.tables:
            message = f"{chain[0].path} is raw, and nothing tells what was written there"
            raise JobError("not_supported", message, remedy="see what it holds yourself")
        lacks = await self._file.lacking(loss.tables, strand.layers, bare=len(loss.tables) == len(chain))
        if lacks == 0:
            return Operation.PULL, 0
        top = strand.layers[0].file
        if strand.on and known.compared.get(top) != loss.state:  # all of it is read: once, for it says the same again
            if await self._file.adds_nothing(strand.layers, chain[strand.on :]):
                return Operation.COMMIT, lacks
            known.compared[top] = loss.state
        return None, lacks

    async def _look(self, image: Holder, rows: Sequence[AccessRow]) -> _Found:
        """An image has one that hangs. What comes late tells of other rows than there are by then."""
        try:
            return await self._looks.look(image.id, lambda: _read(image, rows, self._settings.limits))
        except Late:
            message = f"its files do not answer within {self._settings.file_timeout:g} s (libvirt.file_timeout)"
            raise JobError("unresponsive", message, remedy="see whether their storage hangs") from None

    async def _say(self, rows: Sequence[AccessRow], reason: str) -> None:
        """If it is news."""
        if any(row.reason != reason for row in rows):
            await self._rows.explain_rows([row.id for row in rows], reason)
            log.warning("it stays open", extra={"fields": {"paths": [row.path for row in rows], "reason": reason}})

    def _job(self, operation: Operation, drive: Drive, chain: tuple[Layer, ...], strand: Strand) -> Job:
        now, size = self._clock.now(), chain[0].virtual_size
        return Job(
            id=str(uuid.uuid4()),
            spec=JobSpec(operation, target=str(drive)),
            state=State.COMPLETED,
            created=now,
            since=now,
            finished=now,
            before=Chain((*chain[: strand.above], *strand.layers, *chain[strand.above :])),
            after=Chain(chain),
            origin=EXTERNAL,
            cursor=Cursor(size, size),
            revocation=Revocation.PENDING,
            warnings=(FOUND,),
            drive=drive,
        )


def _disks(image: Holder, rows: Sequence[AccessRow]) -> list[Drive]:
    """The disks that have the image in their chain."""
    found = []
    for row in rows:
        if row.holder.kind == KIND and row.path == image.id:
            uuid_, _, target = row.holder.id.partition("/")
            found.append(Drive(uuid_, row.name.partition("/")[0] or uuid_, target))
    return found


def _read(image: Holder, rows: Sequence[AccessRow], limits: ChainLimits) -> _Found:
    """Blocking: it looks at the files."""
    holders = {row.holder for row in rows if row.holder.kind == KIND and row.path == image.id}
    disks = [row for row in rows if row.holder in holders]
    kept = [row for row in rows if row.holder == image and row.lost]
    format = next((row.format for row in disks if row.path == image.id and row.format), None)
    chain = chain_of(image.id, format, [layer_of(row) for row in (*kept, *disks)], limits)
    named, needed = {layer.file for layer in chain}, {row.file for row in disks}
    # Of an image that no disk has its header tells alone, as when its domain goes.
    moot = [row for row in kept if row.file in named and (row.file in needed or not disks)]
    lost = [row for row in kept if row.file not in named | needed]
    found = strands(chain, [layer_of(row) for row in lost]) if lost else ()
    return _Found(chain, tuple(_loss(chain, strand, kept, disks) for strand in found), tuple(moot))


def _loss(chain: Sequence[Layer], strand: Strand, kept: Sequence[AccessRow], disks: Sequence[AccessRow]) -> _Loss:
    """What has come below the image since, by hand, may have anything where the strand had it, and a raw file has
    something everywhere: that proves nothing. What the disk had when it lost the strand stood there with it; and with
    what was only written, as the target of a copy is, also a raw base."""
    rows = [row for row in kept if row.file in {layer.file for layer in strand.layers}]

    def was_there(layer: Layer) -> bool:
        had = [disk for disk in disks if disk.file == layer.file]
        return all(any(disk.name == row.name and disk.since < row.since for disk in had) for row in rows)

    there = [layer == chain[0] or was_there(layer) for layer in chain]
    written = all(row.mode == "rw" for row in rows)
    above = zip(chain[: strand.above], there, strict=False)
    tables = tuple(layer for layer, was in above if was and (written or layer.format != "raw"))
    compared = (*strand.layers, *chain[strand.on or len(chain) :])  # not what a guest writes
    return _Loss(strand, tables, all(there), tuple(_state(layer.path) for layer in compared))


def _files(found: Sequence[_Loss]) -> set[FileId]:
    return {layer.file for loss in found for layer in loss.strand.layers}


def _is_job(loss: _Loss, rows: Sequence[AccessRow]) -> bool:
    """Whether it is known what was done. A disk that has another top may have gone over, or been given that by hand, as
    one was that stands on what it never did."""
    return loss.whole and loss.strand.on != 0 and all(row.mode == "r" for row in rows)


def _state(path: str) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        found = os.stat(path)  # noqa: PTH116
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def _unsaid(image: Holder, error: JobError) -> str:
    told = f"whether {image.id} has what it held cannot be said: {error.message}"
    return f"{told}; when you know that it is needed no more, `hostagent grant revoke` it"


def _why(chain: Sequence[Layer], loss: _Loss, lacks: int, *, runs: bool) -> str:
    strand = loss.strand
    text = f"{chain[0].path} stands on it no more, and {lacks} bytes of what it held are not written there"
    if strand.on:
        text = f"{text}, nor was it seen to have gone down into {chain[strand.on].path}"
    if runs:
        return f"{text}: {WAITS}"
    return f"{text}: QEMU was killed just as a pull ended, or somebody took it out by hand; {_mend(loss)}"


def _mend(loss: _Loss) -> str:
    """It is what was just above the strand that names another base now."""
    top, base = loss.tables[-1], loss.strand.layers[0]
    command = ["qemu-img", "rebase", "-u", "-f", top.format, "-F", base.format, "-b", base.path, top.path]
    return f"stand {top.path} on that again before it is used ({shlex.join(command)}), or `hostagent grant revoke` it"
