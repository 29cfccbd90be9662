"""The agent's own NBD conversations: a handshake as proof that an export is served, the copy-up of a pull's slice, and
the look for what layers have allocated and no bitmap tells of.

Blocking, for a worker thread. libnbd keeps the protocol; sockets are polled here, in Python, so that every wait has a
deadline and can be stopped, and so that no other thread waits for the interpreter meanwhile. What a slice leaves is
durable when it returns: its last request is a flush (docs: libnbd(3), NBD protocol `NBD_CMD_CACHE`, `NBD_CMD_FLUSH`).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hostagent.errors import AgentError

nbd: Any
try:
    nbd = importlib.import_module("nbd")
except ImportError:  # python3-libnbd is a distribution package; without it exports and incremental pulls are off
    nbd = None

MIB = 1 << 20
STATUS_SPAN = 1 << 30
"""Bytes that one block status request asks about."""
ZERO_PIECE = 128 * MIB
"""Bytes of one write-zeroes request: short enough that a storage that really writes them can still be stopped."""
TICK_MS = 50
HOLE_OR_ZERO = 2  # NBD_STATE_ZERO in base:allocation
DIRTY = 1  # NBD_STATE_DIRTY in qemu:dirty-bitmap
ALLOCATION, DEPTH, BITMAP = "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:"
RANGES_MOST = 1 << 16
"""Ranges that `unrecorded` tells apart. Each is one request later on; a stranger's image may have billions."""

Range = tuple[int, int]
"""From the first byte to that after the last one."""


def available() -> bool:
    return nbd is not None


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
    with _errors(f"export {export!r} at {socket!r}"), _Connection(socket, export, timeout) as connection:
        return int(connection.handle.get_size())


def copy_up(work: Slice, stop: threading.Event) -> int:
    """Make part of [begin, goal) local to the top layer, and durable. Where it got to: all below is done.

    Raises AgentError no_space or io_error; what was copied before that stays.
    """
    with (
        _errors(f"export {work.control!r} at {work.socket!r}"),
        _Connection(work.socket, work.control, work.timeout, contexts=(ALLOCATION, DEPTH)) as control,
    ):
        if work.reader is None:
            return _Copy(work, control, control, stop).run()
        with _Connection(work.socket, work.reader, work.timeout) as reader:
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
    with (
        _errors(f"export {export!r} at {socket!r}"),
        _Connection(socket, export, patience.answer, contexts=contexts) as reader,
    ):
        size, position = int(reader.handle.get_size()), 0
        found = _Ranges(grain, size)
        while position < size:
            patience.refuse_late()
            extents = reader.status(position, min(size - position, STATUS_SPAN))
            if not extents:
                raise AgentError("io_error", f"export {export!r} does not tell what is allocated")
            for length, flags, layer in extents:
                if 1 <= layer <= depth and not flags & DIRTY:
                    found.add(position, position + length)
                position += length
        return found.all


def write_zeroes(socket: str, export: str, ranges: Sequence[Range], patience: Patience) -> None:
    """Write zeroes to all of these ranges, one after the other."""
    with _errors(f"export {export!r} at {socket!r}"), _Connection(socket, export, patience.answer) as writer:
        for begin, end in ranges:
            for offset in range(begin, end, STATUS_SPAN):
                patience.refuse_late()
                writer.zero(offset, min(STATUS_SPAN, end - offset))


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
def _errors(what: str) -> Iterator[None]:
    """What libnbd raises, in a call or as a request's end, as AgentError."""
    if nbd is None:
        raise AgentError("unavailable", "the libnbd binding is not installed", remedy="apt install python3-libnbd")
    try:
        yield
    except nbd.Error as error:
        raise _translated(error, what) from error


