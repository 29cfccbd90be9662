"""What every BlockDriver promises the engine: one suite, for the driver in memory and for the one on real storage daemons.

A subclass says in `rig` how a host is made. Each rig has one chain of three layers, `top` the overlay and `base` the
lowest, with enough data that a job with BANDWIDTH is still running when it is looked at.
"""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobs import pull
from jobs.errors import JobError
from jobs.model import Cursor, FileId, Holder, Job, JobSpec, Operation, State
from jobs.ports import BlockDriver, Contact, Observation, Phase

MIB = 1 << 20
SIZE = 16 * MIB
BANDWIDTH = 2 * MIB
PATIENCE = 20.0
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class Rig:
    """`backing` reads the overlay's header from outside; `kill` ends the chain's storage daemon by force.

    Nothing is at `dest`, but what `make` puts there: an empty image of the right size. `names` are the paths of all
    files in the folder; `same` says whether an image reads as the top did in the beginning, and `serves` which file is
    on top of the prepared chain.
    """

    driver: BlockDriver
    top: str
    middle: str
    base: str
    dest: str
    backing: Callable[[], str | None]
    kill: Callable[[], Awaitable[None]]
    make: Callable[[str], object]
    names: Callable[[], set[str]]
    same: Callable[[str], bool]
    serves: Callable[[], FileId]

    async def job(self, operation: Operation = Operation.PULL, **spec: Any) -> Job:
        """A job as the engine makes it, about to start."""
        wanted = JobSpec(operation, self.top, **spec)
        plan = await self.driver.plan(wanted)
        job = Job(
            "00000000-0000-4000-8000-000000000001",
            wanted,
            State.STARTING,
            NOW,
            NOW,
            plan.before,
            plan.after,
            cursor=Cursor(0, plan.size),
            bandwidth=wanted.bandwidth,
            target=plan.target,
        )
        return replace(job, upto=pull.goal(job)) if job.incremental else job

    async def prepared(self, job: Job) -> Job:
        while changes := await self.driver.prepare(job):
            job = replace(job, **changes)
        return job

    async def started(self, **spec: Any) -> Job:
        job = await self.prepared(await self.job(**spec))
        await self.driver.start(job)
        return replace(job, state=State.RUNNING, started=NOW)

    async def until(self, job: Job, *phases: Phase) -> Observation:
        async with asyncio.timeout(PATIENCE):
            while (seen := await self.driver.observe(job)).phase not in phases:
                await asyncio.sleep(0.005)
            return seen

    async def end(self, job: Job, state: State) -> Job:
        """Conclude as the engine does, and give everything back."""
        ended = replace(job, state=state, finished=NOW)

        async def record(sharers: tuple[Holder, ...]) -> Job:
            return ended

        await self.driver.conclude(ended, record)
        await self.driver.drop(ended)
        await self.driver.leave(ended)
        return ended


def on_a_rig(test: Callable[[Any, Rig], Coroutine[Any, Any, None]]) -> Callable[[Any, Path], None]:
    """Run an asynchronous test of the suite on a fresh rig."""

    def play(self: DriverSuite, folder: Path) -> None:
        async def go() -> None:
            async with self.rig(folder) as rig:
                await asyncio.wait_for(test(self, rig), 2 * PATIENCE)

        asyncio.run(go())

    functools.update_wrapper(play, test)
    del play.__wrapped__  # type: ignore[attr-defined]  # or pytest would ask for a fixture called rig
    return play


