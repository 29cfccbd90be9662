"""Jobs on offline images: the BlockDriver that runs them in the chain's storage daemon.

Order is everything here. Before QEMU may rewrite the overlay's header, all pulled data is flushed (`finalize`): QEMU
itself does not, and a daemon killed just after the header's change would leave an image that passes `qemu-img check`
and has lost its data. Before the header counts as proof, it is synced. A cursor is returned only after its flush.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hostagent import nbdclient
from hostagent.drivers.qsd import COPY_ON_READ, MOMENT, BlockJob
from hostagent.errors import AgentError
from hostagent.images.chain import OpenChain, verify
from hostagent.images.header import read_backing
from hostagent.images.qemu_img import QemuImg
from hostagent.nbd.chains import Chains
from hostagent.nbd.prepared import CONTROL, READER, PreparedChain
from jobs import pull
from jobs.errors import JobError
from jobs.model import Chain, FileId, Holder, Job, JobSpec, Layer, Need, Plan, State
from jobs.ports import Contact, Observation, Phase

log = logging.getLogger(__name__)


class Grants(Protocol):
    """The part of the access ledger that opening images needs."""

    async def acquire(self, holder: Holder, needs: Sequence[Need]) -> None:
        """Rows first, then files; JobError access_refused when a file cannot be given, and then nothing is."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and seconds; the `jobs` and `exports` sections of the configuration."""

    slice: int
    requests_in_flight: int
    request_size: int
    nbd_timeout: float
    check_auto_size: int


class _UnreadableError(Exception):
    """The image's header cannot be read now."""


