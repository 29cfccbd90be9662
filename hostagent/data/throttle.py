"""Bandwidth: of a ticket, and of the host, fair between tickets.

A rate is a clock of promises: whoever wants to move bytes is told when they are due, and sleeps until then. A ticket's
connections ask the host's clock one after the other (the lane's lock), so that a ticket with eight connections has no
more of it than one with a single one. What was not used for a while is lost but for BURST.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST = 0.1
"""Seconds of the rate that may be caught up after an idle moment."""
_TICK = 0.1  # a sleep is cut here, so that a revocation is noticed


class Rate:
    """`rate` in bytes/s; 0 is no limit."""

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._next = 0.0
        self._lock = threading.Lock()

    def due(self, number: int) -> float:
        """Seconds to wait before these bytes may move."""
        if not self.rate:
            return 0.0
        now = self._clock()
        with self._lock:
            begin = max(self._next, now - BURST)
            self._next = begin + number / self.rate
            return max(0.0, begin - now)


class Lane:
    """One ticket's way: its own rate, then its turn at the host's."""

    def __init__(self, own: Rate, host: Rate) -> None:
        self._own = own
        self._host = host
        self._turn = threading.Lock()
        self.limited = bool(own.rate or host.rate)

    def take(self, number: int, check: Callable[[], None]) -> None:
        """Wait until `number` bytes may move; `check` is called meanwhile, and may raise."""
        if not self.limited:
            return
        with self._turn:
            _sleep(self._own.due(number), check)
            _sleep(self._host.due(number), check)


def _sleep(seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, _TICK))
