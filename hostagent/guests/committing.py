"""Commit on a guest's disk: what an overlay holds goes down into a base, while the guest runs on it.

The rules are those of an image (nbd.committing): nobody else may stand on what is written. Of the layers that are read
QEMU's own locks are the lease, and what other disks, exports and jobs use is asked of those who know.

Below the top the proof is libvirt's chain and the header above, and that the base has on its file what went down into
it: QEMU flushes it before it says that it is done, and does not say when that failed. A commit of the top is a mirror:
where the guest goes over, its disk says so; where the overlay stays, QEMU's word is the proof.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from hostagent.drivers.domain_xml import Disk
from hostagent.drivers.libvirt import CommitCall
from hostagent.guests import chain
from hostagent.guests.disks import ACTIVE_COMMIT, COMMIT, Disks, drive_of
from hostagent.guests.durable import Durable, grasp
from hostagent.guests.finding import Finder, Found
from hostagent.guests.work import Work
from hostagent.images.header import read_backing, read_header
from hostagent.inodes import real_path
from hostagent.nbd.chains import Chains
from hostagent.nbd.committing import Commit, refuse_devices
from hostagent.nbd.headers import Headers
from hostagent.nbd.operations import preflight, room
from jobs import commit
from jobs.errors import JobError
from jobs.model import Chain, Drive, FileId, Job, JobSpec, Layer, Plan
from jobs.ports import Deletion

T = TypeVar("T")


class GuestCommit(Work):
    """`offline` finds who stands on a layer; `file_timeout` in seconds."""

    types: tuple[int, ...] = (COMMIT, ACTIVE_COMMIT)

    def __init__(
        self,
        disks: Disks,
        finder: Finder,
        offline: Commit,
        chains: Chains,
        file: Durable,
        headers: Headers,
        *,
        file_timeout: float,
    ) -> None:
        self._disks = disks
        self._finder = finder
        self._offline = offline
        self._chains = chains
        self._file = file
        self._headers = headers
        self._timeout = file_timeout

    async def plan(self, spec: JobSpec, found: Found, before: Chain) -> Plan:
        if spec.prune_bitmaps:
            message = "bitmaps of a guest's disk are libvirt's checkpoints"
            raise JobError("not_supported", message, field="prune_bitmaps", remedy="see `virsh checkpoint-list`")
        named = _by_real_paths(spec)
        top, base = commit.resolve(before, named)
        refuse_devices(before, named, top, base)
        await self._aside(_refuse_larger, before, base)
        await self._refuse_used(before, named, found.drive)
        moving = before.layers[before.layers.index(top) : before.layers.index(base)]
        need = min(sum(layer.allocated for layer in moving), before.top.virtual_size)
        free = None if base.device else await room(Path(base.path).parent, self._timeout)
        warnings = (*found.warnings, *preflight(spec, need, free, "the base"))
        space = {"space": {"need": need, "free": free}}
        after = commit.after(before, named)
        return Plan(before, after, before.top.virtual_size, warnings, space, drive=found.drive)

    async def _refuse_used(self, before: Chain, spec: JobSpec, drive: Drive) -> None:
        """Invariant: who writes a file, or takes one away, does so alone."""
        touched = commit.touched(before, spec)
        await self._finder.refuse_used(touched, besides=drive, field="target")
        for layer in touched:
            if users := self._chains.users_of(layer.file):
                message = f"{layer.path!r} is used by {', '.join(users)}"
                raise JobError("busy", message, field="target", value=layer.path, remedy="end it first", holders=users)
        await self._offline.refuse_dependents(before, spec)

    async def make_ready(self, job: Job) -> Mapping[str, Any]:
        return {}

    async def begin(self, job: Job, disk: Disk) -> None:
        spec = _by_real_paths(job.spec)
        await self._refuse_used(job.before, spec, drive_of(job))  # again, as late as can be: from here on QEMU writes
        top, base = commit.resolve(job.before, spec)
        active = top.file == job.before.top.file
        relative = not active and await self._aside(_relative, job.before, top, base)
        wanted = CommitCall(
            base=await self._aside(chain.name_of, disk, base),
            top=None if active else await self._aside(chain.name_of, disk, top),
            relative=relative,
            bandwidth=job.bandwidth,
        )
        await self._disks.commit(drive_of(job), wanted)

    def is_ours(self, job: Job, disk: Disk) -> bool:
        """Of the active layer: that it goes to our base."""
        if not self.is_mirrored(job):
            return disk.mirror is None
        _, base = commit.resolve(job.before, _by_real_paths(job.spec))
        mirror = disk.mirror.layer if disk.mirror else None
        return disk.mirror is None or (mirror is not None and os.path.realpath(mirror.path or "") == base.path)

    def is_mirrored(self, job: Job) -> bool:
        return commit.resolve(job.before, _by_real_paths(job.spec))[0].file == job.before.top.file

    async def proven(self, job: Job, disk: Disk) -> bool:
        if job.after == job.before or not disk.layers:
            return False
        runs = disk.layers[0].index is not None
        if runs:
            shown = await self._aside(chain.has_become, disk, job)
        else:  # a definition may name its top alone
            shown = (await self._aside(chain.files_of, disk))[:1] == [job.after.top.file]
        parent = commit.parent(replace(job, spec=_by_real_paths(job.spec)))
        if parent is None or not shown:
            return shown
        if not await self._in_header(job, parent):
            return False
        if not await self._is_written(job):
            if not runs:
                return False
            base = job.after.layers[-1].path
            raise JobError("unresponsive", f"{base!r} does not have on its file yet all that was committed")
        return True

    async def _in_header(self, job: Job, parent: Layer) -> bool:
        try:
            _, resolved = await self._headers.backing(parent)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, TimeoutError) as error:
            raise JobError("unresponsive", f"{parent.path!r} cannot be read back: {error}") from error
        _, base = commit.resolve(job.before, _by_real_paths(job.spec))
        return resolved == base.path

    async def _is_written(self, job: Job) -> bool:
        """The base has what the others had, and on stable storage."""
        _, base = commit.resolve(job.before, _by_real_paths(job.spec))
        bare = job.after.layers[-1].file == base.file
        return await self._file.lacking([base], job.dropped, bare=bare) == 0

    async def named(self, job: Job) -> bool:
        return False

    async def audit(self, job: Job) -> tuple[str, ...]:
        return await self._offline.audit(replace(job, spec=_by_real_paths(job.spec)), None)

    async def seal(self, job: Job) -> None:
        """QEMU has flushed the base; whatever the cache mode of the disk is, the file is synced."""
        _, base = commit.resolve(job.before, _by_real_paths(job.spec))
        await self._aside(_sync, base)

    async def discard(self, job: Job, disk: Disk | None, *, over: bool) -> bool:
        """The base has part of the overlay's data, and the overlay all of it."""
        return False

    async def delete_dropped(self, job: Job, needed: Collection[FileId]) -> Deletion:
        return await self._offline.delete_dropped(job, needed, self._chains.leasing)

    async def _aside(self, work: Callable[..., T], *args: Any) -> T:
        """Blocking work on files, bounded by libvirt.file_timeout."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(work, *args), self._timeout)
        except TimeoutError:
            message = f"the files of the disk do not answer within {self._timeout:g} s (libvirt.file_timeout)"
            raise JobError("unresponsive", message, remedy="see whether their storage hangs") from None


def _by_real_paths(spec: JobSpec) -> JobSpec:
    """With its layers named as in a chain that was read from libvirt: without links."""

    def real(path: str | None) -> str | None:
        return path if path is None or not path.startswith("/") else real_path(path)

    return replace(spec, base=real(spec.base), top=real(spec.top))


# Files; all of these block


def _opened(layer: Layer) -> int:
    handle = grasp(layer)
    try:
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(handle)


def _sync(layer: Layer) -> None:
    fd = _opened(layer)
    try:
        os.fsync(fd)
    except OSError as error:
        raise JobError("io_error", f"{layer.path!r} cannot be synced: {error.strerror}") from error
    finally:
        os.close(fd)


def _refuse_larger(before: Chain, base: Layer) -> None:
    """A base that is larger than the disk would show what it has beyond."""
    fd = _opened(base)
    try:
        header = read_header(fd) if base.format == "qcow2" else None
        size = os.lseek(fd, 0, os.SEEK_END) if header is None else header.virtual_size
    finally:
        os.close(fd)
    if size > before.top.virtual_size:
        message = f"{base.path!r} has {size} bytes, more than the disk: a commit would show them"
        remedy = "resize the disk first (virsh blockresize)"
        raise JobError("invalid", message, field="base", value=base.path, remedy=remedy)


def _relative(before: Chain, top: Layer, base: Layer) -> bool:
    """Whether all headers from the layer above top down to base name what is below them by relative names."""
    first, last = before.layers.index(top) - 1, before.layers.index(base)
    for layer in before.layers[first:last]:
        fd = _opened(layer)
        try:
            name = read_backing(fd)
        finally:
            os.close(fd)
        if name is None or Path(name).is_absolute():
            return False
    return True