class DriverSuite(ABC):
    @abstractmethod
    def rig(self, folder: Path) -> AbstractAsyncContextManager[Rig]:
        """A fresh host, and the driver on it."""

    # Before the job

    @on_a_rig
    async def test_a_plan_shows_the_chain_before_and_after_and_changes_nothing(self, rig: Rig) -> None:
        plan = await rig.driver.plan(JobSpec(Operation.PULL, rig.top))
        assert len(plan.before.layers) == 3
        assert plan.after.layers == plan.before.layers[:1]
        assert plan.size == SIZE
        partial = await rig.driver.plan(JobSpec(Operation.PULL, rig.top, base=rig.base))
        assert partial.after.layers == (plan.before.layers[0], plan.before.layers[2])
        assert rig.backing() is not None

    @on_a_rig
    async def test_a_plan_that_makes_no_sense_is_refused(self, rig: Rig) -> None:
        for spec in (JobSpec(Operation.PULL, rig.top + ".absent"), JobSpec(Operation.PULL, rig.top, base="/elsewhere")):
            with pytest.raises(JobError) as refused:
                await rig.driver.plan(spec)
            assert refused.value.code in ("not_found", "invalid", "image_invalid")

    @on_a_rig
    async def test_one_job_works_on_a_chain(self, rig: Rig) -> None:
        job = await rig.job()
        await rig.driver.prepare(job)
        with pytest.raises(JobError) as refused:
            await rig.driver.prepare(replace(job, id="00000000-0000-4000-8000-000000000002"))
        assert refused.value.code == "busy"
        await rig.driver.leave(job)

    @on_a_rig
    async def test_preparing_and_leaving_may_be_repeated_and_come_to_nothing(self, rig: Rig) -> None:
        job = await rig.job()
        for _ in range(2):
            for _ in range(2):
                await rig.driver.prepare(job)
                await rig.driver.check(job)
            for _ in range(2):
                await rig.driver.drop(replace(job, state=State.ABORTED))
                await rig.driver.leave(job)
        assert (await rig.driver.observe(job)) == Observation(Contact.DEAD)

    # A block job

    @on_a_rig
    async def test_a_pull_goes_from_start_to_proof(self, rig: Rig) -> None:
        job = await rig.started()
        await rig.until(job, Phase.PENDING)
        assert rig.backing() is not None
        assert not (await rig.driver.observe(job)).proven
        await rig.driver.finalize(job)
        seen = await rig.until(job, Phase.CONCLUDED)
        assert (seen.contact, seen.error, seen.proven) == (Contact.ALIVE, None, True)
        assert rig.backing() is None
        await rig.end(job, State.COMPLETED)
        seen = await rig.driver.observe(job)
        assert (seen.contact, seen.proven) == (Contact.DEAD, True)

    @on_a_rig
    async def test_a_pull_to_a_base_is_proven_by_that_base(self, rig: Rig) -> None:
        job = await rig.started(base=rig.base)
        await rig.until(job, Phase.PENDING)
        await rig.driver.finalize(job)
        assert (await rig.until(job, Phase.CONCLUDED)).proven
        named = rig.backing()
        assert named is not None
        assert Path(rig.top).parent / named == Path(rig.base)
        await rig.end(job, State.COMPLETED)

    @on_a_rig
    async def test_starting_twice_is_one_job_that_goes_on(self, rig: Rig) -> None:
        job = await rig.started(bandwidth=BANDWIDTH)
        first = await rig.driver.observe(job)
        await rig.driver.prepare(job)
        await rig.driver.start(job)
        second = await rig.driver.observe(job)
        assert first.cursor is not None
        assert second.cursor is not None
        assert second.cursor >= first.cursor
        await rig.driver.cancel(job)
        await rig.until(job, Phase.CONCLUDED)
        await rig.end(job, State.ABORTED)

    @on_a_rig
    async def test_the_cursor_never_goes_back(self, rig: Rig) -> None:
        job = await rig.started(bandwidth=8 * BANDWIDTH)
        last = Cursor()
        async with asyncio.timeout(PATIENCE):
            while (seen := await rig.driver.observe(job)).phase is Phase.RUNNING:
                assert seen.cursor is not None
                assert last.cur <= seen.cursor.cur <= seen.cursor.end
                last = seen.cursor
                await asyncio.sleep(0.01)
        await rig.driver.cancel(job)
        await rig.until(job, Phase.CONCLUDED)
        await rig.end(job, State.ABORTED)

    @on_a_rig
    async def test_a_paused_job_stands_still_and_a_resumed_one_moves(self, rig: Rig) -> None:
        job = await rig.started(bandwidth=BANDWIDTH)
        await rig.driver.pause(job)
        seen = await rig.until(job, Phase.PAUSED)
        await asyncio.sleep(0.1)
        assert (await rig.driver.observe(job)).cursor == seen.cursor
        await rig.driver.set_speed(job, 0)
        await rig.driver.resume(job)
        await rig.until(job, Phase.PENDING)
        await rig.driver.cancel(job)
        await rig.until(job, Phase.CONCLUDED)
        await rig.end(job, State.ABORTED)

    @on_a_rig
    async def test_a_cancelled_job_ends_unproven_and_the_chain_stays(self, rig: Rig) -> None:
        before = rig.backing()
        job = await rig.started(bandwidth=BANDWIDTH)
        await rig.driver.cancel(job)
        assert not (await rig.until(job, Phase.CONCLUDED)).proven
        await rig.driver.cancel(job)
        await rig.end(job, State.ABORTED)
        assert rig.backing() == before
        await rig.driver.cancel(job)

    @on_a_rig
    async def test_a_pending_job_can_still_be_cancelled(self, rig: Rig) -> None:
        before = rig.backing()
        job = await rig.started()
        await rig.until(job, Phase.PENDING)
        await rig.driver.cancel(job)
        assert not (await rig.until(job, Phase.CONCLUDED)).proven
        await rig.end(job, State.ABORTED)
        assert rig.backing() == before

    @on_a_rig
    async def test_finalizing_twice_is_finalizing_once(self, rig: Rig) -> None:
        job = await rig.started()
        await rig.until(job, Phase.PENDING)
        for _ in range(2):
            await rig.driver.finalize(job)
        assert (await rig.until(job, Phase.CONCLUDED)).proven
        await rig.end(job, State.COMPLETED)

    @on_a_rig
    async def test_what_was_aborted_can_be_started_again(self, rig: Rig) -> None:
        job = await rig.started(bandwidth=BANDWIDTH)
        await rig.driver.cancel(job)
        await rig.until(job, Phase.CONCLUDED)
        await rig.end(job, State.ABORTED)
        again = replace(await rig.started(), id=job.id)
        await rig.until(again, Phase.PENDING)
        await rig.driver.finalize(again)
        assert (await rig.until(again, Phase.CONCLUDED)).proven
        await rig.end(again, State.COMPLETED)

    # The end

    @on_a_rig
    async def test_the_end_is_recorded_once_while_the_job_still_stands(self, rig: Rig) -> None:
        job = await rig.started()
        await rig.until(job, Phase.PENDING)
        await rig.driver.finalize(job)
        await rig.until(job, Phase.CONCLUDED)
        calls: list[tuple[Holder, ...]] = []

        async def record(sharers: tuple[Holder, ...]) -> Job:
            assert (await rig.driver.observe(job)).phase is Phase.CONCLUDED
            calls.append(sharers)
            return replace(job, state=State.COMPLETED, finished=NOW)

        await rig.driver.conclude(job, record)
        assert calls == [()]
        assert (await rig.driver.observe(job)).phase is Phase.ABSENT
        ended = replace(job, state=State.COMPLETED)
        for _ in range(2):
            await rig.driver.drop(ended)
        for _ in range(2):
            await rig.driver.leave(ended)

    @on_a_rig
    async def test_an_end_that_cannot_be_recorded_leaves_the_job_as_it_is(self, rig: Rig) -> None:
        job = await rig.started()
        await rig.until(job, Phase.PENDING)
        await rig.driver.finalize(job)
        await rig.until(job, Phase.CONCLUDED)

        async def refuse(sharers: tuple[Holder, ...]) -> Job:
            raise JobError("store_full", "no room")

        with pytest.raises(JobError, match="no room"):
            await rig.driver.conclude(job, refuse)
        seen = await rig.driver.observe(job)
        assert (seen.phase, seen.proven) == (Phase.CONCLUDED, True)
        await rig.end(job, State.COMPLETED)

    @on_a_rig
    async def test_a_killed_daemon_is_dead_and_nothing_is_proven(self, rig: Rig) -> None:
        job = await rig.started(bandwidth=BANDWIDTH)
        await rig.kill()
        async with asyncio.timeout(PATIENCE):
            while (seen := await rig.driver.observe(job)).contact is not Contact.DEAD:
                await asyncio.sleep(0.01)
        assert not seen.proven
        await rig.driver.cancel(job)
        for call in (rig.driver.start(job), rig.driver.pause(job), rig.driver.set_speed(job, 1)):
            with pytest.raises(JobError) as refused:
                await call
            assert refused.value.code == "storage_daemon_died"
        await rig.end(job, State.FAILED)

    @on_a_rig
    async def test_force_ends_the_daemon(self, rig: Rig) -> None:
        job = await rig.started(bandwidth=BANDWIDTH)
        await rig.driver.cancel(job, force=True)
        async with asyncio.timeout(PATIENCE):
            while (await rig.driver.observe(job)).contact is not Contact.DEAD:
                await asyncio.sleep(0.01)
        await rig.end(job, State.ABORTED)

    # Increments

    @on_a_rig
    async def test_slices_reach_the_goal_and_a_last_start_makes_the_proof(self, rig: Rig) -> None:
        job = await rig.job(increment=5 * MIB)
        steps = 0
        while job.cursor.cur < job.cursor.end:
            job = replace(job, upto=pull.goal(job))
            await rig.driver.prepare(job)
            job = await self.reach(rig, job)
            await rig.driver.rest(job)
            await rig.driver.rest(job)
            assert not (await rig.driver.observe(job)).proven
            steps += 1
        assert steps == 4
        await rig.driver.prepare(job)
        await rig.driver.start(job)
        await rig.until(job, Phase.PENDING)
        await rig.driver.finalize(job)
        assert (await rig.until(job, Phase.CONCLUDED)).proven
        await rig.end(job, State.COMPLETED)
        assert rig.backing() is None

    async def reach(self, rig: Rig, job: Job) -> Job:
        """Slice by slice to the job's goal."""
        assert job.upto is not None
        while job.cursor.cur < job.upto:
            cur = await rig.driver.advance(job, asyncio.Event())
            assert job.cursor.cur < cur <= job.upto
            job = replace(job, cursor=Cursor(cur, job.cursor.end), started=NOW)
        return job

    @on_a_rig
    async def test_a_stopped_slice_returns_soon_and_says_how_far_it_is(self, rig: Rig) -> None:
        job = await rig.job(increment=SIZE, bandwidth=BANDWIDTH)
        await rig.driver.prepare(job)
        stop = asyncio.Event()
        slice_ = asyncio.create_task(rig.driver.advance(job, stop))
        await asyncio.sleep(0.003)
        stop.set()
        async with asyncio.timeout(3):
            cur = await slice_
        assert 0 <= cur < SIZE
        await rig.driver.rest(job)

    @on_a_rig
    async def test_a_slice_to_a_base_takes_only_what_lies_above_it(self, rig: Rig) -> None:
        job = await rig.job(increment=SIZE, base=rig.base)
        await rig.driver.prepare(job)
        job = await self.reach(rig, job)
        await rig.driver.start(job)
        await rig.until(job, Phase.PENDING)
        await rig.driver.finalize(job)
        assert (await rig.until(job, Phase.CONCLUDED)).proven
        await rig.end(job, State.COMPLETED)
        assert rig.backing() is not None
