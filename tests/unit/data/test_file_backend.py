"""Raw files by the data daemon: what it opens, what it reads and writes, what it leaves alone."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostagent.data.backends import whole
from hostagent.data.backends.base import Extent, ImageBackend
from hostagent.data.backends.file import files, handed_over
from hostagent.data.backends.holds import Holds
from hostagent.data.backends.registry import Opening
from hostagent.data.streams import PIECE, PeerGone, Stopped
from hostagent.errors import CODES, AgentError
from hostagent.extents import merged
from tests.ends import Collected, Given, noise
from tests.links import no_link

MIB = 1 << 20
Opened = Callable[..., ImageBackend]


@pytest.fixture
def holds() -> Holds:
    return Holds()


@pytest.fixture
def opened(tmp_path: Path, holds: Holds) -> Opened:
    factory = files([str(tmp_path)], holds)

    def open_(path: Path | str, *, size: int = 1 << 40, writable: bool = False, sparse: bool = False) -> ImageBackend:
        return factory(Opening(f"file://{path}", size, writable=writable, sparse=sparse))

    return open_


def image(tmp_path: Path, size: int = 3 * MIB + 1234, name: str = "disk.raw") -> tuple[Path, bytes]:
    path, data = tmp_path / name, noise(size)
    path.write_bytes(data)
    return path, data


def copied(backend: ImageBackend, offset: int, length: int) -> bytes:
    sink = Collected()
    with backend.open_session() as session:
        session.copy_to(sink, offset, length)
    return bytes(sink.data)


def code(call: Callable[[], object]) -> str:
    with pytest.raises(AgentError) as caught:
        call()
    assert caught.value.remedy or caught.value.code == "range"
    return caught.value.code


# What is opened


@pytest.mark.parametrize(("kernel", "expected"), [(errno.EACCES, "denied"), (errno.EINVAL, "image_changed")])
def test_a_link_that_cannot_be_read_is_no_fault_of_the_storage(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch, kernel: int, expected: str
) -> None:
    (tmp_path / "there").mkdir()
    path, _ = image(tmp_path / "there")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there")
    no_link(monkeypatch, link, kernel)
    assert code(lambda: opened(link / path.name).size()) == expected
    assert CODES[expected].http < 500


def test_a_file_below_an_allowed_folder_is_read(tmp_path: Path, opened: Opened) -> None:
    path, data = image(tmp_path)
    with opened(path) as backend:
        assert backend.size() == len(data)
        assert copied(backend, 0, len(data)) == data
        assert copied(backend, 4097, PIECE + 3) == data[4097 : 4097 + PIECE + 3]
        assert backend.read(10, 20) == data[10:30]
        assert backend.read(len(data) - 5, 5) == data[-5:]


def test_a_name_with_escapes_is_the_name_that_they_stand_for(tmp_path: Path, opened: Opened) -> None:
    path, data = image(tmp_path, 100, name="a b?c.raw")
    with opened(str(path).replace(" ", "%20").replace("?", "%3F")) as backend:
        assert backend.read(0, 100) == data


@pytest.mark.parametrize(
    "url", ["file:relative", "file://host/x", "file:///a?b", "file:///a#b", "file:///a%00b", "file:"]
)
def test_a_url_that_names_no_file_is_refused(url: str, holds: Holds) -> None:
    assert code(lambda: files(["/"], holds)(Opening(url, 1))) == "invalid"


@pytest.mark.parametrize("way", ["elsewhere", "dots", "folder link", "prefix"])
def test_nothing_outside_the_allowed_folders_is_opened(way: str, tmp_path: Path, holds: Holds) -> None:
    allowed, other = tmp_path / "allowed", tmp_path / "allowed-not"
    allowed.mkdir()
    other.mkdir()
    secret, _ = image(other, 10)
    (allowed / "link").symlink_to(other)
    paths = {
        "elsewhere": secret,
        "dots": allowed / "../allowed-not/disk.raw",
        "folder link": allowed / "link/disk.raw",
        "prefix": f"{allowed}-not/disk.raw",
    }
    factory = files([str(allowed)], holds)
    assert code(factory(Opening(f"file://{paths[way]}", 10)).size) == "denied"
    missing = str(paths[way]).replace("disk.raw", "none")
    assert code(factory(Opening(f"file://{missing}", 10)).size) == "denied", "tells what there is elsewhere"


def test_dots_and_links_inside_the_allowed_folder_are_followed(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "a").mkdir()
    _, data = image(tmp_path, 10)
    (tmp_path / "b").symlink_to(tmp_path)
    assert opened(tmp_path / "a/../b/disk.raw").read(0, 10) == data


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "hard link", "device", "missing"])
def test_what_is_no_image_is_refused(kind: str, tmp_path: Path, opened: Opened, holds: Holds) -> None:
    path, _ = image(tmp_path, 10)
    other = tmp_path / "other"
    if kind == "link":
        other.symlink_to(path)
    elif kind == "folder":
        other.mkdir()
    elif kind == "fifo":
        os.mkfifo(other)
    elif kind == "hard link":
        other.hardlink_to(path)
    if kind == "device":
        assert code(files(["/dev"], holds)(Opening("file:///dev/zero", 10)).size) == "invalid"
        return
    assert code(opened(other).size) == ("not_found" if kind == "missing" else "invalid")


def test_a_file_without_storage_is_refused(holds: Holds) -> None:
    assert code(files(["/proc"], holds)(Opening("file:///proc/version", 10)).size) == "invalid"


# Handed over


def handed(fds: list[int], holds: Holds, *, writable: bool = False, size: int = 1 << 30) -> ImageBackend:
    factory = handed_over(lambda _, name: [os.dup(fd) for fd in fds] if name == "one" else [], holds)
    return factory(Opening("fd:one", size, writable=writable))


def test_a_descriptor_is_read_and_written(tmp_path: Path, holds: Holds) -> None:
    path, data = image(tmp_path)
    fd = os.open(path, os.O_RDWR)
    path.rename(tmp_path / "gone")
    with handed([fd], holds, writable=True) as backend:
        assert copied(backend, 1, 100) == data[1:101]
        backend.write(b"abc", 5)
        backend.flush()
    assert (tmp_path / "gone").read_bytes() == data[:5] + b"abc" + data[8:]
    assert os.fstat(fd).st_size == len(data), "the daemon closed what is not its own"
    os.close(fd)


def test_a_second_descriptor_writes_directly(tmp_path: Path, holds: Holds) -> None:
    path, _ = image(tmp_path, 2 * MIB)
    fds = [os.open(path, os.O_RDWR), os.open(path, os.O_WRONLY | os.O_DIRECT)]
    new = noise(2 * MIB, 2)
    with handed(fds, holds, writable=True) as backend:
        backend.write_from(Given(new), 0, len(new))
        backend.flush()
    assert path.read_bytes() == new
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("flags", [[os.O_RDONLY], [os.O_WRONLY], [os.O_RDWR, os.O_RDWR], [os.O_RDWR | os.O_DIRECT], []])
def test_a_descriptor_of_another_kind_is_refused_and_not_kept(flags: list[int], tmp_path: Path, holds: Holds) -> None:
    path, _ = image(tmp_path)
    fds = [os.open(path, flag) for flag in flags]
    before = len(os.listdir("/proc/self/fd"))
    assert code(handed(fds, holds, writable=True).size) == "invalid"
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in fds:
        os.close(fd)


def test_a_pipe_is_no_image(holds: Holds) -> None:
    one, other = os.pipe()
    assert code(handed([one], holds).size) == "invalid"
    os.close(one)
    os.close(other)


# Writing


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "zero"]),
            st.integers(0, 2 * MIB) | st.integers(0, 600).map(lambda n: n * 4096),
            st.integers(0, 20000) | st.integers(0, 300).map(lambda n: n * 4096) | st.just(PIECE + 4096),
        ),
        max_size=6,
    ),
    st.booleans(),
    st.booleans(),
)
def test_ranges_at_any_offset_are_written_and_zeroed(
    tmp_path: Path, opened: Opened, steps: list[tuple[str, int, int]], sparse: bool, grows: bool
) -> None:
    size = 4 * MIB + 100
    expected = bytearray(size if not grows else 0)
    path = tmp_path / "w.raw"
    path.write_bytes(noise(size, 5) if not grows else b"")
    expected[:] = path.read_bytes()
    with opened(path, size=size, writable=True, sparse=sparse) as backend:
        for number, (what, offset, length) in enumerate(steps):
            expected.extend(bytes(max(0, offset + length - len(expected)) if length else 0))
            if what == "zero":
                backend.zero(offset, length)
                expected[offset : offset + length] = bytes(length)
            else:
                data = noise(length, number)
                assert backend.write_from(Given(data, length), offset, length if number % 2 else None) == length
                expected[offset : offset + length] = data
        backend.flush()
        assert backend.size() == len(expected)
    assert path.read_bytes() == expected


def test_a_part_of_a_page_is_written_beside_what_others_write_in_it(tmp_path: Path, opened: Opened) -> None:
    """Two connections whose ranges meet within a page."""
    path, _ = image(tmp_path, 4 * MIB)
    one, other = noise(MIB + 100, 1), noise(2 * MIB, 2)
    with opened(path, writable=True) as first, opened(path, writable=True) as second:
        for _ in range(3):
            second.write_from(Given(other), MIB + 100, len(other))
            first.write_from(Given(one), 0, len(one))
        first.flush()
    assert path.read_bytes()[: 3 * MIB + 100] == one + other


def test_what_goes_beyond_the_end_is_refused_before_it_is_written(tmp_path: Path, opened: Opened) -> None:
    path, data = image(tmp_path, 8192)
    with opened(path, size=10000, writable=True) as backend:
        assert backend.capacity() == 10000
        assert code(lambda: backend.write_from(Given(bytes(2000)), 8100, 2000)) == "range"
        assert code(lambda: backend.zero(9000, 1001)) == "range"
        assert path.read_bytes() == data
        assert code(lambda: backend.write_from(Given(bytes(2000)), 8192, None)) == "range"
        backend.write(b"x", 9999)
    assert path.read_bytes() == data + bytes(9999 - 8192) + b"x"


def test_a_body_that_ends_early_leaves_what_came(tmp_path: Path, opened: Opened) -> None:
    path, data = image(tmp_path, 4 * MIB)
    with opened(path, writable=True) as backend, pytest.raises(PeerGone):
        backend.write_from(Given(bytes(PIECE + 5)), 0, 3 * PIECE)
    assert path.read_bytes()[PIECE + 5 :] == data[PIECE + 5 :]


def test_a_read_only_ticket_writes_nothing(tmp_path: Path, opened: Opened) -> None:
    path, data = image(tmp_path, 100)
    with opened(path) as backend:
        assert backend.get_capabilities() == {"read_only": True, "can_flush": False, "can_zero": False}
        assert not backend.supports_range_write
        for call in (
            lambda: backend.write(b"x", 0),
            lambda: backend.zero(0, 1),
            backend.flush,
            lambda: backend.write_full(io.BytesIO(b"x"), 1, True),
        ):
            assert code(call) == "denied"
    assert path.read_bytes() == data


def test_zeroing_frees_space_only_where_the_ticket_says_so(tmp_path: Path, opened: Opened) -> None:
    path, _ = image(tmp_path, 8 * MIB)
    with opened(path, writable=True) as backend:
        backend.zero(0, 8 * MIB)
        backend.flush()
    assert path.stat().st_blocks * 512 >= 8 * MIB
    with opened(path, writable=True, sparse=True) as backend:
        backend.zero(MIB, 4 * MIB)
        backend.flush()
    assert path.stat().st_blocks * 512 <= 4 * MIB + 65536
    assert path.read_bytes() == bytes(8 * MIB)


# What lies where


def test_extents_are_those_of_the_file(tmp_path: Path, opened: Opened) -> None:
    path = tmp_path / "sparse.raw"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        for offset in (0, 1 << 30, (1 << 40) - 65536):
            file.seek(offset)
            file.write(noise(65536))
    with opened(path) as backend:
        found = list(merged(backend.extents(0, 1 << 40)))
        assert sum(one.length for one in found) == 1 << 40
        data = [(one.start, one.length) for one in found if not one.zero]
        assert data == [(0, 65536), (1 << 30, 65536), ((1 << 40) - 65536, 65536)]
        assert not any(one.hole for one in found), "a raw image has one layer, which has all of it"
        assert list(backend.extents(100, 65536)) == [Extent(100, 65436, False), Extent(65536, 100, True)]
        assert list(backend.extents(2 << 30, 10)) == [Extent(2 << 30, 10, True)]
        assert list(backend.extents(5, 0)) == []
        assert backend.get_allocation_extents()[0] == {"start": 0, "length": 65536, "zero": False, "hole": False}


def test_extents_are_asked_for_one_at_a_time(tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse.raw"
    with path.open("wb") as file:
        for number in range(100):
            file.seek(number * 131072)
            file.write(b"x" * 4096)
    calls: list[int] = []
    seek = os.lseek
    monkeypatch.setattr(os, "lseek", lambda *args: (calls.append(1), seek(*args))[1])
    with opened(path) as backend:
        found = backend.extents(0, path.stat().st_size)
        next(found)
        assert len(calls) <= 2
        assert len(list(found)) == 198


def test_a_raw_image_has_no_bitmaps(tmp_path: Path, opened: Opened) -> None:
    path, _ = image(tmp_path, 100)
    with opened(path) as backend:
        assert backend.dirty_context is None
        with pytest.raises(AgentError, match="bitmap"):
            list(backend.dirty_extents(0, 100))


# A whole image


def attempt(opened: Opened, path: Path, body: bytes, length: int | None = None) -> int:
    with opened(path, writable=True) as backend:
        return backend.write_full(io.BytesIO(body), len(body) if length is None else length, True)


def test_a_whole_image_replaces_the_file_with_its_owner_and_mode(tmp_path: Path, opened: Opened) -> None:
    path, _ = image(tmp_path)
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12345, 54321)
    before, new = path.stat(), noise(2 * MIB + 7, 9)
    assert attempt(opened, path, new) == len(new)
    after = path.stat()
    assert path.read_bytes() == new
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert after.st_ino != before.st_ino
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_whole_image_is_made_where_there_is_none(tmp_path: Path, opened: Opened) -> None:
    path = tmp_path / "new.raw"
    with opened(path, size=100, writable=True) as backend:
        assert not backend.supports_range_write
        assert (backend.capacity(), backend.max_writers) == (100, 1)
        assert code(lambda: backend.write(b"abc", 0)) == "not_found"
        backend.write_full(io.BytesIO(b"abc"), 3, False)
        assert backend.supports_range_write
        assert backend.size() == 3
        backend.flush()
    assert path.read_bytes() == b"abc"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_nlink == 1


def test_a_file_that_is_not_there_is_not_read(tmp_path: Path, opened: Opened) -> None:
    for writable in (False, True):
        backend = opened(tmp_path / "none", writable=writable)
        assert code(backend.size) == "not_found"
        assert code(backend.open_session) == "not_found"


def test_a_short_body_leaves_the_old_file_and_nothing_else(tmp_path: Path, opened: Opened) -> None:
    path, data = image(tmp_path)
    before = path.stat()
    with pytest.raises(PeerGone):
        attempt(opened, path, noise(MIB), 2 * MIB)
    assert path.read_bytes() == data
    assert path.stat().st_ino == before.st_ino
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_stream_that_fails_leaves_no_new_file(tmp_path: Path, opened: Opened) -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: object) -> int:
            raise Stopped

    with opened(tmp_path / "new.raw", writable=True) as backend, pytest.raises(Stopped):
        backend.write_full(Broken(), 100, True)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_daemon_left_is_recognised_and_removed(tmp_path: Path, opened: Opened) -> None:
    path, _ = image(tmp_path)
    part = tmp_path / f".{path.name}{whole.SUFFIX}"
    part.write_bytes(b"half")
    attempt(opened, path, b"new")
    assert path.read_bytes() == b"new"
    assert not part.exists()


def test_of_two_uploads_of_a_whole_image_one_is_refused(tmp_path: Path, opened: Opened) -> None:
    path = tmp_path / "new.raw"
    refused: list[str] = []

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if not refused:
                refused.append(code(lambda: attempt(opened, path, b"second")))
            return super().read(size)

    with opened(path, writable=True) as backend:
        backend.write_full(Slow(b"first"), 5, True)
    assert refused == ["busy"]
    assert path.read_bytes() == b"first"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path, opened: Opened) -> None:
    path = tmp_path / "new.raw"

    class Late(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            path.write_bytes(b"theirs")
            return super().read(size)

    with opened(path, writable=True) as backend:
        assert code(lambda: backend.write_full(Late(b"ours"), 4, True)) == "conflict"
    assert path.read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_open_connection_goes_on_with_the_new_file(tmp_path: Path, opened: Opened) -> None:
    path, data = image(tmp_path)
    with opened(path, writable=True) as other:
        assert other.size() == len(data)
        attempt(opened, path, b"new image")
        assert other.read(0, 9) == b"new image"
        other.write(b"NEW", 0)
    assert path.read_bytes() == b"NEW image"


def test_a_whole_image_larger_than_the_ticket_is_refused(tmp_path: Path, opened: Opened) -> None:
    path, data = image(tmp_path)
    with opened(path, size=10, writable=True) as backend:
        assert code(lambda: backend.write_full(io.BytesIO(bytes(11)), 11, True)) == "range"
    assert path.read_bytes() == data


def test_a_long_name_has_room_for_the_unfinished_one(tmp_path: Path, opened: Opened) -> None:
    path = tmp_path / ("x" * 255)
    attempt(opened, path, b"abc")
    assert path.read_bytes() == b"abc"


def test_what_was_handed_over_is_written_in_place_and_whole_only(tmp_path: Path, holds: Holds) -> None:
    path, data = image(tmp_path, 100)
    with path.open("r+b") as file, handed([file.fileno()], holds, writable=True) as backend:
        assert code(lambda: backend.write_full(io.BytesIO(b"short"), 5, True)) == "invalid"
        assert path.read_bytes() == data
        backend.write_full(io.BytesIO(data[::-1]), 100, True)
    assert path.read_bytes() == data[::-1]


# Ends


def test_a_fence_ends_what_runs_and_refuses_what_comes(tmp_path: Path, opened: Opened) -> None:
    path, data = image(tmp_path)
    backend = opened(path, writable=True)
    sink = Collected(before=lambda: backend.fence() if len(sink.data) >= PIECE else None)
    with backend.open_session() as session, pytest.raises(Stopped):
        session.copy_to(sink, 0, len(data))
    assert len(sink.data) <= 2 * PIECE
    with pytest.raises(Stopped):
        backend.write(b"x", 0)
    with pytest.raises(Stopped):
        backend.open_session()
    backend.fence()
    backend.close()
    assert path.read_bytes() == data


def test_a_file_that_was_cut_is_never_padded(tmp_path: Path, opened: Opened) -> None:
    path, data = image(tmp_path)
    with opened(path) as backend, backend.open_session() as session:
        sink = Collected(before=lambda: os.truncate(path, MIB + 5))
        with pytest.raises(AgentError) as caught:
            session.copy_to(sink, 0, len(data))
        assert caught.value.code == "image_changed"
        assert sink.data == data[: MIB + 5]


def test_nothing_stays_open(tmp_path: Path, opened: Opened) -> None:
    path, _ = image(tmp_path)
    before = sorted(os.listdir("/proc/self/fd"))
    for writable in (False, True):
        with opened(path, writable=writable) as backend:
            backend.read(0, 10)
            next(backend.extents(0, 10))
            if writable:
                backend.write(bytes(8192), 0)
    assert sorted(os.listdir("/proc/self/fd")) == before
