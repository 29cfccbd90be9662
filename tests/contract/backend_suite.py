"""What every image backend promises the data daemon: one suite, for NBD exports, files, other daemons, and any backend
that is written against CloudStack's interface alone.

A subclass says in `make` how an image is made and opened. BackendSuite is for all; what a backend need not have is in
suites of its own, to be inherited beside it: RangeSuite here, ExtentsSuite, GuardSuite and StallSuite.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hostagent.data.backends.base import ImageBackend
from hostagent.data.streams import Stopped

MIB = 1 << 20


@dataclass(slots=True)
class Rig:
    """An image that holds `content`, and `now`, what it holds as seen from outside once it was flushed.

    `open()` gives a backend that may write, `open(writable=False)` one that may not. While `stalled`, its storage
    answers nothing. `dirty` are ranges that its bitmap must know, from the first byte to that after the last one.
    """

    open: Callable[..., ImageBackend]
    content: bytes
    now: Callable[[], bytes]
    stalled: Callable[[], AbstractContextManager[object]] | None = None
    dirty: list[tuple[int, int]] = field(default_factory=list)


class Collected:
    """A Sink that keeps everything, and may be stopped at a byte."""

    def __init__(self, stop: int | None = None) -> None:
        self.data = bytearray()
        self._stop = stop

    def write(self, data: memoryview | bytes | bytearray) -> None:
        self.data += data
        if self._stop is not None and len(self.data) >= self._stop:
            raise Stopped

    def send_file(self, fd: int, offset: int, length: int) -> None:
        while length:
            data = os.pread(fd, min(length, MIB), offset)
            assert data
            self.write(data)
            offset, length = offset + len(data), length - len(data)


class Given:
    """A Source of these bytes, which may break off with Stopped after some of them."""

    def __init__(self, data: bytes, stop: int | None = None) -> None:
        self._data = memoryview(data)
        self._stop = len(data) + 1 if stop is None else stop
        self._done = 0

    def read_into(self, buffer: memoryview) -> int:
        if self._done >= self._stop:
            raise Stopped
        number = min(len(buffer), len(self._data) - self._done)
        buffer[:number] = self._data[self._done : self._done + number]
        self._done += number
        return number


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes without zeros that differ from place to place."""
    block = bytes((seed + 7 * number) % 255 + 1 for number in range(251))
    return (block * (length // 251 + 1))[:length]


class BackendSuite(ABC):
    range_write = False
    extents = False

    @abstractmethod
    def make(self, folder: Path) -> AbstractContextManager[Rig]:
        """A fresh image, of at least 4 MiB and not a multiple of one."""

    @pytest.fixture
    def rig(self, folder: Path) -> Iterator[Rig]:
        with self.make(folder) as rig:
            yield rig

    @pytest.fixture
    def backend(self, rig: Rig) -> Iterator[ImageBackend]:
        with rig.open() as backend:
            yield backend

    def test_it_says_what_it_can(self, rig: Rig, backend: ImageBackend) -> None:
        can = backend.get_capabilities()
        assert set(can) == {"read_only", "can_flush", "can_zero"}
        assert not can["read_only"]
        assert backend.max_readers >= 1
        assert backend.max_writers >= 1
        assert backend.block_size >= 1
        assert backend.supports_range_write == self.range_write
        assert backend.supports_extents == self.extents

    def test_it_knows_its_size(self, rig: Rig, backend: ImageBackend) -> None:
        assert backend.size() == len(rig.content)
        with backend.open_session() as session:
            assert session.size() == len(rig.content)

    def test_it_reads_at_borders(self, rig: Rig, backend: ImageBackend) -> None:
        end = len(rig.content)
        for first, last in [(0, 0), (0, 1), (end - 1, end), (end, end), (MIB - 1, MIB + 1), (1, end - 1), (0, end)]:
            assert backend.read(first, last - first) == rig.content[first:last], (first, last)

    def test_a_session_sends_in_order_and_is_read_again(self, rig: Rig, backend: ImageBackend) -> None:
        end = len(rig.content)
        with backend.open_session() as session:
            for first, last in [(0, end), (MIB + 3, end - 5), (end - 1, end), (7, 7)]:
                sink = Collected()
                session.copy_to(sink, first, last - first)
                assert sink.data == rig.content[first:last], (first, last)
            assert session.read(0, 10) == rig.content[:10]

    def test_sessions_follow_one_another(self, rig: Rig, backend: ImageBackend) -> None:
        for _ in range(3):
            session = backend.open_session()
            assert session.read(5, 5) == rig.content[5:10]
            session.close()
            session.close()

    def test_a_stopped_sink_ends_the_sending_and_the_backend_is_of_use(self, rig: Rig, backend: ImageBackend) -> None:
        sink = Collected(stop=100)
        with backend.open_session() as session, pytest.raises(Stopped):
            session.copy_to(sink, 0, len(rig.content))
        assert rig.content.startswith(sink.data)
        assert backend.read(0, len(rig.content)) == rig.content

    @pytest.mark.parametrize("flush", [False, True])
    def test_it_is_written_whole(self, rig: Rig, backend: ImageBackend, flush: bool) -> None:
        data = pattern(len(rig.content), 9)
        stream = io.BytesIO(data + b"and what belongs to somebody else")
        assert backend.write_full(stream, len(data), flush) == len(data)
        assert stream.tell() == len(data)
        if not flush:
            backend.flush()
        backend.close()
        assert rig.now() == data

    def test_a_stream_that_ends_early_is_an_error(self, rig: Rig, backend: ImageBackend) -> None:
        with pytest.raises(Exception, match=r"."):
            backend.write_full(io.BytesIO(pattern(MIB)), len(rig.content), True)

    def test_it_is_closed_twice_and_before_its_first_use(self, rig: Rig) -> None:
        for used in (False, True):
            backend = rig.open()
            if used:
                assert backend.read(0, 1) == rig.content[:1]
            backend.close()
            backend.close()


class RangeSuite(BackendSuite):
    """For a backend that can be written at any place."""

    range_write = True

    def test_what_is_written_is_there(self, rig: Rig, backend: ImageBackend) -> None:
        model, end = bytearray(rig.content), len(rig.content)
        for number, (first, last) in enumerate([(0, 1), (end - 1, end), (MIB - 3, 2 * MIB + 5), (9, 9)]):
            data = pattern(last - first, number)
            backend.write(data, first)
            model[first:last] = data
            assert backend.read(first, last - first) == data
        backend.flush()
        assert backend.read(0, end) == model
        backend.close()
        assert rig.now() == model

    def test_it_takes_what_a_source_gives(self, rig: Rig, backend: ImageBackend) -> None:
        model, end = bytearray(rig.content), len(rig.content)
        for number, (first, last) in enumerate([(3, end - 1), (0, 0), (end - 1, end), (MIB, 2 * MIB)]):
            data = pattern(last - first, number + 5)
            assert backend.write_from(Given(data), first, last - first) == len(data)
            model[first:last] = data
        data = pattern(end - 77, 11)
        assert backend.write_from(Given(data), 77, None) == len(data)
        model[77:end] = data
        backend.flush()
        backend.close()
        assert rig.now() == model

    def test_a_source_that_stops_leaves_what_came_before(self, rig: Rig, backend: ImageBackend) -> None:
        data = pattern(len(rig.content), 3)
        with pytest.raises(Stopped):
            backend.write_from(Given(data, stop=2 * MIB), 0, len(data))
        assert backend.read(0, 2 * MIB) == data[: 2 * MIB]
        tail = 2 * MIB + MIB  # a piece that was begun may be there or not
        assert backend.read(tail, len(data) - tail) == rig.content[tail:]
        backend.flush()

    def test_zeroed_bytes_are_zeros(self, rig: Rig, backend: ImageBackend) -> None:
        model, end = bytearray(rig.content), len(rig.content)
        for first, last in [(1, 2), (MIB - 1, MIB + 70000), (end - 1, end), (5, 5)]:
            backend.zero(first, last - first)
            model[first:last] = bytes(last - first)
            assert backend.read(0, end) == model
        backend.zero(0, end)
        backend.flush()
        backend.close()
        assert rig.now() == bytes(end)
