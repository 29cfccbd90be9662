"""The list of an image's bitmaps: as QEMU writes it, and as nobody should."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostagent.images.bitmaps import Bitmap, read_bitmaps
from hostagent.images.header import BitmapDirectory, read_header
from jobs.errors import JobError

Craft = Callable[..., bytes]
EXTENSION = 0x23852875


@contextmanager
def opened(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


def entry(name: bytes, *, flags: int = 2, bits: int = 16, extra: bytes = b"", name_size: int | None = None) -> bytes:
    size = len(name) if name_size is None else name_size
    data = struct.pack(">QIIBBHI", 1 << 20, 1, flags, 1, bits, size, len(extra)) + extra + name
    return data + bytes(-len(data) % 8)


def test_what_qemu_wrote_is_read(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "64M"], check=True)
    for words in (["b0"], ["--disable", "b1"], ["-g", "1M", "täglich"]):
        subprocess.run(["qemu-img", "bitmap", "--add", *words[:-1], str(image), words[-1]], check=True)
    fd = os.open(image, os.O_RDONLY)
    try:
        header = read_header(fd)
        assert header is not None
        assert set(read_bitmaps(fd, header.bitmaps)) == {
            Bitmap("b0", 65536, in_use=False, enabled=True),
            Bitmap("b1", 65536, in_use=False, enabled=False),
            Bitmap("täglich", 1 << 20, in_use=False, enabled=True),
        }
    finally:
        os.close(fd)


def test_an_image_without_the_extension_has_none(craft: Craft) -> None:
    with opened(craft()) as fd:
        header = read_header(fd)
        assert header is not None
        assert header.bitmaps is None
        assert read_bitmaps(fd, header.bitmaps) == ()


def test_an_extension_that_is_out_of_date_counts_for_nothing(
    craft: Craft, extension: Callable[[int, bytes], bytes]
) -> None:
    data = struct.pack(">IIQQ", 1, 0, 32, 65536)
    for autoclear, found in ((1, BitmapDirectory(1, 32, 65536)), (0, None)):
        with opened(craft(autoclear=autoclear, extensions=extension(EXTENSION, data))) as fd:
            header = read_header(fd)
            assert header is not None
            assert header.bitmaps == found


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 23, struct.pack(">IIQQ", 1, 0, 32, 65537), struct.pack(">IIQQ", 1, 0, 1 << 63, 65536)]
)
def test_a_damaged_extension_is_refused(craft: Craft, extension: Callable[[int, bytes], bytes], data: bytes) -> None:
    with opened(craft(autoclear=1, extensions=extension(EXTENSION, data))) as fd, pytest.raises(JobError) as caught:
        read_header(fd)
    assert caught.value.code == "image_invalid"


def test_marks_and_extra_data_are_understood() -> None:
    data = entry(b"left", flags=3) + entry(b"more", flags=0, bits=9, extra=b"x" * 12)
    with opened(data) as fd:
        assert read_bitmaps(fd, BitmapDirectory(2, len(data), 0)) == (
            Bitmap("left", 65536, in_use=True, enabled=True),
            Bitmap("more", 512, in_use=False, enabled=False),
        )


@pytest.mark.parametrize(
    ("data", "entries", "size"),
    [
        (entry(b"a"), 2, None),
        (entry(b"a"), 1, 64),
        (entry(b"a", name_size=500), 1, None),
        (entry(b"a" * 1024), 1, None),
        (entry(b"a", bits=8), 1, None),
        (entry(b"a", bits=32), 1, None),
        (entry(b"\xff"), 1, None),
        (entry(b"a\nb"), 1, None),
        (b"", 70000, 0),
        (b"", 1, 2 << 20),
    ],
)
def test_a_damaged_directory_is_refused(data: bytes, entries: int, size: int | None) -> None:
    with opened(data) as fd, pytest.raises(JobError) as caught:
        read_bitmaps(fd, BitmapDirectory(entries, len(data) if size is None else size, 0))
    assert caught.value.code == "image_invalid"


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=400), entries=st.integers(0, 10))
def test_any_bytes_are_a_list_or_a_refusal(data: bytes, entries: int) -> None:
    with opened(data) as fd:
        try:
            assert len(read_bitmaps(fd, BitmapDirectory(entries, len(data), 0))) == entries
        except JobError as error:
            assert error.code == "image_invalid"
