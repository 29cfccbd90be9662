"""Copy: the image, or its top layer alone, into another file; with a pivot, everybody goes over to that file.

A target that we make lies under a name of its own (`.hostagent-JOB`) in its folder until the copy is complete and
durable; then it is given its name, in one step that replaces nothing. So a name that is there is a copy that is whole,
and that is also the proof that survives a crash of everything. A target that exists already has no such proof: the
hypervisor's word is the only one, and where it is lost the job failed and its target is unusable.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shlex
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from hostagent.images.chain import OpenChain
from hostagent.images.header import is_empty
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

ACL_GROUP_OBJ = 0x04  # linux/posix_acl.h


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
            target = _remote(spec)
            self._chains.uris.refuse(_remote_layer(target.path, source.top.virtual_size), exclusive=True)
            return Plan(source, source, 0, (), {"space": {}}, target)
        layers = source.layers[: 1 if spec.shallow else None]
        if device:
            target, free = await self._device(spec, opened, format_)
            need = min(sum(one.allocated for one in layers), source.top.virtual_size)
            need = source.top.virtual_size if format_ == "raw" else at_most(need)
            space = {"need": need, "free": free}
            warnings = preflight(spec, need, free, "the target")
            return Plan(source, copy.after(source, spec, target), 0, warnings, {"space": space}, target)
        existing = None
        if spec.reuse_external:
            target, existing = await self._existing(spec, opened, format_)
        else:
            pools = None if spec.anywhere else self._chains.settings.limits.pools
            target = await self._aside(_new, spec.dest, format_, pools)
        left = await room(Path(spec.dest).parent, self._timeout)
        ample = None if preview else enough(source.top, left)
        growth = ample or await self._space.of_copy(opened, len(layers), format_, existing)
        warnings = judge(spec, growth, left, f"the target {target.path!r}", field="dest")
        found = {"space": {"need": growth.need, "free": left}}
        return Plan(source, copy.after(source, spec, target), 0, warnings, found, target)

    async def _device(self, spec: JobSpec, source: OpenChain, format_: str) -> tuple[Target, int]:
        """The block device as a target, and its size. It is written over, so it must be empty, or --reuse-external says
        that what it holds may go: a raw one goes whole, a qcow2 image must be there and fit, as in a file."""
        assert spec.dest is not None
        with await self._chains.open(spec.dest, format="raw", anywhere=spec.anywhere) as opened:
            device, fd = opened.chain.top, opened.fds[0]
            if device.file in {layer.file for layer in source.chain.layers}:
                raise _unfit(spec.dest, f"is a member of the chain of {source.chain.top.path!r}", "copy somewhere else")
            self._chains.refuse_used(device)
            await self._aside(devices.refuse_claimed, device.path, fd)
            if format_ != "raw" and spec.reuse_external:
                target, _ = await self._existing(spec, source, format_)
                return replace(target, device=True), device.virtual_size
            devices.refuse_small(device, source.chain.top.virtual_size, format_)
            if not spec.reuse_external:
                await self._aside(devices.refuse_content, device.path, fd)
            await self._refuse_dependents(device)
            target = Target(device.path, format_, made=False, file=device.file, device=True)
            return replace(target, state=TargetState.UNTOUCHED, fresh=not spec.reuse_external), device.virtual_size

    async def _existing(self, spec: JobSpec, source: OpenChain, format_: str) -> tuple[Target, Layer]:
        """The target that is there, fit to be written over: of the right size, and on the right backing file."""
        assert spec.dest is not None
        with await self._chains.open(spec.dest, format=format_, anywhere=spec.anywhere) as opened:
            top, below = opened.chain.top, opened.chain.layers[1:2]
            if top.file in {layer.file for layer in source.chain.layers}:
                raise _unfit(spec.dest, f"is a member of the chain of {source.chain.top.path!r}", "copy somewhere else")
            self._chains.refuse_used(top)
            if top.virtual_size != source.chain.top.virtual_size:
                sizes = f"has {top.virtual_size} bytes, and the image {source.chain.top.virtual_size}"
                raise _unfit(spec.dest, sizes, "make it as large as the image")
            wanted = source.chain.layers[1:2] if spec.shallow else ()
            if [layer.file for layer in below] != [layer.file for layer in wanted]:
                needs = f"the backing file {wanted[0].path!r}" if wanted else "no backing file"
                raise _unfit(spec.dest, "stands on another image", f"make it anew, with {needs}")
            if spec.shallow:
                await self._aside(_refuse_own_data, top.path, opened.fds[0])
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
            target = await self._aside(_make, replace(target, part=_part(target, job.id)), source, _size(job))
        await self._hold(replace(job, target=target), chain)
        if not target.made and target.file is not None and job.started is None:
            await self._refuse_dependents(_layer_of(target, _size(job)))  # again: now it is leased
            if target.file in chain.begun:
                pass  # the agent was killed while the job started: what the target holds is ours
            elif target.fresh and (fd := chain.descriptor(target.file)) is not None:
                await self._aside(devices.refuse_content, target.path, fd)
            elif job.spec.shallow and (fd := chain.descriptor(target.file)) is not None:
                await self._aside(_refuse_own_data, target.path, fd)
        if target == job.target:
            return {}
        after = job.after if job.after == job.before else copy.after(job.before, job.spec, target)
        return {"target": target, "after": after}

    async def _hold(self, job: Job, chain: PreparedChain) -> None:
        """Lease the target, again after a restart: what we have of it is what gets its name."""
        assert job.target is not None
        if is_uri(job.target.path):
            await chain.take_server(_remote_layer(job.target.path, _size(job)))
        chain.keeps_target |= job.sealed is not None
        if job.target.file is not None and chain.descriptor(job.target.file) is None:
            self._chains.kept.release(job.target.file)
            fd = await self._aside(_open, job.target)
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
                node = await chain.open_remote(_remote_layer(path, _size(job)), self._timeout)
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
                    await self._aside(_let_its_name_be_all, target)
                except JobError as error:  # it completes all the same, when its storage answers
                    raise TimeoutError(error.message) from error
            return True
        return target.made and await self._aside(_is_settled, target)

    async def audit(self, job: Job, chain: PreparedChain) -> tuple[str, ...]:
        """The target lies where it should, and its name is still free: after a pivot it would be too late to say no."""
        target = job.target
        if target is not None and target.file is not None:
            try:
                await self._hold(job, chain)
                fd = chain.descriptor(target.file)
                assert fd is not None
                await self._aside(_refuse_strange, target, fd)
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
            fd = await self._aside(_open, job.target)
            await self._aside(self._chains.kept.take, job.target.file, fd)

    def release(self, job: Job) -> None:
        """The job has ended. Idempotent."""
        if job.target is not None and job.target.file is not None:
            self._chains.kept.release(job.target.file)

    async def name(self, job: Job) -> None:
        """A further name for the target, which needs no storage daemon any more: it is whole."""
        if job.target is not None and job.target.made:
            await self._aside(_give_name, job.target)

    async def _settle(self, job: Job, chain: PreparedChain, *, named: bool) -> None:
        assert job.target is not None
        await self._hold(job, chain)
        await chain.flush_target(chain.nodes[1] if job.spec.shallow else None)
        if job.target.file is None:
            return
        fd = chain.descriptor(job.target.file)
        if fd is None:
            raise JobError("storage_daemon_died", f"the storage daemon of {job.before.top.path!r} ended")
        await self._aside(_settle, job.target, fd, named)

    async def discard(self, job: Job, chain: PreparedChain | None) -> None:
        place = None
        if chain is not None:
            fd = chain.descriptor(job.target.file) if job.target and job.target.file else None
            place = await self._aside(_place, fd) if fd is not None else None
            await chain.close_beside()
            chain.give_up_target()
        if job.target is not None and job.target.made and not job.decided:
            await self._aside(_delete, job.target, job.id, place)
        self.release(job)

    async def _aside(self, work: Callable[..., T], *args: Any) -> T:
        """Blocking work on files, bounded by exports.nbd_timeout."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(work, *args), self._timeout)
        except TimeoutError:
            raise JobError("timeout", "the target's storage does not answer", remedy="see whether it hangs") from None


