"""Things that another thread tells, handed to the event loop in order, through a queue with a limit.

Who tells is never blocked. When the queue is full the oldest goes, and the receiver finds LOST in its place: it must
read anew what it wants to know.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final, Generic, Literal, TypeVar

T = TypeVar("T")

AT_ONCE = 100
"""Things that are handed over in one turn of the loop: other work goes between."""


class _Marker(Enum):
    LOST = "lost"


LOST: Final = _Marker.LOST
Lost = Literal[_Marker.LOST]


class Handover(Generic[T]):
    """`put` from any thread; `deliver` is called on the loop, once `start` was, and until `stop`."""

    def __init__(self, deliver: Callable[[T | Lost], None], *, size: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._queue: deque[T] = deque(maxlen=size)
        self._lock = threading.Lock()
        self._lossy = False
        self._scheduled = True  # until `start`: nothing is delivered before
        self._stopped = False
        self.dropped = 0

    def put(self, thing: T) -> None:
        with self._lock:
            if len(self._queue) == self._queue.maxlen:
                self._lossy = True
                self.dropped += 1
            self._queue.append(thing)
            wake, self._scheduled = not self._scheduled, True
        if wake:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._turn)

    def start(self) -> None:
        self._turn()

    def stop(self) -> None:
        """What is still queued goes nowhere."""
        self._stopped = True

    def _turn(self) -> None:
        for _ in range(AT_ONCE):
            with self._lock:
                if self._stopped or not (self._queue or self._lossy):
                    self._scheduled = self._stopped  # after the stop nothing wakes us again
                    return
                thing: T | Lost = LOST if self._lossy else self._queue.popleft()
                self._lossy = False
            try:
                self._deliver(thing)
            except BaseException:
                self._loop.call_soon(self._turn)  # whatever is wrong with one thing, the others are told
                raise
        self._loop.call_soon(self._turn)
