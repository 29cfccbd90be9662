"""The agent's own NBD conversations: a handshake as proof that an export is served, the copy-up of a pull's slice, and
the look for what layers have allocated and no bitmap tells of.

Blocking, for a worker thread. What a slice leaves is durable when it returns: its last request is a flush (docs: NBD
protocol `NBD_CMD_CACHE`, `NBD_CMD_FLUSH`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hostagent.errors import AgentError
from hostagent.nbdclient.connection import (
    ALLOCATION,
    BITMAP,
    DEPTH,
    DIRTY,
    STATUS_SPAN,
    ZERO,
    Connection,
    available,
    nbd,
)
from hostagent.nbdclient.dial import Server, Waits

MIB = 1 << 20
SETTING = "exports.nbd_timeout"
ZERO_PIECE = 128 * MIB
"""Bytes of one write-zeroes request: short enough that a storage that really writes them can still be stopped."""
TICK = 0.05
RANGES_MOST = 1 << 16
"""Ranges that `unrecorded` tells apart. Each is one request later on; a stranger's image may have billions."""

Range = tuple[int, int]
"""From the first byte to that after the last one."""


@dataclass(frozen=True, slots=True)
class Slice:
    """What to copy up. `begin`, `goal`, `end` (the image's) and `increment` are bytes; the top `depth` layers belong to
    the pull.

    `reader` is the export to read from when copying up must stop at a layer (copy-on-read with a bottom); otherwise
    NBD_CMD_CACHE on `control` does it. `may_zero`: the control export is ours alone and writable.
    """

    socket: str
    control: str
    begin: int
    goal: int
    end: int
    increment: int
    depth: int
    reader: str | None = None
    may_zero: bool = False
    bandwidth: int = 0
    budget: int = 64 * MIB
    seconds: float = 0.5
    in_flight: int = 16
    request_size: int = MIB
    timeout: float = 10.0


def handshake(socket: str, export: str, timeout: float) -> int:
    """Connect, negotiate, and leave. The export's size in bytes: whoever connects now is served."""
    with _errors(), _connection(socket, export, timeout) as connection:
        return int(connection.handle.get_size())


def copy_up(work: Slice, stop: threading.Event) -> int:
    """Make part of [begin, goal) local to the top layer, and durable. Where it got to: all below is done.

    Raises AgentError no_space or io_error; what was copied before that stays.
    """
    with _errors(), _connection(work.socket, work.control, work.timeout, (ALLOCATION, DEPTH)) as control:
        if work.reader is None:
            return _Copy(work, control, control, stop).run()
        with _connection(work.socket, work.reader, work.timeout) as reader:
            return _Copy(work, control, reader, stop).run()


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: for one answer (exports.nbd_timeout), and for all of them since `began` (exports.merge_timeout)."""

    answer: float
    whole: float
    began: float = field(default_factory=time.monotonic)

    def refuse_late(self) -> None:
        """Raise AgentError timeout when the time is up."""
        if time.monotonic() - self.began > self.whole:
            message = f"what the layers have allocated was not compared with their bitmaps within {self.whole:g} s"
            raise AgentError("timeout", f"{message} (exports.merge_timeout)", remedy="raise it, or make a full copy")


def unrecorded(socket: str, export: str, bitmap: str, depth: int, grain: int, patience: Patience) -> list[Range]:
    """What the layers down to `depth`, as the export counts them, have allocated and the export's bitmap calls clean.

    In order and in whole grains (bytes), which are doubled when the ranges become too many: it is never less than that,
    and may be more.
    """
    contexts = (BITMAP + bitmap, DEPTH)
    with _errors(), _connection(socket, export, patience.answer, contexts) as reader:
        size, position = int(reader.handle.get_size()), 0
        found = _Ranges(grain, size)
        while position < size:
            patience.refuse_late()
            for length, flags, layer in reader.status(position, min(size - position, STATUS_SPAN)):
                if 1 <= layer <= depth and not flags & DIRTY:
                    found.add(position, position + length)
                position += length
        return found.all


def write_zeroes(socket: str, export: str, ranges: Sequence[Range], patience: Patience) -> None:
    """Write zeroes to all of these ranges, one after the other."""
    with _errors(), _connection(socket, export, patience.answer) as writer:
        for begin, end in ranges:
            for offset in range(begin, end, STATUS_SPAN):
                patience.refuse_late()
                writer.wait(writer.zero(min(STATUS_SPAN, end - offset), offset))


class _Ranges:
    """Whole grains of a disk of `size` bytes, added in order; never more than RANGES_MOST."""

    def __init__(self, grain: int, size: int) -> None:
        self._grain = grain
        self._size = size
        self.all: list[Range] = []

    def add(self, begin: int, end: int) -> None:
        begin = begin // self._grain * self._grain
        end = min(-(-end // self._grain) * self._grain, self._size)
        if self.all and begin <= self.all[-1][1]:
            self.all[-1] = (self.all[-1][0], max(end, self.all[-1][1]))
            return
        self.all.append((begin, end))
        while len(self.all) > RANGES_MOST:
            self._grain *= 2
            ranges, self.all = self.all, []
            for one in ranges:
                self.add(*one)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What is asked of a storage daemon of our own fails for want of space or time, or else for a fault of its."""
    try:
        yield
    except AgentError as error:
        if not available() or error.code in ("no_space", "timeout", "limit"):
            raise
        raise AgentError("io_error", error.message, remedy=error.remedy) from error


