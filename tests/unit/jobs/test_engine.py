from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from jobs.errors import JobError
from jobs.model import Chain, Cursor, Holder, Job, Revocation, State
from jobs.ports import AccessVerdict, Phase
from tests.unit.jobs.agent_in_memory import PATIENCE, QUICK, Agent, run
from tests.unit.jobs.fake_driver import MIB, spec
from tests.unit.jobs.fake_images import Image

STEP = 16 * MIB


def refusal(code: str) -> pytest.RaisesExc[JobError]:
    return pytest.RaisesExc(JobError, check=lambda error: error.code == code)


# A pull, from its creation to its end


def test_a_pull_runs_to_its_proof_and_gives_up_what_the_chain_lost() -> None:
    async def scenario(agent: Agent) -> None:
        chain = agent.driver.image("/top", depth=3)
        job = await agent.pull()
        assert (job.state, job.cursor) == (State.QUEUED, Cursor(0, agent.driver.size))
        ended = await agent.until_cleared(job)
        assert (ended.state, ended.error, ended.revocation) == (State.COMPLETED, None, Revocation.DONE)
        assert ended.cursor == Cursor(agent.driver.size, agent.driver.size)
        assert ended.revoked == ("/top.1", "/top.2")
        assert agent.access.found_at == {layer.file: layer.path for layer in chain.layers[1:]}
        assert agent.driver.images["/top"].backing is None
        assert not agent.driver.images["/top"].users
        (_, change) = agent.store.finishes[0]
        assert job.holder in change.release
        assert set(change.forget) == {layer.file for layer in chain.layers[1:]}
        assert change.release == (job.holder, Holder("image", "/top"))
        assert change.sharers == (Holder("image", "/top"),)
        assert change.gains == ()
        assert agent.store.kinds(job.id) == ["started", "completed"]
        assert agent.counts.finished == [("pull", "completed")]

    run(scenario)


def test_a_pull_whose_base_was_cut_ends_failed_before_its_header_is_rewritten() -> None:
    async def scenario(agent: Agent) -> None:
        def drift(job: Job) -> tuple[str, ...]:
            raise JobError("image_changed", "/top.1 was cut")

        agent.driver.image("/top")
        agent.driver.drift = drift
        ended = await agent.until_cleared(await agent.pull())
        assert (ended.state, ended.error and ended.error.code) == (State.FAILED, "image_changed")
        assert agent.driver.images["/top"].backing == "/top.1"
        assert ended.revoked == ()

    run(scenario)


def test_what_changed_without_harm_is_a_warning_once() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.warnings = ("/top has leaks",)
        agent.driver.drift = lambda job: ("/top.1 grew",)
        ended = await agent.until_cleared(await agent.pull())
        assert (ended.state, ended.warnings) == (State.COMPLETED, ("/top has leaks", "/top.1 grew"))

    run(scenario)


def test_a_pull_to_a_base_forgets_only_what_lies_between() -> None:
    async def scenario(agent: Agent) -> None:
        chain = agent.driver.image("/top", depth=3)
        ended = await agent.until_cleared(await agent.pull(base="/top.2"))
        assert ended.state is State.COMPLETED
        assert agent.store.finishes[0][1].forget == (chain.layers[1].file,)
        assert ended.revoked == ("/top.1",)

    run(scenario)


def test_an_export_of_the_chain_loses_the_dropped_files_too() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        export = Holder("export", "e1")
        agent.driver.images["/top"].users.add(export)
        await agent.until_cleared(await agent.pull())
        assert set(agent.store.finishes[0][1].sharers) == {export, Holder("image", "/top")}
        assert agent.driver.images["/top"].users == {export}

    run(scenario)


