"""The workers of a transfer: each has a connection and a handle of the local image of its own, and takes the next
piece.

What a worker has written counts as done when the other side said so, and as durable when a flush over the same
connection succeeded. A connection that breaks takes with it what was not flushed: those pieces are done again, and
never more than `flush_interval` is open to that. The first error that is final stops all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from hostagent.client.extents import Kind, Piece
from hostagent.client.options import PIECE, Options
from hostagent.client.progress import Progress, Show, Speed, Tell
from hostagent.client.retry import Retries
from hostagent.client.trouble import Retry
from hostagent.rangeset import RangeSet

Passed = Callable[[int], None]
LEAST_INTERVAL = 0.1  # seconds
TICK = 0.25  # seconds between two looks of the thread that waits


class Ends(Protocol):
    """The two ends of one worker: its connection to the server, and its handle of the local image."""

    volatile: bool
    """What was written and not flushed may be lost with the connection; else even a part of a piece is kept."""

    def connect(self) -> None:
        """To the server, where it is not connected. Raises Retry."""

    def move(self, begin: int, end: int, passed: Passed) -> None:
        """Copy these bytes; `passed` hears of them in order, and may raise."""

    def zero(self, begin: int, end: int) -> None:
        """Make these bytes zeros on the side that is written."""

    def flush(self) -> None:
        """What was written by this worker is durable when it returns."""

    def abort(self) -> None:
        """From another thread: whatever waits for the server fails soon."""

    def close(self) -> None: ...


@dataclass(slots=True)
class Count:
    """Bytes that went over the wire, bytes that are zeros and did not have to, tries after a failure."""

    moved: int = 0
    zeroed: int = 0
    retries: int = 0


class Crew:
    """`record` gets what became durable, from time to time and at the end, in the thread that called `run`."""

    def __init__(
        self,
        pieces: Iterator[Piece],
        open_ends: Callable[[], Ends],
        options: Options,
        *,
        size: int,
        done: RangeSet,
        record: Callable[[list[Piece]], None],
        stop: threading.Event,
        tell: Tell,
    ) -> None:
        self.options = options
        self.open_ends = open_ends
        self.stop = stop
        self.tell = tell
        self.count = Count()
        self._pieces = pieces
        self._size = size
        self._done = done.copy()
        self._fresh: list[Piece] = []
        self._record = record
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._workers: list[Worker] = []
        self._errors: list[BaseException] = []
        self._left = 0
        self._shown = 0
        self._speed = Speed()

    # The thread that waits

    def run(self, workers: int, show: Show) -> None:
        """Until all is done and durable. Raises the first error; then nothing works any more."""
        self._workers = [Worker(self, number) for number in range(workers)]
        recorded = time.monotonic()
        try:
            for worker in self._workers:
                worker.start()
            while not self._over():
                self._tick(show)
                if time.monotonic() - recorded >= self.options.flush_interval:
                    recorded = time.monotonic()
                    self._save()
            if self._errors:
                raise self._errors[0]
            self._tick(show)
        finally:
            self._end()
            self._save()

    def _over(self) -> bool:
        with self._changed:
            if not self._errors and self._left < len(self._workers):
                self._changed.wait(TICK)
            return bool(self._errors) or self._left == len(self._workers)

    def _tick(self, show: Show) -> None:
        with self._lock:
            done = len(self._done)
        done = min(self._size, done + sum(worker.moving for worker in self._workers))
        self._shown = max(self._shown, done)
        state = "flushing" if self._shown == self._size else "running"
        show(Progress(state, self._shown, self._size, self._speed.at(time.monotonic(), self._shown)))

    def _end(self) -> None:
        self.stop.set()
        for worker in self._workers:
            worker.abort()
        deadline = time.monotonic() + self.options.patience.stop
        for worker in self._workers:
            if worker.ident is not None:
                worker.join(max(0.0, deadline - time.monotonic()))

    def _save(self) -> None:
        with self._lock:
            fresh, self._fresh = self._fresh, []
        if fresh:
            self._record(fresh)

    # The workers

    def next(self) -> Piece | None:
        """What nobody works on yet; None when there is no more."""
        with self._lock:
            for piece in self._pieces:
                if piece.kind is not Kind.SKIP:
                    return piece
                self._done.add(piece.begin, piece.end)
                self._fresh.append(piece)
        return None

    def done(self, piece: Piece) -> None:
        with self._lock:
            self._done.add(piece.begin, piece.end)
            if piece.kind is Kind.ZERO:
                self.count.zeroed += piece.end - piece.begin

    def moved(self, number: int) -> None:
        with self._lock:
            self.count.moved += number

    def retried(self) -> None:
        with self._lock:
            self.count.retries += 1

    def durable(self, pieces: Iterable[Piece]) -> None:
        with self._lock:
            self._fresh.extend(pieces)

    def failed(self, error: BaseException) -> None:
        with self._changed:
            self._errors.append(error)
            self._changed.notify_all()

    def left(self) -> None:
        """One worker has come to its end."""
        with self._changed:
            self._left += 1
            self._changed.notify_all()


class Stopped(Exception):
    """The crew was stopped."""


class Worker(threading.Thread):
    def __init__(self, crew: Crew, number: int) -> None:
        super().__init__(name=f"transfer-{number}", daemon=True)
        self._crew = crew
        self._ends: Ends | None = None
        self._again: deque[Piece] = deque()
        self._open: list[Piece] = []
        """Done, and not durable yet."""
        self._opened = 0.0
        self._interval = crew.options.flush_interval
        """Seconds between two flushes: none for a moment after a failure, or a bad line would never get ahead."""
        self._most = PIECE
        """Bytes of the next request: as many as go over the line between two flushes."""
        self._retries = Retries(crew.options.patience, stop=crew.stop, told=crew.tell)
        self.moving = 0
        """Bytes of the piece at hand."""

    def run(self) -> None:
        try:
            self._ends = self._crew.open_ends()
            try:
                self._work(self._ends)
            finally:
                self._ends.close()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - the thread that waits raises it
            self._crew.failed(error)
        finally:
            self._crew.left()

    def abort(self) -> None:
        """From another thread."""
        if self._ends is not None:
            self._ends.abort()

    def _work(self, ends: Ends) -> None:
        while True:
            while (piece := self._next()) is not None:
                self._piece(ends, piece)
                if time.monotonic() - self._opened >= self._interval:
                    self._flush(ends)
            self._flush(ends)
            if not self._again:
                return

    def _next(self) -> Piece | None:
        if self._crew.stop.is_set():
            raise Stopped
        piece = self._again.popleft() if self._again else self._crew.next()
        if piece is None or piece.kind is not Kind.DATA or piece.end - piece.begin <= self._most:
            return piece
        middle = piece.begin + self._most
        self._again.appendleft(piece._replace(begin=middle))
        return piece._replace(end=middle)

    def _piece(self, ends: Ends, piece: Piece) -> None:
        """What a failure leaves of it is to be done again."""
        began = time.monotonic()
        try:
            ends.connect()
            self._move(ends, piece)
        except Retry as error:
            moved, self.moving = self.moving, 0
            kept = piece.begin if ends.volatile else piece.begin + moved
            if kept > piece.begin:
                self._moved(piece._replace(end=kept))
            self._again.appendleft(piece._replace(begin=kept))
            self._fit(moved // 2)
            self._failed(ends, error)
            return
        finally:
            self.moving = 0
        if piece.kind is Kind.DATA:
            rate = (piece.end - piece.begin) / max(time.monotonic() - began, 1e-3)
            self._fit(int(rate * self._crew.options.flush_interval))
        self._moved(piece)
        if not ends.volatile:
            self._retries.progress()

    def _moved(self, piece: Piece) -> None:
        if not self._open:
            self._opened = time.monotonic()
        self._open.append(piece)
        self._crew.done(piece)

    def _fit(self, number: int) -> None:
        self._most = min(max(PIECE, number // PIECE * PIECE), self._crew.options.request_size)

    def _move(self, ends: Ends, piece: Piece) -> None:
        if piece.kind is Kind.ZERO:
            ends.zero(piece.begin, piece.end)
        elif piece.begin < piece.end:
            ends.move(piece.begin, piece.end, self._passed)

    def _passed(self, number: int) -> None:
        if self._crew.stop.is_set():
            raise Stopped
        self.moving += number
        self._crew.moved(number)

    def _flush(self, ends: Ends) -> None:
        """Make durable what is done; where the connection breaks, it is to be done again."""
        if not self._open:
            return
        try:
            ends.flush()
        except Retry as error:
            self._failed(ends, error)
            return
        self._retries.progress()
        self._interval = min(max(LEAST_INTERVAL, 2 * self._interval), self._crew.options.flush_interval)
        self._crew.durable(self._open)
        self._open = []

    def _failed(self, ends: Ends, error: Retry) -> None:
        if self._crew.stop.is_set():
            raise Stopped
        if ends.volatile:
            self._again.extend(self._open)
            self._open = []
            self._interval = 0.0
        self._crew.retried()
        self._retries.wait(error)
