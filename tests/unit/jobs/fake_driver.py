"""A host in memory: images, storage daemons and block jobs that outlive the engine, with faults to order.

`FakeDriver` keeps what the real one keeps of a chain, a daemon, a header and a folder, and moves a block job on by
`pace` bytes each time somebody looks.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from jobs import commit, copy, pull
from jobs.errors import JobError
from jobs.model import Chain, Cursor, FileId, Holder, Job, JobSpec, Layer, Operation, Plan, State, Target, TargetState
from jobs.ports import Contact, Deletion, Observation, Phase
from tests.unit.jobs.fake_images import BlockJob, Daemon, Image, becomes_ready, part_of, rewritten, written

MIB = 1 << 20
_inodes = itertools.count(1000)


class FakeDriver:
    """jobs.ports.BlockDriver in memory. `fault(call, job)` is called at the beginning of each call, and with
    `call + " done"` when its work is done but not answered; it may raise, or do harm with `die` and `silence`.

    `names` are the files in the folders, beside the images' layers; `synced` have the content that they should, and
    `sealed` have it on stable storage.
    """

    def __init__(self, *, size: int = 64 * MIB, pace: int = 16 * MIB, slice: int = 8 * MIB) -> None:
        self.size, self.pace, self.slice = size, pace, slice
        self.images: dict[str, Image] = {}
        self.names: dict[str, FileId] = {}
        self.synced: set[FileId] = set()
        self.sealed: set[FileId] = set()
        self.deleted: set[FileId] = set()
        self.calls: list[tuple[str, str]] = []
        self.warnings: tuple[str, ...] = ()
        self.check_waits: asyncio.Event | None = None
        self.fault: Callable[[str, Job], None] = lambda call, job: None
        self.gates: dict[str, asyncio.Event] = {}
        """A call that is named here waits for its event before it does anything."""
        self.drift: Callable[[Job], tuple[str, ...]] = lambda job: ()
        self.hint: Callable[[str], None] = lambda job_id: None

    # What a test does to the host

    def image(self, path: str, *, depth: int = 2) -> Chain:
        """An overlay over `depth - 1` layers."""
        names = [path, *(f"{path}.{n}" for n in range(1, depth))]
        layers = [
            Layer(name, "qcow2", self.file(name), self.size, self.size, below)
            for name, below in itertools.zip_longest(names, names[1:])
        ]
        self.images[path] = Image(Chain(tuple(layers)), names[1] if depth > 1 else None)
        return self.images[path].chain

    def file(self, path: str) -> FileId:
        """A new file under this name."""
        self.names[path] = FileId(1, next(_inodes))
        return self.names[path]

    def serving(self, path: str) -> Image:
        """The prepared chain of the image that was made under this name, wherever a pivot took it; else the image."""
        image = self.images[path]
        while not image.prepared and image.moved is not None:
            image = image.moved
        return image

    def die(self, path: str) -> None:
        """The storage daemon is killed: the chain is gone with it, the header stays."""
        image = self.serving(path)
        names = list(image.daemon.blocks) if image.daemon else []
        if image.daemon is not None:
            image.daemon, image.prepared, image.answers = None, False, True
            image.users.clear()
        for name in names:
            self.hint(name)

    def silence(self, path: str) -> None:
        self.serving(path).answers = False

    def heal(self, path: str) -> None:
        self.serving(path).answers = True

    def block(self, job: Job) -> BlockJob | None:
        daemon = self._image(job).daemon
        return daemon.blocks.get(job.id) if daemon else None

    def running(self) -> int:
        """Block jobs that move data now, or keep two images the same."""
        blocks = [block for image in self.images.values() if image.daemon for block in image.daemon.blocks.values()]
        return sum(1 for block in blocks if block.phase is not Phase.CONCLUDED)

    def external_error(self, job: Job, text: str) -> None:
        block = self.block(job)
        assert block is not None
        block.phase, block.error = Phase.CONCLUDED, text
        self.hint(job.id)

    def adopt(self, claims: Sequence[Job]) -> None:
        """An agent starts: only daemons outlived the one before, and are kept where a job or an export claims them."""
        for image in self.images.values():
            users = {user for user in image.users if user.kind == "export"}
            if image.daemon is not None and image.prepared:
                users |= {job.holder for job in claims if self._image(job) is image}
            if image.daemon is None or not users:
                image.daemon, image.prepared, users = None, False, set()
            elif not any(user.kind == "job" for user in users):
                image.daemon.blocks.clear()
                image.daemon.beside = None
            image.users = users

    # Before the job

    async def plan(self, spec: JobSpec, *, preview: bool = False) -> Plan:
        await asyncio.sleep(0)
        image = self.images.get(spec.target)
        if image is None:
            raise JobError("not_found", f"no image {spec.target!r}", field="target", value=spec.target)
        chain = Chain(image.layers)
        if spec.operation is Operation.PULL:
            return Plan(chain, pull.after(chain, pull.resolve_base(chain, spec.base)), chain.top.virtual_size)
        if spec.operation is Operation.COMMIT:
            return Plan(chain, commit.after(chain, spec), 0)
        assert spec.dest is not None
        if spec.dest not in self.names and spec.reuse_external:
            raise JobError("not_found", f"no file {spec.dest!r}", value=spec.dest, remedy="restore the file")
        if spec.dest in self.names and not spec.reuse_external:
            raise JobError("conflict", f"{spec.dest!r} exists", field="dest", value=spec.dest)
        target = Target(spec.dest, "qcow2", made=not spec.reuse_external, file=self.names.get(spec.dest))
        if not target.made:
            target = replace(target, state=TargetState.UNTOUCHED)
        return Plan(chain, copy.after(chain, spec, target), 0, target=target)

    async def turn(self, job: Job) -> None:
        """At once."""

    async def prepare(self, job: Job) -> dict[str, Any]:
        image = await self._called("prepare", job)
        others = [user for user in image.users if user.kind == "job" and user != job.holder]
        if others:
            raise JobError("busy", f"{others[0]} works on {job.before.top.path!r}")
        image.prepared = True
        image.users.add(job.holder)
        changes = self._make_target(job)
        self.fault("prepare done", job)
        return changes

    def _make_target(self, job: Job) -> dict[str, Any]:
        target = job.target
        if target is None or not target.made or target.file is not None or job.started is not None:
            return {}
        target = replace(target, part=part_of(job), file=self.file(part_of(job)))
        return {
            "target": target,
            "after": job.after if job.after == job.before else copy.after(job.before, job.spec, target),
        }

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
            if job.target is not None:
                image.daemon.beside = job.target.file
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
                block.phase = Phase.READY if becomes_ready(job) else Phase.PENDING
                self.hint(job.id)

    async def audit(self, job: Job) -> tuple[str, ...]:
        return self.drift(job)

    async def finalize(self, job: Job) -> None:
        image = await self._called("finalize", job)
        self._answering(image)
        block = self.block(job)
        if block is not None and block.phase is Phase.PENDING:
            block.phase = Phase.CONCLUDED
            path, below = rewritten(job)
            image.rewrite(path, below)
        self.fault("finalize done", job)
        self.hint(job.id)

    async def cancel(self, job: Job, *, force: bool = False) -> None:
        image = await self._called("cancel", job)
        if image.daemon is None:
            return
        if force:
            self.die(image.chain.top.path)
            return
        self._answering(image)
        block = self.block(job)
        if block is not None and block.phase is not Phase.CONCLUDED:
            block.phase, block.error = Phase.CONCLUDED, "Operation canceled"
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
        image = await self._called("complete", job)
        if not image.prepared:
            raise JobError("storage_daemon_died", "the storage daemon ended")
        self._answering(image)
        block = self.block(job)
        if block is not None and block.phase is Phase.READY:
            block.phase = Phase.CONCLUDED
            self.synced.add(written(job))
            self.hint(job.id)
        self.fault("complete done", job)

    async def seal(self, job: Job) -> None:
        image = await self._called("seal", job)
        if not image.prepared:
            raise JobError("storage_daemon_died", "the storage daemon ended")
        self._answering(image)
        file = written(job)
        assert file in self.synced, "sealed before its block job ended well"
        self.sealed.add(file)
        if job.target is not None and job.target.made and job.group is None:
            self._name(job)
            self.names.pop(part_of(job), None)
        self.fault("seal done", job)

    async def harden(self, job: Job) -> None:
        image = await self._called("harden", job)
        if not image.prepared:
            raise JobError("storage_daemon_died", "the storage daemon ended")
        self._answering(image)
        block = self.block(job)
        assert block is not None and block.phase is Phase.READY, "hardened before it was in sync"
        self.sealed.add(written(job))
        self.fault("harden done", job)

    async def name(self, job: Job) -> None:
        await self._called("name", job)
        assert written(job) in self.sealed, "named before it was durable"
        if job.target is not None and job.target.made:
            if job.target.file not in self.names.values():
                raise JobError("image_changed", "the target is gone")
            self._name(job)
        self.fault("name done", job)

    def _name(self, job: Job) -> None:
        assert job.target is not None and job.target.file is not None
        if self.names.get(job.target.path, job.target.file) != job.target.file:
            raise JobError("conflict", f"the target {job.target.path!r}: File exists")
        self.names[job.target.path] = job.target.file

    async def discard(self, job: Job) -> bool:
        image = await self._called("discard", job)
        if image.prepared and job.holder in image.users and image.daemon is not None:
            self._answering(image)
            image.daemon.blocks.pop(job.id, None)
            image.daemon.beside = None
        target = job.target
        if target is not None and target.made and not job.decided:
            if target.file is None or self.names.get(part_of(job)) == target.file:
                self.names.pop(part_of(job), None)
            if self.names.get(target.path) == target.file:
                self.names.pop(target.path, None)
        self.fault("discard done", job)
        return target is not None and target.made and not job.decided

    async def delete_dropped(self, job: Job, needed: Collection[FileId]) -> Deletion:
        await self._called("delete_dropped", job)
        deleted = set()
        for layer in job.dropped:
            if layer.file not in needed and self.names.get(layer.path) == layer.file:
                del self.names[layer.path]
                deleted.add(layer.file)
        self.deleted |= deleted
        return Deletion(frozenset(deleted))

    # After the job

    async def conclude(self, job: Job, record: Callable[[tuple[Holder, ...]], Awaitable[Job]]) -> None:
        image = await self._called("conclude", job)
        ended = await record(tuple(user for user in image.users if user.kind == "export"))
        await self.drop(ended)

    async def drop(self, job: Job) -> None:
        image = await self._called("drop", job)
        if not image.prepared or job.holder not in image.users:
            return
        if image.daemon is not None:
            self._answering(image)
            image.daemon.blocks.pop(job.id, None)
            image.daemon.beside = None
        if job.state is State.COMPLETED and job.after.top.file != image.chain.top.file:
            self._move(image, job.after)
        self.fault("drop done", job)

    def _move(self, image: Image, after: Chain) -> None:
        """The chain with all its users stands on another top now."""
        backing = after.layers[1].path if len(after.layers) > 1 else None
        image.moved = Image(after, backing, image.users, True, image.daemon, image.answers)
        self.images[after.top.path] = image.moved
        image.users, image.prepared, image.daemon, image.answers = set(), False, None, True

    async def leave(self, job: Job) -> None:
        image = await self._called("leave", job)
        if image.prepared and job.holder in image.users:
            self._answering(image)
            self._release(image, job.holder)

    # Small things

    async def _called(self, call: str, job: Job) -> Image:
        self.calls.append((call, job.id))
        await asyncio.sleep(0)
        if call in self.gates:
            await self.gates[call].wait()
        self.fault(call, job)
        return self._image(job)

    def _image(self, job: Job) -> Image:
        """The job's chain: by its top, or by what a pivot put there."""
        image = self.images[job.before.top.path]
        moved = self.images.get(job.after.top.path, image)
        return moved if moved.prepared and not image.prepared else image

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
        if job.decided:
            self.names.pop(part_of(job), None)
            return True
        if job.target is not None:
            target = job.target
            return target.made and job.completion is not None and self.names.get(target.path) == target.file
        if becomes_ready(job):
            return False
        path, below = rewritten(job)
        found = self.images[job.before.top.path].header(path)
        return pull.proven(job, found, found) if job.spec.operation is Operation.PULL else found == below


def spec(path: str, **values: object) -> JobSpec:
    return replace(JobSpec(Operation.PULL, path), **values)  # type: ignore[arg-type]
