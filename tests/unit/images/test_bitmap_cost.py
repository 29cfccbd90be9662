"""What bitmaps take in their image, from tables that may say anything."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from hostagent.images.bitmap_cost import TABLES_READ, Cost, costs

CLUSTER = 65536
DIRECTORY, TABLE = 4 * CLUSTER, 5 * CLUSTER
Make = Callable[..., bytes]


@pytest.fixture
def make(craft: Callable[..., bytes], extension: Callable[[int, bytes], bytes]) -> Make:
    def image(
        table: list[int], *, offset: int = TABLE, entries: int | None = None, length: int = 64 * CLUSTER
    ) -> bytes:
        count = len(table) if entries is None else entries
        entry = struct.pack(">QIIBBHI", offset, count, 2, 1, 16, 2, 0) + b"b0" + b"\0" * 6
        header = craft(extensions=extension(0x23852875, struct.pack(">IIQQ", 1, 0, len(entry), DIRECTORY)), autoclear=1)
        body = header.ljust(DIRECTORY, b"\0") + entry
        return (body.ljust(TABLE, b"\0") + struct.pack(f">{len(table)}Q", *table)).ljust(length, b"\0")

    return image


def cost(content: bytes) -> Cost:
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        (found,) = costs(fd)
        return found
    finally:
        os.close(fd)


def test_only_clusters_that_are_stored_count_beside_the_table(make: Make) -> None:
    assert cost(make([0, 1, 7 * CLUSTER, 8 * CLUSTER])).stored == 3 * CLUSTER
    assert cost(make([])).stored == 0


def test_a_table_that_cannot_be_true_takes_no_more_than_the_file(make: Make) -> None:
    for content in (make([0], entries=(1 << 32) - 1), make([0], offset=(1 << 64) - CLUSTER), make([1 << 63])):
        assert cost(content).stored <= len(content)


def test_a_disk_that_is_dirty_everywhere_has_all_bits_stored(make: Make) -> None:
    found = cost(make([0]))
    assert found.most == 2 * CLUSTER


def test_a_table_that_many_bitmaps_share_is_not_read_for_each(
    craft: Callable[..., bytes], extension: Callable[[int, bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{n:05}".encode() for n in range(2000)]
    directory = b"".join(struct.pack(">QIIBBHI", TABLE, 1 << 17, 2, 1, 16, 5, 0) + name + b"\0" * 3 for name in names)
    header = craft(
        extensions=extension(0x23852875, struct.pack(">IIQQ", len(names), 0, len(directory), DIRECTORY)), autoclear=1
    )
    body = header.ljust(DIRECTORY, b"\0") + directory
    read, pread = [], os.pread

    def counted(fd: int, size: int, offset: int) -> bytes:
        read.append(size)
        return pread(fd, size, offset)

    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.write(fd, body.ljust(TABLE, b"\0") + struct.pack(">Q", CLUSTER) * (1 << 17))
        monkeypatch.setattr(os, "pread", counted)
        assert len(costs(fd)) == len(names)
    finally:
        os.close(fd)
    assert sum(read) <= TABLES_READ + (1 << 20)
