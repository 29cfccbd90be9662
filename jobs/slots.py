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
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed = False

    async def take(self) -> None:
        if self._free > 0 and not self._waiting and not self._closed:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()
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
        while self._free > 0 and self._waiting and not self._closed:
            turn = self._waiting.popleft()
            if not turn.done():
                self._free -= 1
                turn.set_result(None)
