"""Looks at files that may lie on dead storage: such a look never returns, and keeps one of the agent's threads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_HANGING = 4
"""Looks in one place that have not returned, of the 32 threads for all files."""


class Late(TimeoutError):
    """Nothing came within the time; what comes later is thrown away."""


class Looks:
    """Of one key only one hangs, and of one place (a file system, say) a few; then none begins there. `timeout` in
    seconds. What a look does to a file is so never done by two at once, either."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._hanging: list[tuple[Hashable, Hashable]] = []

    async def look(
        self,
        key: Hashable,
        look: Callable[[], T],
        *,
        place: Hashable = None,
        drop: Callable[[T], None] = lambda _: None,
    ) -> T:
        """What it found, or a Late; `drop` gets what is thrown away. Cancelled, it hangs until it returns."""
        if any(one == key for one, _ in self._hanging):
            raise Late("an earlier look at it has not returned")
        if sum(one == place for _, one in self._hanging) >= MOST_HANGING:
            raise Late("earlier looks at others there have not returned")
        work = asyncio.ensure_future(asyncio.to_thread(look))
        hung = (key, place)
        try:
            await asyncio.wait({work}, timeout=self.timeout)
            if work.done():
                return work.result()
            raise Late(f"nothing came within {self.timeout:g} s")
        except (asyncio.CancelledError, Late):
            self._hanging.append(hung)
            work.add_done_callback(lambda work: self._returned(hung, work, drop))  # at once, if it is done
            raise

    def _returned(self, hung: tuple[Hashable, Hashable], work: asyncio.Future[T], drop: Callable[[T], None]) -> None:
        self._hanging.remove(hung)
        if work.cancelled():
            return
        if (error := work.exception()) is not None:
            log.info("what came late failed", extra={"fields": {"error": str(error)}})
        else:
            drop(work.result())
