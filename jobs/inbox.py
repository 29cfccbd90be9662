"""What comes in for one job: requests of users, and hints that something may have happened. Bounded."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jobs.errors import JobError
from jobs.model import Job

SIZE = 64
"""Requests that may wait for one job, and a hint beside them."""


class Ask(StrEnum):
    LOOK = "look"
    ABORT = "abort"
    FORCE = "force"
    PAUSE = "pause"
    RESUME = "resume"
    NEXT = "next"
    SPEED = "speed"
    COMPLETE = "complete"
    FAIL = "fail"


@dataclass(slots=True)
class Message:
    ask: Ask
    value: Any = None
    reply: asyncio.Future[Job] | None = None

    @property
    def given_up(self) -> bool:
        """Whether who asked was told already that it was not taken up. An abort is carried out all the same."""
        return self.reply is not None and self.reply.done() and self.ask not in (Ask.ABORT, Ask.FORCE)

    def answer(self, job: Job) -> None:
        if self.reply is not None and not self.reply.done():
            self.reply.set_result(job)

    def refuse(self, error: JobError) -> None:
        if self.reply is not None and not self.reply.done():
            self.reply.set_exception(error)


class Inbox:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[Message] = asyncio.Queue(maxsize=SIZE)
        self._first: Message | None = None
        self._hinted = False
        self._order: Message | None = None
        self._replies: set[asyncio.Future[Job]] = set()
        self._held: JobError | None = None

    def order(self, ask: Ask, value: Any = None) -> None:
        """What the job's group wants of it: never lost, and taken up before what waits."""
        self._order = Message(ask, value)
        self.hint()

    def hint(self) -> None:
        """One look answers all hints before it; a hint that finds the queue full is dropped (the poll finds what it
        told)."""
        if not self._hinted and not self._queue.full():
            self._hinted = True
            self._queue.put_nowait(Message(Ask.LOOK))

    async def ask(self, ask: Ask, value: Any, timeout: float, name: str) -> Job:
        """Put a request for job `name` and wait until it is carried out or refused."""
        if self._queue.full():
            raise self._held or JobError("limit", f"job {name} has {SIZE} requests waiting", remedy="try again later")
        reply: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(Message(ask, value, reply))
        if self._held is not None:
            reply.set_exception(self._held)
        self._replies.add(reply)
        try:
            return await asyncio.wait_for(reply, timeout)
        except TimeoutError:
            raise JobError(
                "timeout",
                f"job {name} did not take up {ask} within {timeout:g} s (jobs.start_timeout)",
                remedy="look at `hostagent status`: its storage daemon may not answer",
            ) from None
        finally:
            self._replies.discard(reply)

    def hold(self, why: JobError | None) -> None:
        """The job stands still, for this reason, until None is said: who asks is told so at once, and who asked
        already. An abort is carried out all the same when it goes on."""
        self._held = why
        for reply in self._replies:
            if why is not None and not reply.done():
                reply.set_exception(why)

    async def next(self, timeout: float | None) -> Message | None:
        if self._first is not None:
            message, self._first = self._first, None
            return message
        if self._order is not None:
            message, self._order = self._order, None
            return message
        try:
            # Not wait_for: in Python 3.11 it can swallow a cancellation (bpo-37658), and the agent's stop with it.
            async with asyncio.timeout(timeout):
                message = await self._queue.get()
        except TimeoutError:
            return None
        if message.ask is not Ask.LOOK:
            return message
        if self._order is not None:
            self._hinted = False
            message, self._order = self._order, None
            return message
        if not self._queue.empty():  # who asks goes first: a look may take as long as a daemon that does not answer
            request = self._queue.get_nowait()
            self._queue.put_nowait(message)
            return request
        self._hinted = False
        return message

    async def next_or(self, other: asyncio.Future[Any]) -> Message | None:
        """The next message, or None when `other` is done first."""
        getter = asyncio.ensure_future(self.next(None))
        try:
            await asyncio.wait({getter, other}, return_when=asyncio.FIRST_COMPLETED)
            return getter.result() if getter.done() else None
        finally:
            getter.cancel()

    def put_back(self, message: Message) -> None:
        """It could not be seen to here: the state that follows takes it up first."""
        self._first = message

    def refuse_all(self, error: JobError) -> None:
        if self._first is not None:
            self._first.refuse(error)
        while not self._queue.empty():
            self._queue.get_nowait().refuse(error)
