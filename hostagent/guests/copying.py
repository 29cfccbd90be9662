"""Copy of a guest's disk: libvirt mirrors it to a file, and then the guest goes over to that, or the file stays.

A copy that is to be finished lies under the unfinished file's name until it is whole, as that of an image does
(nbd.copy_files). One that the guest may go over to has its own name from the begin, for libvirt remembers the file
by it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from xml.sax.saxutils import quoteattr

from hostagent.drivers.domain_xml import Disk
from hostagent.drivers.libvirt import CopyCall
from hostagent.guests import chain
from hostagent.guests.disks import COPY, Disks, drive_of
from hostagent.guests.finding import Finder, Found
from hostagent.images.member import ChainLimits, Wanted, open_member
from hostagent.nbd import copy_files, device_targets
from hostagent.nbd.copying import Copy
from hostagent.nbd.operations import preflight, room
from hostagent.nbd.prepared import Leasing
from hostagent.nbd.uri import is_uri
from jobs import copy
from jobs.errors import JobError
from jobs.model import Chain, Completion, Drive, FileId, Job, JobSpec, Layer, Plan, Target

T = TypeVar("T")


class GuestCopy:
    """`offline` knows what may be written over; `file_timeout` in seconds."""

    types: tuple[int, ...] = (COPY,)

    def __init__(
        self,
        disks: Disks,
        finder: Finder,
        offline: Copy,
        leasing: Leasing,
        *,
        limits: ChainLimits,
        file_timeout: float,
    ) -> None:
        self._disks = disks
        self._finder = finder
        self._offline = offline
        self._leasing = leasing
        self._limits = limits
        self._timeout = file_timeout

    async def plan(self, spec: JobSpec, found: Found, before: Chain) -> Plan:
        assert spec.dest is not None
        if is_uri(spec.dest):
            remedy = "copy into a file"
            message = "a guest's disk is not copied to NBD"
            raise JobError("not_supported", message, field="dest", value=spec.dest, remedy=remedy)
        if spec.shallow and len(before.layers) == 1:
            remedy = "copy it without --shallow"
            raise JobError("invalid", f"{before.top.path!r} has no backing file", field="shallow", remedy=remedy)
        device = await self._aside(device_targets.is_one, spec.dest)
        format_ = spec.format or ("raw" if device and not spec.shallow else before.top.format)
        if spec.shallow and format_ == "raw":
            remedy = "copy into qcow2, or without --shallow"
            raise JobError("invalid", "a raw image cannot have a backing file", field="format", remedy=remedy)
        pools = None if spec.anywhere else self._limits.pools
        if device or spec.reuse_external:
            target = await self._existing(spec, before, format_, found.drive, device=device)
        else:
            target = await self._aside(copy_files.new, spec.dest, format_, pools)
        layers = before.layers[: 1 if spec.shallow else None]
        need = min(sum(layer.allocated for layer in layers), before.top.virtual_size)
        free = None if device else await room(Path(target.path).parent, self._timeout)
        told = () if device else preflight(spec, need, free, "the target")  # a device that is too small is refused
        space = {"space": {"need": need, "free": free}}
        after = copy.after(before, spec, target)
        return Plan(before, after, before.top.virtual_size, (*found.warnings, *told), space, target, found.drive)

    async def make_ready(self, job: Job) -> Mapping[str, Any]:
        """Make the file, ours alone until libvirt gives it to QEMU's user; once it is stored, give it its name."""
        target = _target(job)
        if job.started is not None:
            return {}
        if not target.made:  # again: a turn may be long in coming
            drive = drive_of(job)
            again = await self._existing(job.spec, job.before, target.format, drive, device=target.device)
            if again.file != target.file:
                raise copy_files.unfit(target.path, "is another file by now", "start the copy again")
            return {}
        if target.file is None:
            target = replace(target, part=copy_files.part_of(target, job.id))
            target = await self._aside(self._make, job, target)
            after = job.after if job.after == job.before else copy.after(job.before, job.spec, target)
            return {"target": target, "after": after}
        if not by_name(job):
            await self._aside(_name, target)
        return {}

    async def _existing(self, spec: JobSpec, before: Chain, format_: str, drive: Drive, *, device: bool) -> Target:
        """What is there and may be written over. libvirt makes no image on a device."""
        if device:
            target, _ = await self._offline.device(spec, before, format_)
        else:
            target, _ = await self._offline.existing(spec, before, format_)
        if target.fresh and format_ != "raw":
            remedy = f"make it first (qemu-img create -f {format_}), and say --reuse-external; or --format raw"
            message = f"an image of format {format_} is not made on a device for a guest"
            raise JobError("not_supported", message, field="format", value=format_, remedy=remedy)
        assert target.file is not None
        layer = Layer(target.path, target.format, target.file, before.top.virtual_size, 0, device=device)
        await self._finder.refuse_used([layer], besides=drive, field="dest")
        return target

    def _make(self, job: Job, target: Target) -> Target:
        top = job.before.top
        fd, _ = open_member(Wanted(top.path, top.format), replace(self._limits, top_anywhere=job.spec.anywhere))
        try:
            return copy_files.make(target, fd, top.virtual_size, own=True)
        finally:
            os.close(fd)

    async def begin(self, job: Job, disk: Disk) -> None:
        target = _target(job)
        await self._aside(self._alone, job)
        kind = ("block", "dev") if target.device else ("file", "file")
        path = quoteattr(path_of(job))
        wanted = CopyCall(
            f"<disk type='{kind[0]}'><source {kind[1]}={path}/><driver name='qemu' type='{target.format}'/></disk>",
            shallow=job.spec.shallow,
            reuse=not target.made,
            bandwidth=job.bandwidth,
        )
        await self._disks.copy(drive_of(job), wanted)

    def _alone(self, job: Job) -> None:
        """Nobody else uses the target, until QEMU's own locks say so. What an attempt left in ours goes: libvirt makes
        images in empty files only."""
        target = _target(job)
        fd = copy_files.reopen(target)
        try:
            lease = self._leasing(fd, exclusive=True, ours=())
            try:
                if target.made:
                    os.ftruncate(fd, 0)
            finally:
                lease.release()
        finally:
            os.close(fd)

    def is_ours(self, job: Job, disk: Disk) -> bool:
        """Whether the job that runs on the disk has our target."""
        mirror = disk.mirror.layer if disk.mirror else None
        return mirror is not None and mirror.path == path_of(job)

    async def proven(self, job: Job, disk: Disk) -> bool:
        """What the disk consists of now; of a copy that gets its name when it is whole, also that."""
        if job.after != job.before and disk.layers and disk.layers[0].path == _target(job).path:
            found = await self._aside(chain.files_of, disk)
            return found[:1] == [_target(job).file]
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

    async def delete_dropped(self, job: Job, needed: Collection[FileId]) -> tuple[str, ...]:
        return ()

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
