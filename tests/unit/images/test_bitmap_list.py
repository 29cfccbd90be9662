"""What we list of an image's bitmaps, and which of them QEMU would refuse."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from hostagent.images.bitmaps import Bitmap, BitmapList, list_bitmaps
from jobs.errors import JobError

DIRECTORY = 0x40000
Make = Callable[..., bytes]


def entry(name: bytes = b"b0", *, flags: int = 2, kind: int = 1) -> bytes:
    raw = struct.pack(">QIIBBHI", 0x50000, 1, flags, kind, 16, len(name), 0) + name
    return raw + b"\0" * (-len(raw) % 8)


@pytest.fixture
def make(craft: Callable[..., bytes], extension: Callable[[int, bytes], bytes]) -> Make:
    def image(*entries: bytes, autoclear: int = 1) -> bytes:
        directory = b"".join(entries)
        numbers = struct.pack(">IIQQ", len(entries), 0, len(directory), DIRECTORY)
        header = craft(extensions=extension(0x23852875, numbers), autoclear=autoclear)
        return header.ljust(DIRECTORY, b"\0") + directory

    return image


def listed(content: bytes, most: int = 10) -> BitmapList:
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        return list_bitmaps(fd, most=most)
    finally:
        os.close(fd)


def refusal(content: bytes, most: int = 10) -> JobError:
    with pytest.raises(JobError) as caught:
        listed(content, most)
    return caught.value


def test_an_image_with_none_and_what_is_no_image(craft: Callable[..., bytes]) -> None:
    assert listed(craft()) == BitmapList()
    assert listed(craft(version=2)) == BitmapList()
    assert refusal(b"\0" * 4096).code == "not_supported"


def test_they_are_found_by_name(make: Make) -> None:
    found = listed(make(entry(), entry(b"n" * 1023, flags=1)))
    assert found == BitmapList((Bitmap("b0", 65536, False, True), Bitmap("n" * 1023, 65536, True, False)))
    assert found.find("b0") is found.items[0]
    assert found.find("b") is None


def test_those_of_an_image_that_was_changed_without_them_are_lost(make: Make) -> None:
    assert listed(make(entry(), autoclear=0)) == BitmapList(lost=True)
    assert listed(make(entry(), autoclear=2)) == BitmapList(lost=True)


def test_more_than_the_limit_are_refused(make: Make) -> None:
    many = make(*(entry(b"%d" % number) for number in range(5)))
    assert len(listed(many, most=5).items) == 5
    error = refusal(many, most=4)
    assert error.code == "limit"
    assert error.remedy and "images.bitmaps" in error.remedy


@pytest.mark.parametrize("bad", [entry(flags=4), entry(flags=1 << 31), entry(kind=0), entry(kind=2), entry(b"")])
def test_what_qemu_refuses_is_refused(make: Make, bad: bytes) -> None:
    assert refusal(make(bad)).code == "image_invalid"
    assert refusal(make(entry(b"good"), bad)).code == "image_invalid"


def test_two_of_the_same_name_are_refused(make: Make) -> None:
    assert refusal(make(entry(), entry())).code == "image_invalid"
