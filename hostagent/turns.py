"""Work for one thread, in the order in which it came; what comes while the thread is busy is done in the next turn."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
Outcome = tuple[Any, Exception | None]
"""What came of one work: its result, or what it raised."""

TOGETHER = 64
"""Works of one turn: more would keep the first of them waiting."""


class Turns:
    """`together` does the works of a turn, in the thread, and gives an outcome for each. For one event loop."""

    def __init__(self, name: str, together: Callable[[Sequence[Any]], list[Outcome]]) -> None:
        self._name = name
        self._together = together
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._waiting: deque[tuple[Any, asyncio.Future[Any]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def first(self, call: Callable[[], T]) -> T:
        """`call` in the thread, by itself."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def take(self, work: Any) -> Any:
        """The result of `work`, or what it raised. Who is cancelled before his turn has it not done."""
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, done))
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=self._name)
        return await done

    async def close(self, last: Callable[[], None]) -> None:
        """Do what was asked for, then `last`, and end the thread."""
        if self._task is not None:
            await self._task
        await self.first(last)
        self._thread.shutdown()

    async def _run(self) -> None:
        while self._waiting:
            turn = [self._waiting.popleft() for _ in range(min(TOGETHER, len(self._waiting)))]
            turn = [(work, done) for work, done in turn if not done.cancelled()]
            works = [work for work, _ in turn]
            try:
                outcomes = await self.first(functools.partial(self._together, works))
            except RuntimeError as closed:
                outcomes = [(None, closed)] * len(turn)
            for (_, done), (result, error) in zip(turn, outcomes, strict=True):
                if done.done():
                    continue
                if error is None:
                    done.set_result(result)
                else:
                    done.set_exception(error)
        self._task = None