class _Connection:
    """An NBD connection whose every wait ends."""

    def __init__(self, socket: str, export: str, timeout: float, *, contexts: Sequence[str] = ()) -> None:
        self._timeout = timeout
        self._what = f"export {export!r} at {socket!r}"
        self.handle: Any = nbd.NBD()
        self.handle.set_export_name(export)
        self._contexts = contexts
        for context in contexts:
            self.handle.add_meta_context(context)
        try:
            self.handle.aio_connect_unix(socket)
            self.until(lambda: bool(self.handle.aio_is_ready()))
        except AgentError as error:
            if error.code != "timeout":
                raise
            # Its monitor answered a moment ago, so the likely cause is a full house.
            raise AgentError(
                "limit",
                f"{self._what} took no connection within {timeout:g} s (exports.nbd_timeout)",
                remedy="disconnect NBD clients, or raise qsd.max_connections",
            ) from error

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.handle.aio_is_ready():
                self.handle.aio_disconnect(0)
        except nbd.Error:
            pass
        self.handle = None  # libnbd closes with the last reference

    def until(self, done: Callable[[], bool]) -> None:
        """Serve the connection until `done`; AgentError timeout when nothing comes for `timeout` seconds."""
        deadline = time.monotonic() + self._timeout
        while not done():
            if self.serve(TICK_MS):
                deadline = time.monotonic() + self._timeout
            elif time.monotonic() > deadline:
                raise AgentError(
                    "timeout",
                    f"{self._what} did not answer within {self._timeout:g} s (exports.nbd_timeout)",
                    remedy="see whether its storage hangs",
                )

    def serve(self, milliseconds: float) -> bool:
        """Wait for the socket and do what it is ready for. Whether it was ready for anything."""
        direction = self.handle.aio_get_direction()
        wanted = 0
        if direction & nbd.AIO_DIRECTION_READ:
            wanted |= select.POLLIN
        if direction & nbd.AIO_DIRECTION_WRITE:
            wanted |= select.POLLOUT
        poll = select.poll()
        poll.register(self.handle.aio_get_fd(), wanted)
        ready = poll.poll(milliseconds)
        for _, event in ready:
            if event & select.POLLIN and direction & nbd.AIO_DIRECTION_READ:
                self.handle.aio_notify_read()
            elif event & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
                self.handle.aio_notify_write()
            elif event & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                raise AgentError("io_error", f"{self._what} was closed", remedy="its storage daemon may have ended")
        return bool(ready)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool, int]]:
        """(length, reads as zeros, depth) from `offset` on; may stop early. Depth 0: in no layer; 1: in the top."""
        return [(size, bool(flags & HOLE_OR_ZERO), depth) for size, flags, depth in self.status(offset, length)]

    def status(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """(length, flags of the first context, those of the second) from `offset` on; may stop early."""
        found: dict[str, list[int]] = {}

        def extent(context: str, _: int, entries: list[int], __: Any) -> int:
            found[context] = entries
            return 0

        cookie = self.handle.aio_block_status(length, offset, extent)
        self.until(lambda: self.completed(cookie))
        first, second = (found.get(context, []) for context in self._contexts)
        return _merged(first, second)

    def zero(self, offset: int, length: int) -> None:
        """Write zeroes, and wait until that is done."""
        cookie = self.handle.aio_zero(length, offset)
        self.until(lambda: self.completed(cookie))

    def completed(self, cookie: int) -> bool:
        return bool(self.handle.aio_command_completed(cookie))


class _Copy:
    """One slice. `done` grows in order: a request that is in flight keeps the cursor below itself."""

    def __init__(self, work: Slice, control: _Connection, mover: _Connection, stop: threading.Event) -> None:
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
        cookie = self._control.handle.aio_flush()
        self._control.until(lambda: self._control.completed(cookie))
        return self._position

    def _span(self, position: int) -> int:
        """Go through one span of known extents; the new position."""
        length = min(self._work.goal - position, STATUS_SPAN)
        for extent, zero, depth in self._control.extents(position, length):
            end = min(position + extent, self._work.goal)
            if 2 <= depth <= self._work.depth:
                position = self._extent(position, end, zero=zero)
                if position < end:
                    return position
            position = end
        return position

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
            for extent, zero, depth in self._control.extents(position, min(stop - position, STATUS_SPAN)):
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
            self._flying[self._control.handle.aio_zero(length, offset)] = 0
            return
        if self._work.reader is not None:
            self._flying[self._mover.handle.aio_pread(nbd.Buffer(length), offset)] = length
        else:
            self._flying[self._mover.handle.aio_cache(length, offset)] = length
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
                self._mover.serve(min(left * 1000, TICK_MS))

    def _enough(self) -> bool:
        late = time.monotonic() - self._began > self._work.seconds
        begun = self._moved > 0 or self._position > self._work.begin
        return self._stop.is_set() or self._moved >= self._work.budget or (late and begun)


def _merged(allocation: list[int], depths: list[int]) -> list[tuple[int, int, int]]:
    """Two lists of (length, flags) pairs cut at each other's borders; as long as the shorter one."""
    merged: list[tuple[int, int, int]] = []
    first, second = _pairs(allocation), _pairs(depths)
    length_a = length_d = flags = depth = 0
    while True:
        try:
            if length_a == 0:
                length_a, flags = next(first)
            if length_d == 0:
                length_d, depth = next(second)
        except StopIteration:
            return merged
        length = min(length_a, length_d)
        merged.append((length, flags, depth))
        length_a -= length
        length_d -= length


def _pairs(entries: list[int]) -> Iterator[tuple[int, int]]:
    return zip(entries[::2], entries[1::2], strict=True)


def _translated(error: Any, what: str) -> AgentError:
    number = error.errnum
    if number in (errno.ENOSPC, errno.EDQUOT):
        return AgentError("no_space", f"no space left while pulling through {what}", remedy="make space, then go on")
    if number in (errno.EIO, None, 0):
        return AgentError("io_error", f"Input/output error on {what}", remedy="look at the storage below the chain")
    return AgentError("io_error", f"{what}: {error.string}", remedy="see whether its storage daemon still runs")