class OfflineDriver:
    def __init__(self, chains: Chains, grants: Grants, qemu_img: QemuImg, limits: Limits) -> None:
        self._chains = chains
        self._grants = grants
        self._qemu_img = qemu_img
        self._limits = limits

    # Before the job

    async def plan(self, spec: JobSpec) -> Plan:
        with await self._chains.open(spec.target, format="qcow2", anywhere=spec.anywhere) as opened:
            chain = opened.chain
            base = pull.resolve_base(chain, spec.base)
            after = pull.after(chain, base)
            space = _space(opened, after)
        warnings = []
        if space["need"] > space["free"]:
            text = f"the pull may need {space['need']} bytes, and {space['free']} are free beside the overlay"
            if spec.check == "always":
                raise JobError(
                    "no_space",
                    text,
                    field="target",
                    value=spec.target,
                    remedy="make space, or pull without `--check always`",
                )
            warnings.append(text)
        return Plan(chain, after, chain.top.virtual_size, tuple(warnings), {"space": space})

    async def prepare(self, job: Job) -> None:
        chain = self._chains.find(job.before.top.file)
        if job.started is not None and chain is not None and chain.daemon is not None and job.holder in chain.users:
            return  # it was prepared before it started; its header may have changed since
        opened = await self._chains.open(job.before.top.path, format="qcow2")
        try:
            verify(opened, job.before)
        except JobError:
            opened.close()
            raise
        async with self._chains.joined(opened) as chain:
            others = [user for user in chain.users if user.kind == "job" and user != job.holder]
            if others:
                raise JobError("busy", f"{others[0]} works on {chain.path!r}", remedy="wait for it to end")
            await chain.lease(write=True)
            try:
                await self._grants.acquire(job.holder, _needs(job))
            except JobError:
                await chain.close_for_writing()
                raise
            chain.users.add(job.holder)

    async def check(self, job: Job) -> tuple[str, ...]:
        wanted = job.spec.check == "always" or (
            job.spec.check == "auto" and job.before.top.allocated <= self._limits.check_auto_size
        )
        chain = self._chains.find(job.before.top.file)
        if not wanted or chain is None or chain.writable:
            return ()
        with await self._chains.open(job.before.top.path, format="qcow2") as opened:
            verify(opened, job.before)
            serving = asyncio.ensure_future(self._serve(chain))  # each takes some 20 ms, and neither needs the other
            serving.add_done_callback(lambda task: task.cancelled() or task.exception())
            try:
                result = await self._qemu_img.check(opened)
            finally:
                await asyncio.wait({serving})  # never cancelled: a process in the making would be nobody's
            await serving
        return (result.warning,) if result.warning else ()

    async def _serve(self, chain: PreparedChain) -> None:
        async with chain.lock:
            await chain.serve()

    # The job

    async def start(self, job: Job) -> None:
        chain = self._chain(job)
        async with chain.lock:
            daemon = await chain.serve()
            found: BlockJob = await chain.ask(daemon.block_job(job_name(job)))
            if found.phase is not Phase.ABSENT:
                return
            await self._clear(job, chain)
            await chain.lease(write=True)
            await chain.open_for_writing()
            base = next((node for node in chain.nodes if node.layer.file == _base(job)), None)
            if base is None and _base(job) is not None:
                remedy = "start the pull again"
                raise JobError("image_changed", f"the base of {chain.path!r} is not open", remedy=remedy)
            await chain.ask(
                daemon.stream(
                    job_name(job),
                    chain.nodes[0],
                    base,
                    backing=_backing_name(job),
                    speed=0 if job.incremental else job.bandwidth,
                )
            )

    async def advance(self, job: Job, stop: asyncio.Event) -> int:
        chain = self._chain(job)
        async with chain.lock:
            daemon = await chain.serve()
            await self._clear(job, chain)
            await chain.lease(write=True)
            await chain.open_for_writing()
            alone = chain.users == {job.holder} and not chain.published
            depth = len(job.before.layers) - len(job.after.layers) + 1
            reader = READER if len(job.after.layers) > 1 else None
            try:
                await chain.ask(daemon.add_export(CONTROL, chain.nodes[0].format_node, writable=alone))
                if reader:
                    await chain.ask(daemon.add_copy_on_read(chain.nodes[0], chain.nodes[depth - 1]))
                    await chain.ask(daemon.add_export(READER, COPY_ON_READ))
                assert job.upto is not None and job.spec.increment is not None
                work = nbdclient.Slice(
                    socket=str(daemon.places.socket),
                    control=CONTROL,
                    reader=reader,
                    begin=job.cursor.cur,
                    goal=job.upto,
                    end=job.cursor.end,
                    increment=job.spec.increment,
                    depth=depth,
                    may_zero=alone,
                    bandwidth=job.bandwidth,
                    budget=self._limits.slice,
                    in_flight=self._limits.requests_in_flight,
                    request_size=self._limits.request_size,
                    timeout=self._limits.nbd_timeout,
                )
                return await _copy_up(work, stop)
            except JobError as error:
                if error.code == "io_error" and await daemon.ended(MOMENT):
                    raise daemon.death() from error
                raise
            finally:
                if daemon.alive:
                    await self._clear(job, chain)

    async def _clear(self, job: Job, chain: PreparedChain) -> None:
        if job.incremental:
            await chain.remove_internal(reader=len(job.after.layers) > 1)

    async def rest(self, job: Job) -> None:
        chain = self._chains.find(job.before.top.file)
        if chain is None or job.holder not in chain.users:
            return
        async with chain.lock:
            if chain.daemon is not None:
                await self._clear(job, chain)
            await chain.close_for_writing()
            await chain.release(job.holder)

    async def observe(self, job: Job) -> Observation:
        chain = self._chains.find(job.before.top.file)
        contact, found = Contact.DEAD, BlockJob(Phase.ABSENT)
        if chain is not None and not chain.died:
            contact = Contact.ALIVE
            try:
                if chain.daemon is not None:
                    found = await chain.ask(chain.daemon.block_job(job_name(job)))
            except JobError as error:
                if error.code != "storage_daemon_died" and chain.daemon is not None and chain.daemon.alive:
                    return Observation(Contact.UNRESPONSIVE)
                contact = Contact.DEAD
        cursor = None if job.incremental else found.cursor
        if found.phase not in (Phase.ABSENT, Phase.CONCLUDED):
            return Observation(contact, found.phase, cursor, found.error)
        try:
            proven = await self._proven(job, chain)
        except _UnreadableError as error:
            log.warning("the image cannot be read back", extra={"fields": {"job": job.id, "error": str(error)}})
            return Observation(Contact.UNRESPONSIVE)
        return Observation(contact, found.phase, cursor, found.error, proven)

    async def _proven(self, job: Job, chain: PreparedChain | None) -> bool:
        """What the header on stable storage says. A file that is gone, replaced or no image is an answer, too; one that
        cannot be read now is none, but for an abort, which does not wait for it."""
        top = job.before.top
        fd = chain.descriptor(top.file) if chain else None
        try:
            reading = asyncio.to_thread(_durable_backing, top, fd)
            name = await asyncio.wait_for(reading, self._limits.nbd_timeout)
        except (FileNotFoundError, NotADirectoryError, JobError) as error:
            log.warning("the image proves nothing", extra={"fields": {"job": job.id, "error": str(error)}})
            return False
        except (TimeoutError, OSError) as error:
            if job.intent == "abort":
                return False
            raise _UnreadableError(str(error) or "no answer in time") from error
        resolved = None if name is None else await asyncio.to_thread(os.path.realpath, Path(top.path).parent / name)
        return pull.proven(job, name, resolved)

    async def finalize(self, job: Job) -> None:
        chain = self._chain(job)
        async with chain.lock:
            await chain.flush()
            assert chain.daemon is not None
            await chain.ask(chain.daemon.finalize(job_name(job)))

    async def cancel(self, job: Job, *, force: bool = False) -> None:
        chain = self._chains.find(job.before.top.file)
        if chain is None or chain.daemon is None or not chain.daemon.alive:
            return
        if force:
            await chain.daemon.kill()
            return
        await chain.ask(chain.daemon.cancel(job_name(job)))

    async def pause(self, job: Job) -> None:
        chain = self._chain(job)
        await chain.ask((await chain.serve()).pause(job_name(job)))

    async def resume(self, job: Job) -> None:
        chain = self._chain(job)
        await chain.ask((await chain.serve()).resume(job_name(job)))

    async def set_speed(self, job: Job, bandwidth: int) -> None:
        chain = self._chain(job)
        await chain.ask((await chain.serve()).set_speed(job_name(job), bandwidth))

    # After the job

    async def conclude(self, job: Job, record: Callable[[tuple[Holder, ...]], Awaitable[Job]]) -> None:
        chain = self._chains.find(job.before.top.file)
        if chain is None:
            await record(())
            return
        async with chain.lock:
            ended = await record(tuple(user for user in chain.users if user.kind == "export"))
            await self._drop(ended, chain)

    async def drop(self, job: Job) -> None:
        chain = self._chains.find(job.before.top.file)
        if chain is not None and job.holder in chain.users:
            async with chain.lock:
                await self._drop(job, chain)

    async def _drop(self, job: Job, chain: PreparedChain) -> None:
        if chain.daemon is not None and chain.daemon.alive:
            await self._clear(job, chain)
            await chain.ask(chain.daemon.dismiss(job_name(job)))
            await chain.ask(chain.daemon.remove_stream_top())
        if job.state is State.COMPLETED:
            await chain.shed(job.after)
        await chain.close_for_writing()

    async def leave(self, job: Job) -> None:
        chain = self._chains.find(job.before.top.file)
        if chain is None or job.holder not in chain.users:
            return
        async with chain.lock:
            await chain.release(job.holder)

    def claim(self, job: Job) -> None:
        """After a restart: the job that is stored as running uses the chain whose daemon still runs."""
        if chain := self._chains.find(job.before.top.file):
            chain.users.add(job.holder)

    def _chain(self, job: Job) -> PreparedChain:
        chain = self._chains.find(job.before.top.file)
        if chain is None:
            raise JobError("storage_daemon_died", f"the storage daemon of {job.before.top.path!r} ended")
        return chain


