"""A download into an image that a storage daemon writes, whose server's connection breaks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent.client.crew import Crew
from hostagent.client.extents import Kind, Piece
from hostagent.client.fetching import StreamFetcher
from hostagent.client.options import Options, Patience
from hostagent.client.throttle import Throttle
from hostagent.client.trouble import Lost
from hostagent.nbdclient.dial import Fence, Server, Waits
from hostagent.nbdclient.stream import PIECE, Stream
from hostagent.rangeset import RangeSet
from tests.contract.backend_guards import refused
from tests.unit.data.nbd_fake import WRITE, Behaviour, FakeServer

SIZE = 8 * PIECE
PATIENCE = 20.0


class _Body:
    """Breaks after two pieces, if it is to."""

    def __init__(self, begin: int, length: int, breaks: bool) -> None:
        self._at, self._end = begin, begin + length
        self._most = begin + 2 * PIECE if breaks else self._end

    def fill(self, view: memoryview) -> int:
        if self._at >= self._most < self._end:
            raise Lost("unreachable", "the connection broke")
        number = min(len(view), self._end - self._at)
        view[:number] = bytes([1 + self._at // PIECE]) * number
        self._at += number
        return number

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Remote:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def connect(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...

    def get(self, begin: int, length: int) -> _Body:
        self.asked.append(begin)
        return _Body(begin, length, breaks=len(self.asked) == 2)


class _FirstWrite(dict[int, int]):
    """ENOSPC for the first write, and then there is space again."""

    failed = False

    def get(self, kind: int, default: Any = 0) -> Any:
        if kind != WRITE or self.failed:
            return default
        self.failed = True
        return 28


class _Download:
    def __init__(self, folder: Path) -> None:
        self.image = FakeServer(folder / "s", bytes(SIZE), Behaviour())
        self.remote: Any = _Remote()
        self.recorded: list[Piece] = []
        self._server = Server("", str(folder / "s"))

    def run(self) -> None:
        stop = threading.Event()

        def ends() -> StreamFetcher:
            stream = Stream(self._server, Waits(PATIENCE, PATIENCE, "a", "b"), Fence())
            return StreamFetcher(self.remote, stream, Throttle(0, stop))

        pieces = iter([Piece(0, SIZE, Kind.DATA)])
        options = Options(patience=Patience(retry_wait=0.01))
        crew = Crew(
            pieces,
            ends,
            options,
            size=SIZE,
            done=RangeSet(),
            record=self.recorded.extend,
            stop=stop,
            tell=lambda _: None,
        )
        crew.run(1, lambda _: None)


@pytest.fixture
def download(tmp_path: Path) -> Iterator[_Download]:
    download = _Download(tmp_path)
    yield download
    download.image.close()


def test_it_goes_on_behind_what_was_written(download: _Download) -> None:
    download.run()
    assert download.remote.asked == [0, PIECE, 3 * PIECE, 4 * PIECE]
    assert download.image.data == b"".join(bytes([number]) * PIECE for number in range(1, 9))
    assert [piece.begin for piece in download.recorded] == download.remote.asked
    assert [piece.end for piece in download.recorded] == [*download.remote.asked[1:], SIZE]


def test_a_local_write_that_failed_meanwhile_ends_it(download: _Download) -> None:
    download.image.how.errors = _FirstWrite()
    with refused("no_space"):
        download.run()
    assert download.recorded == []
