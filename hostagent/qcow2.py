"""A bounded reader of qcow2 headers.

A header is written by whoever made the image, so it is read here the way a parcel from a stranger is opened: through a
descriptor that is already open (never by path), with at most two preads of bounded size, and with every offset and
length checked against what was read. Nothing is followed, nothing is opened, and nothing of the image's tables is read
but by `is_empty`.

Whatever is in the file, the answer is a Qcow2Header, None (no qcow2 magic), or an AgentError: `image_invalid` when QEMU
would refuse the header or two readers could read it in two ways, `not_supported` when it asks for something that we do
not handle. Limits follow QEMU's block/qcow2.c and docs/interop/qcow2.
"""

from __future__ import annotations

import os
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hostagent.errors import AgentError

MAGIC = b"QFI\xfb"
READ_SIZE = 65536  # one default cluster; QEMU's own headers, feature table included, take under 1 KiB of it
NAME_MAX = 1023  # the longest backing file name in the qcow2 specification
FORMAT_MAX = 15  # QEMU keeps the backing format in char[16]
EXTENSIONS_MAX = 64  # QEMU writes at most six
TABLE_MAX = 32 << 20  # QCOW_MAX_L1_SIZE
TABLE_READ = 1 << 20  # bytes of an L1 table that are read at a time
SIZE_MAX = (1 << 63) - 1  # off_t

_V2 = struct.Struct(">4sIQIIQIIQ")  # up to l1_table_offset; what follows is not needed here
_V3 = struct.Struct(">QQQII")
_V2_LENGTH, _V3_LENGTH = 72, 104
_EXTENSION = struct.Struct(">II")
_END, _BACKING_FORMAT, _DATA_FILE, _BITMAPS = 0, 0xE2792ACA, 0x44415441, 0x23852875
_BITMAPS_EXTENSION = struct.Struct(">IIQQ")  # how many, reserved, the directory's size, its offset
_BITMAPS_VALID = 1  # autoclear bit: whoever does not know of bitmaps and writes the image clears it

_DIRTY, _CORRUPT, _EXTERNAL_DATA, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN = _DIRTY | _CORRUPT | _EXTERNAL_DATA | _COMPRESSION | _EXTENDED_L2


class BitmapDirectory(NamedTuple):
    """Where the image keeps the list of its dirty bitmaps; size and offset in bytes."""

    entries: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """What a qcow2 header says. `backing` and `backing_format` stand as written; None where nothing is written."""

    version: int
    virtual_size: int
    cluster_size: int
    backing: str | None
    backing_format: str | None
    encrypted: bool
    dirty: bool
    corrupt: bool
    has_data_file: bool
    data_file: str | None
    extended_l2: bool
    bitmaps: BitmapDirectory | None
    bitmaps_lost: bool  # there were some, and a program that knows no bitmaps has changed the image since
    l1: tuple[int, int] = (0, 0)  # where its L1 table is: an offset in the file, and a number of entries


@dataclass(frozen=True, slots=True)
class _Fixed:
    """The fixed part of the header, as numbers."""

    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_entries: int
    l1_offset: int
    incompatible: int
    autoclear: int
    length: int

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits


def read_header(fd: int) -> Qcow2Header | None:
    """The header of the image that is open as `fd`; None if it does not begin as a qcow2 image."""
    try:
        return _read(fd)
    except OSError as error:
        raise AgentError("io_error", f"{_name(fd)} cannot be read: {error.strerror}") from error


def read_backing(fd: int) -> str | None:
    """The backing file that the image names now; None when it stands alone. Cheap: usually one pread."""
    header = read_header(fd)
    return None if header is None else header.backing


def is_empty(fd: int) -> bool:
    """Whether the qcow2 image has nothing of its own, so that all of it reads as what it stands on."""
    header = read_header(fd)
    if header is None:
        return False
    offset, entries = header.l1
    try:
        for at in range(0, 8 * entries, TABLE_READ):
            if any(os.pread(fd, min(TABLE_READ, 8 * entries - at), offset + at)):
                return False
    except OSError as error:
        raise AgentError("io_error", f"{_name(fd)} cannot be read: {error.strerror}") from error
    return True


def is_plain(name: str) -> bool:
    """Whether a file name may be shown, logged and stored: no NUL, newline, control character or undecodable byte."""
    return not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in name)


