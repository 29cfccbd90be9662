"""An NBD export's bytes and extents in bulk: several requests in flight, each with a buffer of its own.

Measured against a storage daemon with a qcow2 image: of 512 KiB and 1 MiB, and of 1 to 4, 1 MiB × 2 is the best for
reads as for writes, over one connection as over four (tests/bench); with more the caches lose. Answers come in any
order, bytes go out in theirs.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from hostagent.errors import AgentError
from hostagent.nbdclient.connection import ALLOCATION, DEPTH, STATUS_SPAN, Connection, nbd
from hostagent.nbdclient.dial import Fence, Fenced, Server, Waits

PIECE = 1 << 20
IN_FLIGHT = 2
ZERO_STEP = 128 << 20
"""Bytes of one write-zeroes request: short enough that a storage that really writes them can still be stopped."""

FIRST_SPAN = 64 << 20
"""Bytes that the first block status request asks about: a fragmented image's first extents are wanted soon."""
UNTOLD = (0, 1, 0)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the handshake says of an export. `minimum`: bytes of the server's own blocks; `bitmap`: the context of its
    dirty bitmap, if it has exactly one."""

    size: int
    read_only: bool
    multi_conn: bool
    can_flush: bool
    can_zero: bool
    minimum: int
    bitmap: str | None


def _unheard(_: int) -> None:
    """Nobody wants to know."""


class _Slot:
    """A buffer that is used again and again, on whole pages."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._memory)
        self._whole = nbd.Buffer.from_buffer(self.view)

    def buffer(self, length: int) -> Any:
        return self._whole if length == PIECE else nbd.Buffer.from_buffer(self.view[:length])

    def forget(self) -> None:
        """Give the pages back."""
        self._memory.madvise(mmap.MADV_DONTNEED)


_spare: deque[_Slot] = deque()
"""Of connections that were closed: libnbd's binding (1.14) never lets go of a buffer, not even with its connection, so
the next one takes them over."""


