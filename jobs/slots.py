"""How many jobs run at once."""

from __future__ import annotations

import asyncio
from collections import deque


class Slots:
    """How many jobs may run at once; first come, first served. A job that runs already takes one without asking.

    While they are `closed` nobody is let in; who waits keeps his place.
    """

    def __init__(self, width: int) -> None:
        self._free = width
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._closed = False

    async def take(self, number: int = 1) -> None:
        """As many at once, or none: who comes later waits meanwhile, so that many are never kept waiting by few."""
        if self._free >= number and not self._waiting and not self._closed:
            self._free -= number
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, number))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free += number
            self._let_in()
            raise

    def occupy(self) -> None:
        self._free -= 1

    def give(self) -> None:
        self._free += 1
        self._let_in()

    def close(self) -> None:
        self._closed = True

    def open(self) -> None:
        self._closed = False
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and not self._closed:
            turn, number = self._waiting[0]
            if not turn.done():
                if self._free < number:
                    return
                self._free -= number
                turn.set_result(None)
            self._waiting.popleft()