def _remote(spec: JobSpec) -> Target:
    """An export of another host or program. Nothing can go over to it, and nobody but the hypervisor proves it."""
    assert spec.dest is not None
    if spec.completion is Completion.PIVOT or spec.shallow or spec.format not in (None, "raw"):
        remedy = "copy with --finish, whole, and as raw"
        raise JobError("invalid", "an NBD export can only be filled", field="dest", value=spec.dest, remedy=remedy)
    if not spec.anywhere:
        raise JobError("denied", "only root may copy to NBD", field="dest", value=spec.dest, remedy="name a file")
    return Target(normal(spec.dest), "raw", made=False, state=TargetState.UNTOUCHED)


def _remote_layer(uri: str, size: int) -> Layer:
    return Layer(normal(uri), "raw", file_of(uri), size, 0)


def _size(job: Job) -> int:
    return job.before.top.virtual_size


def _layer_of(target: Target, size: int) -> Layer:
    assert target.file is not None
    return Layer(target.part or target.path, target.format, target.file, size, 0, device=target.device)


def _layer(job: Job) -> Layer | None:
    return _layer_of(job.target, _size(job)) if job.target and job.target.file else None


def _unfit(path: str, why: str, remedy: str) -> JobError:
    return JobError("invalid", f"{path!r} {why}", field="dest", value=path, remedy=remedy)


