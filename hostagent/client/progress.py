"""How far a transfer is, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of the image: `done` never goes back, and is `size` once all was done; what that is worth the transfer says
    when it returns. `rate` is bytes/s of late, `state` one of connecting, running, flushing, verifying."""

    state: str
    done: int = 0
    size: int = 0
    rate: float | None = None

    @property
    def eta(self) -> float | None:
        """Seconds that are left at this rate."""
        return (self.size - self.done) / self.rate if self.rate else None


Show = Callable[[Progress], None]
Tell = Callable[[str], None]
"""A remark for people: a retry, a journal that does not fit."""


def nobody(_: object) -> None:
    """Shows and tells nobody anything."""


class Speed:
    """Bytes/s over the last few seconds."""

    WINDOW = 5.0

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []

    def at(self, now: float, done: int) -> float | None:
        self._points = [point for point in self._points if point[0] > now - self.WINDOW][-100:]
        self._points.append((now, done))
        (first, begun), span = self._points[0], now - self._points[0][0]
        return (done - begun) / span if span > 0 and first < now else None
