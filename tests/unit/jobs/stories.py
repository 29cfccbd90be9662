"""A story of an agent: steps in whatever order, with faults that were ordered; then everything comes right."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from abc import ABC, abstractmethod

from jobs.errors import JobError
from jobs.model import Completion, Job, State
from tests.unit.jobs.agent_in_memory import Agent

Step = tuple[str, str, int]
"""What happens, to which image ("" is the agent), and the milliseconds until the next."""

FAULTS = ("unresponsive", "die", "io_error")
"""`FAULT in CALL` orders one for the driver's next such call on the image."""

ASK_TIMEOUT = 0.05
"""Seconds of a request: who is killed or silent meanwhile does not answer it."""


class Story(ABC):
    """Plays a sequence, then lets everything come right; what happened is for the subclass to judge."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.numbers = itertools.count()
        self.faults: dict[tuple[str, str], str] = {}
        agent.driver.fault = self.strike

    def strike(self, call: str, job: Job) -> None:
        """The fault that was ordered for the next such call."""
        path = job.before.top.path
        what = self.faults.pop((call, path), None)
        if what == "die":
            self.agent.driver.die(path)
            raise JobError("storage_daemon_died", "killed")
        if what == "unresponsive":
            self.agent.driver.silence(path)
            raise JobError("unresponsive", "no answer")
        if what == "io_error":
            raise JobError("io_error", "Input/output error")

    async def play(self, steps: list[Step]) -> None:
        for what, path, pause in steps:
            with contextlib.suppress(TimeoutError):
                try:
                    await self.act(what, path)
                except JobError as error:
                    assert error.code in self.allowed(what), (what, error.code, error.message)
            await asyncio.sleep(pause / 1000)

    async def act(self, what: str, path: str) -> None:
        """What happens to any agent; the rest is asked of it."""
        agent = self.agent
        if " in " in what:
            kind, _, call = what.partition(" in ")
            self.faults[call, path] = kind
        elif what == "crash":
            await agent.crash()
        elif what in ("fill", "empty"):
            agent.store.full = what == "fill"
        elif what.startswith("hints "):
            agent.hints = what == "hints found"
        elif what in ("silence", "heal", "die"):
            getattr(agent.driver, what)(path)
        else:
            async with asyncio.timeout(ASK_TIMEOUT):
                await self.request(what, path)

    @abstractmethod
    def allowed(self, what: str) -> set[str]:
        """The codes with which this may be refused."""

    @abstractmethod
    async def request(self, what: str, path: str) -> None:
        """Ask the engine."""

    async def come_right(self) -> None:
        """Storage answers, the store has room, nobody is in the way: every job must come to an end."""
        agent = self.agent
        self.faults.clear()
        agent.store.full = False
        for path in agent.driver.images:
            agent.driver.heal(path)
        async with asyncio.timeout(5):
            while agent.engine._actors:
                for job in agent.engine.active():
                    with contextlib.suppress(JobError):
                        if job.state is State.PAUSED:
                            await agent.engine.resume(job.id)
                        elif job.state is State.WAITING:
                            await agent.engine.next(job.id, job.cursor.cur)
                        elif job.state is State.READY:
                            await agent.engine.complete(job.id, Completion.PIVOT)
                await asyncio.sleep(0.001)

    def judge_rest(self) -> None:
        """Nothing is left over."""
        images, names = self.agent.driver.images, self.agent.driver.names
        assert all(not image.users and image.daemon is None for image in images.values())
        assert [name for name in names if ".part-" in name] == []