def job_name(job: Job) -> str:
    """The block job's id inside the storage daemon."""
    return f"{job.spec.operation}-{job.id}"


def job_id(name: str) -> str:
    """The job that a block job's id belongs to."""
    return name.partition("-")[2]


def _needs(job: Job) -> list[Need]:
    top, *below = job.before.layers
    reads = [Need(layer, "r", f"job {job.id} reads it") for layer in below]
    return [Need(top, "rw", f"job {job.id} writes it"), *reads]


def _base(job: Job) -> FileId | None:
    return job.after.layers[1].file if len(job.after.layers) > 1 else None


def _backing_name(job: Job) -> str | None:
    """How the overlay will name its base: by name alone in the same folder, so that the folder can be moved."""
    if len(job.after.layers) == 1:
        return None
    base, top = Path(job.after.layers[1].path), Path(job.before.top.path)
    return base.name if base.parent == top.parent else str(base)


def _space(opened: OpenChain, after: Chain) -> dict[str, int]:
    """What the pull may write (all that is allocated in the layers it takes in) against what is free."""
    stays = {layer.file for layer in after.layers}
    need = sum(layer.allocated for layer in opened.chain.layers[1:] if layer.file not in stays)
    room = os.fstatvfs(opened.fds[0])
    return {"need": min(need, opened.chain.top.virtual_size), "free": room.f_bavail * room.f_frsize}


def _durable_backing(top: Layer, fd: int | None) -> str | None:
    """The backing file that the header on stable storage names. Raises when the file is not the job's image."""
    handle = os.open(top.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC) if fd is None else os.dup(fd)
    try:
        found = os.fstat(handle)
        if FileId(found.st_dev, found.st_ino) != top.file:
            raise JobError("image_changed", f"{top.path!r} is another file now", remedy="see who replaced it")
        own = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(handle)
    try:
        os.fdatasync(own)
        return read_backing(own)
    finally:
        os.close(own)


async def _copy_up(work: nbdclient.Slice, stop: asyncio.Event) -> int:
    """The slice in a thread. It is never left behind: a cancelled caller stops it and waits for its flush."""
    halt = threading.Event()
    running = asyncio.ensure_future(asyncio.to_thread(nbdclient.copy_up, work, halt))
    stopper = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({running, stopper}, return_when=asyncio.FIRST_COMPLETED)
        halt.set()
        return await asyncio.shield(running)
    except AgentError as error:
        code = "unresponsive" if error.code == "timeout" else error.code
        raise JobError(code, error.message, remedy=error.remedy) from error
    finally:
        stopper.cancel()
        halt.set()
        if not running.done():
            with contextlib.suppress(AgentError, asyncio.CancelledError):
                await running
