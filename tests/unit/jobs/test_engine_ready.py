"""Copies and active commits: ready, told to end, sealed, aborted.

What every outcome must keep is judged as it is recorded (`Agent.broken`): a completed job has a sealed result, and the
target of another is discarded.
"""

from __future__ import annotations

import asyncio

import pytest

from jobs.errors import JobError
from jobs.model import Completion, Job, JobSpec, Revocation, State
from jobs.ports import AccessVerdict
from tests.unit.jobs.agent_in_memory import Agent, run
from tests.unit.jobs.fake_driver import MIB
from tests.unit.jobs.ready import (
    FINISH,
    PIVOT,
    WORKS,
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

# Ready


@each_work
@each_end
def test_a_job_stays_ready_until_its_end_is_asked_for(work: str, end: Completion) -> None:
    async def scenario(agent: Agent) -> None:
        job = await agent.until_state(await begin(agent, work), State.READY)
        for _ in range(20):
            agent.engine.hint(job.id)
        await asyncio.sleep(0.02)
        assert (await agent.engine.get(job.id)).state is State.READY
        asked = await agent.engine.complete(job.id, end)
        assert asked.completion is end
        ended = await agent.until_cleared(job)
        assert (await agent.engine.complete(job.id, end)).state is State.COMPLETED
        assert_completed(agent, ended, end)
        assert agent.store.kinds(job.id) == ["started", "ready", "completed"]

    run(scenario)


@each_work
@each_end
@pytest.mark.parametrize("hints", [True, False])
def test_a_job_whose_end_was_given_with_it_ends_by_itself(work: str, end: Completion, hints: bool) -> None:
    async def scenario(agent: Agent) -> None:
        agent.hints = hints
        assert_completed(agent, await agent.until_cleared(await begin(agent, work, completion=end)), end)

    run(scenario)


@each_work
def test_a_job_that_is_not_ready_cannot_be_completed(work: str) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 0
        job = await agent.until_state(await begin(agent, work), State.RUNNING)
        with refusal("conflict"):
            await agent.engine.complete(job.id, PIVOT)
        with refusal("invalid"):
            await agent.engine.complete(job.id, None)
        assert (await agent.engine.get(job.id)).completion is None
        assert ("complete", job.id) not in agent.driver.calls
        agent.driver.pace = 16 * MIB
        await agent.until_state(job, State.READY)
        await agent.engine.complete(job.id, FINISH)
        assert_completed(agent, await agent.until_cleared(job), FINISH)

    run(scenario)


def test_a_pull_is_never_told_to_complete() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = 0
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        with refusal("conflict"):
            await agent.engine.complete(job.id, PIVOT)

    run(scenario)


@each_work
def test_an_end_that_was_decided_is_not_changed_for_another(work: str) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, "complete")
        job = await begin(agent, work, completion=FINISH)
        await hold(agent, job, "complete")
        other = asyncio.create_task(agent.engine.complete(job.id, PIVOT))
        assert (await agent.engine.complete(job.id, None)).completion is FINISH
        open_gates(agent)
        with refusal("conflict"):
            await other
        assert_completed(agent, await agent.until_cleared(job), FINISH)

    run(scenario)


def test_an_end_that_the_block_job_did_not_hear_is_asked_for_again() -> None:
    async def scenario(agent: Agent) -> None:
        complete, deaf = agent.driver.complete, [True, True, False]

        async def listen(job: Job) -> None:
            if not deaf.pop(0):
                await complete(job)

        agent.driver.complete = listen  # type: ignore[method-assign]
        job = await begin(agent, "copy", completion=PIVOT)
        assert_completed(agent, await agent.until_cleared(job), PIVOT)

    run(scenario)


def test_an_end_that_is_refused_for_good_fails_the_job_and_ends_the_mirror() -> None:
    async def scenario(agent: Agent) -> None:
        asked = []

        async def refuse(job: Job) -> None:
            asked.append(job)
            if len(asked) > 2:
                raise JobError("pivot_refused", "it does not go over", remedy="see why")

        agent.driver.complete = refuse  # type: ignore[method-assign]
        job = await begin(agent, "copy", completion=PIVOT)
        ended = await agent.until_cleared(job)
        assert_not_completed(agent, ended, State.FAILED, "pivot_refused")
        assert agent.driver.block(ended) is None and len(asked) == 3

    run(scenario)


# Aborts


@each_work
@pytest.mark.parametrize("state", [State.RUNNING, State.READY])
def test_an_aborted_job_leaves_nothing(work: str, state: State) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 0 if state is State.RUNNING else agent.driver.pace
        job = await agent.until_state(await begin(agent, work), state)
        await agent.engine.abort(job.id)
        assert_not_completed(agent, await agent.until_cleared(job), State.ABORTED, "cancelled")

    run(scenario)


@each_work
def test_an_abort_before_the_block_job_heard_of_its_end_aborts(work: str) -> None:
    async def scenario(agent: Agent) -> None:
        def busy(call: str, job: Job) -> None:
            if call == "complete":
                raise JobError("busy", "not now")

        agent.driver.fault = busy
        job = await agent.until_state(await begin(agent, work, completion=PIVOT), State.COMPLETING)
        await agent.engine.abort(job.id)
        assert_not_completed(agent, await agent.until_cleared(job), State.ABORTED, "cancelled")

    run(scenario)


