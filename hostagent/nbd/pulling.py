"""Pull: what lies below the overlay is copied into it, by one block-stream or slice by slice.

A cursor is returned only after its flush. The last step of an incremental pull is a block-stream that has nothing left
to copy, and rewrites the header.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hostagent.drivers.qsd import COPY_ON_READ
from hostagent.drivers.qsd_process import MOMENT
from hostagent.errors import AgentError
from hostagent.images.chain import OpenChain
from hostagent.nbd.headers import Headers
from hostagent.nbd.operations import at_most, backing_name, job_name, node_of, preflight, room
from hostagent.nbd.prepared import CONTROL, READER, PreparedChain
from hostagent.nbdclient import conversations
from jobs import pull
from jobs.errors import JobError
from jobs.model import Chain, FileId, Job, JobSpec, Need, Plan


@dataclass(frozen=True, slots=True)
class SliceLimits:
    """Bytes and seconds; see the `jobs` and `exports` sections of the configuration."""

    slice: int
    requests_in_flight: int
    request_size: int
    nbd_timeout: float


class Pull:
    def __init__(self, limits: SliceLimits, headers: Headers) -> None:
        self._limits = limits
        self._headers = headers

    async def plan(self, spec: JobSpec, opened: OpenChain, *, preview: bool) -> Plan:
        chain = opened.chain
        after = pull.after(chain, pull.resolve_base(chain, spec.base))
        need, free = _need(chain, after), await room(opened.fds[0], self._limits.nbd_timeout)
        warnings = preflight(spec, need, free, "the overlay")
        return Plan(chain, after, chain.top.virtual_size, warnings, {"space": {"need": need, "free": free}})

    def needs(self, job: Job) -> list[Need]:
        top, *below = job.before.layers
        reads = [Need(layer, "r", f"job {job.id} reads it") for layer in below]
        return [Need(top, "rw", f"job {job.id} writes it"), *reads]

    def writes(self, job: Job) -> Collection[FileId]:
        return (job.before.top.file,)

    def alone(self, spec: JobSpec, chain: Chain) -> Collection[FileId]:
        return (chain.top.file,)

    async def make_ready(self, job: Job, chain: PreparedChain) -> Mapping[str, Any]:
        return {}

    async def start(self, job: Job, chain: PreparedChain) -> None:
        daemon = await chain.serve()
        await self.clear(job, chain)
        base = job.after.layers[1] if len(job.after.layers) > 1 else None
        backing = None if base is None else backing_name(job.before.top.path, base, job.before)
        await chain.ask(
            daemon.stream(
                job_name(job),
                chain.nodes[0],
                node_of(chain, base),
                backing=backing,
                speed=0 if job.incremental else job.bandwidth,
            )
        )

    async def flush(self, job: Job, chain: PreparedChain) -> None:
        await chain.flush(job.before.top.file)

    async def proven(self, job: Job, chain: PreparedChain | None) -> bool:
        name, resolved = await self._headers.backing(job.before.top, chain)
        return pull.proven(job, name, resolved)

    async def audit(self, job: Job, chain: PreparedChain) -> tuple[str, ...]:
        return ()

    async def seal(self, job: Job, chain: PreparedChain) -> None:
        """The header is the proof; it is durable when it is read."""

    async def discard(self, job: Job, chain: PreparedChain | None) -> None:
        """What was copied stays."""

    # Increments

    async def advance(self, job: Job, chain: PreparedChain, stop: asyncio.Event) -> int:
        """One slice of an increment; the top is open for writing."""
        daemon = await chain.serve()
        await self.clear(job, chain)
        alone = chain.users == {job.holder} and not chain.published
        depth = len(job.before.layers) - len(job.after.layers) + 1
        reader = READER if len(job.after.layers) > 1 else None
        try:
            await chain.ask(daemon.add_export(CONTROL, chain.nodes[0].format_node, writable=alone))
            if reader:
                await chain.ask(daemon.add_copy_on_read(chain.nodes[0], chain.nodes[depth - 1]))
                await chain.ask(daemon.add_export(READER, COPY_ON_READ))
            assert job.upto is not None and job.spec.increment is not None
            work = conversations.Slice(
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
                await self.clear(job, chain)

    async def clear(self, job: Job, chain: PreparedChain) -> None:
        """Remove what a slice used, also one that a killed agent left."""
        if job.incremental:
            await chain.remove_internal(reader=len(job.after.layers) > 1)


def _need(chain: Chain, after: Chain) -> int:
    """Bytes that the pull may write: all that is allocated in the layers it takes in. Of an overlay on a device nobody
    knows how full it is: its whole."""
    if chain.top.device:
        return at_most(chain.top.virtual_size)
    stays = {layer.file for layer in after.layers}
    need = sum(layer.allocated for layer in chain.layers[1:] if layer.file not in stays)
    return min(need, chain.top.virtual_size)


async def _copy_up(work: conversations.Slice, stop: asyncio.Event) -> int:
    """The slice in a thread. It is never left behind: a cancelled caller stops it and waits for its flush."""
    halt = threading.Event()
    running = asyncio.ensure_future(asyncio.to_thread(conversations.copy_up, work, halt))
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
