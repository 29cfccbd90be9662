"""Copy of a guest's disk: libvirt mirrors it to a file, and then the guest goes over to that, or the file stays.

A copy that is to be finished lies under the unfinished file's name until it is whole, as that of an image does
(nbd.copy_files). One that the guest may go over to has its own name from the begin, for libvirt remembers the file
by it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from xml.sax.saxutils import quoteattr

from hostagent.drivers.domain_xml import Disk
from hostagent.drivers.libvirt import CopyCall
from hostagent.guests import chain
from hostagent.guests.blank import Backing, Blank
from hostagent.guests.disks import COPY, Disks, drive_of
from hostagent.guests.finding import Finder, Found
from hostagent.guests.work import Work
from hostagent.images.header import read_backing
from hostagent.images.member import ChainLimits, Wanted, open_member
from hostagent.nbd import copy_files, device_targets
from hostagent.nbd.copying import Copy
from hostagent.nbd.operations import at_most, preflight, room
from hostagent.nbd.prepared import Leasing
from jobs import copy
from jobs.errors import JobError
from jobs.model import Chain, Completion, Drive, Job, JobSpec, Layer, Plan, Target, TargetState

T = TypeVar("T")


class GuestCopy(Work):
    """`offline` knows what may be written over, `blank` makes images on devices; `file_timeout` in seconds."""

    types: tuple[int, ...] = (COPY,)

    def __init__(
        self,
        disks: Disks,
        finder: Finder,
        offline: Copy,
        blank: Blank,
        leasing: Leasing,
        *,
        limits: ChainLimits,
        file_timeout: float,
    ) -> None:
        self._disks = disks
        self._finder = finder
        self._offline = offline
        self._blank = blank
        self._leasing = leasing
        self._limits = limits
        self._timeout = file_timeout
        self._judged: set[str] = set()
        """The jobs whose target was there and was judged by us, and is not written yet."""

    async def plan(self, spec: JobSpec, found: Found, before: Chain) -> Plan:
        assert spec.dest is not None
        if spec.shallow and len(before.layers) == 1:
            remedy = "copy it without --shallow"
            raise JobError("invalid", f"{before.top.path!r} has no backing file", field="shallow", remedy=remedy)
        device = await self._aside(device_targets.is_one, spec.dest)
        format_ = spec.format or ("raw" if device and not spec.shallow else before.top.format)
        if spec.shallow and format_ == "raw":
            remedy = "copy into qcow2, or without --shallow"
            raise JobError("invalid", "a raw image cannot have a backing file", field="format", remedy=remedy)
        pools = None if spec.anywhere else self._limits.pools
        free: int | None = None
        if device or spec.reuse_external:
            target, free = await self._existing(spec, before, format_, found.drive, device=device)
        else:
            target = await self._aside(copy_files.new, spec.dest, format_, pools)
        layers = before.layers[: 1 if spec.shallow else None]
        need = min(sum(layer.allocated for layer in layers), before.top.virtual_size)
        if device:
            need = before.top.virtual_size if format_ == "raw" else at_most(need)
        else:
            free = await room(Path(target.path).parent, self._timeout)
        told = preflight(spec, need, free, "the target")
        space = {"space": {"need": need, "free": free}}
        after = copy.after(before, spec, target)
        return Plan(before, after, before.top.virtual_size, (*found.warnings, *told), space, target, found.drive)

    async def make_ready(self, job: Job) -> Mapping[str, Any]:
        """Make the file, ours alone until libvirt gives it to QEMU's user; once it is stored, give it its name."""
        target = _target(job)
        if job.started is not None:
            return {}
        if not target.made:
            if target.state is TargetState.UNTOUCHED:  # again: a turn may be long in coming
                await self._judge(job, target)
            return {}  # else an agent that was killed has begun: what it holds is ours
        if target.file is None:
            target = replace(target, part=copy_files.part_of(target, job.id))
            target = await self._aside(self._make, job, target)
            after = job.after if job.after == job.before else copy.after(job.before, job.spec, target)
            return {"target": target, "after": after}
        if not by_name(job):
            await self._aside(_name, target)
        return {}

    async def _judge(self, job: Job, target: Target) -> None:
        drive = drive_of(job)
        again, _ = await self._existing(job.spec, job.before, target.format, drive, device=target.device)
        if again.file != target.file:
            raise copy_files.unfit(target.path, "is another file by now", "start the copy again")
        self._judged.add(job.id)

    async def _existing(
        self, spec: JobSpec, before: Chain, format_: str, drive: Drive, *, device: bool
    ) -> tuple[Target, int | None]:
        """What is there and may be written over; of a device, its size."""
        free: int | None = None
        if device:
            target, free = await self._offline.device(spec, before, format_)
        else:
            target, _ = await self._offline.existing(spec, before, format_)
        await self._finder.refuse_used([_layer(target, before.top.virtual_size)], besides=drive, field="dest")
        return target, free

    def _make(self, job: Job, target: Target) -> Target:
        fd = self._opened(job, job.before.top)
        try:
            return copy_files.make(target, fd, job.before.top.virtual_size, own=True)
        finally:
            os.close(fd)

    def _opened(self, job: Job, top: Layer) -> int:
        limits = replace(self._limits, top_anywhere=job.spec.anywhere)
        return open_member(Wanted(top.path, top.format), limits)[0]

    def release(self, job: Job) -> None:
        self._judged.discard(job.id)

    async def begin(self, job: Job, disk: Disk) -> None:
        size = await self._cleared(job)
        wanted = CopyCall(
            _disk_xml(job, size),
            shallow=job.spec.shallow,
            reuse=not _target(job).made,
            synchronous=job.spec.synchronous_writes,
            bandwidth=job.bandwidth,
        )
        await self._disks.copy(drive_of(job), wanted)

    async def _cleared(self, job: Job) -> int:
        """Make the target what libvirt needs, while nobody else uses it; from then on QEMU's own locks say so. The
        bytes that it has."""
        target, size = _target(job), job.before.top.virtual_size
        fd = await self._aside(copy_files.reopen, target)
        try:
            lease = await self._aside(lambda: self._leasing(fd, exclusive=True, ours=()))
            try:
                await self._aside(self._clear, job, fd)
                if target.fresh and target.format != "raw":
                    backing = await self._aside(self._backing, job) if job.spec.shallow else None
                    await self._blank.make(_layer(target, size), fd, backing)
                return await self._aside(os.lseek, fd, 0, os.SEEK_END)
            finally:
                lease.release()
        finally:
            os.close(fd)

    def _clear(self, job: Job, fd: int) -> None:
        """What an attempt left in a file of ours goes: libvirt makes images in empty files only. What was judged by us
        is so again: now it is leased."""
        target = _target(job)
        if target.made:
            os.ftruncate(fd, 0)
        elif job.id in self._judged and target.fresh:
            device_targets.refuse_content(target.path, fd)
        elif job.id in self._judged and job.spec.shallow:
            copy_files.refuse_own_data(target.path, fd)
        self._judged.discard(job.id)

    def _backing(self, job: Job) -> Backing:
        """A device has the name by which the disk's own header knows it: the kernel's may be another one's after the
        next boot."""
        top, below = job.before.layers[:2]
        if not below.device:
            return Backing(below.path, below.format)
        fd = self._opened(job, top)
        try:
            name = read_backing(fd)
        finally:
            os.close(fd)
        return Backing(str(Path(top.path).parent / name) if name else below.path, below.format)

    def is_ours(self, job: Job, disk: Disk) -> bool:
        """Whether the job that runs on the disk has our target."""
        mirror = disk.mirror.layer if disk.mirror else None
        return mirror is not None and mirror.path == path_of(job)

    async def proven(self, job: Job, disk: Disk) -> bool:
        """What the disk consists of now; of a copy that gets its name when it is whole, also that."""
        target = _target(job)
        if job.after != job.before and any(layer.path == target.path for layer in disk.layers):
            if disk.layers[0].index is not None:
                return await self._aside(chain.has_become, disk, job)
            return (await self._aside(chain.files_of, disk))[:1] == [target.file]
        return job.completion is Completion.FINISH and await self.named(job)

    async def named(self, job: Job) -> bool:
        return by_name(job) and await self._aside(copy_files.is_settled, _target(job))

    async def audit(self, job: Job) -> tuple[str, ...]:
        """The target lies where it should: after a pivot it would be too late to say no."""
        await self._aside(_with_target, _target(job), copy_files.refuse_strange)
        return ()

    async def seal(self, job: Job) -> None:
        """QEMU has flushed it and closed it: durable, and with its name."""
        named = by_name(job)
        await self._aside(_with_target, _target(job), lambda target, fd: copy_files.settle(target, fd, named))

    async def discard(self, job: Job, disk: Disk | None, *, over: bool) -> bool:
        """Delete what we made, unless the guest may have gone over to it: `over`, or its chain (`disk`) has it."""
        target = _target(job)
        if not target.made:
            return False
        if disk is not None:
            over = over or target.file in await self._aside(chain.files_of, disk) or self.is_ours(job, disk)
        if over:
            return False
        await self._aside(copy_files.delete, target, job.id, None)
        return True

    async def _aside(self, work: Callable[..., T], *args: Any) -> T:
        """Blocking work on files, bounded by libvirt.file_timeout."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(work, *args), self._timeout)
        except TimeoutError:
            message = f"the target's storage does not answer within {self._timeout:g} s (libvirt.file_timeout)"
            raise JobError("unresponsive", message, remedy="see whether it hangs") from None


def by_name(job: Job) -> bool:
    """Whether the target has its name only when it is whole."""
    return _target(job).made and job.spec.completion is Completion.FINISH


def path_of(job: Job) -> str:
    """Where the target lies while it is written."""
    target = _target(job)
    return target.part if by_name(job) and target.part is not None else target.path


def _disk_xml(job: Job, size: int) -> str:
    """The target as libvirt has a disk; `size` are its bytes. A raw device may have more of them than the disk."""
    target, disk, part = _target(job), job.before.top.virtual_size, ""
    kind = ("block", "dev") if target.device else ("file", "file")
    if target.device and target.format == "raw" and size > disk:
        part = f"<slices><slice type='storage' offset='0' size='{disk}'/></slices>"
    source = f"<source {kind[1]}={quoteattr(path_of(job))}>{part}</source>"
    return f"<disk type='{kind[0]}'>{source}<driver name='qemu' type='{target.format}'/></disk>"


def _layer(target: Target, size: int) -> Layer:
    assert target.file is not None
    return Layer(target.path, target.format, target.file, size, 0, device=target.device)


def _target(job: Job) -> Target:
    assert job.target is not None, f"job {job.id} copies nowhere"
    return job.target


def _with_target(target: Target, work: Callable[[Target, int], None]) -> None:
    fd = copy_files.reopen(target)
    try:
        work(target, fd)
    finally:
        os.close(fd)


def _name(target: Target) -> None:
    _with_target(target, lambda target, fd: copy_files.settle(target, fd, True))
