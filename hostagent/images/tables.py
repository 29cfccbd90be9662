"""Which parts of a qcow2 image its own tables tell of, as they are on its file: read here, in a moment, where the image
is small and simple, while its QEMU goes on. All else is qemu-img's to say.

Two levels of tables lead from a cluster of the virtual disk to one of the file (docs/interop/qcow2). An entry that says
neither where it lies, nor that it is compressed, nor that it reads as zeros leaves it to the backing file. As in
hostagent.qcow2, every number of the image's is checked, and no more is read than is bounded here.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Sequence

from hostagent.images.header import read_header

CLUSTERS_MOST = 1 << 18
"""Of a larger image (16 GiB in clusters of 64 KiB) the tables are not read here."""

_OFFSET, _COMPRESSED, _ZERO = 0x00FFFFFFFFFFFE00, 1 << 62, 1


def unmentioned(fd: int, ranges: Sequence[tuple[int, int]]) -> int | None:
    """Bytes of these sorted ranges of the virtual disk, in bytes from begin to end, of which the image open as `fd` has
    nothing itself. None where that is not said here. An OSError; a JobError `image_invalid`."""
    header = read_header(fd)
    if header is None or header.extended_l2 or header.has_data_file or header.encrypted or header.corrupt:
        return None
    cluster, (l1_offset, l1_entries) = header.cluster_size, header.l1
    if header.virtual_size > CLUSTERS_MOST * cluster:
        return None
    mask = _OFFSET | _COMPRESSED | (_ZERO if header.version > 2 else 0)
    each = cluster // 8  # entries of one table of the second level
    tables = _entries(fd, l1_offset, min(l1_entries, -(-header.virtual_size // (cluster * each))))
    if tables is None:
        return None
    lacks, known, table = 0, -1, None
    for begin, end in ranges:
        end = min(end, header.virtual_size)
        for number in range(begin // cluster, -(-end // cluster)):
            if number // each != known:
                known = number // each
                where = tables[known] & _OFFSET
                table = _entries(fd, where, each) if where else array("Q")
                if table is None:
                    return None
            assert table is not None
            if not table or not table[number % each] & mask:
                lacks += min(end, (number + 1) * cluster) - max(begin, number * cluster)
    return lacks


def _entries(fd: int, offset: int, count: int) -> array[int] | None:
    """Big-endian numbers of 64 bits; None where the file ends before."""
    text = os.pread(fd, 8 * count, offset)
    if len(text) < 8 * count:
        return None
    found = array("Q", text)
    if sys.byteorder == "little":
        found.byteswap()
    return found
