"""What of a file was written and is not known to be on stable storage, and what of it a failed flush has lost.

The kernel tells a failed write-back once, to one of those who share the description, and takes the pages for written
from then on. So it is remembered here, for the file and not for who had it open, until those bytes are written again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hostagent.blocks import size_of
from hostagent.data.backends.faults import fault
from hostagent.errors import AgentError
from hostagent.rangeset import RangeSet

_END = sys.maxsize


class Unflushed:
    """Of one file. Thread-safe."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._syncing = threading.Lock()
        self._failures = 0
        self._written = RangeSet(whole=True)
        self._lost = RangeSet(whole=True)
        self._error: OSError | None = None

    @property
    def lost(self) -> bool:
        return self._lost.parts > 0

    @contextmanager
    def writing(self, begin: int, end: int) -> Iterator[None]:
        """Around a write of these bytes. What a flush that failed meanwhile has made of them, nobody knows."""
        before, done = self._failures, False
        try:
            yield
            done = True
        finally:
            with self._turn:
                self._written.add(begin, end)
                if self._failures != before:
                    self._lost.add(begin, end)
                elif done:
                    self._lost.discard(begin, end)

    def sync(self, fd: int, name: str) -> None:
        """What was written is on stable storage; AgentError when it is not, or when something was lost before."""
        with self._syncing:
            with self._turn:
                covered, self._written = self._written, RangeSet(whole=True)
            try:
                os.fdatasync(fd)
            except OSError as error:
                self._failed(error, covered, size_of(fd))
                raise _refusal(error, name) from error
            with self._turn:
                self._lost.discard(size_of(fd), _END)
                if self._error is not None and self.lost:
                    raise _refusal(self._error, name)

    def _failed(self, error: OSError, covered: RangeSet, size: int) -> None:
        with self._turn:
            self._failures += 1
            self._error = error
            covered.update(self._written)
            self._written.clear()
            if not len(covered):  # written by somebody before us
                covered.add(0, size)
            self._lost.update(covered)


def _refusal(error: OSError, name: str) -> AgentError:
    found = fault(error, name, "flushed")
    found.remedy = f"{found.remedy}; then send again what is not durable"
    return found