@contextlib.contextmanager
def _connection(socket: str, export: str, timeout: float, contexts: Sequence[str] = ()) -> Iterator[Connection]:
    try:
        connection = Connection(Server(export, socket), Waits(timeout, timeout, SETTING, SETTING))
    except AgentError as error:
        if error.code != "timeout":
            raise
        # Its monitor answered a moment ago, so the likely cause is a full house.
        remedy = "disconnect NBD clients, or raise qsd.max_connections"
        raise AgentError("limit", error.message, remedy=remedy) from error
    with connection:
        connection.go(contexts)
        if connection.contexts != tuple(contexts):
            raise AgentError("io_error", f"export {export!r} does not tell what is allocated")
        yield connection


class _Copy:
    """One slice. `done` grows in order: a request that is in flight keeps the cursor below itself."""

    def __init__(self, work: Slice, control: Connection, mover: Connection, stop: threading.Event) -> None:
        self._work = work
        self._control = control
        self._mover = mover
        self._stop = stop
        self._flying: dict[int, int] = {}
        self._moved = 0
        self._position = work.begin
        self._began = time.monotonic()

    def run(self) -> int:
        while self._position < self._work.goal and not self._enough():
            self._position = self._span(self._position)
        if self._position >= self._work.goal:
            self._position = self._further(self._position)
        while self._flying:
            self._reap()
        self._control.flush()
        return self._position

    def _span(self, position: int) -> int:
        """Go through one span of known extents; the new position."""
        length = min(self._work.goal - position, STATUS_SPAN)
        for extent, zero, depth in self._extents(position, length):
            end = min(position + extent, self._work.goal)
            if 2 <= depth <= self._work.depth:
                position = self._extent(position, end, zero=zero)
                if position < end:
                    return position
            position = end
        return position

    def _extents(self, offset: int, length: int) -> list[tuple[int, bool, int]]:
        """(length, reads as zeros, depth) from `offset` on; may stop early. Depth 0: in no layer; 1: in the top."""
        return [(size, bool(flags & ZERO), depth) for size, flags, depth in self._control.status(offset, length)]

    def _further(self, position: int) -> int:
        """Whole increments beyond the goal in which no data has to be moved: a hole is not worth a step of its own."""
        while position < self._work.end and not self._enough():
            stop = min(position + self._work.increment, self._work.end)
            zeros = self._only_zeros(position, stop)
            if zeros is None or any(self._extent(begin, end, zero=True) < end for begin, end in zeros):
                return position
            position = stop
        return position

    def _only_zeros(self, position: int, stop: int) -> list[tuple[int, int]] | None:
        """What must be written as zeros to make [position, stop) local; None when there is data to move."""
        found = []
        while position < stop:
            for extent, zero, depth in self._extents(position, min(stop - position, STATUS_SPAN)):
                end = min(position + extent, stop)
                if 2 <= depth <= self._work.depth:
                    if not (zero and self._work.may_zero):
                        return None
                    found.append((position, end))
                position = end
        return found

    def _extent(self, position: int, end: int, *, zero: bool) -> int:
        zero = zero and self._work.may_zero
        piece = ZERO_PIECE if zero else self._work.request_size
        while position < end and not self._enough():
            length = min(piece, end - position)
            while len(self._flying) >= self._work.in_flight:
                self._reap()
            self._send(position, length, zero=zero)
            position += length
        return position

    def _send(self, offset: int, length: int, *, zero: bool) -> None:
        if zero:
            self._flying[self._control.zero(length, offset)] = 0
            return
        if self._work.reader is not None:
            self._flying[self._mover.pread(nbd.Buffer(length), offset)] = length
        else:
            self._flying[self._mover.cache(length, offset)] = length
        self._moved += length
        self._pace()

    def _reap(self) -> None:
        """Wait until at least one request is answered."""

        def any_done() -> bool:
            for cookie in list(self._flying):
                moved = self._flying[cookie]
                owner = self._mover if moved else self._control
                if owner.completed(cookie):
                    del self._flying[cookie]
                    return True
            return False

        owner = self._mover if any(self._flying.values()) else self._control
        owner.until(any_done)

    def _pace(self) -> None:
        """Keep below the bandwidth, at the rate since this slice began."""
        if self._work.bandwidth:
            due = self._began + self._moved / self._work.bandwidth
            while (left := due - time.monotonic()) > 0 and not self._stop.is_set():
                self._mover.serve(min(left, TICK))

    def _enough(self) -> bool:
        late = time.monotonic() - self._began > self._work.seconds
        begun = self._moved > 0 or self._position > self._work.begin
        return self._stop.is_set() or self._moved >= self._work.budget or (late and begun)
