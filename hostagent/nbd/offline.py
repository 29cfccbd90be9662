"""Jobs on offline images: the BlockDriver that runs them in the chain's storage daemon.

Order is everything here. Before QEMU may rewrite a header, all data that it will then rely on is flushed
(`finalize`): QEMU itself does not, and a daemon killed just after the header's change would leave an image that passes
`qemu-img check` and has lost its data. Before a header counts as proof, it is synced. What is special about an
operation is in pulling, copying and committing.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from hostagent.drivers.qsd import BlockJob
from hostagent.images.chain import verify
from hostagent.images.drift import Drift, find_drift, stamped
from hostagent.images.qemu_img import QemuImg
from hostagent.nbd.chains import Chains
from hostagent.nbd.committing import Commit
from hostagent.nbd.copying import Copy
from hostagent.nbd.operations import Operation, job_name
from hostagent.nbd.prepared import PreparedChain
from hostagent.nbd.pulling import Pull
from hostagent.nbd.write_out import WriteOut
from jobs import model
from jobs.errors import JobError
from jobs.model import Completion, FileId, Holder, Job, JobSpec, Need, Plan, State
from jobs.ports import Contact, Deletion, Observation, Phase

log = logging.getLogger(__name__)

T = TypeVar("T")


class Grants(Protocol):
    """The part of the access ledger that opening images needs."""

    async def acquire(self, holder: Holder, needs: Sequence[Need]) -> None:
        """Rows first, then files; JobError access_refused when a file cannot be given, and then nothing is."""


class OfflineDriver:
    def __init__(
        self,
        chains: Chains,
        grants: Grants,
        qemu_img: QemuImg,
        *,
        pull: Pull,
        copy: Copy,
        commit: Commit,
        check_auto: int,
    ) -> None:
        """`check_auto` (bytes): the largest image that `--check auto` looks at."""
        self._chains = chains
        self._grants = grants
        self._qemu_img = qemu_img
        self._pull = pull
        self._copy = copy
        self._commit = commit
        self._check_auto = check_auto
        self._write_out = WriteOut()
        self._operations: dict[model.Operation, Operation] = {
            model.Operation.PULL: pull,
            model.Operation.COPY: copy,
            model.Operation.COMMIT: commit,
        }

    # Before the job

    async def plan(self, spec: JobSpec, *, preview: bool = False) -> Plan:
        format_ = spec.source_format if spec.operation is model.Operation.COPY else "qcow2"
        with await self._chains.open(spec.target, format=format_, anywhere=spec.anywhere) as opened:
            self._chains.refuse_written(opened.chain)
            operation = self._operations[spec.operation]
            plan = await operation.plan(spec, opened, preview=preview)
            self._chains.refuse_apart(operation.alone(spec, plan.before), plan.before)
            return self._with_those_who_stay(spec, plan)

    def _with_those_who_stay(self, spec: JobSpec, plan: Plan) -> Plan:
        """Exports with a storage daemon of their own do not go over to what a pivot puts on top."""
        if plan.after == plan.before:
            return plan
        warnings = tuple(
            f"{user} has a storage daemon of its own, and stays on {plan.before.top.path} after a pivot"
            for user in self._chains.apart_on(plan.before.top.file)
        )
        return replace(plan, warnings=(*plan.warnings, *warnings))

    async def turn(self, job: Job) -> None:
        """At once: who has the image already is busy."""

    async def prepare(self, job: Job) -> Mapping[str, Any]:
        operation = self._operations[job.spec.operation]
        chain = self._find(job)
        if job.started is not None and chain is not None and chain.daemon is not None and job.holder in chain.users:
            return {}  # it was prepared before it started; its header may have changed since
        opened = await self._chains.open(job.before.top.path, format=job.before.top.format)
        try:
            verify(opened, job.before)
        except JobError:
            opened.close()
            raise
        async with self._chains.joined(opened) as chain:
            others = [user for user in chain.users if user.kind == "job" and user != job.holder]
            if others:
                raise JobError("busy", f"{others[0]} works on {chain.path!r}", remedy="wait for it to end")
            await chain.lease(exclusive=operation.alone(job.spec, job.before))
            try:
                # Stored before the grants: rows for a file that no job names would be nobody's to take back.
                if not (changes := await operation.make_ready(job, chain) or await self._remembered(job, chain)):
                    await self._grants.acquire(job.holder, operation.needs(job))
            except JobError:
                chain.give_up_target()
                await chain.close_for_writing()
                raise
            chain.users.add(job.holder)
            return changes

    async def check(self, job: Job) -> tuple[str, ...]:
        wanted = job.spec.check == "always" or (
            job.spec.check == "auto" and job.before.top.allocated <= self._check_auto
        )
        chain = self._find(job)
        if not wanted or chain is None or chain.writable:
            return ()
        with await self._chains.open(job.before.top.path, format=job.before.top.format) as opened:
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
        operation = self._operations[job.spec.operation]
        async with chain.lock:
            daemon = await chain.serve()
            found: BlockJob = await chain.ask(daemon.block_job(job_name(job)))
            if found.phase is not Phase.ABSENT:
                return
            await chain.lease(exclusive=operation.alone(job.spec, job.before))
            await chain.open_for_writing(operation.writes(job))
            await operation.start(job, chain)

    async def advance(self, job: Job, stop: asyncio.Event) -> int:
        chain = self._chain(job)
        async with chain.lock:
            await chain.lease(exclusive=self._pull.alone(job.spec, job.before))
            await chain.open_for_writing(self._pull.writes(job))
            return await self._pull.advance(job, chain, stop)

    async def rest(self, job: Job) -> None:
        chain = self._find(job)
        if chain is None or job.holder not in chain.users:
            return
        async with chain.lock:
            if chain.daemon is not None:
                await self._pull.clear(job, chain)
            await chain.close_for_writing()
            await chain.release(job.holder)

    async def observe(self, job: Job) -> Observation:
        chain = self._find(job)
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
        if chain is not None and cursor is not None and found.phase is Phase.RUNNING:
            self._write_out.begin(job.id, cursor, self._written(job, chain))
        if found.phase not in (Phase.ABSENT, Phase.CONCLUDED):
            return Observation(contact, found.phase, cursor, found.error)
        proven = await self._proven(job, chain)
        if proven is None:
            return Observation(Contact.UNRESPONSIVE)
        return Observation(contact, found.phase, cursor, found.error, proven)

    def _written(self, job: Job, chain: PreparedChain) -> list[int]:
        """The agent's own descriptors of what the job writes."""
        files = [*self._operations[job.spec.operation].writes(job)]
        if job.target is not None and job.target.file is not None:
            files.append(job.target.file)
        return [fd for fd in map(chain.descriptor, files) if fd is not None]

    async def _proven(self, job: Job, chain: PreparedChain | None) -> bool | None:
        """What stable storage says. A file that is gone, replaced or no image is an answer, too; None when it cannot be
        asked now, but for an abort, which does not wait for it."""
        try:
            return await self._operations[job.spec.operation].proven(job, chain)
        except (FileNotFoundError, NotADirectoryError, JobError) as error:
            log.warning("the image proves nothing", extra={"fields": {"job": job.id, "error": str(error)}})
            return False
        except (TimeoutError, OSError) as error:
            log.warning("the image cannot be read back", extra={"fields": {"job": job.id, "error": str(error)}})
            return False if job.intent == "abort" else None

    async def audit(self, job: Job) -> tuple[str, ...]:
        chain = self._chain(job)
        found = await self._unharmed(job, chain)
        results = self._results(job)
        if astray := [drift for drift in found if drift.astray and drift.path in results]:
            path = astray[0].path
            remedy = f"put the file back as {path}, and start the {job.spec.operation} again"
            raise JobError(
                "image_changed", f"{astray[0]}: the job's result would not be there", remedy=remedy, value=path
            )
        async with chain.lock:
            beside = await self._operations[job.spec.operation].audit(job, chain)
        return (*map(str, found), *beside)

    async def _unharmed(self, job: Job, chain: PreparedChain) -> list[Drift]:
        """What others did to the job's files and took no bytes; an image_changed for what did, or may have."""
        written = {*self._operations[job.spec.operation].writes(job), *chain.writable}
        look = functools.partial(find_drift, job.before.layers, chain.descriptor, written=written)
        found = await self._looked_at(job, chain, look)
        if lost := [drift for drift in found if drift.lost]:
            raise JobError("image_changed", str(lost[0]), remedy=lost[0].remedy, value=lost[0].path)
        return found

    async def _remembered(self, job: Job, chain: PreparedChain) -> Mapping[str, Any]:
        """The chain as the job is about to read it. Until its leases were taken others could write it by right."""
        if job.started is not None:
            await self._unharmed(job, chain)  # an increment after a rest, in which nobody had leases
            return {}
        if any(layer.mtime_ns for layer in job.before.layers):
            return {}
        look = functools.partial(stamped, job.before, chain.descriptor)
        before = await self._looked_at(job, chain, look)
        return {"before": before} if any(layer.mtime_ns for layer in before.layers) else {}

    async def _looked_at(self, job: Job, chain: PreparedChain, look: Callable[[], T]) -> T:
        """What a look at the files says, within images.inspect_timeout."""
        timeout = self._chains.settings.inspect_timeout
        try:
            return await asyncio.wait_for(asyncio.to_thread(look), timeout)
        except TimeoutError:
            what = f"the files of {chain.path!r} do not answer within {timeout:g} s (images.inspect_timeout)"
            raise JobError("unresponsive", what, remedy="see whether their storage hangs") from None
        except OSError as error:
            what = f"a file of {chain.path!r} cannot be looked at: {error.strerror}"
            remedy = f"look at its storage (dmesg), then start the {job.spec.operation} again"
            raise JobError("io_error", what, remedy=remedy) from error

    def _results(self, job: Job) -> set[str]:
        """The paths by which the image is found when the job is done: its result is only one where it has its name."""
        files = set(self._operations[job.spec.operation].writes(job))
        if job.after != job.before:
            files |= {layer.file for layer in job.after.layers}
        return {layer.path for layer in job.before.layers if layer.file in files}

    async def finalize(self, job: Job) -> None:
        chain = self._chain(job)
        async with chain.lock:
            await self._operations[job.spec.operation].flush(job, chain)
            assert chain.daemon is not None
            await chain.ask(chain.daemon.finalize(job_name(job)))

    async def complete(self, job: Job) -> None:
        chain = self._chain(job)
        async with chain.lock:  # nobody may come to stand on the chain in this moment
            daemon = await chain.serve()
            found: BlockJob = await chain.ask(daemon.block_job(job_name(job)))
            if found.phase is Phase.READY:  # of one that is not, a good end that keeps the disk would be a cancelling
                await chain.ask(daemon.complete(job_name(job), pivot=job.completion is Completion.PIVOT))

    async def seal(self, job: Job) -> None:
        chain = self._chain(job)
        async with chain.lock:
            await self._operations[job.spec.operation].seal(job, chain)

    async def harden(self, job: Job) -> None:
        chain = self._chain(job)
        async with chain.lock:
            await self._copy.harden(job, chain)

    async def name(self, job: Job) -> None:
        await self._copy.name(job)

    async def discard(self, job: Job) -> bool:
        chain = self._find(job)
        operation = self._operations[job.spec.operation]
        if chain is None or job.holder not in chain.users:
            await operation.discard(job, None)
            return _goes(job)
        async with chain.lock:
            if chain.daemon is not None and chain.daemon.alive:
                await chain.ask(chain.daemon.dismiss(job_name(job)))
            await operation.discard(job, chain)
        return _goes(job)

    async def delete_dropped(self, job: Job, needed: Collection[FileId]) -> Deletion:
        return await self._commit.delete_dropped(job, needed, self._chains.leasing)

    async def cancel(self, job: Job, *, force: bool = False) -> None:
        chain = self._find(job)
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
        chain = self._find(job)
        if chain is None:
            await record(())
            self._copy.release(job)
            return
        async with chain.lock:
            ended = await record(tuple(user for user in chain.users if user.kind == "export"))
            self._copy.release(job)
            await self._drop(ended, chain)

    async def drop(self, job: Job) -> None:
        chain = self._find(job)
        if chain is not None and job.holder in chain.users:
            async with chain.lock:
                await self._drop(job, chain)

    async def _drop(self, job: Job, chain: PreparedChain) -> None:
        if chain.daemon is not None and chain.daemon.alive:
            await self._pull.clear(job, chain)
            await chain.ask(chain.daemon.dismiss(job_name(job)))
            await chain.ask(chain.daemon.remove_stream_top())
        if job.state is State.COMPLETED:
            await chain.become(job.after)
        await chain.close_beside()
        chain.give_up_target()
        await chain.close_for_writing()

    async def leave(self, job: Job) -> None:
        self._write_out.forget(job.id)
        chain = self._find(job)
        if chain is None or job.holder not in chain.users:
            return
        async with chain.lock:
            await chain.release(job.holder)

    async def claim(self, job: Job) -> None:
        """After a restart: the job that is stored as running uses the chain whose daemon still runs. What else it had
        for itself is leased again, as the chain was; where that fails the job's end will say why."""
        chain = self._find(job)
        if chain is not None:
            chain.users.add(job.holder)
        if job.started is None or job.state.terminal:
            return
        try:
            if chain is None:
                await self._copy.keep(job)
                return
            async with chain.lock:
                await self._operations[job.spec.operation].make_ready(job, chain)
        except JobError as error:
            log.warning("a lease was lost", extra={"fields": {"job": job.id, "error": error.message}})

    def _find(self, job: Job) -> PreparedChain | None:
        """The job's chain: by its top, or by what a pivot put there. One that clients write is no job's: its daemon may
        hold what they wrote, and nothing here may touch it."""
        chain = self._chains.find(job.before.top.file) or self._chains.find(job.after.top.file)
        return None if chain is None or chain.writer is not None else chain

    def _chain(self, job: Job) -> PreparedChain:
        chain = self._find(job)
        if chain is None:
            raise JobError("storage_daemon_died", f"the storage daemon of {job.before.top.path!r} ended")
        return chain


def _goes(job: Job) -> bool:
    """Whether the target of a job that did not complete is deleted."""
    return job.target is not None and job.target.made and not job.decided
