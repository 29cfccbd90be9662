"""What dirty bitmaps cost in their image: the bytes that they take, and those that they can come to take.

A bitmap has a table with an entry for each cluster of bits; a cluster of zeros (or, marked so, of ones) is not stored.
QEMU writes the table anew, and all that is then dirty, whenever it closes an image that was open for writing.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from hostagent.images.bitmaps import Bitmap, read_bitmaps
from hostagent.images.header import SIZE_MAX, read_header
from jobs.errors import JobError

TABLE_READ = 1 << 20
"""Bytes of one table that are read; the clusters of 128 Ki entries are bits of 4 PiB, in clusters and grains of 64 KiB.
What a table has beyond that counts as stored."""
TABLES_READ = 4 << 20
"""Bytes of all tables: a stranger's image may have 32768 bitmaps that share one, which would take minutes to count."""
_OFFSET = 0x00FFFFFFFFFFFE00


@dataclass(frozen=True, slots=True)
class Cost:
    """A bitmap, the bytes that it takes now, and those that it takes when all of the disk is dirty."""

    bitmap: Bitmap
    stored: int
    most: int

    @property
    def growth(self) -> int:
        """What it may come to take beside that."""
        return max(0, self.most - self.stored)


def costs(fd: int) -> tuple[Cost, ...]:
    """Of all bitmaps of the qcow2 image that is open as `fd`. Blocks. Raises JobError image_invalid or io_error."""
    header = read_header(fd)
    if header is None:
        return ()
    found = read_bitmaps(fd, header.bitmaps)
    told, left = [], TABLES_READ
    for bitmap in found:
        read = min(8 * bitmap.table[1], TABLE_READ, left)
        left -= read
        told.append(_cost(fd, bitmap, header.virtual_size, header.cluster_size, read))
    return tuple(told)


def _cost(fd: int, bitmap: Bitmap, virtual_size: int, cluster: int, read: int) -> Cost:
    offset, entries = bitmap.table
    covered = 8 * cluster * bitmap.granularity  # bytes of the disk, by one cluster of bits
    clusters = _rounded(virtual_size, covered) // covered
    stored = _rounded(8 * entries, cluster) + cluster * _stored_clusters(fd, offset, entries, read)
    return Cost(bitmap, min(stored, os.fstat(fd).st_size), _rounded(8 * clusters, cluster) + cluster * clusters)


def _stored_clusters(fd: int, offset: int, entries: int, read: int) -> int:
    if offset > SIZE_MAX:
        return entries
    try:
        table = os.pread(fd, read, offset)
    except OSError as error:
        raise JobError("io_error", f"the image's bitmaps cannot be read: {error.strerror}") from error
    known = len(table) // 8
    beyond = entries - read // 8
    return beyond + sum(1 for (entry,) in struct.iter_unpack(">Q", table[: known * 8]) if entry & _OFFSET)


def _rounded(size: int, cluster: int) -> int:
    return -(-size // cluster) * cluster
