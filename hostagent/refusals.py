"""Calls that changed nothing, as the audit tells of them: the first of a caller's in a minute one by one, all others in
one line when the minute is over. So nobody pushes the lines of others out of the audit by asking what he is refused.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from hostagent.addresses import network_of
from hostagent.calls import Call

CODES = frozenset(
    {
        *("unauthenticated", "denied", "not_found", "busy", "conflict", "invalid", "too_large", "range", "limit"),
        *("outside_pools", "image_invalid", "image_corrupt", "chain_too_deep", "chain_loop", "access_refused"),
        *("not_supported", "unavailable", "draining", "no_space"),
    }
)
"""The results of calls that were refused: nothing was changed."""
WINDOW = 60.0
"""Seconds that are counted together."""
CALLERS = 64
"""That are told apart in that time: addresses of who showed nothing, and sixteen times as many who have a name. All who
come later are counted as one of them."""
OTHERS = Call("", who="others")


@dataclass(slots=True)
class Beyond:
    """What one caller had no line for: how often each `WHAT: RESULT`."""

    who: str
    surface: str
    origin: str
    whole: int = 0
    calls: Counter[str] = field(default_factory=Counter)


class Refusals:
    """`most` of a caller in a minute have their own line. For any thread."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._began: float | None = None
        self._of: dict[tuple[str, str, str], Beyond] = {}

    def whole(self, call: Call | None, what: str, result: str) -> bool:
        """Whether this one has a line of its own; else it is counted."""
        with self._lock:
            if self._began is None:
                self._began = self._clock()
            caller = self._caller(call or OTHERS)
            caller.whole += 1
            if caller.whole <= self._most:
                return True
            caller.calls[f"{what}: {result}"] += 1
            return False

    def left(self) -> float | None:
        """Seconds until the minute is over; None where none has begun."""
        with self._lock:
            return None if self._began is None else max(0.0, self._began + WINDOW - self._clock())

    def over(self, *, now: bool = False) -> list[Beyond]:
        """Who had no line for all in the minute that is over; or that is to be over now."""
        with self._lock:
            if self._began is None or (not now and self._clock() < self._began + WINDOW):
                return []
            found, self._of, self._began = self._of, {}, None
            return [one for one in found.values() if one.calls]

    def _caller(self, call: Call) -> Beyond:
        """A person is one wherever he comes from; who has no name is one with all of his address."""
        origin = network_of(call.origin.rpartition(":")[0]) if call.surface == "tcp" and call.who == "nobody" else ""
        key = (call.surface, call.who, origin)
        most = CALLERS if origin else 16 * CALLERS
        if key not in self._of and sum(bool(of) == bool(origin) for _, _, of in self._of) >= most:
            key = ("", OTHERS.who, "")
        return self._of.setdefault(key, Beyond(key[1], key[0], key[2]))