@each_work
@each_end
def test_what_ended_well_after_its_end_was_decided_is_completed_and_never_aborted(work: str, end: Completion) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, "seal")
        job = await begin(agent, work, completion=end)
        await hold(agent, job, "seal")
        abort = asyncio.create_task(agent.engine.abort(job.id))
        await asyncio.sleep(0.005)
        open_gates(agent)
        with refusal("conflict"):
            await abort
        assert_completed(agent, await agent.until_cleared(job), end)

    run(scenario)


@each_work
def test_an_abort_while_a_pivot_cannot_be_sealed_changes_nothing(work: str) -> None:
    async def scenario(agent: Agent) -> None:
        def fail(call: str, job: Job) -> None:
            if call == "seal":
                raise JobError("io_error", "Input/output error")

        agent.driver.fault = fail
        job = await begin(agent, work, completion=PIVOT)
        await hold(agent, job, "seal")
        assert (await agent.engine.abort(job.id)).state is State.ABORTING
        await asyncio.sleep(0.02)
        assert not (await agent.engine.get(job.id)).state.terminal
        agent.driver.fault = lambda call, job: None
        assert_completed(agent, await agent.until_cleared(job), PIVOT)

    run(scenario)


# Seals


@each_work
@pytest.mark.parametrize("crash", [False, True])
def test_a_finish_that_cannot_be_sealed_failed_and_is_not_sealed_later(work: str, crash: bool) -> None:
    async def scenario(agent: Agent) -> None:
        failed = []

        def fail(call: str, job: Job) -> None:
            if call == "seal" and not failed:
                failed.append(job)
                raise JobError("no_space", "no space left")

        agent.driver.fault = fail
        if crash:
            gate(agent, "conclude")
        job = await begin(agent, work, completion=FINISH)
        if crash:
            await hold(agent, job, "conclude")
            assert (await agent.engine.get(job.id)).error is not None
            open_gates(agent)
            await agent.crash()
        assert_not_completed(agent, await agent.until_cleared(job), State.FAILED, "no_space")
        assert agent.driver.calls.count(("seal", job.id)) == 1

    run(scenario)


@each_work
def test_a_pivot_is_sealed_until_it_is_done(work: str) -> None:
    async def scenario(agent: Agent) -> None:
        left = [1, 2, 3]

        def fail(call: str, job: Job) -> None:
            if call == "seal" and left:
                left.pop()
                raise JobError("no_space", "no space left")

        agent.driver.fault = fail
        job = await begin(agent, work, completion=PIVOT)
        assert_completed(agent, await agent.until_cleared(job), PIVOT)
        assert left == []

    run(scenario)


def test_a_name_that_was_taken_fails_a_finish_and_stays_what_it_is() -> None:
    async def scenario(agent: Agent) -> None:
        job = await agent.until_state(await begin(agent, "copy"), State.READY)
        theirs = agent.driver.file("/dest")
        await agent.engine.complete(job.id, FINISH)
        assert_not_completed(agent, await agent.until_cleared(job), State.FAILED, "conflict")
        assert agent.driver.names["/dest"] == theirs

    run(scenario)


# What is left, and what is not there


def test_what_was_deleted_is_not_kept() -> None:
    """The agent of a plain user takes nothing back: what it kept is named, but for what is there no more."""

    async def scenario(agent: Agent) -> None:
        agent.access.verdicts = dict.fromkeys(
            (layer.file for layer in agent.driver.image("/top", depth=3).layers), AccessVerdict.KEPT
        )
        for layer in agent.driver.images["/top"].layers:
            agent.driver.names[layer.path] = layer.file
        ended = await agent.until_cleared(await agent.pull("/top", **WORKS["commit"], completion=PIVOT, delete=True))
        assert ended.dropped and {layer.file for layer in ended.dropped} <= agent.driver.deleted
        assert (ended.state, ended.revocation, ended.kept) == (State.COMPLETED, Revocation.DONE, ())

    run(scenario)


def test_what_was_moved_before_it_could_be_deleted_is_still_kept() -> None:
    async def scenario(agent: Agent) -> None:
        layers = agent.driver.image("/top", depth=3).layers
        agent.access.verdicts = dict.fromkeys((layer.file for layer in layers), AccessVerdict.KEPT)
        for layer in agent.driver.images["/top"].layers:
            agent.driver.names.pop(layer.path, None)
            agent.driver.names[f"{layer.path}.moved"] = layer.file
        ended = await agent.until_cleared(await agent.pull("/top", **WORKS["commit"], completion=PIVOT, delete=True))
        assert ended.dropped and not agent.driver.deleted
        assert (ended.revocation, {one.path for one in ended.kept}) == (
            Revocation.KEPT, {layer.path for layer in ended.dropped},
        )  # fmt: skip

    run(scenario)


def test_a_target_to_write_over_that_is_not_there_can_be_made() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        for asked in (agent.engine.plan, agent.engine.create):
            with refusal("not_found") as caught:
                await asked(JobSpec(target="/top", **WORKS["over"]))
            assert (caught.value.field, caught.value.value) == ("dest", "/there")
            assert "leave out --reuse-external" in (caught.value.remedy or "")

    run(scenario)
