"""Hand-made qcow2 headers: any field may be wrong, which qemu-img would not let us make."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

BACKING_FORMAT = 0xE2792ACA


def _extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def craft_header(
    *,
    magic: bytes = b"QFI\xfb",
    version: int = 3,
    backing: bytes | None = None,
    backing_format: bytes | None = None,
    backing_offset: int | None = None,
    backing_length: int | None = None,
    cluster_bits: int = 16,
    size: int = 1 << 20,
    crypt: int = 0,
    l1_entries: int = 1,
    l1_offset: int = 0x30000,
    incompatible: int = 0,
    autoclear: int = 0,
    header_length: int = 104,
    extensions: bytes = b"",
) -> bytes:
    fixed = 104 if version == 3 else 72
    area = extensions
    if backing_format is not None:
        area += _extension(BACKING_FORMAT, backing_format)
    area += _extension(0, b"")
    name = backing or b""
    at = fixed + len(area) if backing is not None else 0
    at = at if backing_offset is None else backing_offset
    length = len(name) if backing_length is None else backing_length
    numbers = (magic, version, at, length, cluster_bits, size, crypt, l1_entries, l1_offset, 0x10000, 1, 0, 0)
    header = struct.pack(">4sIQIIQIIQQIIQ", *numbers)
    if version == 3:
        header += struct.pack(">QQQII", incompatible, 0, autoclear, 4, header_length)
    return (header + area + name).ljust(4096, b"\0")


@pytest.fixture(scope="session")
def craft() -> Callable[..., bytes]:
    return craft_header


@pytest.fixture(scope="session")
def extension() -> Callable[[int, bytes], bytes]:
    return _extension