@pytest.mark.parametrize("way", ["abort", "fail", "die"])
def test_a_pull_that_does_not_complete_leaves_its_backing_files_to_the_image(way: str) -> None:
    async def scenario(agent: Agent) -> None:
        chain = agent.driver.image("/top", depth=3)
        agent.driver.pace = MIB // 4
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        await agent.until(job, lambda now: now.cursor.cur > 0)
        if way == "abort":
            await agent.engine.abort(job.id)
        elif way == "fail":
            agent.driver.external_error(job, "No space left on device")
        else:
            agent.driver.die("/top")
        ended = await agent.until_cleared(job)
        state, code = {
            "abort": (State.ABORTED, "cancelled"),
            "fail": (State.FAILED, "no_space"),
            "die": (State.FAILED, "storage_daemon_died"),
        }[way]
        assert ended.error is not None
        assert (ended.state, ended.error.code, ended.revocation) == (state, code, Revocation.NONE)
        (_, change) = agent.store.finishes[0]
        assert change.forget == ()
        assert {(holder, need.layer.file, need.mode) for holder, need in change.gains} == {
            (Holder("image", "/top"), one.file, "r") for one in chain.layers[1:]
        }
        assert agent.store.kinds(job.id) == ["started", "cancelled" if way == "abort" else "failed"]
        assert not agent.driver.images["/top"].users

    run(scenario, size=1024 * MIB)


@pytest.mark.parametrize("then", ["let go", "abort", "stay"])
def test_a_job_on_another_image_of_the_chain_waits_until_an_aborted_one_has_let_go(then: str) -> None:
    async def scenario(agent: Agent) -> None:
        driver = agent.driver
        below = driver.image("/top", depth=3).layers[1:]
        beside = driver.image("/beside", depth=3).layers[0]
        driver.images["/beside"] = Image(Chain((replace(beside, backing="/top.1"), *below)), "/top.1")
        driver.pace = 0

        def leased(call: str, job: Job) -> None:
            if (call, job.before.top.path) == ("prepare", "/beside") and driver.images["/top"].users:
                raise JobError("busy", "'/top.1' is in use by job:1")

        driver.fault = leased
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        if then != "stay":
            driver.gates["leave"] = asyncio.Event()
            await agent.engine.abort(job.id)
        other = await agent.pull("/beside")
        if then == "stay":
            ended = await agent.until_cleared(other)
            assert (ended.state, ended.error and ended.error.code) == (State.FAILED, "busy")
            await agent.engine.abort(job.id)
            return
        await agent.until_state(job, State.ABORTED)
        await asyncio.sleep(0.02)
        assert (await agent.engine.get(other.id)).state is State.STARTING
        if then == "abort":
            await agent.engine.abort(other.id)
        driver.pace = 16 * MIB
        driver.gates["leave"].set()
        assert (await agent.until_cleared(other)).state is (State.ABORTED if then == "abort" else State.COMPLETED)

    run(scenario)


def test_lost_hints_cost_nothing_but_time() -> None:
    async def scenario(agent: Agent) -> None:
        agent.hints = False
        agent.driver.image("/top")
        assert (await agent.until_cleared(await agent.pull())).state is State.COMPLETED

    run(scenario)


def test_hints_that_tell_nothing_change_nothing() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = 0
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        for _ in range(200):
            agent.engine.hint(job.id)
            agent.engine.hint("nobody")
        await asyncio.sleep(0.02)
        assert (await agent.engine.get(job.id)).state is State.RUNNING
        await agent.engine.abort(job.id)
        assert (await agent.until_cleared(job)).state is State.ABORTED

    run(scenario)


# What stands in the way


@pytest.mark.parametrize("call", ["prepare", "check", "start"])
def test_what_hinders_the_start_is_the_reason_of_the_failure(call: str) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")

        def refuse(name: str, job: Job) -> None:
            if name == call:
                raise JobError("access_refused", "no ACLs here", remedy="move it")

        agent.driver.fault = refuse
        ended = await agent.until_cleared(await agent.pull())
        assert ended.error is not None
        assert (ended.state, ended.error.code, ended.error.remedy) == (State.FAILED, "access_refused", "move it")
        assert agent.store.kinds(ended.id) == ["failed"]

    run(scenario)


