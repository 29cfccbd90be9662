"""A host in memory: images, storage daemons and block jobs that outlive the engine, with faults to order.

`FakeDriver` keeps what the real one keeps of a chain, a daemon and a header, and moves a block job on by `pace` bytes each
time somebody looks. `MemoryStore` and `FakeAccess` write down what they were asked, so that a test can judge it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from events.model import Event, JobEvent
from jobs import pull
from jobs.errors import JobError
from jobs.model import (
    Chain,
    Cursor,
    FileId,
    Holder,
    Job,
    JobSpec,
    Layer,
    Operation,
    Plan,
    Revocation,
)
from jobs.ports import AccessChange, AccessResult, AccessVerdict, Contact, Observation, Phase

MIB = 1 << 20
_inodes = itertools.count(1000)


@dataclass(slots=True)
class BlockJob:
    """What a storage daemon knows of its job."""

    end: int
    cur: int = 0
    phase: Phase = Phase.RUNNING
    error: str | None = None
    speed: int = 0


@dataclass(slots=True)
class Daemon:
    """A storage daemon; it goes on when the engine stops."""

    blocks: dict[str, BlockJob] = field(default_factory=dict)


@dataclass(slots=True)
class Image:
    """The overlay on disk, and the prepared chain that stands on it."""

    chain: Chain
    backing: str | None
    users: set[Holder] = field(default_factory=set)
    prepared: bool = False
    daemon: Daemon | None = None
    answers: bool = True

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain as the header has it now."""
        if self.backing is None:
            return self.chain.layers[:1]
        index = next(n for n, layer in enumerate(self.chain.layers) if layer.path == self.backing)
        return (self.chain.top, *self.chain.layers[index:])


