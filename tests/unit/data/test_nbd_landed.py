"""What a write over NBD says that it has written, when the one who gives the bytes fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent.errors import AgentError
from hostagent.nbdclient.dial import Fence, Server, Waits
from hostagent.nbdclient.stream import PIECE, Stream
from tests.contract.backend_guards import refused
from tests.unit.data.nbd_fake import WRITE, Behaviour, FakeServer

PATIENCE = 20.0


class _Nth(dict[int, int]):
    """ENOSPC for one write, and then there is space again."""

    def __init__(self, failing: int) -> None:
        super().__init__()
        self._failing = failing
        self._writes = 0

    def get(self, kind: int, default: Any = 0) -> Any:
        self._writes += kind == WRITE
        return 28 if kind == WRITE and self._writes == self._failing else default


class _Broke(Exception):
    """The side that the bytes come from."""


def _giving(pieces: int) -> Any:
    left = pieces

    def fill(view: memoryview) -> int:
        nonlocal left
        if not left:
            raise _Broke
        left -= 1
        view[:] = b"\xaa" * len(view)
        return len(view)

    return fill


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    server = FakeServer(tmp_path / "s", bytes(8 * PIECE), Behaviour())
    yield server
    server.close()


@pytest.fixture
def stream(server: FakeServer, tmp_path: Path) -> Iterator[Stream]:
    stream = Stream(Server("", str(tmp_path / "s")), Waits(PATIENCE, PATIENCE, "a", "b"), Fence())
    yield stream
    stream.close()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_write_that_failed_is_told_though_the_source_failed_first(
    server: FakeServer, stream: Stream, failing: int
) -> None:
    server.how.errors = _Nth(failing)
    landed: list[int] = []
    with refused("no_space"):
        stream.write(_giving(2), 0, 8 * PIECE, landed.append)
    assert sum(landed) in (0, (failing - 1) * PIECE)  # the first one's may have been heard before
    assert not stream.broken


def test_a_server_that_goes_is_told_though_the_source_failed_first(server: FakeServer, stream: Stream) -> None:
    server.how.drop = WRITE
    landed: list[int] = []
    with pytest.raises(AgentError) as error:
        stream.write(_giving(2), 0, 8 * PIECE, landed.append)
    assert error.value.code in ("unavailable", "io_error")
    assert landed == []


def test_what_was_written_counts_when_the_source_fails(server: FakeServer, stream: Stream) -> None:
    landed: list[int] = []
    with pytest.raises(_Broke):
        stream.write(_giving(6), 0, 8 * PIECE, landed.append)
    assert sum(landed) == 6 * PIECE
    assert server.data == b"\xaa" * 6 * PIECE + bytes(2 * PIECE)


def test_bytes_count_in_order_once_they_are_acknowledged(server: FakeServer, stream: Stream) -> None:
    there: list[bool] = []
    done = 0

    def landed(number: int) -> None:
        nonlocal done
        there.append(server.data[done : done + number] == b"\xaa" * number)
        done += number

    assert stream.write(_giving(8), 0, 8 * PIECE, landed) == done == 8 * PIECE
    assert there == [True] * 8
