"""A block device as a copy's target: whether it may be written over, and is large enough.

Nothing is written before a job is sure that the device is nobody's: an exclusive lease claims it from the kernel
(access.leases), so one that is mounted, or a part of another device, is refused there. What a device holds cannot be
known for certain; so one that is not empty where every file system, partition table and image has its marks is written
over only where --reuse-external says so.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat

from hostagent.nbd.operations import at_most
from jobs.errors import JobError
from jobs.model import Layer

MARKS = 1 << 20
"""Bytes at a device's begin and end that are looked at. File systems, LVM, LUKS and boot records have their marks in
the first of these, RAID and a GPT's copy in the last."""


def is_one(path: str) -> bool:
    """Whether the path leads to a block device. Blocking."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)  # noqa: PTH116 - of a name that may be anything
    except (OSError, ValueError):
        return False


def refuse_small(device: Layer, size: int, format_: str) -> None:
    """Raise `invalid` unless an image of `size` bytes fits; of a qcow2 one at least its tables must."""
    need = size if format_ == "raw" else at_most(size) - size
    if device.virtual_size >= need:
        return
    raise JobError(
        "invalid",
        f"{device.path!r} has {device.virtual_size} bytes, and the copy needs {need}",
        field="dest",
        value=device.path,
        remedy="make the device larger, or choose another",
    )


def refuse_claimed(path: str, fd: int) -> None:
    """Raise `busy` when the kernel or somebody else has the device for himself. Early: the job's lease proves it."""
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise JobError("io_error", f"{path!r} cannot be opened: {error.strerror}", field="dest") from error
        raise JobError(
            "busy",
            f"the device {path!r} is claimed: mounted, a part of another device, or written by somebody",
            field="dest",
            value=path,
            remedy=f"see lsblk {shlex.quote(path)}; unmount it, or end its writer",
        ) from error


def refuse_content(path: str, fd: int) -> None:
    """Raise `conflict` unless the device reads as zeros where marks would be. Blocking."""
    size = os.lseek(fd, 0, os.SEEK_END)
    heads = (os.pread(fd, MARKS, 0), os.pread(fd, MARKS, max(0, size - MARKS)))
    if not any(any(head) for head in heads):
        return
    raise JobError(
        "conflict",
        f"the device {path!r} is not empty",
        field="dest",
        value=path,
        remedy=f"see what it holds (lsblk -f {shlex.quote(path)}): a copy that was interrupted may have begun to write "
        f"it; if that may go: --reuse-external for a raw copy, or empty it first (blkdiscard -z {shlex.quote(path)})",
    )
