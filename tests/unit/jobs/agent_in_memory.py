"""An engine over a fake host, that can be crashed and started again on the same store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from jobs.engine import Engine
from jobs.model import Job, State
from jobs.ports import SystemClock
from jobs.world import Limits
from tests.unit.jobs.fake_driver import FakeDriver, spec
from tests.unit.jobs.fake_images import becomes_ready, written
from tests.unit.jobs.memory import Counts, FakeAccess, MemoryStore

QUICK = Limits(
    width=4,
    queue=100,
    progress_interval=0.002,
    abort_timeout=0.05,
    settle_retry=0.001,
    settle_retry_max=0.01,
    request_timeout=2.0,
)
PATIENCE = 5.0
"""Seconds; a test that needs them has failed."""


class Agent:
    """`seen` has each value that a job had, of the present life; `hints` False loses every hint."""

    def __init__(self, limits: Limits = QUICK, driver: FakeDriver | None = None) -> None:
        self.limits = limits
        self.driver = driver or FakeDriver()
        self.store = MemoryStore()
        self.access = FakeAccess()
        self.counts = Counts()
        self.seen: dict[str, list[Job]] = {}
        self.hints = True
        self.broken: list[str] = []
        """Promises about results and targets that an outcome broke when it was recorded."""
        self.store.recorded = self._judge
        self.engine = self._engine()

    def _engine(self) -> Engine:
        self.seen = {}
        engine = Engine(
            self.driver,
            self.store,
            self.access,
            clock=SystemClock(),
            observer=self.counts,
            limits=self.limits,
            changed=lambda job: self.seen.setdefault(job.id, []).append(job),
        )
        self.driver.hint = lambda job_id: engine.hint(job_id) if self.hints else None
        return engine

    async def crash(self) -> None:
        """The agent is gone and comes back, as hostagent.daemon does it; storage daemons go on."""
        await asyncio.wait_for(self.engine.stop(), PATIENCE)
        self.engine = self._engine()
        unsettled = await self.store.unsettled()
        self.driver.adopt([job for job in unsettled if job.state not in (State.QUEUED, State.WAITING)])
        files = {layer.file for job in self.store.jobs.values() for layer in job.before.layers}
        await self.access.converge(sorted(files), trigger="start")
        await self.engine.recover()

    def _judge(self, job: Job) -> None:
        """What must hold in the moment in which an outcome becomes true for everybody."""
        completed, target = job.state is State.COMPLETED, job.target
        if completed and becomes_ready(job) and written(job) not in self.driver.sealed:
            self.broken.append(f"{job.id} is completed, and its result was not sealed")
        if target is None or target.file is None:
            return
        beside = {image.daemon.beside for image in self.driver.images.values() if image.daemon}
        names = [name for name, file in self.driver.names.items() if file == target.file]
        if (completed or job.decided) and names != [target.path]:
            self.broken.append(f"the target of {job.id} has the names {names}")
        if not completed and (target.file in beside or (target.made and names and not job.decided)):
            self.broken.append(f"the target of {job.id}, which is {job.state}, is not discarded: {names}")

    async def pull(self, path: str = "/top", **values: Any) -> Job:
        job, _ = await self.engine.create(spec(path, **values))
        return job

    async def until(self, job: Job, done: Callable[[Job], bool]) -> Job:
        async with asyncio.timeout(PATIENCE):
            while True:
                now = await self.engine.get(job.id)
                if done(now):
                    return now
                await asyncio.sleep(0.001)

    async def until_state(self, job: Job, *states: State) -> Job:
        return await self.until(job, lambda now: now.state in states)

    async def until_cleared(self, job: Job) -> Job:
        """Until the job has ended and nobody writes it any more."""
        async with asyncio.timeout(PATIENCE):
            while not (ended := await self.engine.get(job.id)).state.terminal or job.id in self.engine._actors:
                await asyncio.sleep(0.001)
            return ended


def run(scenario: Callable[[Agent], Coroutine[Any, Any, None]], limits: Limits = QUICK, **host: Any) -> Agent:
    """Play `scenario` on a fresh agent; stop it after."""

    async def play() -> Agent:
        agent = Agent(limits, FakeDriver(**host))
        try:
            await asyncio.wait_for(scenario(agent), 4 * PATIENCE)
        finally:
            await asyncio.wait_for(agent.engine.stop(), PATIENCE)
        assert agent.broken == []
        return agent

    return asyncio.run(play())
