"""One image's map and open layers, shared by the connections of a ticket.

The files are open, and bear their marks, while at least one transfer uses them and no longer, nor longer than
`MapLimits.hold` in one go. Between transfers anybody may write them: the map is then kept only where it can be told
that nobody did, and if somebody did, the ticket reads no more of them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hostagent.data.backends.layers import Layers, Stamp
from hostagent.data.backends.mapping import Map, Unmappable
from hostagent.data.backends.qemu_map import MapLimits
from hostagent.data.backends.same import Same

_TICK = 0.05


@dataclass(frozen=True, slots=True)
class Use:
    map: Map
    layers: Layers
    until: float
    """On the monotonic clock: then it must be given back."""


class SharedMap:
    """Thread-safe."""

    def __init__(self, opened: Callable[[], Layers], limits: MapLimits) -> None:
        """`opened` opens and proves the layers, or raises Unmappable."""
        self._opened = opened
        self._limits = limits
        self._turn = threading.Condition()
        self._busy = False  # somebody opens or maps
        self._users = 0
        self._now: Use | None = None
        self._kept: tuple[tuple[Stamp, ...], Map] | None = None
        self._same = Same()
        self._never: Unmappable | None = None
        self._why = ""

    @contextlib.contextmanager
    def use(self, size: Callable[[], int], check: Callable[[], None]) -> Iterator[Use]:
        """Unmappable when it cannot be had, or not now; AgentError image_changed when it was another one before. `size`
        is what the image must have; `check` raises when nobody waits for it any more."""
        now = self._join(size, check)
        try:
            yield now
        finally:
            self._leave(now)

    def refused(self, why: str) -> bool:
        """Whether that is news."""
        with self._turn:
            news, self._why = why != self._why, why
            return news

    def close(self) -> None:
        """The ticket has ended; what still runs is being ended, too."""
        with self._turn:
            self._kept = None

    def _join(self, size: Callable[[], int], check: Callable[[], None]) -> Use:
        with self._turn:
            while self._busy:
                check()
                self._turn.wait(_TICK)
            if self._never is not None:
                raise self._never
            if self._now is not None:
                if time.monotonic() > self._now.until:
                    raise Unmappable("its locks were held for as long as they may be", lasting=False)
                self._users += 1
                return self._now
            self._busy = True
        now: Use | None = None
        try:
            now = self._made(size, check)
        except Unmappable as error:
            self._never = error if error.lasting else None
            raise
        finally:
            with self._turn:
                self._busy = False
                self._now, self._users = now, 1
                self._turn.notify_all()
        return now

    def _made(self, size: Callable[[], int], check: Callable[[], None]) -> Use:
        layers = self._opened()
        try:
            self._same.refuse_other(layers.all[0].held.name, layers.written)
            kept = self._kept
            if kept is not None and kept[0] == layers.stamp:
                known = kept[1]
            else:
                known = layers.map(self._limits, check)
                if known.size != size():
                    raise Unmappable(f"it has {known.size} bytes, and its export {size()}", lasting=False)
                self._kept = None if layers.stamp is None else (layers.stamp, known)
            return Use(known, layers, time.monotonic() + self._limits.hold)
        except BaseException:
            layers.close()
            raise

    def _leave(self, now: Use) -> None:
        with self._turn:
            self._users -= 1
            if self._users:
                return
            self._now = None
        now.layers.close()
