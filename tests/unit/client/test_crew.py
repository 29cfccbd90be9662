"""Workers on a line that is slow, and breaks."""

from __future__ import annotations

import threading
import time

from hostagent.client.crew import Crew, Passed
from hostagent.client.extents import Kind, Piece
from hostagent.client.options import PIECE, Options, Patience
from hostagent.client.trouble import Lost
from hostagent.rangeset import RangeSet

SIZE = 8 * PIECE
STEP = PIECE // 8
RATE = 10 * PIECE
"""Bytes a second."""
HOLDS = 0.4
"""Seconds after which a connection breaks: half of what all of it takes."""


class Line:
    """One connection; what was not flushed when it breaks is lost."""

    volatile = True

    def __init__(self) -> None:
        self.kept = RangeSet()
        self._sent: list[tuple[int, int]] = []
        self._until = 0.0

    def connect(self) -> None:
        if not self._until:
            self._until = time.monotonic() + HOLDS

    def move(self, begin: int, end: int, passed: Passed) -> None:
        for _ in range(begin, end, STEP):
            time.sleep(STEP / RATE)
            self._try()
            passed(STEP)
        self._sent.append((begin, end))

    def zero(self, begin: int, end: int) -> None:
        raise AssertionError

    def flush(self) -> None:
        self._try()
        for begin, end in self._sent:
            self.kept.add(begin, end)
        self._sent.clear()

    def _try(self) -> None:
        if time.monotonic() > self._until:
            self._until = 0.0
            self._sent.clear()
            raise Lost("unreachable", "the connection broke")

    def abort(self) -> None: ...

    def close(self) -> None: ...


def test_a_line_that_breaks_sooner_than_a_request_would_take_gets_ahead() -> None:
    line, recorded = Line(), list[Piece]()
    crew = Crew(
        iter([Piece(0, SIZE, Kind.DATA)]),
        lambda: line,
        Options(flush_interval=0.1, request_size=SIZE, patience=Patience(retry_wait=0.001, retry_for=30)),
        size=SIZE,
        done=RangeSet(),
        record=recorded.extend,
        stop=threading.Event(),
        tell=lambda _: None,
    )
    crew.run(1, lambda _: None)
    assert len(line.kept) == SIZE
    assert sum(piece.end - piece.begin for piece in recorded) == SIZE


class Kept(Line):
    """What it wrote is on this side, and stays when the line breaks, once, near the end."""

    volatile = False

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self._broke = False

    def move(self, begin: int, end: int, passed: Passed) -> None:
        for at in range(begin, end, STEP):
            if at == PIECE - STEP and not self._broke:
                self._broke = True
                raise Lost("unreachable", "the connection broke")
            self.written += STEP
            passed(STEP)

    def flush(self) -> None: ...


def test_what_is_shown_while_it_waits_to_try_again_is_there() -> None:
    line, shown = Kept(), list[tuple[int, int]]()
    crew = Crew(
        iter([Piece(0, PIECE, Kind.DATA)]),
        lambda: line,
        Options(patience=Patience(retry_wait=1.0)),
        size=PIECE,
        done=RangeSet(),
        record=lambda pieces: None,
        stop=threading.Event(),
        tell=lambda _: None,
    )
    crew.run(1, lambda progress: shown.append((progress.done, line.written)))
    assert all(done <= written for done, written in shown) and len(shown) > 1
    assert shown[-1] == (PIECE, PIECE)
