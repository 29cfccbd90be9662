"""When a file was made, which tells it from a later one with its inode number.

Inode numbers are used again, often at once: an image that is made anew in the place of a deleted one has mostly the
same. So a device and an inode number name a file only as long as somebody holds it.
"""

from __future__ import annotations

import ctypes
import struct

AT_EMPTY_PATH, STATX_BTIME, BTIME_OFFSET = 0x1000, 0x800, 80  # statx(2)


def born(fd: int) -> int | None:
    """When the inode was made, in ns since 1970; None where the file system does not say (statx(2)). Any descriptor
    will do, also an O_PATH one."""
    found = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None).statx(fd, b"", AT_EMPTY_PATH, STATX_BTIME, found) != 0:
        return None
    (mask,) = struct.unpack_from("=I", found)
    seconds, nanoseconds = struct.unpack_from("=qI", found, BTIME_OFFSET)
    return int(seconds) * 10**9 + int(nanoseconds) if mask & STATX_BTIME else None


def is_later(fd: int, when: int | None) -> bool:
    """Whether this is not the file that was made at that time, but a later one. False where that cannot be told."""
    return when is not None and (made := born(fd)) is not None and made != when
