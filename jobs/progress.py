"""How far, how fast, how long still. Only what was reported: nothing here invents progress."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from jobs.model import Cursor

WINDOW = 20
"""Samples that the rate is taken over: ten seconds at the default interval, enough to smooth a writeback stall."""


@dataclass(frozen=True, slots=True)
class View:
    rate: float
    eta: float | None
    stalled: float


def advance(old: Cursor, new: Cursor) -> Cursor:
    """The cursor never goes back within a job; `end` may grow, and `cur` stays within it."""
    end = max(old.end, new.end)
    return Cursor(min(max(old.cur, new.cur), end), end)


class Progress:
    """A sliding window over (time, cur)."""

    def __init__(self, at: float, cursor: Cursor) -> None:
        self._samples: deque[tuple[float, int]] = deque([(at, cursor.cur)], maxlen=WINDOW)
        self._moved = at
        self._cursor = cursor

    def update(self, at: float, cursor: Cursor) -> None:
        if cursor.cur > self._cursor.cur:
            self._moved = at
        self._cursor = cursor
        self._samples.append((at, cursor.cur))

    def view(self, at: float) -> View:
        (t0, c0), (t1, c1) = self._samples[0], self._samples[-1]
        rate = (c1 - c0) / (t1 - t0) if t1 > t0 else 0.0
        left = self._cursor.end - self._cursor.cur
        return View(rate=rate, eta=left / rate if rate > 0 else None, stalled=max(0.0, at - self._moved))