def _part(target: Target, job_id: str) -> str:
    return str(Path(target.path).with_name(f".hostagent-{job_id}"))


# Files; all of these block


def _new(dest: str, format_: str, pools: Sequence[str] | None) -> Target:
    """A target that is not there yet; for who may not name any image it must lie in a pool."""
    path = Path(os.path.realpath(Path(dest).parent), Path(dest).name)
    if pools is not None and not any(path.is_relative_to(os.path.realpath(pool)) for pool in pools):
        remedy = f"copy into a pool, or add {path.parent} to images.pools"
        raise JobError("outside_pools", f"{dest!r} lies in no configured pool", field="dest", value=dest, remedy=remedy)
    if not path.parent.is_dir():
        remedy = "make the folder, or correct the path"
        raise JobError("not_found", f"there is no folder {str(path.parent)!r}", field="dest", value=dest, remedy=remedy)
    if os.path.lexists(path):
        remedy = "choose another name; to write over an existing image, say --reuse-external"
        raise JobError("conflict", f"{dest!r} exists", field="dest", value=dest, remedy=remedy)
    return Target(str(path), format_, made=True)


def _refuse_own_data(dest: str, fd: int) -> None:
    """A mirror of the top layer alone writes only what that layer has: whatever else the target holds would stay."""
    if not is_empty(fd):
        remedy = "see what it holds: a copy that was interrupted may have begun to write it; make it anew, and empty"
        raise _unfit(dest, "has data of its own, which a shallow copy would leave in it", remedy)


def _make(target: Target, source: int, size: int) -> Target:
    """The target's file, empty, with the source's owner and mode. What lies there under the job's own name was left by
    an agent that was killed before it could say so."""
    assert target.part is not None
    like = os.fstat(source)
    folder = Path(target.part).parent
    if os.path.realpath(folder) != str(folder):
        remedy = "see who replaced it"
        raise JobError("image_changed", f"{str(folder)!r} is another folder now", field="dest", remedy=remedy)
    Path(target.part).unlink(missing_ok=True)
    fd = os.open(target.part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        made = os.fstat(fd)
        if (made.st_uid, made.st_gid) != (like.st_uid, like.st_gid):
            os.fchown(fd, like.st_uid, like.st_gid)
        os.fchmod(fd, _mode(source, like.st_mode))
        if target.format == "raw":
            os.ftruncate(fd, size)
        return replace(target, file=FileId(made.st_dev, made.st_ino))
    except OSError as error:
        Path(target.part).unlink(missing_ok=True)
        raise _os_error(target, error) from error
    finally:
        os.close(fd)


def _mode(fd: int, mode: int) -> int:
    """The file's mode without its ACL, whose mask stands in the group's place (acl(5))."""
    try:
        acl = os.getxattr(fd, "system.posix_acl_access")
    except OSError:
        return mode & 0o777
    entries = struct.iter_unpack("<HHI", acl[4:])
    group = next((permissions for tag, permissions, _ in entries if tag == ACL_GROUP_OBJ), 0)
    return mode & 0o707 | group << 3


def _open(target: Target) -> int:
    """A descriptor of the target's file, wherever it lies by now."""
    for path in (target.part, target.path):
        if path is None:
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _os_error(target, error) from error
        found = os.fstat(fd)
        if FileId(found.st_dev, found.st_ino) == target.file:
            return fd
        os.close(fd)
    remedy = "start the copy again; the image is what it was"
    raise JobError("image_changed", f"the target {target.path!r} is gone or replaced", field="dest", remedy=remedy)


def _leads_to(path: str, file: FileId | None) -> bool:
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return FileId(found.st_dev, found.st_ino) == file


def _named(target: Target) -> bool:
    """Whether the target's name leads to the target."""
    return _leads_to(target.path, target.file)


def _place(fd: int) -> str:
    """Where the file that was opened lies by now; the kernel follows it through every renaming."""
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def _refuse_strange(target: Target, fd: int) -> None:
    """Raise when somebody moved the target, gave it a further name, or took the name that it is to have."""
    ours = [path for path in (target.part, target.path) if path is not None and _leads_to(path, target.file)]
    names = os.fstat(fd).st_nlink
    if not ours:
        lies = f"; what was copied lies at {_place(fd)!r}" if names else ""
        raise _strange(target, f"was moved, deleted or replaced, or its folder was{lies}", "leave it where it is")
    if names > len(ours):
        why = f"has {names - len(ours)} more hard link(s), so that no path tells whose it is"
        raise _strange(target, why, f"remove them: find FOLDER -xdev -inum {os.fstat(fd).st_ino}")
    if target.path not in ours and os.path.lexists(target.path):
        raise _os_error(target, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)))