def test_a_fault_of_the_agent_ends_the_job_and_says_so() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")

        def fault(name: str, job: Job) -> None:
            if name == "start":
                raise ZeroDivisionError

        agent.driver.fault = fault
        ended = await agent.until_cleared(await agent.pull())
        assert ended.error is not None
        assert (ended.state, ended.error.code) == (State.FAILED, "internal")

    run(scenario)


def test_a_daemon_that_dies_in_finalize_is_judged_by_the_header_that_it_left() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")

        def die(name: str, job: Job) -> None:
            if name == "finalize done":
                agent.driver.die("/top")
                raise JobError("storage_daemon_died", "killed")

        agent.driver.fault = die
        ended = await agent.until_cleared(await agent.pull())
        assert (ended.state, ended.revocation) == (State.COMPLETED, Revocation.DONE)
        assert len(agent.store.finishes[0][1].forget) == 1

    run(scenario)


def test_a_job_whose_start_was_not_answered_is_followed_when_contact_is_back() -> None:
    async def scenario(agent: Agent) -> None:
        chain = agent.driver.image("/top")
        agent.driver.pace = 0

        def hang(name: str, job: Job) -> None:
            if name == "start done":
                agent.driver.fault = lambda call, job: None
                agent.driver.silence("/top")
                raise JobError("unresponsive", "no answer")

        agent.driver.fault = hang
        job = await agent.until_state(await agent.pull(), State.UNKNOWN)
        agent.driver.heal("/top")
        running = await agent.until_state(job, State.RUNNING)
        assert running.started is not None
        assert agent.store.kinds(job.id) == ["started"]
        await agent.engine.abort(job.id)
        await agent.until_cleared(job)
        assert [need.layer.file for _, need in agent.store.finishes[0][1].gains] == [chain.layers[1].file]

    run(scenario)


def test_silence_is_unknown_and_never_an_outcome() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = MIB // 4
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        agent.driver.silence("/top")
        await agent.until_state(job, State.UNKNOWN)
        await asyncio.sleep(0.05)
        assert (await agent.engine.get(job.id)).state is State.UNKNOWN
        agent.driver.pace = 64 * MIB
        agent.driver.heal("/top")
        assert (await agent.until_cleared(job)).state is State.COMPLETED

    run(scenario, size=1024 * MIB)


def test_an_abort_of_an_unknown_job_waits_for_the_answer_and_force_does_not() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = 0
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        agent.driver.silence("/top")
        await agent.until_state(job, State.UNKNOWN)
        asked = await agent.engine.abort(job.id)
        assert (asked.state, asked.intent) == (State.UNKNOWN, "abort")
        assert (await agent.engine.abort(job.id)).state is State.UNKNOWN
        with refusal("busy"):
            await agent.engine.abort(job.id, force=True)
        await asyncio.sleep(QUICK.abort_timeout)
        await agent.engine.abort(job.id, force=True)
        assert (await agent.until_cleared(job)).state is State.ABORTED

    run(scenario)


def test_a_failure_that_contact_outlived_does_not_taint_a_later_success() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = MIB
        failed = False

        def fault(name: str, job: Job) -> None:
            nonlocal failed
            if name == "finalize" and not failed:
                failed = True
                raise JobError("io_error", "a flush failed")
            if name == "cancel":
                agent.driver.silence("/top")

        agent.driver.fault = fault
        job = await agent.until_state(await agent.pull(), State.UNKNOWN)
        agent.driver.fault = lambda call, job: None
        agent.driver.heal("/top")
        ended = await agent.until_cleared(job)
        proven = agent.driver.images["/top"].backing is None
        assert ended.state is (State.COMPLETED if proven else State.FAILED)

    run(scenario)


def test_the_agents_own_reason_outlives_a_restart() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        held = asyncio.Event()

        def refuse(name: str, job: Job) -> None:
            if name == "prepare":
                raise JobError("access_refused", "no ACLs here")
            if name == "conclude" and not held.is_set():
                raise JobError("unavailable", "not now")

        agent.driver.fault = refuse
        job = await agent.until_state(await agent.pull(), State.COMPLETING)
        held.set()
        await agent.crash()
        ended = await agent.until_cleared(job)
        assert ended.error is not None
        assert ended.error.code == "access_refused"

    run(scenario)


