"""Copy: the image, or its top layer alone, into another file; with a pivot, everybody goes over to that file.

A target that we make lies under a name of its own (`.hostagent-JOB`) in its folder until the copy is complete and
durable; then it is given its name, in one step that replaces nothing. So a name that is there is a copy that is whole,
and that is also the proof that survives a crash of everything. A target that exists already has no such proof: the
hypervisor's word is the only one, and where it is lost the job failed and its target is unusable.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from hostagent.images.chain import OpenChain
from hostagent.nbd import base_bitmaps, copy_files
from hostagent.nbd import device_targets as devices
from hostagent.nbd.chains import Chains
from hostagent.nbd.network import closed_server
from hostagent.nbd.operations import Search, at_most, backing_name, job_name, preflight, refuse_dependents, room
from hostagent.nbd.prepared import PreparedChain
from hostagent.nbd.space import Space, enough, judge
from hostagent.nbd.uri import file_of, is_uri, normal
from jobs import copy
from jobs.errors import JobError
from jobs.model import Chain, Completion, FileId, Job, JobSpec, Layer, Need, Plan, Target, TargetState

log = logging.getLogger(__name__)
T = TypeVar("T")


class Copy:
    def __init__(self, chains: Chains, search: Search, space: Space, file_timeout: float) -> None:
        self._chains = chains
        self._search = search
        self._space = space
        self._timeout = file_timeout

    async def plan(self, spec: JobSpec, opened: OpenChain, *, preview: bool) -> Plan:
        assert spec.dest is not None
        source = opened.chain
        device = not is_uri(spec.dest) and await self._aside(devices.is_one, spec.dest)
        if spec.shallow and len(source.layers) == 1:
            remedy = "copy it without --shallow"
            raise JobError("invalid", f"{source.top.path!r} has no backing file", field="shallow", remedy=remedy)
        format_ = spec.format or ("raw" if device and not spec.shallow else source.top.format)
        if spec.shallow and format_ == "raw":
            remedy = "copy into qcow2, or without --shallow"
            raise JobError("invalid", "a raw image cannot have a backing file", field="format", remedy=remedy)
        if is_uri(spec.dest):
            target = remote_target(spec)
            self._chains.uris.refuse(remote_layer(target.path, source.top.virtual_size), exclusive=True)
            return Plan(source, source, 0, (), {"space": {}}, target)
        layers = source.layers[: 1 if spec.shallow else None]
        if device:
            target, free = await self.device(spec, source, format_)
            need = min(sum(one.allocated for one in layers), source.top.virtual_size)
            need = source.top.virtual_size if format_ == "raw" else at_most(need)
            space = {"need": need, "free": free}
            warnings = preflight(spec, need, free, "the target")
            return Plan(source, copy.after(source, spec, target), 0, warnings, {"space": space}, target)
        existing = None
        if spec.reuse_external:
            target, existing = await self.existing(spec, source, format_)
        else:
            pools = None if spec.anywhere else self._chains.settings.limits.pools
            target = await self._aside(copy_files.new, spec.dest, format_, pools)
        left = await room(Path(spec.dest).parent, self._timeout)
        ample = None if preview else enough(source.top, left)
        growth = ample or await self._space.of_copy(opened, len(layers), format_, existing)
        warnings = judge(spec, growth, left, f"the target {target.path!r}", field="dest")
        if spec.completion is not Completion.FINISH:
            warnings += await base_bitmaps.stay_behind(layers, opened.fds, self._timeout)
        found = {"space": {"need": growth.need, "free": left}}
        return Plan(source, copy.after(source, spec, target), 0, warnings, found, target)

    async def device(self, spec: JobSpec, source: Chain, format_: str) -> tuple[Target, int]:
        """The block device as a target, and its size. It is written over, so it must be empty, or --reuse-external says
        that what it holds may go: a raw one goes whole, a qcow2 image must be there and fit, as in a file."""
        assert spec.dest is not None
        with await self._chains.open(spec.dest, format="raw", anywhere=spec.anywhere) as opened:
            device, fd = opened.chain.top, opened.fds[0]
            if device.file in {layer.file for layer in source.layers}:
                raise _own_member(spec.dest, source)
            self._chains.refuse_used(device)
            await self._aside(devices.refuse_claimed, device.path, fd)
            if format_ != "raw" and spec.reuse_external:
                target, _ = await self.existing(spec, source, format_)
                return replace(target, device=True), device.virtual_size
            devices.refuse_small(device, source.top.virtual_size, format_)
            if not spec.reuse_external:
                await self._aside(devices.refuse_content, device.path, fd)
            await self._refuse_dependents(device)
            target = Target(device.path, format_, made=False, file=device.file, device=True)
            return replace(target, state=TargetState.UNTOUCHED, fresh=not spec.reuse_external), device.virtual_size

    async def existing(self, spec: JobSpec, source: Chain, format_: str) -> tuple[Target, Layer]:
        """The target that is there, fit to be written over: of the right size, and on the right backing file."""
        assert spec.dest is not None
        with await self._chains.open(spec.dest, format=format_, anywhere=spec.anywhere) as opened:
            top, below = opened.chain.top, opened.chain.layers[1:2]
            if top.file in {layer.file for layer in source.layers}:
                raise _own_member(spec.dest, source)
            self._chains.refuse_used(top)
            if top.virtual_size != source.top.virtual_size:
                sizes = f"has {top.virtual_size} bytes, and the image {source.top.virtual_size}"
                raise copy_files.unfit(spec.dest, sizes, "make it as large as the image")
            wanted = source.layers[1:2] if spec.shallow else ()
            if [layer.file for layer in below] != [layer.file for layer in wanted]:
                needs = f"the backing file {wanted[0].path!r}" if wanted else "no backing file"
                raise copy_files.unfit(spec.dest, "stands on another image", f"make it anew, with {needs}")
            if spec.shallow:
                await self._aside(copy_files.refuse_own_data, top.path, opened.fds[0])
            await self._refuse_dependents(top)
            return Target(top.path, top.format, made=False, state=TargetState.UNTOUCHED, file=top.file), top

    async def _refuse_dependents(self, target: Layer) -> None:
        """Invariant: who writes a file does so alone."""
        folders = [Path(target.path).parent]
        await refuse_dependents(self._search, [target], folders=folders, skip=[target.file], field="dest")

    def needs(self, job: Job) -> list[Need]:
        reads = [Need(layer, "r", f"job {job.id} reads it") for layer in job.before.layers]
        layer = _layer(job)
        return [*reads, Need(layer, "rw", f"job {job.id} writes it")] if layer else reads

    def writes(self, job: Job) -> Collection[FileId]:
        return ()

    def alone(self, spec: JobSpec, chain: Chain) -> Collection[FileId]:
        return ()

    async def make_ready(self, job: Job, chain: PreparedChain) -> Mapping[str, Any]:
        assert job.target is not None
        target = job.target
        if target.made and job.started is None and target.file is None:
            source = chain.descriptor(chain.file)
            assert source is not None
            target = replace(target, part=copy_files.part_of(target, job.id))
            target = await self._on(source, functools.partial(_made, target, _size(job)))
        await self._hold(replace(job, target=target), chain)
        if not target.made and target.file is not None and job.started is None:
            await self._refuse_dependents(_layer_of(target, _size(job)))  # again: now it is leased
            if target.file in chain.begun:
                pass  # the agent was killed while the job started: what the target holds is ours
            elif target.fresh and (fd := chain.descriptor(target.file)) is not None:
                await self._on(fd, functools.partial(devices.refuse_content, target.path))
            elif job.spec.shallow and (fd := chain.descriptor(target.file)) is not None:
                await self._on(fd, functools.partial(copy_files.refuse_own_data, target.path))
        if target == job.target:
            return {}
        after = job.after if job.after == job.before else copy.after(job.before, job.spec, target)
        return {"target": target, "after": after}

    async def _hold(self, job: Job, chain: PreparedChain) -> None:
        """Lease the target, again after a restart: what we have of it is what gets its name."""
        assert job.target is not None
        if is_uri(job.target.path):
            await chain.take_server(remote_layer(job.target.path, _size(job)))
        chain.keeps_target |= job.sealed is not None
        if job.target.file is not None and chain.descriptor(job.target.file) is None:
            self._chains.kept.release(job.target.file)
            fd = await self._aside(copy_files.reopen, job.target)
            await chain.take_target(_layer_of(job.target, _size(job)), fd)

    async def start(self, job: Job, chain: PreparedChain) -> None:
        assert job.target is not None
        daemon = await chain.serve()
        below = chain.nodes[1] if job.spec.shallow else None
        backing = None
        if below is not None:
            backing = (backing_name(job.target.path, below.layer, job.before), below.layer.format)
        path, new = job.target.part or job.target.path, job.target.made or job.target.fresh
        try:
            if job.target.file is None:
                node = await chain.open_remote(remote_layer(path, _size(job)), self._timeout)
            else:
                node = await chain.open_target(path, below=below, new=new, backing=backing)
        except JobError as error:
            if "permission denied" not in error.message.lower():
                raise
            if job.target.file is None:
                raise closed_server(job.target.path, self._chains.settings.qsd.user.name, field="dest") from error
            folder = str(Path(path).parent)
            message = f"the hypervisor user cannot pass through {folder!r} to the target"
            remedy = f"let it: chmod o+x {shlex.quote(folder)} (and the folders above)"
            raise JobError("access_refused", message, field="dest", value=job.target.path, remedy=remedy) from error
        await chain.ask(
            daemon.mirror(job_name(job), chain.nodes[0], node, shallow=job.spec.shallow, speed=job.bandwidth)
        )

    async def flush(self, job: Job, chain: PreparedChain) -> None:
        """No header is rewritten; the target is flushed when it is sealed."""

    async def proven(self, job: Job, chain: PreparedChain | None) -> bool:
        target = job.target
        if target is None or job.completion is None:
            return False
        if job.group is not None:  # its end was decided when all of the group had their names
            if target.made:
                try:
                    await self._aside(copy_files.let_its_name_be_all, target)
                except JobError as error:  # it completes all the same, when its storage answers
                    raise TimeoutError(error.message) from error
            return True
        return target.made and await self._aside(copy_files.is_settled, target)

    async def audit(self, job: Job, chain: PreparedChain) -> tuple[str, ...]:
        """The target lies where it should, and its name is still free: after a pivot it would be too late to say no."""
        target = job.target
        if target is not None and target.file is not None:
            try:
                await self._hold(job, chain)
                fd = chain.descriptor(target.file)
                assert fd is not None
                await self._on(fd, functools.partial(copy_files.refuse_strange, target))
            except JobError as error:
                if error.code != "timeout":
                    raise
                raise JobError("unresponsive", error.message, remedy=error.remedy) from error  # and asked again
        return ()

    async def seal(self, job: Job, chain: PreparedChain) -> None:
        assert job.target is not None
        if job.group is None:
            await self._settle(job, chain, named=True)
        if job.completion is not Completion.FINISH or job.target.file is None:
            return
        # Who sees the job completed can open the copy. The block job is dismissed only where its end is proven
        # without it: an agent that is killed now asks it again.
        if job.target.made:
            await chain.ask((await chain.serve()).dismiss(job_name(job)))
        await chain.close_beside()
        chain.give_up_target()

    async def harden(self, job: Job, chain: PreparedChain) -> None:
        """On stable storage while the mirror is ready: nobody writes the image, so the target stays what it is."""
        await self._settle(job, chain, named=False)
        chain.keeps_target = True

    async def keep(self, job: Job) -> None:
        """Lease the whole target again after a restart that its storage daemon did not outlive."""
        if job.sealed is not None and job.target is not None and job.target.file is not None:
            fd = await self._aside(copy_files.reopen, job.target)
            await self._aside(self._chains.kept.take, job.target.file, fd)

    def release(self, job: Job) -> None:
        """The job has ended. Idempotent."""
        if job.target is not None and job.target.file is not None:
            self._chains.kept.release(job.target.file)

    async def name(self, job: Job) -> None:
        """A further name for the target, which needs no storage daemon any more: it is whole."""
        if job.target is not None and job.target.made:
            await self._aside(copy_files.give_name, job.target)

    async def _settle(self, job: Job, chain: PreparedChain, *, named: bool) -> None:
        assert job.target is not None
        await self._hold(job, chain)
        await chain.flush_target(chain.nodes[1] if job.spec.shallow else None)
        if job.target.file is None:
            return
        fd = chain.descriptor(job.target.file)
        if fd is None:
            raise JobError("storage_daemon_died", f"the storage daemon of {job.before.top.path!r} ended")
        await self._on(fd, functools.partial(_settled, job.target, named))

    async def discard(self, job: Job, chain: PreparedChain | None) -> None:
        place = None
        if chain is not None:
            fd = chain.descriptor(job.target.file) if job.target and job.target.file else None
            place = await self._on(fd, copy_files.place) if fd is not None else None
            await chain.close_beside()
            chain.give_up_target()
        if job.target is not None and job.target.made and not job.decided:
            await self._aside(copy_files.delete, job.target, job.id, place)
        self.release(job)

    async def _on(self, fd: int, work: Callable[[int], T]) -> T:
        """Blocking work on a descriptor of the chain's, by one of its own: the chain's are closed when the storage
        daemon dies, and their numbers are other files' then. The lease lasts as long as that."""
        own = [os.dup(fd)]

        def run() -> T:
            mine = own.pop()
            try:
                return work(mine)
            finally:
                os.close(mine)

        try:
            return await self._aside(run)
        finally:
            with contextlib.suppress(IndexError):  # it was never begun
                os.close(own.pop())

    async def _aside(self, work: Callable[..., T], *args: Any) -> T:
        """Blocking work on files, bounded by exports.nbd_timeout."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(work, *args), self._timeout)
        except TimeoutError:
            raise JobError("timeout", "the target's storage does not answer", remedy="see whether it hangs") from None


def _made(target: Target, size: int, source: int) -> Target:
    return copy_files.make(target, source, size)


def _settled(target: Target, named: bool, fd: int) -> None:
    copy_files.settle(target, fd, named)


def remote_target(spec: JobSpec) -> Target:
    """An export of another host or program. Nothing can go over to it, and nobody but the hypervisor proves it."""
    assert spec.dest is not None
    if spec.completion is Completion.PIVOT or spec.shallow or spec.format not in (None, "raw"):
        remedy = "copy with --finish, whole, and as raw"
        raise JobError("invalid", "an NBD export can only be filled", field="dest", value=spec.dest, remedy=remedy)
    if not spec.anywhere:
        message = "copies to NBD are for root, the agent's own user and the scope admin"
        raise JobError("denied", message, field="dest", value=spec.dest, remedy="name a file")
    return Target(normal(spec.dest), "raw", made=False, state=TargetState.UNTOUCHED)


def remote_layer(uri: str, size: int) -> Layer:
    """What stands for the export in leases."""
    return Layer(normal(uri), "raw", file_of(uri), size, 0)


def _own_member(dest: str, source: Chain) -> JobError:
    return copy_files.unfit(dest, f"is a member of the chain of {source.top.path!r}", "copy somewhere else")


def _size(job: Job) -> int:
    return job.before.top.virtual_size


def _layer_of(target: Target, size: int) -> Layer:
    assert target.file is not None
    return Layer(target.part or target.path, target.format, target.file, size, 0, device=target.device)


def _layer(job: Job) -> Layer | None:
    return _layer_of(job.target, _size(job)) if job.target and job.target.file else None