class Stream:
    """One connection to an export. It is `broken` after an error that leaves it of no use, and then wants a new one."""

    def __init__(self, server: Server, waits: Waits, fence: Fence, bitmap: str | None = None) -> None:
        """`bitmap` is the context of the dirty bitmap that `status` tells of; without it, the only one there is."""
        self._server = server
        self._connection = Connection(server, waits, fence)
        self._slots: list[_Slot] = []
        self._flying: deque[tuple[int, _Slot, int]] = deque()
        self.broken = False
        try:
            bitmaps = self._connection.bitmaps()
            only = bitmaps[0] if len(bitmaps) == 1 else None
            chosen = bitmap or only
            self._connection.handle.set_pread_initialize(False)
            self._asked = (ALLOCATION, DEPTH, chosen or "")
            self._connection.go(self._asked if chosen else self._asked[:2])
            self.facts = _facts(self._connection.handle, only)
        except BaseException:
            self.close()
            raise

    @property
    def contexts(self) -> tuple[str, ...]:
        """What `status` tells of, in its order."""
        return self._connection.contexts

    def close(self) -> None:
        """Idempotent."""
        self.broken = True
        self._connection.close()
        self._slots += [slot for _, slot, _ in self._flying]
        self._flying.clear()
        self._rest()

    def alive(self) -> bool:
        """Whether the server is still there, as far as its socket tells."""
        if not self.broken:
            with contextlib.suppress(AgentError), self._alive():
                self._connection.serve(0)
        if not self.broken and self._connection.closed:
            self.close()
        return not self.broken

    # Bytes

    def read(self, offset: int, length: int, deliver: Callable[[memoryview], object]) -> None:
        """Give `length` bytes to `deliver`, in order, in pieces that are its own until it returns."""
        end = offset + length
        try:
            while offset < end or self._flying:
                while offset < end and len(self._flying) < IN_FLIGHT:
                    number = min(PIECE, end - offset)
                    with self._slot(_unheard) as slot:
                        self._fly(self._connection.pread(slot.buffer(number), offset), slot, number)
                    offset += number
                slot, number = self._land()
                try:
                    deliver(slot.view[:number])
                finally:
                    self._slots.append(slot)
        except BaseException:
            # What is still to come would have to be read: a new connection is cheaper.
            self.close()
            raise
        finally:
            self._rest()

    def write(
        self,
        fill: Callable[[memoryview], int],
        offset: int,
        length: int | None,
        landed: Callable[[int], object] = _unheard,
    ) -> int:
        """Write what `fill` puts into buffers, `length` bytes or until it puts none; the bytes written.

        `landed` hears of the bytes that the server has acknowledged, in order. Nothing is in flight when this returns
        or raises, unless the stream is `broken`. A write that failed is told even when `fill` failed first."""
        written, filling = 0, False
        try:
            while length is None or written < length:
                with self._slot(landed) as slot:
                    filling = True
                    number = fill(slot.view if length is None else slot.view[: length - written])
                    filling = False
                    if number == 0:
                        self._slots.append(slot)
                        break
                    self._room(offset + written + number)
                    self._fly(self._connection.pwrite(slot.buffer(number), offset + written), slot, number)
                written += number
                self._connection.serve(0)  # while the next piece comes, this one goes
            while self._flying:
                self._slots.append(self._written(landed))
        except BaseException as first:
            whole, failure = self._settle()
            if filling and failure is not None:
                raise failure from first
            if filling:
                landed(whole)
            raise
        finally:
            self._rest()
        return written

    def zero(self, offset: int, length: int, *, sparse: bool) -> None:
        """Make these bytes zeros; `sparse`: their space may be freed."""
        end = offset + length
        while offset < end:
            step = min(ZERO_STEP, end - offset)
            with self._alive():
                self._connection.wait(self._connection.zero(step, offset, no_hole=not sparse))
            offset += step

    def flush(self) -> None:
        """What was written is on stable storage when this returns."""
        with self._alive():
            self._connection.flush()

    def status(self, start: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(length, flags of base:allocation, depth, flags of the bitmap), of exactly these bytes. One answer at a time
        is in memory. What the export does not tell of is data, in the top layer, and clean."""
        if not self.contexts:
            yield length, *UNTOLD
            return
        end, picked, span = start + length, self._picked(), FIRST_SPAN
        while start < end:
            with self._alive():
                answer = self._connection.status(start, min(end - start, span))
            span = min(2 * span, STATUS_SPAN)
            for one in answer:
                size, state, depth, dirty = picked(one + UNTOLD)
                size = min(size, end - start)
                if size:
                    yield size, state, depth, dirty
                start += size

    # Parts

    def _rest(self) -> None:
        """An idle connection keeps no memory of its own, and one that was closed no buffers."""
        for slot in self._slots:
            slot.forget()
        if self.broken:
            _spare.extend(self._slots)
            self._slots.clear()

    def _picked(self) -> Callable[[tuple[int, ...]], tuple[int, int, int, int]]:
        """Makes an answer with UNTOLD behind it complete, whichever contexts it tells of."""
        contexts = self.contexts
        places = [
            1 + contexts.index(context) if context in contexts else 1 + len(contexts) + place
            for place, context in enumerate(self._asked)
        ]
        return itemgetter(0, *places)

    @contextlib.contextmanager
    def _slot(self, landed: Callable[[int], object]) -> Iterator[_Slot]:
        """One that is free, for the block to let fly; it comes back when that fails."""
        slot = self._free(landed)
        try:
            yield slot
        except BaseException:
            self._slots.append(slot)
            raise

    def _free(self, landed: Callable[[int], object]) -> _Slot:
        if self._slots:
            return self._slots.pop()
        if len(self._flying) == IN_FLIGHT:
            return self._written(landed)
        with contextlib.suppress(IndexError):
            return _spare.pop()
        return _Slot()

    def _fly(self, cookie: int, slot: _Slot, number: int) -> None:
        self._flying.append((cookie, slot, number))

    def _land(self) -> tuple[_Slot, int]:
        """The oldest request's buffer, once it is answered."""
        cookie, slot, number = self._flying.popleft()
        try:
            with self._alive():
                self._connection.wait(cookie)
        except BaseException:
            self._slots.append(slot)
            raise
        return slot, number

    def _written(self, landed: Callable[[int], object]) -> _Slot:
        slot, number = self._land()
        try:
            landed(number)
        except BaseException:
            self._slots.append(slot)
            raise
        return slot

    def _settle(self) -> tuple[int, Exception | None]:
        """After a failure: wait for what is still in flight, so that nothing is written later on. The bytes that were
        written, and the first failure among them."""
        whole, failure = 0, None
        while self._flying and not self.broken:
            try:
                slot, number = self._land()
                self._slots.append(slot)
                whole += number
            except (AgentError, Fenced) as error:
                failure = failure or error
        return whole, failure

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """A request that failed leaves the connection as it was; one of which nobody knows what became does not."""
        if self.broken:
            raise AgentError("unavailable", f"{self._server} was closed", remedy="its storage daemon may have ended")
        try:
            yield
        except AgentError as error:
            if error.code in ("unavailable", "timeout"):
                self.close()
            raise
        except BaseException:
            self.close()
            raise

    def _room(self, end: int) -> None:
        if end > self.facts.size:
            raise AgentError("range", f"{self._server} has {self.facts.size} bytes", size=self.facts.size)


def _facts(handle: Any, bitmap: str | None) -> Facts:
    read_only = bool(handle.is_read_only())
    return Facts(
        size=int(handle.get_size()),
        read_only=read_only,
        multi_conn=bool(handle.can_multi_conn()),
        can_flush=bool(handle.can_flush()),
        can_zero=not read_only and bool(handle.can_zero()),
        minimum=max(1, int(handle.get_block_size(nbd.SIZE_MINIMUM))),
        bitmap=bitmap,
    )