def test_a_full_store_holds_a_job_and_loses_nothing() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = MIB
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        agent.store.full = True
        await asyncio.sleep(0.2)
        assert not (await agent.engine.get(job.id)).state.terminal
        agent.store.full = False
        assert (await agent.until_cleared(job)).state is State.COMPLETED
        assert len(agent.store.finishes) == 1

    run(scenario)


@pytest.mark.parametrize("held", [False, True], ids=["by the abort", "before it"])
def test_who_aborts_a_job_that_cannot_be_recorded_hears_why_at_once_and_it_ends_so_when_there_is_space(
    held: bool,
) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = 1 if not held else MIB
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        agent.store.full = True
        if held:  # what runs in the hypervisor is over, and that cannot be recorded
            async with asyncio.timeout(PATIENCE):
                while not agent.store.refused:
                    await asyncio.sleep(0.002)
        with refusal("store_full"):
            await asyncio.wait_for(agent.engine.abort(job.id), 1)  # far below limits.request_timeout
        with refusal("store_full"):
            await asyncio.wait_for(agent.engine.abort(job.id), 1)
        assert (await agent.engine.get(job.id)).state is State.RUNNING
        agent.store.full = False
        ended = await agent.until_cleared(job)
        assert ended.state is (State.COMPLETED if held else State.ABORTED)

    run(scenario)


def test_a_full_store_refuses_a_new_job_and_keeps_nothing_of_it() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.store.full = True
        with refusal("store_full"):
            await agent.pull()
        agent.store.full = False
        assert agent.engine.active() == []
        assert (await agent.until_cleared(await agent.pull())).state is State.COMPLETED

    run(scenario)


# Access, after the end


def test_a_revocation_is_asked_for_until_it_is_settled() -> None:
    async def scenario(agent: Agent) -> None:
        base = agent.driver.image("/top").layers[1].file
        agent.access.verdicts[base] = AccessVerdict.PENDING
        job = await agent.until_state(await agent.pull(), State.COMPLETED)
        await asyncio.sleep(0.05)
        assert (await agent.engine.get(job.id)).revocation is Revocation.PENDING
        with refusal("conflict"):
            await agent.engine.delete(job.id)
        agent.access.verdicts[base] = AccessVerdict.KEPT
        ended = await agent.until_cleared(job)
        assert (ended.revocation, ended.revoked) == (Revocation.KEPT, ())
        assert [kept.path for kept in ended.kept] == ["/top.1"]
        await agent.engine.delete(job.id)
        with refusal("not_found"):
            await agent.engine.get(job.id)

    run(scenario)


def test_a_pending_revocation_is_taken_up_after_a_restart() -> None:
    async def scenario(agent: Agent) -> None:
        base = agent.driver.image("/top").layers[1].file
        agent.access.verdicts[base] = AccessVerdict.PENDING
        job = await agent.until_state(await agent.pull(), State.COMPLETED)
        await agent.crash()
        agent.access.verdicts.clear()
        assert (await agent.until_cleared(job)).revocation is Revocation.DONE
        assert len(agent.store.finishes) == 1

    run(scenario)


def test_a_job_that_owes_a_revocation_holds_no_slot() -> None:
    async def scenario(agent: Agent) -> None:
        base = agent.driver.image("/top").layers[1].file
        agent.driver.image("/other")
        agent.access.verdicts[base] = AccessVerdict.PENDING
        await agent.until_state(await agent.pull(), State.COMPLETED)
        assert (await agent.until_cleared(await agent.pull("/other"))).state is State.COMPLETED

    run(scenario, replace(QUICK, width=1))


# Requests


