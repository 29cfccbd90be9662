"""The data daemon's files beside QEMU and the agent: nobody writes what another reads; and block devices, full disks."""

from __future__ import annotations

import io
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hostagent.access.leases import Lease
from hostagent.data.backends.base import Extent, ImageBackend
from hostagent.data.backends.file import files, handed_over
from hostagent.data.backends.holds import Holds
from hostagent.data.backends.registry import Opening
from hostagent.errors import AgentError
from jobs.errors import JobError
from tests.ends import Collected, Given, noise
from tests.qemu.faults import ROOT
from tests.qemu.test_device_exports import loop

MIB = 1 << 20
pytestmark = pytest.mark.qemu
needs_root = pytest.mark.skipif(not ROOT, reason="loop devices and mounts need root")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(noise(4 * MIB))
    return path


@pytest.fixture
def holds() -> Holds:
    return Holds()


def opened(path: Path, holds: Holds, *, writable: bool = False, sparse: bool = False) -> ImageBackend:
    factory = files([str(path.parent)], holds)
    return factory(Opening(f"file://{path}", 1 << 40, writable=writable, sparse=sparse))


def qemu_io(path: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    words = ["qemu-io", "-f", "raw", *options, "-c", command, str(path)]
    return subprocess.run(words, capture_output=True, text=True, timeout=30)


def writes(path: Path) -> bool:
    return qemu_io(path, "write -P 7 0 4k").returncode == 0


def reads(path: Path) -> bool:
    return qemu_io(path, "read 0 4k", "-r").returncode == 0


@contextmanager
def in_use(path: Path, *options: str) -> Iterator[None]:
    """QEMU has it open."""
    words = ["qemu-io", "-f", "raw", *options, str(path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("length\n")
        process.stdin.flush()
        assert process.stdout.readline()
        yield
    finally:
        process.communicate("quit\n", timeout=20)


def code(call: Callable[[], object]) -> str:
    with pytest.raises(AgentError) as caught:
        call()
    assert caught.value.remedy
    return caught.value.code


def test_a_file_is_not_written_while_it_is_downloaded_and_may_be_right_after(image: Path, holds: Holds) -> None:
    with opened(image, holds) as one, opened(image, holds) as two:
        with one.open_session() as first:
            with two.open_session() as second:
                assert not writes(image)
                assert second.read(0, 10) == noise(10)
            assert not writes(image), "the other connection's marks went, too"
            assert reads(image)
            assert first.read(0, 10) == noise(10)
        assert writes(image)


def test_a_ticket_that_reads_does_not_mix_two_images(image: Path, holds: Holds) -> None:
    shared: dict[str, Any] = {}
    factory = files([str(image.parent)], holds)
    with factory(Opening(f"file://{image}", 1 << 40, shared=shared)) as backend:
        assert backend.read(0, 10) == noise(10)
        assert backend.read(10, 10) == noise(20)[10:]
        assert writes(image)
        assert code(lambda: backend.read(20, 10)) == "image_changed"
        assert code(lambda: list(backend.extents(0, 10))) == "image_changed"
    with factory(Opening(f"file://{image}", 1 << 40, shared=shared)) as backend:
        assert code(lambda: backend.read(20, 10)) == "image_changed"
    assert writes(image), "the refusal left its marks"
    with opened(image, holds) as another:
        assert another.read(0, 1) == b"\7"


def test_a_file_that_qemu_writes_is_not_served(image: Path, holds: Holds) -> None:
    with opened(image, holds) as backend:
        with in_use(image):
            assert code(backend.open_session) == "busy"
            assert code(lambda: next(backend.extents(0, 10))) == "busy"
        backend.open_session().close()
        with in_use(image, "-r"), backend.open_session() as session:
            assert session.read(0, 10) == noise(10)


def test_an_upload_is_alone_from_its_first_byte_until_its_connection_ends(image: Path, holds: Holds) -> None:
    with opened(image, holds, writable=True) as one, opened(image, holds, writable=True) as two:
        assert one.size() == 4 * MIB
        assert writes(image), "looking at it is no upload"
        one.write(b"x", 0)
        assert not writes(image)
        assert not reads(image), "half an upload is read"
        two.write(b"y", 1)
        one.close()
        assert not writes(image), "the other connection's marks went, too"
        assert two.read(0, 2) == b"xy"
    assert reads(image)
    assert writes(image)


@pytest.mark.parametrize("options", [(), ("-r",)], ids=["writes", "reads"])
def test_a_file_that_qemu_has_open_is_not_written(options: tuple[str, ...], image: Path, holds: Holds) -> None:
    with opened(image, holds, writable=True) as backend, in_use(image, *options):
        assert code(lambda: backend.write(b"x", 0)) == "busy"
        assert code(lambda: backend.zero(0, 10)) == "busy"
    assert image.read_bytes() == noise(4 * MIB)


def test_one_ticket_does_not_read_what_another_one_writes(image: Path, holds: Holds) -> None:
    with opened(image, holds) as reader, opened(image, holds, writable=True) as writer:
        with reader.open_session():
            assert code(lambda: writer.write(b"x", 0)) == "busy"
        writer.write(b"x", 0)
        assert code(reader.open_session) == "busy"
        with opened(image, holds, writable=True) as same:
            assert same.read(0, 1) == b"x"
    assert reader.size() == 4 * MIB


def test_the_agent_s_leases_count_for_what_the_daemon_opens_itself(image: Path, holds: Holds) -> None:
    with image.open("rb") as file:
        with Lease.exclusive(file.fileno()), opened(image, holds) as backend:
            assert code(backend.open_session) == "busy"
        with Lease.shared(file.fileno()), opened(image, holds) as backend:
            backend.open_session().close()
            with opened(image, holds, writable=True) as writer:
                assert code(lambda: writer.write(b"x", 0)) == "busy"
        with opened(image, holds, writable=True) as writer:
            writer.write(b"x", 0)
            with pytest.raises(JobError, match=r"is open|is leased"):
                Lease.shared(file.fileno())


def test_what_the_agent_leased_and_handed_over_is_written(image: Path, holds: Holds) -> None:
    with image.open("r+b") as file, Lease.exclusive(file.fileno()):
        factory = handed_over(lambda _, name: [os.dup(file.fileno())], holds)
        with factory(Opening("fd:one", 1 << 30, writable=True)) as backend:
            backend.write(b"xyz", 0)
            assert not reads(image)
        # the agent has its descriptor still, and the marks are gone
        assert writes(image)


def test_a_whole_image_does_not_replace_a_file_in_use(image: Path, holds: Holds) -> None:
    with in_use(image, "-r"), opened(image, holds, writable=True) as backend:
        assert code(lambda: backend.write_full(io.BytesIO(b"new"), 3, True)) == "busy"
    assert image.read_bytes() == noise(4 * MIB)
    assert [one.name for one in image.parent.iterdir()] == [image.name]


# Block devices


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    whole = tmp_path / "whole"
    whole.write_bytes(noise(8 * MIB))
    with loop(whole) as device:
        yield device


@needs_root
@pytest.mark.root
def test_a_device_is_read_and_written_at_any_offset(device: Path, holds: Holds) -> None:
    expected = bytearray(noise(8 * MIB))
    with opened(device, holds, writable=True) as backend:
        assert backend.size() == backend.capacity() == 8 * MIB
        assert list(backend.extents(5, 100)) == [Extent(5, 100, False)]
        for offset, length in ((0, MIB), (4097, 3 * MIB + 5), (8 * MIB - 100, 100), (5 * MIB + 1, 100)):
            backend.write_from(Given(noise(length, offset)), offset, length)
            expected[offset : offset + length] = noise(length, offset)
        for offset, length in ((7 * MIB, 513), (4 * MIB + 4095, 2), (6 * MIB, MIB)):
            backend.zero(offset, length)
            expected[offset : offset + length] = bytes(length)
        backend.flush()
        assert code_range(lambda: backend.write(b"xx", 8 * MIB - 1))
        sink = Collected()
        with backend.open_session() as session:
            session.copy_to(sink, 0, 8 * MIB)
        assert sink.data == expected
    assert device.read_bytes() == expected


def code_range(call: Callable[[], object]) -> bool:
    with pytest.raises(AgentError) as caught:
        call()
    return caught.value.code == "range"


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("sparse", [False, True])
def test_zeroing_a_device_frees_its_space_only_where_the_ticket_says_so(
    sparse: bool, device: Path, tmp_path: Path, holds: Holds
) -> None:
    with opened(device, holds, writable=True, sparse=sparse) as backend:
        backend.zero(0, 8 * MIB)
        backend.flush()
    allocated = (tmp_path / "whole").stat().st_blocks * 512
    assert (allocated < MIB) == sparse
    assert device.read_bytes() == bytes(8 * MIB)


@needs_root
@pytest.mark.root
def test_a_device_that_is_mounted_is_not_written(device: Path, tmp_path: Path, holds: Holds) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", str(device)], check=True)
    where = tmp_path / "mnt"
    where.mkdir()
    subprocess.run(["mount", str(device), str(where)], check=True)
    try:
        assert code(opened(device, holds, writable=True).size) == "busy"
        assert opened(device, holds).size() == 8 * MIB
    finally:
        subprocess.run(["umount", str(where)], check=True)


@needs_root
@pytest.mark.root
def test_a_link_by_which_root_names_a_device_is_followed(device: Path, holds: Holds) -> None:
    folder = Path("/dev/hostagent-test")
    folder.mkdir()
    try:
        (folder / "lv").symlink_to(device)
        factory = files([str(folder)], holds)
        assert factory(Opening(f"file://{folder}/lv", 10)).size() == 8 * MIB
        assert code(factory(Opening(f"file://{device}", 10)).size) == "denied"
    finally:
        (folder / "lv").unlink(missing_ok=True)
        folder.rmdir()


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("how", ["write", "zero", "whole"])
def test_a_full_disk_is_said_so(how: str, tmp_path: Path, holds: Holds) -> None:
    small = tmp_path / "small"
    small.mkdir()
    disk = tmp_path / "fs"
    with disk.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(disk)], check=True)
    subprocess.run(["mount", "-o", "loop", str(disk), str(small)], check=True)
    try:
        image = small / "disk.raw"
        image.write_bytes(b"old")
        with opened(image, holds, writable=True) as backend:
            if how == "write":
                assert code(lambda: backend.write_from(Given(noise(32 * MIB)), 0, 32 * MIB)) == "no_space"
            elif how == "zero":
                assert code(lambda: backend.zero(0, 64 * MIB)) == "no_space"
            else:
                body = io.BytesIO(noise(32 * MIB))
                assert code(lambda: backend.write_full(body, 32 * MIB, True)) == "no_space"
                assert image.read_bytes() == b"old"
                assert sorted(one.name for one in small.iterdir()) == ["disk.raw", "lost+found"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next flush fails, and none after it."""
    failures = [OSError(5, "Input/output error")]

    def once(fd: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(os, "fdatasync", once)


def test_a_failed_flush_is_told_to_all_who_wrote(image: Path, holds: Holds, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells it once, and takes the pages for written from then on."""
    failing(monkeypatch)
    with opened(image, holds, writable=True) as one, opened(image, holds, writable=True) as two:
        one.write(b"x", 0)
        two.write(b"y", 1)
        assert code(one.flush) == "io_error"
        assert code(two.flush) == "io_error"
        assert code(one.flush) == "io_error"


def test_what_a_failed_flush_lost_is_not_forgotten_with_its_connection(
    image: Path, holds: Holds, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch)
    with opened(image, holds, writable=True) as backend:
        backend.write(bytes(100), 1000)
        backend.zero(8192, 4096)
        assert code(backend.flush) == "io_error"
    with opened(image, holds, writable=True) as backend:
        assert code(backend.flush) == "io_error"
        backend.write(bytes(99), 1000)
        backend.write(bytes(4096), 8192)
        assert code(backend.flush) == "io_error", "one byte is still lost"
    with opened(image, holds, writable=True) as backend:
        backend.write(b"x", 1099)
        backend.flush()
    assert not holds._files


def test_what_is_written_while_a_flush_fails_is_lost_too(
    image: Path, holds: Holds, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch)
    with opened(image, holds, writable=True) as one, opened(image, holds, writable=True) as two:
        two.write(b"x", 0)
        real = os.pwrite

        def meanwhile(fd: int, data: bytes, offset: int) -> int:
            monkeypatch.setattr(os, "pwrite", real)
            number = real(fd, data, offset)
            assert code(two.flush) == "io_error"
            return number

        monkeypatch.setattr(os, "pwrite", meanwhile)
        one.write(b"abc", 100)
        two.write(b"x", 0)
        assert code(two.flush) == "io_error"
        one.write(b"abc", 100)
        two.flush()


def test_a_long_flush_holds_up_nobody_who_closes(image: Path, holds: Holds, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        begun.set()
        assert go_on.wait(30)

    monkeypatch.setattr(os, "fdatasync", slow)
    one, two = opened(image, holds, writable=True), opened(image, holds, writable=True)
    one.write(b"x", 0)
    two.write(b"x", 0)
    flush = threading.Thread(target=one.flush)
    flush.start()
    assert begun.wait(30)
    try:
        close = threading.Thread(target=two.close)
        close.start()
        close.join(10)
        assert not close.is_alive()
        assert flush.is_alive()
    finally:
        go_on.set()
        flush.join(30)
    one.close()


def test_of_one_description_that_was_handed_over_nobody_takes_the_other_s_marks(image: Path, holds: Holds) -> None:
    fd = os.open(image, os.O_RDWR)
    factory = handed_over(lambda _, name: [os.dup(fd)], holds)
    with (
        factory(Opening("fd:disk", 4 * MIB, writable=True)) as writer,
        factory(Opening("fd:disk", 4 * MIB)) as reader,
    ):
        assert reader.read(0, 1) == noise(1)
        with reader.open_session():
            assert code(lambda: writer.write(b"x", 0)) == "busy"
            assert not writes(image)
        writer.write(b"x", 0)
        assert code(lambda: reader.read(0, 1)) == "busy"
        assert not reads(image), "the upload's marks are gone"
    assert writes(image)
    os.close(fd)
