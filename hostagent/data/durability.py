"""What of a ticket's image is on stable storage, and what may have been lost.

A write is acknowledged before it is durable; what makes it so is a flush that began after it, at the server that took
it. So each connection's writes wait here until a flush covers them: its own, or another's where the image says that a
flush of one covers all, and the writer's connection is still there when it has ended (else the server may have been
another one by then). What cannot be covered any more, because a flush failed or a connection broke, is lost, and no
flush succeeds before it is written again: nobody may take a later flush for the one that did not come through.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator

from hostagent.errors import AgentError
from hostagent.rangeset import RangeSet


class _Written:
    """By one writer, and in no flush yet: what is there for sure, and all that may be lost."""

    def __init__(self) -> None:
        self.sure = RangeSet()
        self.at_risk = RangeSet(whole=True)

    def add(self, begin: int, end: int) -> None:
        self.sure.add(begin, end)
        self.at_risk.add(begin, end)

    def discard(self, begin: int, end: int) -> None:
        self.sure.discard(begin, end)
        self.at_risk.discard(begin, end)

    def copy(self) -> _Written:
        other = _Written()
        other.sure, other.at_risk = self.sure.copy(), self.at_risk.copy()
        return other


class Durability:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._durable = RangeSet()
        self._lost = RangeSet(whole=True)
        self._pending: dict[object, _Written] = {}
        self._writing: dict[object, tuple[object, int, int]] = {}
        self._flushes: list[dict[object, _Written]] = []

    def durable(self) -> list[tuple[int, int]]:
        """From the first byte to that after the last, in order."""
        with self._lock:
            return self._durable.pairs()

    def pending(self, writer: object) -> bool:
        """Whether it has written what no flush has covered."""
        with self._lock:
            written = self._pending.get(writer)
            return (written is not None and written.at_risk.parts > 0) or any(
                owner is writer for owner, _, _ in self._writing.values()
            )

    @contextlib.contextmanager
    def writing(self, writer: object, op: object, begin: int, end: int, done: Callable[[], int]) -> Iterator[None]:
        """Around a write of these bytes; `done` says how many there were when it has ended well.

        Not durable any more, from now on and whatever comes, nor made so by a flush that has begun."""
        with self._lock:
            self._writing[op] = writer, begin, end
            self._durable.discard(begin, end)
            for written in itertools.chain(self._pending.values(), *(flush.values() for flush in self._flushes)):
                written.discard(begin, end)
        try:
            yield
            with self._lock:
                mine = self._pending.setdefault(writer, _Written())
                last = begin + done()
                mine.add(begin, last)
                self._lost.discard(begin, last)
                for other, (_, first, after) in self._writing.items():
                    if other is not op:  # what it leaves there is its own to tell
                        mine.discard(first, after)
        finally:
            with self._lock:
                del self._writing[op]

    @contextlib.contextmanager
    def flushing(self, writer: object, *, shared: bool, intact: Callable[[object], bool]) -> Iterator[None]:
        """Around a flush over this writer's connection. `shared`: it covers what all have written, as far as these are
        `intact` when it has ended: still connected to the server that took it.

        AgentError io_error while something is lost, and after a flush in which something was."""
        with self._lock:
            self._refuse_lost()
            chosen = self._pending if shared else {writer: self._pending.get(writer, _Written())}
            covered = {one: written.copy() for one, written in chosen.items()}
            self._flushes.append(covered)
        try:
            yield
        except BaseException:
            self._lose(covered)
            raise
        else:
            with self._lock:
                others = [one for one in covered if one is not writer]
            self._lose([one for one in others if not intact(one)])
            with self._lock:
                for one, written in covered.items():
                    if one in self._pending:
                        self._durable.update(written.sure)
                        for begin, end in written.at_risk.pairs():
                            self._pending[one].discard(begin, end)
                self._refuse_lost()
        finally:
            with self._lock:
                self._flushes = [one for one in self._flushes if one is not covered]

    def left(self, writer: object) -> None:
        """It has no connection any more; what it wrote and no flush covered is lost."""
        self._lose([writer])

    def _lose(self, writers: Iterable[object]) -> None:
        with self._lock:
            for one in list(writers):
                written = self._pending.pop(one, None)
                if written is not None:
                    self._lost.update(written.at_risk)
                for flush in self._flushes:
                    flush.pop(one, None)

    def _refuse_lost(self) -> None:
        if lost := self._lost.pairs():
            begin, end = lost[0]
            message = (
                f"what was written before may be lost: {len(self._lost)} bytes, the first from {begin} to {end - 1}"
            )
            raise AgentError("io_error", message, remedy="write it again, then flush")
