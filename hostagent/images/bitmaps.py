"""The dirty bitmaps that a qcow2 image keeps: their directory, read as its header is, within bounds and by descriptor.

Nothing of their contents is read. A bitmap marked in use was not stored by whoever wrote the image last, so it tells of
too few changes: it is inconsistent, unless somebody writes the image at this moment. The format is in QEMU's
docs/interop/qcow2.txt, "Bitmaps extension".
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field

from hostagent.images.header import BitmapDirectory, is_plain, read_header, shown
from jobs.errors import JobError

DIRECTORY_MAX = 1 << 20  # bytes; QEMU writes some 40 a bitmap
BITMAPS_MAX = 65535  # QCOW2_MAX_BITMAPS
NAME_MAX = 1023  # BME_MAX_NAME_SIZE
GRANULARITY_BITS = range(9, 32)  # BME_MIN_GRANULARITY_BITS to BME_MAX_GRANULARITY_BITS

_ENTRY = struct.Struct(">QIIBBHI")  # table offset, table size, flags, type, granularity bits, name size, extra size
_IN_USE, _AUTO = 1, 2
_DIRTY_TRACKING = 1


@dataclass(frozen=True, slots=True)
class Bitmap:
    """`granularity` is bytes of the disk for each bit; `enabled` bitmaps go on recording when the image is written.

    `table` is where its bits are found: an offset in the file, and a number of entries. It says nothing of which it is.
    """

    name: str
    granularity: int
    in_use: bool
    enabled: bool
    table: tuple[int, int] = field(default=(0, 0), compare=False)


@dataclass(frozen=True, slots=True)
class BitmapList:
    """All bitmaps of an image. `lost`: a program that knows none changed the image, and QEMU has dropped them."""

    items: tuple[Bitmap, ...] = ()
    lost: bool = False

    def find(self, name: str) -> Bitmap | None:
        return next((bitmap for bitmap in self.items if bitmap.name == name), None)


def list_bitmaps(fd: int, *, most: int) -> BitmapList:
    """The bitmaps that the image has now; a JobError `limit` when it has more than `most`. Blocks."""
    header = read_header(fd)
    if header is None:
        raise JobError("not_supported", "this is not a qcow2 image, and only those have bitmaps")
    if header.bitmaps is not None and header.bitmaps.entries > most:
        remedy = "remove those that nobody needs, or raise images.bitmaps"
        raise JobError("limit", f"the image has {header.bitmaps.entries} bitmaps, {most} are allowed", remedy=remedy)
    return BitmapList(read_bitmaps(fd, header.bitmaps), header.bitmaps_lost)


def read_bitmaps(fd: int, directory: BitmapDirectory | None) -> tuple[Bitmap, ...]:
    """The bitmaps of the image that is open as `fd`. Raises JobError image_invalid or io_error."""
    if directory is None:
        return ()
    count, size, offset = directory
    if count > BITMAPS_MAX or size > DIRECTORY_MAX:
        raise _invalid(f"it has {count} bitmaps, whose directory takes {size} bytes; {DIRECTORY_MAX} are allowed")
    try:
        data = os.pread(fd, size, offset)
    except OSError as error:
        raise JobError("io_error", f"the image's bitmaps cannot be read: {error.strerror}") from error
    if len(data) < size:
        raise _invalid("it ends within the directory of its bitmaps")
    found, at = [], 0
    for _ in range(count):
        bitmap, at = _entry(data, at)
        found.append(bitmap)
    if len({bitmap.name for bitmap in found}) < count:
        raise _invalid("two of its bitmaps have the same name")
    return tuple(found)


def _entry(data: bytes, at: int) -> tuple[Bitmap, int]:
    if at + _ENTRY.size > len(data):
        raise _invalid("the directory of its bitmaps is cut off")
    table, entries, flags, kind, bits, name_size, extra = _ENTRY.unpack_from(data, at)
    start = at + _ENTRY.size + extra
    end = start + name_size
    if flags & ~(_IN_USE | _AUTO) or kind != _DIRTY_TRACKING or bits not in GRANULARITY_BITS:
        raise _invalid(f"a bitmap has flags {flags:#x}, type {kind} and granularity 2**{bits}")
    if end > len(data) or not 1 <= name_size <= NAME_MAX:
        raise _invalid("the directory of its bitmaps is damaged")
    try:
        name = data[start:end].decode()
    except UnicodeDecodeError:
        raise _invalid(f"the name of a bitmap, {shown(data[start:end])}, is not UTF-8") from None
    if not is_plain(name):
        raise _invalid(f"the name of a bitmap, {shown(name)}, contains control characters")
    bitmap = Bitmap(name, 1 << bits, bool(flags & _IN_USE), bool(flags & _AUTO), (table, entries))
    return bitmap, at + -(-(_ENTRY.size + extra + name_size) // 8) * 8


def _invalid(reason: str) -> JobError:
    remedy = "have the image's maker check it, or remove its bitmaps (qemu-img bitmap --remove)"
    return JobError("image_invalid", f"the image cannot be trusted: {reason}", remedy=remedy)
