"""How malloc(3) deals with pieces of a megabyte: it keeps them, and does not map new pages for each.

What comes out of a MemoryBIO is a new object each time. From 128 KiB on, malloc maps it and the kernel fills its pages
with zeros, which cost TLS downloads a third of their processor time (docs/data.md).
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
KEPT = 8 << 20
"""Bytes: smaller blocks come from the heaps, and so much at the end of one is not given back to the kernel."""
HEAPS = 16
"""For all threads; malloc would make 8 for each processor."""


def keep_pieces() -> None:
    """For the whole process, from now on. No change where the C library is not glibc (mallopt(3))."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(_M_MMAP_THRESHOLD, KEPT)
        tune(_M_TRIM_THRESHOLD, KEPT)
        tune(_M_ARENA_MAX, HEAPS)
