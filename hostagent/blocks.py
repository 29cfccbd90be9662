"""What the kernel does to the bytes of an open file or block device beyond reading and writing: telling the size and
where there is data, making zeros as cheaply as the storage can, and writing early what is to be durable."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import NamedTuple

PAGE = 4096
"""What is written directly is aligned to this: no page is then written both directly and through the page cache."""
ZERO_STEP = 128 << 20
"""Bytes that are zeroed by one call: some storage really writes them, and a revocation waits for the call."""
ZEROS = bytes(1 << 20)

_BLKGETSIZE64, _BLKSSZGET, _BLKZEROOUT = 0x80081272, 0x1268, 0x127F
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.ENODEV)
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_WRITE = 2


class Run(NamedTuple):
    """`zero`: not stored, and read as zeros."""

    start: int
    length: int
    zero: bool


class Mode(IntEnum):
    """Of fallocate(2)."""

    PUNCH_HOLE = 0x02 | 0x01  # with KEEP_SIZE, which it demands
    ZERO_RANGE = 0x10
    ZERO_RANGE_WITHIN = 0x10 | 0x01


def size_of(fd: int) -> int:
    found = os.fstat(fd)
    if not stat.S_ISBLK(found.st_mode):
        return found.st_size
    return int(struct.unpack("Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0])


def alignment(fd: int) -> int:
    """Bytes of which direct writes must be multiples, in the file and in memory."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return PAGE
    return max(PAGE, int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]))


def data_and_holes(fd: int, start: int, length: int) -> Iterator[Run]:
    """Of a regular file, one run at a time, for which the kernel is asked then. A device has data throughout."""
    position, end = start, start + length
    while position < end:
        data = _seek(fd, position, os.SEEK_DATA)
        if data is None or data >= end:
            yield Run(position, end - position, True)
            return
        if data > position:
            yield Run(position, data - position, True)
        hole = _seek(fd, data, os.SEEK_HOLE)
        position = end if hole is None else min(hole, end)
        yield Run(data, position - data, False)


def _seek(fd: int, offset: int, what: int) -> int | None:
    """The file's own position goes along, and means nothing here: threads share it."""
    try:
        return os.lseek(fd, offset, what)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno == errno.EINVAL and what == os.SEEK_DATA:  # a device, or a file system that cannot tell
            return offset
        if error.errno == errno.EINVAL:
            return None
        raise


def write_out(fd: int) -> None:
    """Begin to write what is dirty in the page cache, whoever wrote it, without waiting for the end of it: the
    SYNC_FILE_RANGE_WRITE of sync_file_range(2). It makes nothing durable, and takes no error from a later flush."""
    if _sync_file_range(fd, 0, 0, _WRITE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def zero_steps(fd: int, offset: int, length: int, *, sparse: bool) -> Iterator[int]:
    """Make these bytes zeros, of which `offset` and `length` are multiples of the alignment for a device; yields the
    bytes done so far after each step. `sparse` frees their space where that is sure to leave zeros."""
    device = stat.S_ISBLK(os.fstat(fd).st_mode)
    ways: list[Callable[[int, int], bool]] = []
    if sparse:
        ways.append(lambda begin, number: _allocate(fd, Mode.PUNCH_HOLE, begin, number))
    mode = Mode.ZERO_RANGE_WITHIN if device else Mode.ZERO_RANGE
    ways.append(lambda begin, number: _allocate(fd, mode, begin, number))
    if device:
        ways.append(lambda begin, number: _zero_out(fd, begin, number))
    done = 0
    while done < length:
        while ways and not ways[0](offset + done, min(ZERO_STEP, length - done)):
            ways.pop(0)
        if ways:
            done = min(done + ZERO_STEP, length)
        else:
            done += os.pwrite(fd, memoryview(ZEROS)[: length - done], offset + done)
        yield done


def _allocate(fd: int, mode: Mode, offset: int, length: int) -> bool:
    """Whether that can be done here. OSError when it failed."""
    while _fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


def _zero_out(fd: int, offset: int, length: int) -> bool:
    try:
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True