def shown(name: str | bytes) -> str:
    """A name from a stranger, escaped and cut for an error message."""
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _read(fd: int) -> Qcow2Header | None:
    head = os.pread(fd, READ_SIZE, 0)
    if not head.startswith(MAGIC):
        return None
    fixed = _fixed(fd, head)
    _check_sizes(fd, fixed)
    extensions = _extensions(fd, head, fixed)
    return Qcow2Header(
        version=fixed.version,
        virtual_size=fixed.size,
        cluster_size=fixed.cluster_size,
        backing=_backing(fd, head, fixed),
        backing_format=_backing_format(fd, extensions.get(_BACKING_FORMAT)),
        encrypted=fixed.crypt_method != 0,
        dirty=bool(fixed.incompatible & _DIRTY),
        corrupt=bool(fixed.incompatible & _CORRUPT),
        has_data_file=bool(fixed.incompatible & _EXTERNAL_DATA),
        data_file=_text(fd, extensions.get(_DATA_FILE), "external data file name"),
        extended_l2=bool(fixed.incompatible & _EXTENDED_L2),
        bitmaps=_bitmaps(fd, fixed, extensions.get(_BITMAPS)),
        bitmaps_lost=_BITMAPS in extensions and not fixed.autoclear & _BITMAPS_VALID,
        l1=(fixed.l1_offset, fixed.l1_entries),
    )


def _fixed(fd: int, head: bytes) -> _Fixed:
    _need(fd, head, _V2_LENGTH)
    _, version, backing_offset, backing_length, cluster_bits, size, crypt, l1_entries, l1_offset = _V2.unpack_from(head)
    incompatible, autoclear, length = 0, 0, _V2_LENGTH
    if version not in (2, 3):
        raise _invalid(fd, f"its qcow2 version is {version}; 2 and 3 exist")
    if version == 3:
        _need(fd, head, _V3_LENGTH)
        incompatible, _compatible, autoclear, _refcount_order, length = _V3.unpack_from(head, _V2_LENGTH)
    return _Fixed(
        version=version,
        backing_offset=backing_offset,
        backing_length=backing_length,
        cluster_bits=cluster_bits,
        size=size,
        crypt_method=crypt,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        incompatible=incompatible,
        autoclear=autoclear,
        length=length,
    )


def _check_sizes(fd: int, fixed: _Fixed) -> None:
    if not 9 <= fixed.cluster_bits <= 21:
        raise _invalid(fd, f"its cluster_bits is {fixed.cluster_bits}; 9 to 21 are allowed")
    if fixed.incompatible & ~_KNOWN:
        unknown = fixed.incompatible & ~_KNOWN
        raise _unsupported(fd, f"it needs qcow2 features that are not known here (incompatible bits {unknown:#x})")
    if fixed.incompatible & _EXTENDED_L2 and fixed.cluster_bits < 14:
        raise _invalid(fd, f"extended L2 entries need clusters of 16 KiB, and its clusters are {fixed.cluster_size}")
    if fixed.crypt_method > 2:
        raise _invalid(fd, f"its encryption method is {fixed.crypt_method}; 0, 1 and 2 exist")
    least = _V3_LENGTH if fixed.version == 3 else _V2_LENGTH
    if not least <= fixed.length <= fixed.cluster_size:
        raise _invalid(fd, f"its header_length is {fixed.length}; {least} to {fixed.cluster_size} are allowed")
    _check_l1(fd, fixed)


