"""Copies and active commits whose agent crashes, or whose storage daemon dies or falls silent, at every call of an end."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from jobs.errors import JobError
from jobs.model import Completion, Job, Operation, Revocation, State
from jobs.ports import Phase
from tests.unit.jobs.agent_in_memory import Agent, run
from tests.unit.jobs.fake_driver import MIB
from tests.unit.jobs.ready import (
    EXPORT,
    FINISH,
    PIVOT,
    assert_completed,
    assert_not_completed,
    begin,
    each_end,
    each_work,
    gate,
    hold,
    open_gates,
    refusal,
)

# Crashes, deaths and silence, at every call on the way to an end


COMPLETING = ("complete", "seal", "conclude", "drop", "leave")
ABORTING = ("cancel", "discard", "conclude", "drop", "leave")


@each_work
@each_end
@pytest.mark.parametrize("state", [State.RUNNING, State.READY])
def test_a_crash_of_the_agent_loses_no_job(work: str, end: Completion, state: State) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 0 if state is State.RUNNING else agent.driver.pace
        job = await agent.until_state(await begin(agent, work), state)
        await agent.crash()
        agent.driver.pace = 16 * MIB
        await agent.until_state(job, State.READY)
        await agent.engine.complete(job.id, end)
        assert_completed(agent, await agent.until_cleared(job), end)
        assert agent.store.kinds(job.id) == ["started", "ready", "completed"]
        assert agent.driver.calls.count(("block job", job.id)) == 1

    run(scenario)


@each_work
@each_end
@pytest.mark.parametrize("call", COMPLETING)
@pytest.mark.parametrize("hints", [True, False])
def test_a_crash_on_the_way_to_completion_is_made_good(work: str, end: Completion, call: str, hints: bool) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, call)
        agent.hints = hints
        job = await begin(agent, work, completion=end)
        await hold(agent, job, call)
        await agent.engine.stop()
        open_gates(agent)
        await agent.crash()
        ended = await agent.until_cleared(job)
        assert_completed(agent, ended, end)
        assert len(agent.store.finishes) == 1

    run(scenario)


@each_work
@pytest.mark.parametrize("call", ABORTING)
def test_a_crash_on_the_way_to_an_abort_is_made_good(work: str, call: str) -> None:
    async def scenario(agent: Agent) -> None:
        job = await agent.until_state(await begin(agent, work), State.READY)
        gate(agent, call)
        await agent.engine.abort(job.id)
        if call != "discard" or work != "commit":
            await hold(agent, job, call)
        await agent.engine.stop()
        open_gates(agent)
        await agent.crash()
        ended = await agent.until_cleared(job)
        assert_not_completed(agent, ended, State.ABORTED, "cancelled")
        assert len(agent.store.finishes) == 1

    run(scenario)


@each_work
@each_end
@pytest.mark.parametrize("call", COMPLETING)
@pytest.mark.parametrize("crash", [False, True])
def test_a_storage_daemon_that_dies_on_the_way_fails_the_job_unless_it_was_sealed(
    work: str, end: Completion, call: str, crash: bool
) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, call)
        job = await begin(agent, work, completion=end)
        await hold(agent, job, call)
        if crash:
            await agent.engine.stop()
        agent.driver.die("/top")
        open_gates(agent)
        if crash:
            await agent.crash()
        ended = await agent.until_cleared(job)
        recorded = call in ("drop", "leave") or (call == "conclude" and not crash)
        if recorded or (call == "conclude" and work == "copy"):
            assert (ended.state, ended.error) == (State.COMPLETED, None)
            assert ended.revocation is (Revocation.DONE if end is PIVOT else Revocation.NONE)
        else:
            assert_not_completed(agent, ended, State.FAILED, "storage_daemon_died")

    run(scenario)


@each_work
@pytest.mark.parametrize("state", [State.RUNNING, State.READY])
def test_a_storage_daemon_that_dies_fails_the_job(work: str, state: State) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 0 if state is State.RUNNING else agent.driver.pace
        job = await agent.until_state(await begin(agent, work), state)
        agent.driver.die("/top")
        assert_not_completed(agent, await agent.until_cleared(job), State.FAILED, "storage_daemon_died")

    run(scenario)


@each_work
@each_end
@pytest.mark.parametrize("call", COMPLETING)
def test_silence_on_the_way_to_completion_is_waited_out(work: str, end: Completion, call: str) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, call)
        job = await begin(agent, work, completion=end)
        await hold(agent, job, call)
        agent.driver.silence("/top")
        open_gates(agent)
        await asyncio.sleep(0.02)
        now = await agent.engine.get(job.id)
        assert now.state in ((State.UNKNOWN,) if call in ("complete", "seal") else (State.COMPLETED,))
        agent.driver.heal("/top")
        assert_completed(agent, await agent.until_cleared(job), end)

    run(scenario)


@each_work
@each_end
@pytest.mark.parametrize("state", [State.RUNNING, State.READY])
def test_silence_before_the_end_is_unknown_and_the_job_goes_on_after_it(
    work: str, end: Completion, state: State
) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 0 if state is State.RUNNING else agent.driver.pace
        job = await agent.until_state(await begin(agent, work), state)
        agent.driver.silence("/top")
        await agent.until_state(job, State.UNKNOWN)
        await agent.crash()
        assert (await agent.engine.get(job.id)).state is State.UNKNOWN
        with refusal("conflict"):
            await agent.engine.complete(job.id, end)
        agent.driver.heal("/top")
        agent.driver.pace = 16 * MIB
        await agent.until_state(job, State.READY)
        await agent.engine.complete(job.id, end)
        assert_completed(agent, await agent.until_cleared(job), end)
        assert agent.store.kinds(job.id) == ["started", "ready", "completed"]  # contact is back, and it is no news

    run(scenario)


@each_work
def test_a_job_that_cannot_end_yet_says_so_when_it_is_ready_and_stays(work: str) -> None:
    async def scenario(agent: Agent) -> None:
        def taken(job: Job) -> tuple[str, ...]:
            raise JobError("conflict", "the name is taken")

        agent.driver.drift = taken
        job = await agent.until(await begin(agent, work), lambda now: now.warnings == ("the name is taken",))
        with refusal("conflict"):
            await agent.engine.complete(job.id, PIVOT)
        assert (await agent.engine.get(job.id)).state is State.READY
        agent.driver.drift = lambda job: ()
        await agent.engine.complete(job.id, PIVOT)
        assert_completed(agent, await agent.until_cleared(job), PIVOT)

    run(scenario)


def test_what_the_hypervisor_pauses_on_the_way_to_its_end_is_not_a_users_pause() -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, "complete")
        job = await begin(agent, "copy", completion=PIVOT)
        await hold(agent, job, "complete")
        agent.driver.silence("/top")
        open_gates(agent)
        await agent.until_state(job, State.UNKNOWN)
        block = agent.driver.block(job)
        assert block is not None
        block.phase = Phase.PAUSED
        agent.driver.heal("/top")
        await agent.until_state(job, State.COMPLETING)
        block.phase = Phase.READY
        assert_completed(agent, await agent.until_cleared(job), PIVOT)

    run(scenario)


# The copy that was made, and the chain after it


def test_a_crash_before_the_target_is_known_makes_one_target() -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, "start")
        job = await begin(agent, "copy", completion=FINISH)
        await hold(agent, job, "start")
        await agent.engine.stop()
        open_gates(agent)
        stored = agent.store.jobs[job.id]
        assert stored.target is not None
        agent.store.jobs[job.id] = replace(stored, target=replace(stored.target, file=None, part=None))
        await agent.crash()
        assert_completed(agent, await agent.until_cleared(job), FINISH)

    run(scenario)


def test_the_chain_can_be_copied_on_and_back_down() -> None:
    async def scenario(agent: Agent) -> None:
        job = await agent.until_cleared(await begin(agent, "copy", completion=PIVOT))
        for dest in ("/two", "/three"):
            place = job.after.top.path
            job = await agent.until_cleared(
                await agent.pull(place, operation=Operation.COPY, dest=dest, completion=PIVOT)
            )
            assert (job.state, job.before.top.path, job.after.top.path) == (State.COMPLETED, place, dest)
        assert agent.driver.serving("/top").users == {EXPORT}

    run(scenario)
