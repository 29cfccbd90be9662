"""Which objects have changed and are not shown as they are yet: the newest state of each, and no more than a bound.

Pure. A change of state is shown at once, mere progress once in `interval` seconds for each object.
"""

from __future__ import annotations

from collections.abc import Callable

Key = tuple[str, str]
"""The kind and the id of an object."""


class Pending:
    """`everything` says that all is to be read anew: more had changed than is kept apart. `dropped` counts states that
    nobody was told of, because a newer one came before."""

    def __init__(self, most: int, interval: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._interval = interval
        self._clock = clock
        self._waiting: dict[Key, tuple[str, bool]] = {}
        self._shown: dict[Key, tuple[float, str]] = {}
        self.everything = False
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def touch(self, key: Key, state: str) -> None:
        waiting = self._waiting.get(key)
        known = waiting[0] if waiting else self._shown.get(key, (0.0, ""))[1]
        if waiting is not None and waiting[1] and state != waiting[0]:
            self.dropped += 1
        if waiting is None and len(self._waiting) >= self._most:
            self.dropped += len(self._waiting)
            self._waiting.clear()
            self.everything = True
        self._waiting[key] = (state, state != known or bool(waiting and waiting[1]))

    def due(self) -> list[Key]:
        """What is to be shown now; it is waiting no longer."""
        now = self._clock()
        found = [key for key, (_, news) in self._waiting.items() if news or now >= self._at(key)]
        for key in found:
            self._shown[key] = (now, self._waiting.pop(key)[0])
        return found

    def rest(self) -> float | None:
        """Seconds until something that waits is due; None when nothing does."""
        if not self._waiting:
            return None
        if any(news for _, news in self._waiting.values()):
            return 0.0
        return max(0.0, min(map(self._at, self._waiting)) - self._clock())

    def forget(self, key: Key) -> None:
        """The object is shown no more."""
        self._waiting.pop(key, None)
        self._shown.pop(key, None)

    def begin(self) -> None:
        """Everything was read anew: what waits is known. What changes from now on waits again."""
        self._waiting.clear()
        self._shown.clear()
        self.everything = False

    def _at(self, key: Key) -> float:
        return self._shown[key][0] + self._interval if key in self._shown else 0.0