class FakeDriver:
    """jobs.ports.BlockDriver in memory. `fault(call, job)` is called at the beginning of each call, and with
    `call + " done"` when its work is done but not answered; it may raise, or do harm with `die` and `silence`."""

    def __init__(self, *, size: int = 64 * MIB, pace: int = 16 * MIB, slice: int = 8 * MIB) -> None:
        self.size, self.pace, self.slice = size, pace, slice
        self.images: dict[str, Image] = {}
        self.calls: list[tuple[str, str]] = []
        self.warnings: tuple[str, ...] = ()
        self.check_waits: asyncio.Event | None = None
        self.fault: Callable[[str, Job], None] = lambda call, job: None
        self.hint: Callable[[str], None] = lambda job_id: None

    # What a test does to the host

    def image(self, path: str, *, depth: int = 2) -> Chain:
        """An overlay over `depth - 1` layers."""
        names = [path, *(f"{path}.{n}" for n in range(1, depth))]
        layers = [
            Layer(name, "qcow2", FileId(1, next(_inodes)), self.size, self.size, below)
            for name, below in itertools.zip_longest(names, names[1:])
        ]
        self.images[path] = Image(Chain(tuple(layers)), names[1] if depth > 1 else None)
        return self.images[path].chain

    def die(self, path: str) -> None:
        """The storage daemon is killed: the chain is gone with it, the header stays."""
        image = self.images[path]
        names = list(image.daemon.blocks) if image.daemon else []
        if image.daemon is not None:
            image.daemon, image.prepared, image.answers = None, False, True
            image.users.clear()
        for name in names:
            self.hint(name)

    def silence(self, path: str) -> None:
        self.images[path].answers = False

    def heal(self, path: str) -> None:
        self.images[path].answers = True

    def block(self, job: Job) -> BlockJob | None:
        daemon = self._image(job).daemon
        return daemon.blocks.get(job.id) if daemon else None

    def running(self) -> int:
        """Block jobs that move data now."""
        blocks = [block for image in self.images.values() if image.daemon for block in image.daemon.blocks.values()]
        return sum(1 for block in blocks if block.phase in (Phase.RUNNING, Phase.PAUSED, Phase.PENDING))

    def external_error(self, job: Job, text: str) -> None:
        block = self.block(job)
        assert block is not None
        block.phase, block.error = Phase.CONCLUDED, text
        self.hint(job.id)

    def adopt(self, claims: Sequence[Job]) -> None:
        """An agent starts: only daemons outlived the one before, and are kept where a job claims them."""
        for image in self.images.values():
            users = {job.holder for job in claims if job.before.top.file == image.chain.top.file}
            users |= {user for user in image.users if user.kind == "export"}
            if image.daemon is None or not users:
                image.daemon, image.prepared, users = None, False, set()
            image.users = users

    # Before the job

    async def plan(self, spec: JobSpec) -> Plan:
        await asyncio.sleep(0)
        image = self.images.get(spec.target)
        if image is None:
            raise JobError("not_found", f"no image {spec.target!r}", field="target", value=spec.target)
        chain = Chain(image.layers)
        return Plan(chain, pull.after(chain, pull.resolve_base(chain, spec.base)), chain.top.virtual_size)

    async def prepare(self, job: Job) -> dict[str, Any]:
        image = await self._called("prepare", job)
        others = [user for user in image.users if user.kind == "job" and user != job.holder]
        if others:
            raise JobError("busy", f"{others[0]} works on {job.before.top.path!r}")
        image.prepared = True
        image.users.add(job.holder)
        self.fault("prepare done", job)
        return {}

    async def check(self, job: Job) -> tuple[str, ...]:
        await self._called("check", job)
        if job.spec.check == "never":
            return ()
        if self.check_waits is not None:
            await self.check_waits.wait()
        return self.warnings

    # The job

    async def start(self, job: Job) -> None:
        image = await self._called("start", job)
        if not image.prepared:
            raise JobError("storage_daemon_died", f"the storage daemon of {job.before.top.path!r} ended")
        self._answering(image)
        image.daemon = image.daemon or Daemon()
        if job.id not in image.daemon.blocks:
            image.daemon.blocks[job.id] = BlockJob(self.size, speed=job.bandwidth)
            self.calls.append(("block job", job.id))
        self.fault("start done", job)

    async def advance(self, job: Job, stop: asyncio.Event) -> int:
        image = await self._called("advance", job)
        if not image.prepared:
            raise JobError("storage_daemon_died", f"the storage daemon of {job.before.top.path!r} ended")
        self._answering(image)
        image.daemon = image.daemon or Daemon()
        daemon = image.daemon
        assert job.upto is not None
        cur, goal = job.cursor.cur, min(job.upto, job.cursor.cur + self.slice)
        while cur < goal and not stop.is_set():
            await asyncio.sleep(0.0005)
            if image.daemon is not daemon:
                raise JobError("storage_daemon_died", "the storage daemon was killed")
            self._answering(image)
            cur = min(cur + MIB, goal)
        self.fault("advance done", job)
        return cur

    async def rest(self, job: Job) -> None:
        image = await self._called("rest", job)
        if image.prepared and job.holder in image.users:
            self._answering(image)
            self._release(image, job.holder)
        self.fault("rest done", job)

    async def observe(self, job: Job) -> Observation:
        self.calls.append(("observe", job.id))
        await asyncio.sleep(0)
        image = self._image(job)
        if not image.prepared:
            return Observation(Contact.DEAD, proven=self._proven(image, job))
        if image.daemon is None:
            return Observation(Contact.ALIVE, proven=self._proven(image, job))
        if not image.answers:
            return Observation(Contact.UNRESPONSIVE)
        block = image.daemon.blocks.get(job.id)
        if block is None:
            return Observation(Contact.ALIVE, proven=self._proven(image, job))
        self._tick(block, job)
        ended = block.phase is Phase.CONCLUDED
        cursor = None if job.incremental else Cursor(block.cur, block.end)
        return Observation(Contact.ALIVE, block.phase, cursor, block.error, ended and self._proven(image, job))

    def _tick(self, block: BlockJob, job: Job) -> None:
        if block.phase is Phase.RUNNING:
            block.cur = block.end if job.incremental else min(block.end, block.cur + self.pace)
            if block.cur == block.end:
                block.phase = Phase.PENDING
                self.hint(job.id)

    async def finalize(self, job: Job) -> None:
        image = await self._called("finalize", job)
        self._answering(image)
        block = self.block(job)
        if block is not None and block.phase is Phase.PENDING:
            block.phase = Phase.CONCLUDED
            image.backing = job.after.layers[1].path if len(job.after.layers) > 1 else None
        self.fault("finalize done", job)
        self.hint(job.id)

    async def cancel(self, job: Job, *, force: bool = False) -> None:
        image = await self._called("cancel", job)
        if image.daemon is None:
            return
        if force:
            self.die(job.before.top.path)
            return
        self._answering(image)
        block = self.block(job)
        if block is not None and block.phase is not Phase.CONCLUDED:
            block.phase = Phase.CONCLUDED
            self.hint(job.id)

    async def pause(self, job: Job) -> None:
        await self._set_phase("pause", job, Phase.RUNNING, Phase.PAUSED)

    async def resume(self, job: Job) -> None:
        await self._set_phase("resume", job, Phase.PAUSED, Phase.RUNNING)

    async def _set_phase(self, call: str, job: Job, old: Phase, new: Phase) -> None:
        block = self._running_block(await self._called(call, job), job)
        if block.phase is old:
            block.phase = new
        elif block.phase is not new:
            raise JobError("job_failed", f"a job that is {block.phase} cannot {call}")

    async def set_speed(self, job: Job, bandwidth: int) -> None:
        self._running_block(await self._called("set_speed", job), job).speed = bandwidth

    async def complete(self, job: Job) -> None:
        raise AssertionError("a pull completes by itself")

    async def seal(self, job: Job) -> None:
        raise AssertionError("the header of a pull is its proof")

    async def discard(self, job: Job) -> None:
        raise AssertionError("a pull has no target")

    async def delete_dropped(self, job: Job) -> None:
        raise AssertionError("a pull deletes nothing")

    # After the job

    async def conclude(self, job: Job, record: Callable[[tuple[Holder, ...]], Awaitable[Job]]) -> None:
        image = await self._called("conclude", job)
        ended = await record(tuple(user for user in image.users if user.kind == "export"))
        await self.drop(ended)

    async def drop(self, job: Job) -> None:
        image = await self._called("drop", job)
        if image.prepared and job.holder in image.users and image.daemon is not None:
            self._answering(image)
            image.daemon.blocks.pop(job.id, None)

    async def leave(self, job: Job) -> None:
        image = await self._called("leave", job)
        if image.prepared and job.holder in image.users:
            self._answering(image)
            self._release(image, job.holder)

    # Small things

    async def _called(self, call: str, job: Job) -> Image:
        self.calls.append((call, job.id))
        await asyncio.sleep(0)
        self.fault(call, job)
        return self._image(job)

    def _image(self, job: Job) -> Image:
        return self.images[job.before.top.path]

    def _running_block(self, image: Image, job: Job) -> BlockJob:
        if image.daemon is None:
            raise JobError("storage_daemon_died", "the storage daemon ended")
        self._answering(image)
        block = image.daemon.blocks.get(job.id)
        if block is None:
            raise JobError("job_failed", "no such block job")
        return block

    def _answering(self, image: Image) -> None:
        if not image.answers and image.daemon is not None:
            raise JobError("unresponsive", f"the storage daemon of {image.chain.top.path!r} does not answer")

    def _release(self, image: Image, holder: Holder) -> None:
        image.users.discard(holder)
        if not image.users:
            image.daemon, image.prepared = None, False

    def _proven(self, image: Image, job: Job) -> bool:
        return pull.proven(job, image.backing, image.backing)


