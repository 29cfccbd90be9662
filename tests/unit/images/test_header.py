"""The header reader: what it accepts, what it refuses, and that nothing in a file can surprise it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hostagent.images.header import MAGIC, READ_SIZE, read_backing, read_header
from jobs.errors import JobError

Craft = Callable[..., bytes]


@contextmanager
def opened(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


def refusal(content: bytes) -> JobError:
    with opened(content) as fd, pytest.raises(JobError) as caught:
        read_header(fd)
    return caught.value


def test_a_file_without_the_magic_has_no_header() -> None:
    for content in (b"", b"QFI", b"\0" * 4096, b"KDMV" + b"\0" * 600):
        with opened(content) as fd:
            assert read_header(fd) is None
            assert read_backing(fd) is None


@pytest.mark.parametrize("version", [2, 3])
def test_a_good_header_is_read(craft: Craft, version: int) -> None:
    content = craft(version=version, backing="größe.qcow2".encode(), backing_format=b"qcow2", size=5 << 20)
    with opened(content) as fd:
        header = read_header(fd)
        assert read_backing(fd) == "größe.qcow2"
    assert header is not None
    assert (header.version, header.virtual_size, header.cluster_size) == (version, 5 << 20, 65536)
    assert (header.backing, header.backing_format) == ("größe.qcow2", "qcow2")
    assert not (header.encrypted or header.dirty or header.corrupt or header.has_data_file or header.extended_l2)


def test_feature_bits_and_the_data_file_are_told(craft: Craft, extension: Callable[[int, bytes], bytes]) -> None:
    content = craft(incompatible=0b11111, crypt=2, extensions=extension(0x44415441, b"data.raw"))
    with opened(content) as fd:
        header = read_header(fd)
    assert header is not None
    assert header.dirty and header.corrupt and header.has_data_file and header.extended_l2 and header.encrypted
    assert header.data_file == "data.raw"


def test_unknown_extensions_and_the_feature_table_are_skipped(craft: Craft, extension: Callable[..., bytes]) -> None:
    extensions = extension(0x6803F857, b"x" * 336) + extension(0x12345678, b"odd")
    with opened(craft(extensions=extensions, backing=b"b", backing_format=b"raw")) as fd:
        header = read_header(fd)
    assert header is not None and header.backing_format == "raw"


def test_a_backing_name_without_bytes_is_none(craft: Craft) -> None:
    with opened(craft(backing=b"")) as fd:
        assert read_backing(fd) is None


def test_a_backing_name_late_in_a_large_first_cluster_is_found(craft: Craft) -> None:
    content = craft(cluster_bits=21, l1_offset=1 << 21, backing_offset=1 << 20, backing_length=4)
    with opened(content.ljust(1 << 20, b"\0") + b"base") as fd:
        assert read_backing(fd) == "base"


BAD_FIELDS = {
    "version 1": {"version": 1},
    "version 4": {"version": 4},
    "clusters of 256 bytes": {"cluster_bits": 8},
    "clusters of 4 MiB": {"cluster_bits": 22},
    "shift by 2**32-1": {"cluster_bits": 0xFFFFFFFF},
    "size 2**64-1": {"size": (1 << 64) - 1},
    "size 2**63-1": {"size": (1 << 63) - 1},
    "L1 of 32 GiB": {"l1_entries": 0xFFFFFFFF},
    "L1 one entry over its limit": {"l1_entries": (32 << 20) // 8 + 1},
    "L1 too small for the size": {"size": 1 << 40, "l1_entries": 1},
    "L1 inside a cluster": {"l1_offset": 0x30001},
    "L1 past the end of all files": {"l1_offset": 0xFFFFFFFFFFFF0000},
    "header of 100 bytes": {"header_length": 100},
    "header longer than a cluster": {"header_length": 65537},
    "header of 4 GiB": {"header_length": 0xFFFFFFFF},
    "encryption 3": {"crypt": 3},
    "extended L2 with small clusters": {"incompatible": 1 << 4, "cluster_bits": 13, "l1_offset": 0},
    "backing name of 1024 bytes": {"backing": b"n" * 1024},
    "backing name of 4 GiB": {"backing": b"n", "backing_length": 0xFFFFFFFF},
    "backing name in the header": {"backing": b"n", "backing_offset": 8},
    "backing name past the first cluster": {"backing": b"n", "backing_offset": 65536},
    "backing name across the first cluster": {"backing": b"nn", "backing_offset": 65535},
    "backing name past 2**63": {"backing": b"n", "backing_offset": (1 << 64) - 1},
    "backing name past the end of the file": {"backing_offset": 60000, "backing_length": 9},
    "backing format of 16 bytes": {"backing": b"n", "backing_format": b"q" * 16},
    "backing format with a NUL": {"backing": b"n", "backing_format": b"qcow2\0"},
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_a_bad_field_is_image_invalid(craft: Craft, fields: dict[str, object]) -> None:
    error = refusal(craft(**fields))
    assert error.code == "image_invalid"
    assert error.remedy


def test_unknown_incompatible_features_are_refused_by_their_bits(craft: Craft) -> None:
    error = refusal(craft(incompatible=1 << 5 | 1 << 63))
    assert error.code == "not_supported"
    assert "0x8000000000000020" in error.message


UNPLAIN = (b"a\0b", b"a\nb", b"\x1b[2Jb", b"a\x7f", b"\xff\xfe", "a\u0085b".encode(), b"\xed\xb2\x80")


@pytest.mark.parametrize("name", UNPLAIN)
def test_a_backing_name_that_could_write_to_a_terminal_is_refused_and_shown_escaped(craft: Craft, name: bytes) -> None:
    error = refusal(craft(backing=name, backing_format=b"raw"))
    assert error.code == "image_invalid"
    assert error.message.isprintable()


PROTOCOLS = ("json:{}", "nbd:host:10809", "nbd://host/x", "https://h/x", "file:x", "fat:rw:/x", ":x")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_name_that_qemu_takes_for_a_protocol_is_not_supported(craft: Craft, name: str) -> None:
    error = refusal(craft(backing=name.encode(), backing_format=b"raw"))
    assert error.code == "not_supported"
    assert error.value == name


def test_a_colon_after_a_slash_is_part_of_a_file_name(craft: Craft) -> None:
    with opened(craft(backing=b"./a:b", backing_format=b"raw")) as fd:
        assert read_backing(fd) == "./a:b"


def test_more_extensions_than_anybody_writes_are_refused(craft: Craft, extension: Callable[..., bytes]) -> None:
    assert "64 header extensions" in refusal(craft(extensions=extension(7, b"") * 64)).message


def test_an_extension_larger_than_its_room_is_refused(craft: Craft) -> None:
    for length in (0xFFFFFFFF, 65536, 66000):
        error = refusal(craft(extensions=struct.pack(">II", 7, length)))
        assert error.code == "image_invalid"


def test_a_header_cut_off_by_the_end_of_the_file_is_refused(craft: Craft) -> None:
    whole = craft(backing=b"base.qcow2", backing_format=b"qcow2").rstrip(b"\0")
    for length in range(len(MAGIC), len(whole)):
        assert refusal(whole[:length]).code == "image_invalid"


def test_never_more_than_two_bounded_reads(craft: Craft, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        reads.append(length)
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    content = craft(cluster_bits=21, l1_offset=1 << 21, backing_offset=1 << 20, backing_length=1023)
    with opened(content.ljust(3 << 20, b"x")) as fd:
        read_header(fd)
    assert reads == [READ_SIZE, 1023]


@settings(max_examples=300, deadline=200)
@given(st.binary(max_size=400))
@example(b"")
def test_random_bytes_after_the_magic_give_a_header_or_a_job_error(tail: bytes) -> None:
    with opened(MAGIC + tail) as fd:
        try:
            read_header(fd)
        except JobError as error:
            assert error.code in ("image_invalid", "not_supported")
            assert error.message.isprintable()


@settings(max_examples=600, deadline=200)
@given(data=st.data())
def test_a_mutated_header_gives_a_header_or_a_job_error(craft: Craft, data: st.DataObject) -> None:
    version = data.draw(st.sampled_from([2, 3]))
    content = bytearray(craft(version=version, backing=b"base.qcow2", backing_format=b"qcow2"))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, 150))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(patch)] = patch
    cut = data.draw(st.integers(0, len(content)))
    with opened(bytes(content if data.draw(st.booleans()) else content[:cut])) as fd:
        try:
            header = read_header(fd)
        except JobError as error:
            assert error.code in ("image_invalid", "not_supported")
            return
    if header is not None:
        assert header.virtual_size < 1 << 63
        assert header.backing is None or len(header.backing.encode()) <= 1023