def _strange(target: Target, why: str, remedy: str) -> JobError:
    message = f"the target {target.path!r} {why}"
    return JobError("image_changed", message, field="dest", value=target.path, remedy=remedy)


def _is_settled(target: Target) -> bool:
    """Whether the target has its name, on stable storage. An agent that was killed while it gave it may have left the
    other one: that goes, for a file with two names is nobody's for certain, and is refused everywhere."""
    if not _named(target):
        return False
    folder = _open_folder(target)
    try:
        _name_alone(target, folder)
    finally:
        os.close(folder)
    return True


def _let_its_name_be_all(target: Target) -> None:
    """The target of a group that is decided needs the unfinished file's name no more. Idempotent. Where somebody took
    its own name from it meanwhile, that one is all that leads to the copy, and stays."""
    if not _named(target):
        if target.part is not None and _leads_to(target.part, target.file):
            fields = {"path": target.path, "lies_at": target.part}
            log.warning("a copy that is complete has lost its name", extra={"fields": fields})
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        folder = _open_folder(target)
        try:
            _name_alone(target, folder)
        finally:
            os.close(folder)


def _give_name(target: Target) -> None:
    """Its name, durable, beside that of the unfinished file: until its group is decided both may have to go. Should it
    come through when the job has long failed, then there is no such file to be named."""
    own = _open(target)
    try:
        _refuse_strange(target, own)
        folder = _open_folder(target)
        try:
            _name(target, own, folder)
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _os_error(target, error) from error
    finally:
        os.close(own)


def _settle(target: Target, fd: int, named: bool) -> None:
    """On stable storage, and if `named` under its name. Idempotent. Of its own descriptor: should it hang and come
    through when the job has long failed, then there is no such file to be named, and no other by that number."""
    own = os.dup(fd)
    try:
        os.fsync(own)
        _refuse_strange(target, own)
        if target.part is not None and named:
            folder = _open_folder(target)
            try:
                _name(target, own, folder)
                _name_alone(target, folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise _os_error(target, error) from error
    finally:
        os.close(own)


def _open_folder(target: Target) -> int:
    return os.open(Path(target.path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _name(target: Target, fd: int, folder: int) -> None:
    name = Path(target.path).name
    try:
        # By descriptor, so that it is this file that gets the name; the folder makes it linkat(2), which follows.
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
    except OSError:
        if not _named(target):
            raise


def _name_alone(target: Target, folder: int) -> None:
    """Take the unfinished file's name from the target that has its own; durable."""
    if target.part is not None:
        _unlink(Path(target.part), target.file)
    os.fsync(folder)


def _delete(target: Target, job_id: str, place: str | None) -> None:
    """The file that was not sealed, by both its names: it may have got the second in the moment in which it failed.
    `place` is where it lies by now: our own name for it is taken from it wherever that is."""
    part = Path(target.part or _part(target, job_id))
    try:
        _unlink(part, target.file)
        if target.file is not None:
            _unlink(Path(target.path), target.file)
            if place is not None and Path(place).name == part.name:
                _unlink(Path(place), target.file)
    except OSError as error:
        raise _os_error(target, error) from error


def _unlink(path: Path, file: FileId | None) -> None:
    """Only the very file; None is any. What is gone is gone."""
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        if file is None or FileId(found.st_dev, found.st_ino) == file:
            path.unlink()


def _os_error(target: Target, error: OSError) -> JobError:
    code = {errno.ENOSPC: "no_space", errno.EDQUOT: "no_space", errno.EACCES: "denied", errno.EPERM: "denied"}
    remedies = {
        "conflict": "choose another name, or move what lies there away, and copy again",
        "no_space": "make space, or choose another folder",
        "denied": "let the agent write there",
    }
    found = "conflict" if isinstance(error, FileExistsError) else code.get(error.errno or 0, "io_error")
    return JobError(
        found,
        f"the target {target.path!r}: {os.strerror(error.errno or 0)}",
        field="dest",
        value=target.path,
        remedy=remedies.get(found, "see the storage below it (dmesg)"),
    )