class MemoryStore:
    """jobs.ports.JobStore. While `full`, nothing can be written."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.events: list[JobEvent] = []
        self.finishes: list[tuple[Job, AccessChange]] = []
        self.full = False

    def _write(self, job: Job, events: Sequence[Event]) -> None:
        if self.full:
            raise JobError("store_full", "no space left")
        self.jobs[job.id] = job
        self.events += [event for event in events if isinstance(event, JobEvent)]

    async def save(self, job: Job, events: Sequence[Event] = ()) -> None:
        await asyncio.sleep(0)
        self._write(job, events)
        await asyncio.sleep(0)

    async def finish(self, job: Job, events: Sequence[Event], change: AccessChange) -> None:
        await asyncio.sleep(0)
        self._write(job, events)
        self.finishes.append((job, change))
        await asyncio.sleep(0)

    async def get(self, job_id: str) -> Job | None:
        return self.jobs.get(job_id)

    async def delete(self, job_id: str) -> None:
        self.jobs.pop(job_id, None)

    async def unsettled(self) -> list[Job]:
        owed = [job for job in self.jobs.values() if job.finished is None or job.revocation is Revocation.PENDING]
        return sorted(owed, key=lambda job: (job.created, job.id))

    def kinds(self, job_id: str) -> list[str]:
        return [event.kind.value for event in self.events if event.job == job_id]


class FakeAccess:
    """jobs.ports.Access: every file is revoked, unless `verdicts` says otherwise."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[FileId, ...], str]] = []
        self.verdicts: dict[FileId, AccessVerdict] = {}

    async def converge(self, files: Sequence[FileId], *, trigger: str) -> dict[FileId, AccessResult]:
        self.asked.append((tuple(files), trigger))
        await asyncio.sleep(0)
        return {file: AccessResult(str(file), self.verdicts.get(file, AccessVerdict.REVOKED)) for file in files}


class Counts:
    """jobs.ports.Observer."""

    def __init__(self) -> None:
        self.finished: list[tuple[str, str]] = []
        self.reconciles: list[str] = []

    def job_finished(self, operation: str, outcome: str, seconds: float) -> None:
        assert seconds >= 0
        self.finished.append((operation, outcome))

    def event_lag(self, seconds: float) -> None:
        assert seconds >= 0

    def reconcile(self, result: str) -> None:
        self.reconciles.append(result)

    def revocation_lag(self, seconds: float) -> None:
        assert seconds >= 0


def spec(path: str, **values: object) -> JobSpec:
    return replace(JobSpec(Operation.PULL, path), **values)  # type: ignore[arg-type]
