"""Long polls: who waits for an object hears of its next change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

Json = dict[str, Any]


class Changes:
    """Wakes waiters by key. Holds nothing for keys that nobody waits for."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    def tell(self, key: str) -> None:
        for waiter in self._waiting.pop(key, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def wait(
        self,
        look: Callable[[], Awaitable[Json]],
        key: str,
        revision: int | None,
        timeout: float,
    ) -> Json:
        """The object as soon as its revision is not `revision` (None: the present one), or when the time is up."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            change: asyncio.Future[None] = loop.create_future()
            waiters = self._waiting.setdefault(key, set())
            waiters.add(change)  # before the look, so that no change falls between the two
            try:
                found = await look()
                if revision is None:
                    revision = found["revision"]
                left = deadline - loop.time()
                if found["revision"] != revision or left <= 0:
                    return found
                await asyncio.wait({change}, timeout=left)
            finally:
                waiters.discard(change)
                if not waiters and self._waiting.get(key) is waiters:
                    del self._waiting[key]