def test_an_abort_is_carried_out_once_however_often_it_is_asked() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = 0
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        answers = await asyncio.gather(*(agent.engine.abort(job.id) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(a, Job) and a.intent == "abort" for a in answers), answers
        assert (await agent.until_cleared(job)).state is State.ABORTED
        assert (await agent.engine.abort(job.id)).state is State.ABORTED
        assert agent.store.kinds(job.id) == ["started", "cancelled"]
        assert len(agent.store.finishes) == 1

    run(scenario)


def test_an_abort_of_a_completed_job_is_a_conflict() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        job = await agent.until_cleared(await agent.pull())
        with refusal("conflict"):
            await agent.engine.abort(job.id)

    run(scenario)


def test_an_abort_while_the_image_is_checked_is_immediate() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.check_waits = asyncio.Event()
        job = await agent.until_state(await agent.pull(), State.STARTING)
        assert (await agent.engine.abort(job.id)).intent == "abort"
        ended = await agent.until_cleared(job)
        assert (ended.state, ended.started) == (State.ABORTED, None)
        assert ("start", job.id) not in agent.driver.calls

    run(scenario)


def test_requests_that_do_not_fit_are_refused_and_change_nothing() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.check_waits = asyncio.Event()
        job = await agent.until_state(await agent.pull(), State.STARTING)
        for request in (agent.engine.pause, agent.engine.resume):
            with refusal("conflict"):
                await request(job.id)
        with refusal("conflict"):
            await agent.engine.next(job.id, None)
        assert (await agent.engine.get(job.id)).state is State.STARTING
        assert (await agent.engine.set_speed(job.id, 5)).bandwidth == 5
        agent.driver.pace = 0
        agent.driver.check_waits.set()
        await agent.until_state(job, State.RUNNING)
        block = agent.driver.block(job)
        assert block is not None
        assert block.speed == 5
        await agent.engine.abort(job.id)

    run(scenario)


def test_a_request_is_answered_though_settling_fails_again_and_again() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = 0

        def fault(name: str, job: Job) -> None:
            if name in ("cancel", "conclude"):
                raise JobError("unavailable", "not now")

        agent.driver.fault = fault
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        await agent.engine.abort(job.id)
        await asyncio.sleep(0.01)
        async with asyncio.timeout(1.0):
            assert (await agent.engine.set_speed(job.id, 7)).bandwidth == 7
        agent.driver.fault = lambda call, job: None
        assert (await agent.until_cleared(job)).state is State.ABORTED

    run(scenario)


@pytest.mark.parametrize("request_", ["abort", "pause"])
def test_a_request_that_meets_a_failing_slice_is_answered(request_: str) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")

        def fault(name: str, job: Job) -> None:
            if name == "advance done" and agent.store.jobs[job.id].cursor.cur:
                raise JobError("io_error", "Input/output error")

        job = await agent.until(await agent.pull(increment=64 * MIB), lambda now: now.cursor.cur > 0)
        agent.driver.fault = fault
        async with asyncio.timeout(1.0):
            try:
                await getattr(agent.engine, request_)(job.id)
            except JobError as error:
                assert error.code == "conflict"
        ended = await agent.until_cleared(job)
        assert ended.state in ((State.ABORTED, State.FAILED) if request_ == "abort" else (State.FAILED,))

    run(scenario)


def test_force_must_wait_for_the_time_that_an_abort_has() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = 0
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        stuck = agent.driver.cancel

        async def cancel(job: Job, *, force: bool = False) -> None:
            if force:
                await stuck(job, force=True)

        agent.driver.cancel = cancel  # type: ignore[method-assign]
        await agent.engine.abort(job.id)
        with refusal("busy"):
            await agent.engine.abort(job.id, force=True)
        await asyncio.sleep(QUICK.abort_timeout)
        await agent.engine.abort(job.id, force=True)
        assert (await agent.until_cleared(job)).state is State.ABORTED

    run(scenario)


def test_a_paused_job_goes_on_where_it_was() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = MIB // 4
        job = await agent.until(await agent.pull(), lambda now: now.cursor.cur > 0)
        assert (await agent.engine.pause(job.id)).state is State.PAUSED
        assert (await agent.engine.pause(job.id)).state is State.PAUSED
        block = agent.driver.block(job)
        assert block is not None
        assert block.phase is Phase.PAUSED
        await agent.crash()
        assert (await agent.engine.get(job.id)).state is State.PAUSED
        agent.driver.pace = 64 * MIB
        assert (await agent.engine.resume(job.id)).state is State.RUNNING
        assert (await agent.until_cleared(job)).state is State.COMPLETED

    run(scenario, size=1024 * MIB)


def test_the_death_of_a_paused_jobs_daemon_is_found_without_a_hint() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = MIB // 4
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        await agent.engine.pause(job.id)
        agent.hints = False
        agent.driver.die("/top")
        assert (await agent.until_cleared(job)).state is State.FAILED

    run(scenario, size=1024 * MIB)


# Increments


def test_an_incremental_pull_makes_a_step_for_each_next_and_completes_with_the_last() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top", depth=3)
        job = await agent.pull(increment=STEP)
        for step in range(1, 4):
            waiting = await agent.until_state(job, State.WAITING)
            assert waiting.cursor == Cursor(step * STEP, 64 * MIB)
            await agent.until(job, lambda now: not agent.driver.images["/top"].users)
            assert (await agent.engine.next(job.id, waiting.cursor.cur)).state in (State.QUEUED, State.RUNNING)
        ended = await agent.until_cleared(job)
        assert (ended.state, ended.cursor) == (State.COMPLETED, Cursor(64 * MIB, 64 * MIB))
        assert agent.store.kinds(job.id) == ["started", "completed"]

    run(scenario)


def test_a_repeated_next_makes_one_step() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        job = await agent.pull(increment=STEP)
        await agent.until_state(job, State.WAITING)
        await asyncio.gather(*(agent.engine.next(job.id, STEP) for _ in range(4)))
        waiting = await agent.until(job, lambda now: now.state is State.WAITING and now.cursor.cur > STEP)
        assert waiting.cursor.cur == 2 * STEP
        assert (await agent.engine.next(job.id, STEP)).cursor.cur == 2 * STEP
        await asyncio.sleep(0.02)
        assert (await agent.engine.get(job.id)).state is State.WAITING
        await agent.engine.abort(job.id)
        ended = await agent.until_cleared(job)
        assert (await agent.engine.next(job.id, STEP)).state is ended.state is State.ABORTED

    run(scenario)


def test_who_resumes_a_waiting_job_is_told_of_next() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        job = await agent.until_state(await agent.pull(increment=STEP), State.WAITING)
        with refusal("conflict") as caught:
            await agent.engine.resume(job.id)
        assert f"hostagent job next {job.id}" in (caught.value.remedy or "")

    run(scenario)


def test_a_next_without_a_cursor_is_refused_while_a_step_runs() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.gates["advance"] = asyncio.Event()
        job = await agent.until_state(await agent.pull(increment=STEP), State.RUNNING)
        asked = asyncio.ensure_future(agent.engine.next(job.id, None))
        await asyncio.sleep(0)
        agent.driver.gates.pop("advance").set()
        with refusal("conflict"):
            await asked
        waiting = await agent.until_state(job, State.WAITING)
        assert waiting.cursor.cur == STEP
        await agent.engine.next(job.id, None)
        assert (await agent.until_state(job, State.WAITING)).cursor.cur == 2 * STEP

    run(scenario)


def test_a_next_from_ahead_of_the_job_is_refused() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        job = await agent.pull(increment=STEP)
        await agent.until_state(job, State.WAITING)
        with refusal("conflict"):
            await agent.engine.next(job.id, STEP + 1)
        assert (await agent.engine.get(job.id)).state is State.WAITING

    run(scenario)


def test_a_crash_between_and_within_steps_loses_none() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        job = await agent.pull(increment=STEP)
        last = 0
        for _ in range(200):
            now = await agent.engine.get(job.id)
            assert now.cursor.cur >= last
            last = now.cursor.cur
            if now.state.terminal:
                break
            if now.state is State.WAITING:
                await agent.engine.next(job.id, now.cursor.cur)
            await asyncio.sleep(0.004)
            await agent.crash()
        assert (await agent.until_cleared(job)).state is State.COMPLETED
        assert agent.store.kinds(job.id) == ["started", "completed"]

    run(scenario, slice=2 * MIB)


def test_an_incremental_pull_is_paused_within_a_step_and_goes_on() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        job = await agent.until(await agent.pull(increment=48 * MIB), lambda now: now.cursor.cur > 0)
        paused = await agent.engine.pause(job.id)
        assert paused.state is State.PAUSED
        await asyncio.sleep(0.02)
        assert (await agent.engine.get(job.id)).cursor == paused.cursor
        await agent.engine.resume(job.id)
        assert (await agent.until_state(job, State.WAITING)).cursor.cur == 48 * MIB
        await agent.engine.abort(job.id)

    run(scenario)


def test_a_waiting_job_survives_a_daemon_that_does_not_answer_when_it_should_rest() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        silent = True

        def fault(name: str, job: Job) -> None:
            if name == "rest" and silent:
                raise JobError("unresponsive", "no answer")

        agent.driver.fault = fault
        job = await agent.until_state(await agent.pull(increment=STEP), State.UNKNOWN)
        await asyncio.sleep(0.02)
        assert agent.counts.reconciles == []
        silent = False
        await agent.until_state(job, State.WAITING)
        await agent.until(job, lambda now: not agent.driver.images["/top"].users)
        await agent.engine.abort(job.id)
        assert (await agent.until_cleared(job)).state is State.ABORTED

    run(scenario)


# Many jobs


def test_no_more_jobs_run_than_there_are_slots_and_all_of_them_end() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 4 * MIB
        jobs = []
        for n in range(10):
            agent.driver.image(f"/top{n}")
            jobs.append(await agent.pull(f"/top{n}", increment=STEP if n % 3 == 0 else None))
        most = 0
        async with asyncio.timeout(5):
            while agent.engine.active():
                most = max(most, agent.driver.running())
                for job in agent.engine.active():
                    if job.state is State.WAITING:
                        await agent.engine.next(job.id, job.cursor.cur)
                await asyncio.sleep(0.001)
        assert 0 < most <= 2
        for job in jobs:
            assert (await agent.until_cleared(job)).state is State.COMPLETED

    run(scenario, replace(QUICK, width=2))


def test_a_waiting_job_holds_no_slot() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/one")
        agent.driver.image("/two")
        waiting = await agent.until_state(await agent.pull("/one", increment=STEP), State.WAITING)
        assert (await agent.until_cleared(await agent.pull("/two"))).state is State.COMPLETED
        await agent.engine.abort(waiting.id)
        await agent.until_cleared(waiting)

    run(scenario, replace(QUICK, width=1))


def test_a_queued_job_can_be_aborted_and_the_next_one_gets_the_slot() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 0
        first, second, third = [
            await agent.pull(path) for path in ("/one", "/two", "/three") if agent.driver.image(path)
        ]
        await agent.until_state(first, State.RUNNING)
        await agent.engine.abort(second.id)
        assert (await agent.until_cleared(second)).state is State.ABORTED
        assert ("prepare", second.id) not in agent.driver.calls
        assert (await agent.engine.get(third.id)).state is State.QUEUED
        await agent.engine.abort(first.id)
        await agent.until_state(third, State.RUNNING)
        await agent.engine.abort(third.id)
        await agent.until_cleared(third)

    run(scenario, replace(QUICK, width=1))


def test_the_queue_has_a_bound_and_a_refused_job_leaves_nothing() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 0
        for path in ("/one", "/two", "/three"):
            agent.driver.image(path)
        one, two = await agent.pull("/one"), await agent.pull("/two")
        with refusal("limit"):
            await agent.pull("/three")
        assert set(agent.store.jobs) == {one.id, two.id}
        await agent.engine.abort(two.id)
        await agent.until_cleared(two)
        await agent.pull("/three")

    run(scenario, replace(QUICK, queue=2))


def test_the_last_places_are_for_who_may_name_any_image() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 0
        for number in range(11):
            agent.driver.image(f"/{number}")
        for number in range(9):
            await agent.pull(f"/{number}", anywhere=False)
        with refusal("limit"):
            await agent.pull("/9", anywhere=False)
        await agent.pull("/9")
        with refusal("limit"):
            await agent.pull("/10")

    run(scenario, replace(QUICK, queue=10))


def test_one_job_works_on_a_chain() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = 0
        job = await agent.pull()
        with refusal("busy") as refused:
            await agent.pull()
        assert refused.value.details["holders"] == [f"job:{job.id}"]
        await agent.engine.abort(job.id)
        await agent.until_state(job, State.ABORTED)
        agent.driver.pace = 16 * MIB
        assert (await agent.until_cleared(await agent.pull())).state is State.COMPLETED

    run(scenario)


def test_two_creations_at_once_make_one_job() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = 0
        same = await asyncio.gather(*(agent.engine.create(spec("/top"), "id-1") for _ in range(3)))
        assert [created for _, created in same].count(True) == 1
        assert {job.id for job, _ in same} == {"id-1"}
        with refusal("conflict"):
            await agent.engine.create(spec("/top", bandwidth=1), "id-1")
        await agent.engine.abort("id-1")

    run(scenario)


def test_a_plan_that_cannot_be_made_leaves_no_job() -> None:
    async def scenario(agent: Agent) -> None:
        with refusal("not_found"):
            await agent.pull("/absent")
        assert agent.store.jobs == {}

    run(scenario)


@pytest.mark.parametrize("ticks", range(4))
def test_a_caller_that_goes_away_leaves_no_job_without_a_writer(ticks: int) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        save = agent.store.save

        async def shielded(*args: object) -> None:  # as the real store: what is written is written
            await asyncio.shield(asyncio.ensure_future(save(*args)))  # type: ignore[arg-type]

        agent.store.save = shielded  # type: ignore[method-assign, assignment]
        creating = asyncio.create_task(agent.engine.create(spec("/top"), "id-1"))
        while ("id-1") not in agent.store.jobs:
            await asyncio.sleep(0)
        for _ in range(ticks):
            await asyncio.sleep(0)
        creating.cancel()
        await asyncio.wait({creating})
        assert (await agent.until_cleared(await agent.engine.get("id-1"))).state is State.COMPLETED

    run(scenario)


# Stopping


@pytest.mark.parametrize("ticks", range(8))
def test_stopping_ends_whatever_arrives_in_that_moment(ticks: int) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = 0
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        await asyncio.sleep(0.0005)
        agent.engine.hint(job.id)
        for _ in range(ticks):
            await asyncio.sleep(0)
        await asyncio.wait_for(agent.engine.stop(), 1.0)

    run(scenario)


def test_stopping_leaves_no_slice_behind() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        job = await agent.until_state(await agent.pull(increment=64 * MIB), State.RUNNING)
        await agent.until(job, lambda now: ("advance", job.id) in agent.driver.calls)
        before = asyncio.all_tasks()
        await agent.engine.stop()
        await asyncio.sleep(0)
        left = [task for task in before & asyncio.all_tasks() if "advance" in repr(task.get_coro())]
        assert left == []

    run(scenario)


def test_a_continuous_job_goes_on_while_the_agent_is_away() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = MIB // 4
        job = await agent.until(await agent.pull(), lambda now: now.cursor.cur > 0)
        await agent.engine.stop()
        block = agent.driver.block(job)
        assert block is not None
        block.cur, block.phase = block.end, Phase.PENDING
        await agent.crash()
        ended = await agent.until_cleared(job)
        assert ended.state is State.COMPLETED
        assert agent.driver.calls.count(("block job", job.id)) == 1
        assert agent.store.kinds(job.id) == ["started", "completed"]

    run(scenario, size=1024 * MIB)


def test_a_job_whose_end_was_not_seen_is_settled_from_the_image_at_the_next_start() -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.image("/top")
        agent.driver.pace = 0
        job = await agent.until_state(await agent.pull(), State.RUNNING)
        await agent.engine.stop()
        agent.driver.die("/top")
        agent.driver.images["/top"].backing = None
        await agent.crash()
        assert (await agent.until_cleared(job)).state is State.COMPLETED

    run(scenario)
