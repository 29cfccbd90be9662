"""The bandwidth that a transfer may use, shared by its connections."""

from __future__ import annotations

import threading
import time

from hostagent.client.options import PIECE

_LEAST = 16 << 10  # bytes of a step; below 2 KiB/s a server may find the client silent


class Throttle:
    """`rate` in bytes/s, 0 for no limit. What is taken is paid for by waiting, so a pause leaves nothing to spend."""

    def __init__(self, rate: int, stop: threading.Event) -> None:
        self._rate = rate
        self._stop = stop
        self._lock = threading.Lock()
        self._free = time.monotonic()
        self.step = max(_LEAST, min(PIECE, rate // 8)) if rate else PIECE
        """Bytes to take at a time, so that no wait is long."""

    def take(self, number: int) -> None:
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            due = max(self._free, now)
            self._free = due + number / self._rate
        if due > now:
            self._stop.wait(due - now)