def _check_l1(fd: int, fixed: _Fixed) -> None:
    """The L1 table must cover the virtual size, and stay under the limit that keeps its reader's memory bounded."""
    if fixed.size > SIZE_MAX - fixed.cluster_size:
        raise _invalid(fd, f"its virtual size is {fixed.size} bytes, more than a file can have")
    if fixed.l1_entries * 8 > TABLE_MAX:
        raise _invalid(fd, f"its L1 table has {fixed.l1_entries} entries; {TABLE_MAX // 8} are allowed")
    if fixed.l1_offset % fixed.cluster_size or fixed.l1_offset > SIZE_MAX - TABLE_MAX:
        raise _invalid(fd, f"its L1 table begins at {fixed.l1_offset}, which is not the start of a cluster")
    entry_size = 16 if fixed.incompatible & _EXTENDED_L2 else 8
    covered_by_entry = fixed.cluster_size * (fixed.cluster_size // entry_size)
    needed = -(-fixed.size // covered_by_entry)
    if fixed.l1_entries < needed:
        raise _invalid(fd, f"its L1 table has {fixed.l1_entries} entries, and {fixed.size} bytes need {needed}")


def _extensions(fd: int, head: bytes, fixed: _Fixed) -> dict[int, bytes]:
    """The header extensions by type; they end at an end marker, at the backing name, or with the first cluster."""
    offset, end = fixed.length, fixed.backing_offset or fixed.cluster_size
    found: dict[int, bytes] = {}
    for _ in range(EXTENSIONS_MAX):
        if offset >= end:
            return found
        _need(fd, head, offset + _EXTENSION.size)
        kind, length = _EXTENSION.unpack_from(head, offset)
        if kind == _END:
            return found
        offset += _EXTENSION.size
        if length > end - offset:
            raise _invalid(fd, f"its header extension {kind:#010x} has {length} bytes, more than there is room for")
        _need(fd, head, offset + length)
        found[kind] = head[offset : offset + length]
        offset += -(-length // 8) * 8
    raise _invalid(fd, f"it has more than {EXTENSIONS_MAX} header extensions")


def _backing(fd: int, head: bytes, fixed: _Fixed) -> str | None:
    start, length = fixed.backing_offset, fixed.backing_length
    if not start or not length:  # QEMU takes a name without bytes for no name
        return None
    if length > NAME_MAX:
        raise _invalid(fd, f"its backing file name has {length} bytes; {NAME_MAX} are allowed")
    if not fixed.length <= start <= fixed.cluster_size - length:
        raise _invalid(fd, f"its backing file name, {length} bytes at {start}, is not inside the first cluster")
    raw = head[start : start + length] if start + length <= len(head) else os.pread(fd, length, start)
    if len(raw) < length:
        raise _invalid(fd, "it ends within its backing file name")
    name = _text(fd, raw, "backing file name")
    _refuse_network(fd, name)
    return name


def _refuse_network(fd: int, name: str | None) -> None:
    """Refuse what QEMU would not take for a file name: `json:{…}`, and a colon before the first slash (`nbd:…`)."""
    prefix, colon, _ = (name or "").partition(":")
    if colon and "/" not in prefix:
        raise AgentError(
            "not_supported",
            f"{_name(fd)} names {shown(name or '')} as its backing file, which QEMU takes for a protocol, not a file; "
            "network backing files come later",
            remedy="copy the backing image into a local file; a local name with a colon needs ./ before it",
            value=name,
        )


def _backing_format(fd: int, raw: bytes | None) -> str | None:
    if raw and len(raw) > FORMAT_MAX:
        raise _invalid(fd, f"its backing format has {len(raw)} bytes; {FORMAT_MAX} are allowed")
    return _text(fd, raw, "backing format")


def _bitmaps(fd: int, fixed: _Fixed, raw: bytes | None) -> BitmapDirectory | None:
    """As QEMU does it: an extension without its autoclear bit is out of date, and counts for nothing."""
    if raw is None or not fixed.autoclear & _BITMAPS_VALID:
        return None
    if len(raw) < _BITMAPS_EXTENSION.size:
        raise _invalid(fd, f"its bitmaps extension has {len(raw)} bytes; {_BITMAPS_EXTENSION.size} are needed")
    entries, _, size, offset = _BITMAPS_EXTENSION.unpack_from(raw)
    if offset % fixed.cluster_size or offset > SIZE_MAX - size:
        raise _invalid(fd, f"the directory of its bitmaps begins at {offset}, which is not the start of a cluster")
    return BitmapDirectory(entries, size, offset)


def _text(fd: int, raw: bytes | None, what: str) -> str | None:
    if not raw:
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _invalid(fd, f"its {what} {shown(raw)} is not UTF-8") from None
    if not is_plain(text):
        raise _invalid(fd, f"its {what} {shown(text)} contains control characters")
    return text


def _need(fd: int, head: bytes, length: int) -> None:
    if length > len(head):
        where = "goes past the first 64 KiB" if len(head) == READ_SIZE else "is cut off by the end of the file"
        raise _invalid(fd, f"its header {where}")


def _invalid(fd: int, reason: str) -> AgentError:
    remedy = "have the image's maker check it, or restore it from a copy; it is not opened"
    return AgentError("image_invalid", f"{_name(fd)} has a header that cannot be trusted: {reason}", remedy=remedy)


def _unsupported(fd: int, reason: str) -> AgentError:
    return AgentError("not_supported", f"{_name(fd)} cannot be used: {reason}")


def _name(fd: int) -> str:
    """What to call the open file in a message; only the kernel's word, and only for people."""
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return f"the image at descriptor {fd}"
