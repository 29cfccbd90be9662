"""Looks at files that may lie on dead storage: such a look never returns, and keeps its thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

MOST_HANGING = 4
"""Looks that have not returned, of the 32 threads for all files."""


class Late(Exception):
    """Nothing came within the time; what comes later is thrown away."""


class Looks:
    """Of one key only one hangs, and of all a few; then none begins. `timeout` in seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._hanging: list[str] = []

    async def look(self, key: str, look: Callable[[], T], *, drop: Callable[[T], None] = lambda _: None) -> T:
        """What it found, or a Late; `drop` gets what is thrown away. Cancelled, it hangs until it returns."""
        if key in self._hanging or len(self._hanging) >= MOST_HANGING:
            raise Late("an earlier look at it, or at others, has not returned")
        work = asyncio.ensure_future(asyncio.to_thread(look))
        try:
            await asyncio.wait({work}, timeout=self._timeout)
            if work.done():
                return work.result()
            raise Late(f"nothing came within {self._timeout:g} s")
        finally:
            if not work.done():
                self._hanging.append(key)
                work.add_done_callback(lambda work: self._returned(key, work, drop))

    def _returned(self, key: str, work: asyncio.Future[T], drop: Callable[[T], None]) -> None:
        self._hanging.remove(key)
        if not work.cancelled() and work.exception() is None:
            drop(work.result())
