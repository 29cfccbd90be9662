"""Several copies as one group: they complete together or not at all, whatever happens to whom and when."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from jobs.errors import JobError
from jobs.model import Completion, Job, JobSpec, Operation, State, TargetState
from tests.unit.jobs.agent_in_memory import QUICK, Agent, run
from tests.unit.jobs.fake_driver import MIB
from tests.unit.jobs.fake_images import part_of
from tests.unit.jobs.groups import DISKS, EXPORT, GROUP, begin, ended, judge, judge_chains, specs, targets
from tests.unit.jobs.ready import FINISH, PIVOT, each_end, gate, hold, open_gates, refusal

CALLS = ("prepare", "check", "start", "harden", "name", "complete", "seal", "conclude", "drop", "leave")
BEFORE_THE_DECISION = CALLS[:5]

each_kind = pytest.mark.parametrize("over", [False, True], ids=["new", "over"])


def states(jobs: list[Job]) -> list[State]:
    return [job.state for job in jobs]


async def now(agent: Agent, jobs: list[Job]) -> list[Job]:
    return [await agent.engine.get(job.id) for job in jobs]


# Completing


@each_end
@each_kind
@pytest.mark.parametrize("hints", [True, False])
def test_all_complete_each_step_when_all_have_done_the_one_before(end: Completion, over: bool, hints: bool) -> None:
    async def scenario(agent: Agent) -> None:
        agent.hints = hints
        jobs = await ended(agent, await begin(agent, completion=end, reuse_external=over))
        assert states(jobs) == [State.COMPLETED] * 3
        for before, after in (("harden", "name"), ("name", "complete")):
            calls = [call for call, _ in agent.driver.calls if call in (before, after)]
            assert calls == [before] * 3 + [after] * 3

    run(scenario)


@each_end
def test_a_group_stays_ready_until_the_end_of_any_is_asked_for(end: Completion) -> None:
    async def scenario(agent: Agent) -> None:
        jobs = await begin(agent, completion=None)
        for job in jobs:
            await agent.until_state(job, State.READY)
        await asyncio.sleep(0.02)
        assert states(await now(agent, jobs)) == [State.READY] * 3
        asked = await agent.engine.complete(jobs[1].id, end)
        assert asked.sealed is end
        done = await ended(agent, jobs)
        assert [(job.state, job.completion) for job in done] == [(State.COMPLETED, end)] * 3
        assert (await agent.engine.complete(jobs[1].id, end)).state is State.COMPLETED

    run(scenario)


def test_a_member_is_not_completed_before_all_are_ready() -> None:
    async def scenario(agent: Agent) -> None:
        jobs = await begin(agent, completion=None)
        await agent.until_state(jobs[2], State.RUNNING)
        await agent.engine.pause(jobs[2].id)
        agent.driver.pace = 16 * MIB
        for job in jobs[:2]:
            await agent.until_state(job, State.READY)
        with refusal("conflict"):
            await agent.engine.complete(jobs[0].id, FINISH)
        assert (await agent.engine.get(jobs[0].id)).sealed is None
        await agent.engine.resume(jobs[2].id)
        await agent.until_state(jobs[2], State.READY)
        await agent.engine.complete(jobs[0].id, FINISH)
        assert states(await ended(agent, jobs)) == [State.COMPLETED] * 3

    run(scenario, pace=0)


def test_the_end_that_was_asked_for_is_remembered() -> None:
    async def scenario(agent: Agent) -> None:
        jobs = await begin(agent, completion=None)
        for job in jobs:
            await agent.until_state(job, State.READY)
        gate(agent, "name")
        await agent.engine.complete(jobs[0].id, PIVOT)
        with refusal("conflict"):
            await agent.engine.complete(jobs[1].id, FINISH)
        await agent.crash()
        open_gates(agent)
        assert [job.completion for job in await ended(agent, jobs)] == [PIVOT] * 3

    run(scenario)


# Not completing


@pytest.mark.parametrize("what", ["die", "io_error"])
@pytest.mark.parametrize("call", BEFORE_THE_DECISION)
def test_what_fails_one_before_the_decision_fails_all_and_names_it(call: str, what: str) -> None:
    async def scenario(agent: Agent) -> None:
        def fault(now: str, job: Job) -> None:
            if (now, job.before.top.path) == (call, "/b"):
                if what == "die":
                    agent.driver.die("/b")
                else:
                    raise JobError("io_error", "Input/output error")

        agent.driver.fault = fault
        jobs = await ended(agent, await begin(agent))
        if (call, what) == ("name", "die"):  # its result was whole
            assert states(jobs) == [State.COMPLETED] * 3
            return
        if states(jobs) == [State.COMPLETED] * 3:  # it died before there was anything to lose
            assert (call, what) == ("prepare", "die")
            return
        assert states(jobs) == [State.FAILED] * 3
        for job in (jobs[0], jobs[2]):
            assert job.error is not None
            assert job.error.code == "group_failed"
            assert "'/b'" in job.error.message

    run(scenario)


@each_end
def test_a_name_that_was_taken_fails_all_and_stays_whose_it_is(end: Completion) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, "name")
        jobs = await begin(agent, completion=end)
        for job in jobs:
            await hold(agent, job, "name")
        taken = agent.driver.file("/c.copy")
        open_gates(agent)
        jobs = await ended(agent, jobs)
        assert [job.error and job.error.code for job in jobs] == ["group_failed", "group_failed", "conflict"]
        assert targets(agent, jobs) == [None, None, taken]

    run(scenario)


@pytest.mark.parametrize("call", BEFORE_THE_DECISION)
def test_the_abort_of_one_aborts_all(call: str) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, call)
        jobs = await begin(agent)
        await hold(agent, jobs[1], call)
        aborting = asyncio.create_task(agent.engine.abort(jobs[1].id))
        await asyncio.sleep(0.005)
        open_gates(agent)
        await asyncio.wait([aborting])
        done = await ended(agent, jobs)
        if call == "name" and aborting.exception() is not None:  # the decision came first
            assert states(done) == [State.COMPLETED] * 3
        else:
            assert states(done) == [State.ABORTED] * 3

    run(scenario)


def test_queued_copies_are_aborted_together() -> None:
    async def scenario(agent: Agent) -> None:
        agent.engine.admit(jobs=False)
        jobs = await begin(agent)
        await agent.engine.abort(jobs[0].id)
        assert states(await ended(agent, jobs)) == [State.ABORTED] * 3
        assert agent.driver.running() == 0

    run(scenario)


@each_end
@pytest.mark.parametrize("call", ["complete", "seal"])
def test_an_abort_after_the_decision_is_refused(end: Completion, call: str) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, call)
        jobs = await begin(agent, completion=end)
        await hold(agent, jobs[0], call)
        aborting = [asyncio.create_task(agent.engine.abort(job.id, force=force)) for job in jobs for force in (0, 1)]
        await asyncio.sleep(0.005)
        open_gates(agent)
        await asyncio.wait(aborting)
        assert {one.exception().code for one in aborting} == {"conflict"}  # type: ignore[union-attr]
        assert states(await ended(agent, jobs)) == [State.COMPLETED] * 3

    run(scenario)


@pytest.mark.parametrize("ask", ["abort", "speed"])
@pytest.mark.parametrize("crash", [False, True])
def test_what_is_asked_while_the_decision_is_stored_comes_after_it(ask: str, crash: bool) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, "name")
        jobs = await begin(agent)
        for job in jobs:
            await hold(agent, job, "name")
        agent.store.gate = asyncio.Event()
        open_gates(agent)
        while not agent.store.jobs[jobs[0].id].decided:
            await asyncio.sleep(0.001)
        engine = agent.engine
        asked = [engine.abort(job.id) if ask == "abort" else engine.set_speed(job.id, 5) for job in jobs]
        asking = [asyncio.ensure_future(one) for one in asked]
        await asyncio.sleep(0.01)
        if crash:
            await agent.crash()
        agent.store.gate.set()
        await asyncio.wait(asking)
        if ask == "abort":
            assert all(isinstance(one.exception(), JobError) for one in asking)
        assert states(await ended(agent, jobs)) == [State.COMPLETED] * 3

    run(scenario)


@pytest.mark.parametrize("crash", [False, True])
def test_nothing_is_decided_while_an_abort_is_being_stored(crash: bool) -> None:
    async def scenario(agent: Agent) -> None:
        driver, last, name = agent.driver, asyncio.Event(), agent.driver.name

        async def name_last(job: Job) -> None:
            if job.before.top.path == "/c":
                await last.wait()
            await name(job)

        driver.name = name_last  # type: ignore[method-assign]
        jobs = await begin(agent)
        for job in jobs[:2]:
            await agent.until(job, lambda job: job.spec.dest in driver.names)
        agent.store.gate = asyncio.Event()
        aborting = asyncio.ensure_future(agent.engine.abort(jobs[0].id))
        while agent.store.jobs[jobs[0].id].intent is None:
            await asyncio.sleep(0.001)
        last.set()
        await asyncio.sleep(0.01)
        if crash:
            await agent.crash()
        agent.store.gate.set()
        await asyncio.wait([aborting])
        assert states(await ended(agent, jobs)) == [State.ABORTED] * 3

    run(scenario)


@each_end
def test_a_decided_member_that_does_not_answer_is_not_aborted_and_completes_later(end: Completion) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, "complete")
        jobs = await begin(agent, completion=end)
        await hold(agent, jobs[1], "complete")
        agent.driver.silence("/b")
        open_gates(agent)
        await agent.until_state(jobs[1], State.UNKNOWN)
        for force in (False, True):
            with refusal("conflict"):
                await agent.engine.abort(jobs[1].id, force=force)
        await agent.until_cleared(jobs[0])
        await agent.crash()
        assert (await agent.engine.get(jobs[1].id)).intent is None
        agent.driver.heal("/b")
        assert states(await ended(agent, jobs)) == [State.COMPLETED] * 3

    run(scenario)


@pytest.mark.parametrize("call", ["prepare", "start"])
def test_a_target_that_was_there_is_untouched_until_it_may_be_written(call: str) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, call)
        jobs = await begin(agent, reuse_external=True)
        for job in jobs:
            await hold(agent, job, call)
        await agent.crash()
        agent.driver.fault = lambda now, job: fail(now == call)
        open_gates(agent)
        jobs = await ended(agent, jobs)
        expected = TargetState.UNTOUCHED if call == "prepare" else TargetState.UNUSABLE
        assert [job.target and job.target.state for job in jobs] == [expected] * 3

    def fail(now: bool) -> None:
        if now:
            raise JobError("io_error", "Input/output error")

    run(scenario)


# Deaths and restarts


@each_end
@each_kind
@pytest.mark.parametrize("call", [*CALLS, "observe"])
@pytest.mark.parametrize("path", ["/a", "/c"])
def test_an_agent_that_is_killed_anywhere_completes_the_group(
    end: Completion, over: bool, call: str, path: str
) -> None:
    async def scenario(agent: Agent) -> None:
        if call != "observe":
            gate(agent, call)
        jobs = await begin(agent, completion=end, reuse_external=over)
        await hold(agent, jobs[DISKS.index(path)], call)
        await agent.crash()
        open_gates(agent)
        assert states(await ended(agent, jobs)) == [State.COMPLETED] * 3

    run(scenario)


@each_end
@each_kind
@pytest.mark.parametrize("call", ["name", "complete", "seal", "conclude"])
@pytest.mark.parametrize("crash", [False, True])
def test_a_daemon_that_dies_after_all_are_sealed_stops_nobody(
    end: Completion, over: bool, call: str, crash: bool
) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, call)
        jobs = await begin(agent, completion=end, reuse_external=over)
        for job in jobs:
            await agent.until(job, lambda job: job.sealed is not None)
        await hold(agent, jobs[1], call)
        agent.driver.die("/b")
        if crash:
            await agent.crash()
        open_gates(agent)
        assert states(await ended(agent, jobs)) == [State.COMPLETED] * 3

    run(scenario)


async def refused(agent: Agent, jobs: list[Job], wrong: str) -> None:
    """All but the second end well, and that one says what became of it; who uses the disks is where each says."""
    done = [await agent.until_cleared(job) for job in jobs]
    judge_chains(agent, done)
    assert [job.error and job.error.code for job in done] == [None, "pivot_refused", None]
    assert states(done) == [State.COMPLETED, State.FAILED, State.COMPLETED]
    for job in done:
        assert job.target is not None and job.target.state is TargetState.COMPLETE
        assert agent.driver.names[job.target.path] == job.target.file  # whole, and not taken back
        assert part_of(job) not in agent.driver.names
    assert done[1].error is not None and wrong in done[1].error.message
    assert EXPORT in agent.driver.images["/b"].users


@pytest.mark.parametrize("crash", [False, True])
def test_a_pivot_that_ends_badly_after_the_decision_fails_that_member_alone(crash: bool) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, "complete")
        jobs = await begin(agent, completion=PIVOT)
        for job in jobs:
            await hold(agent, job, "complete")
        agent.driver.external_error(jobs[1], "it does not fit")
        if crash:
            await agent.crash()
        open_gates(agent)
        await refused(agent, jobs, "it does not fit")

    run(scenario)


@pytest.mark.parametrize("crash", [False, True])
def test_a_pivot_that_is_refused_after_the_decision_is_asked_for_again_and_then_given_up(crash: bool) -> None:
    async def scenario(agent: Agent) -> None:
        asked = []

        def fault(now: str, job: Job) -> None:
            if now == "complete" and job.before.top.path == "/b":
                asked.append(now)
                raise JobError("job_failed", "not now")

        agent.driver.fault = fault
        if crash:
            gate(agent, "cancel")
        jobs = await begin(agent, completion=PIVOT)
        if crash:
            await hold(agent, jobs[1], "cancel")
            await agent.crash()
            open_gates(agent)
        await refused(agent, jobs, "not now")
        assert len(asked) == 1 + agent.limits.end_retries

    run(scenario)


@pytest.mark.parametrize("times", [1, 100])
def test_a_refused_finish_leaves_the_copy_complete(times: int) -> None:
    async def scenario(agent: Agent) -> None:
        left = [times]

        def fault(now: str, job: Job) -> None:
            if now == "complete" and job.before.top.path == "/b" and left[0]:
                left[0] -= 1
                raise JobError("job_failed", "not now")

        agent.driver.fault = fault
        assert states(await ended(agent, await begin(agent, completion=FINISH))) == [State.COMPLETED] * 3

    run(scenario)


@pytest.mark.parametrize("crash", [False, True])
def test_a_daemon_that_dies_before_its_target_is_sealed_fails_all(crash: bool) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, "harden")
        jobs = await begin(agent)
        await hold(agent, jobs[1], "harden")
        agent.driver.die("/b")
        if crash:
            await agent.crash()
        open_gates(agent)
        jobs = await ended(agent, jobs)
        assert states(jobs) == [State.FAILED] * 3
        assert jobs[1].error is not None
        assert jobs[1].error.code == "storage_daemon_died"

    run(scenario)


@pytest.mark.parametrize("delete", [False, True])
def test_who_failed_is_remembered_over_a_restart_and_when_it_was_deleted(delete: bool) -> None:
    async def scenario(agent: Agent) -> None:
        gate(agent, "name")
        jobs = await begin(agent)
        for job in jobs:
            await hold(agent, job, "name")
        assert targets(agent, jobs) == [None] * 3
        failed = replace(agent.store.jobs[jobs[1].id], state=State.FAILED, finished=jobs[1].created)
        await agent.engine.stop()
        await agent.driver.discard(failed)
        agent.driver.images["/b"].users.discard(failed.holder)
        if delete:
            del agent.store.jobs[failed.id]
        else:
            from jobs.model import Failure

            agent.store.jobs[failed.id] = replace(failed, error=Failure("io_error", "the disk burns"))
        await agent.crash()
        open_gates(agent)
        others = [await agent.until_cleared(job) for job in (jobs[0], jobs[2])]
        judge(agent, others)
        assert [job.error and job.error.code for job in others] == ["group_failed"] * 2
        if not delete:
            assert all("the disk burns" in job.error.message for job in others if job.error)

    run(scenario)


# Requests


def test_a_group_is_made_once() -> None:
    async def scenario(agent: Agent) -> None:
        jobs = await begin(agent)
        again, created = await agent.engine.create_group(specs(), GROUP)
        assert ([job.id for job in again], created) == ([job.id for job in jobs], False)
        with refusal("conflict"):
            await agent.engine.create_group(specs(completion=PIVOT), GROUP)
        await ended(agent, jobs)
        assert not (await agent.engine.create_group(specs(), GROUP))[1]

    run(scenario)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        pytest.param(specs("/a", "/a"), "invalid", id="one disk twice"),
        pytest.param(specs("/a"), "invalid", id="one disk"),
        pytest.param([*specs("/a"), replace(specs("/b")[0], dest="/a.copy")], "invalid", id="one target twice"),
        pytest.param([*specs("/a"), *specs("/b", completion=PIVOT)], "invalid", id="two ends"),
        pytest.param([*specs("/a"), JobSpec(Operation.PULL, "/b")], "invalid", id="a pull"),
        pytest.param([*specs("/a"), *specs("/none")], "not_found", id="no such image"),
        pytest.param(specs(*"abcde"), "limit", id="wider than all that may run"),
        pytest.param(
            [*specs("/a"), replace(specs("/b")[0], dest="/a.1", reuse_external=True)],
            "invalid",
            id="over another's base",
        ),
    ],
)
def test_what_cannot_be_a_group_is_refused_and_nothing_is_stored(asked: list[JobSpec], code: str) -> None:
    async def scenario(agent: Agent) -> None:
        for path in ("/a", "/b"):
            agent.driver.image(path)
        with refusal(code):
            await agent.engine.create_group(asked)
        with refusal(code):
            await agent.engine.plan_group(asked)
        assert agent.store.jobs == {}
        assert agent.engine.active() == []

    run(scenario)


def test_a_group_is_not_made_while_a_job_works_on_one_of_its_disks() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 0
        agent.driver.image("/b")
        await agent.pull("/b")
        agent.driver.image("/a")
        with refusal("busy"):
            await agent.engine.create_group(specs("/a", "/b"))
        assert len(agent.store.jobs) == 1

    run(scenario)


# Slots


def test_groups_are_let_in_whole_and_in_their_order() -> None:
    async def scenario(agent: Agent) -> None:
        first = await begin(agent, "/a", "/b", completion=None, group_id=None)
        second = await begin(agent, "/c", "/d", completion=None, group_id=None)
        agent.driver.image("/e")
        single = await agent.pull("/e")
        for job in first:
            await agent.until_state(job, State.READY)
        await asyncio.sleep(0.01)
        assert states(await now(agent, [*second, single])) == [State.QUEUED] * 3
        await agent.crash()
        await asyncio.sleep(0.01)
        assert states(await now(agent, second)) == [State.QUEUED] * 2
        await agent.engine.complete(first[0].id, FINISH)
        await ended(agent, first)
        for job in second:
            await agent.until_state(job, State.READY)
        await agent.until_cleared(single)
        await agent.engine.abort(second[1].id)
        assert states(await ended(agent, second)) == [State.ABORTED] * 2

    run(scenario, replace(QUICK, width=3))
