"""QEMU's marks on the files that it uses: open file description (OFD) locks on single bytes.

A read lock on 100+n says "I use permission n", one on 200+n "I do not share permission n", and whoever comes tests the
opposite byte before it goes on (QEMU's block/file-posix.c). They belong to an open file description, so they end with
its last descriptor, wherever that is, and are no reason to refuse for its own owner.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable

USES, UNSHARED = 100, 200
CONSISTENT_READ, WRITE, RESIZE = 0, 1, 3
READING = (USES + CONSISTENT_READ, UNSHARED + WRITE, UNSHARED + RESIZE)
"""Of who reads a file that must not change meanwhile."""
WRITERS = (USES + WRITE, USES + RESIZE, UNSHARED + CONSISTENT_READ)
"""What contradicts READING."""
READERS = (UNSHARED + WRITE, UNSHARED + RESIZE)
AGENT_BYTE = 150
"""QEMU does not use it: read-locked by our own who read a file, write-locked by those who write it."""
PART_WRITTEN = 151
"""Nor this: a device that stands on the file is written."""
FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid; native alignment, 64 bits


def take(fd: int, kind: int, byte: int) -> bool:
    """Set or clear (F_RDLCK, F_WRLCK, F_UNLCK) our lock on a byte, without waiting; False when another's is in the
    way. OSError where the file system has no such locks."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def first_taken(fd: int, bytes_: Iterable[int], kind: int = fcntl.F_WRLCK) -> int | None:
    """The first of the bytes that another description has locked, so that a lock of `kind` would be refused."""
    for byte in bytes_:
        test = FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
        if FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, test))[0] != fcntl.F_UNLCK:
            return byte
    return None
