"""What every BlockDriver promises of copies and commits: one suite for both drivers, as driver_suite is for pulls.

A copy, and a commit of the top itself, become ready and wait to be told how they end; a commit below the top ends as a
pull does, by a header.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import JobError
from jobs.model import Completion, Job, Operation, State
from jobs.ports import Contact, Phase
from tests.contract.driver_suite import BANDWIDTH, NOW, PATIENCE, DriverSuite, Rig


@dataclass(frozen=True)
class Work:
    """A kind of job; `made` says that its target is ours, None that it has none."""

    name: str
    operation: Operation
    made: bool | None = None
    below: bool = False

    def __str__(self) -> str:
        return self.name

    def spec(self, rig: Rig) -> dict[str, Any]:
        spec: dict[str, Any] = {"operation": self.operation}
        if self.made is not None:
            spec |= {"dest": rig.dest, "reuse_external": not self.made}
        if self.below:
            spec |= {"top": rig.middle, "base": rig.base}
        if self.made is False:
            rig.make(rig.dest)
        return spec


NEW = Work("copy", Operation.COPY, made=True)
EXISTING = Work("copy-over", Operation.COPY, made=False)
ACTIVE = Work("commit", Operation.COMMIT)
BELOW = Work("commit-below", Operation.COMMIT, below=True)
READY = (NEW, EXISTING, ACTIVE)

Test = Callable[[Any, Rig, Work], Coroutine[Any, Any, None]]


def on_rigs(*works: Work) -> Callable[[Test], Any]:
    """Run an asynchronous test of the suite for each of these works, each on a fresh rig."""

    def wrap(test: Test) -> Any:
        def play(self: DriverSuite, folder: Path, work: Work) -> None:
            async def go() -> None:
                async with self.rig(folder) as rig:
                    await asyncio.wait_for(test(self, rig, work), 2 * PATIENCE)

            asyncio.run(go())

        functools.update_wrapper(play, test)
        del play.__wrapped__  # type: ignore[attr-defined]  # or pytest would ask for a fixture called rig
        return pytest.mark.parametrize("work", works, ids=str)(play)

    return wrap


def result(rig: Rig, work: Work) -> str:
    """The file that has what the job wrote."""
    return rig.base if work.made is None else rig.dest


async def ready(rig: Rig, work: Work) -> Job:
    job = await rig.started(**work.spec(rig))
    await rig.until(job, Phase.READY)
    return job


async def completed(rig: Rig, job: Job, completion: Completion) -> Job:
    """The job told to end, and ended well; twice, as after a crash."""
    after = job.before if completion is Completion.FINISH else job.after
    job = replace(job, state=State.COMPLETING, completion=completion, after=after)
    for _ in range(2):
        await rig.driver.complete(job)
    assert (await rig.until(job, Phase.CONCLUDED)).done
    return job


async def gone(rig: Rig, job: Job) -> None:
    """The daemon is killed, and the driver has seen it."""
    await rig.kill()
    async with asyncio.timeout(PATIENCE):
        while (await rig.driver.observe(job)).contact is not Contact.DEAD:
            await asyncio.sleep(0.01)


async def discarded(rig: Rig, job: Job, state: State) -> None:
    """The end of a job that did not complete, as the engine brings it about."""
    for _ in range(2):
        await rig.driver.discard(job)
    await rig.end(job, state)
    await rig.driver.discard(job)


class ReadySuite(DriverSuite):
    # Ready

    @on_rigs(*READY)
    async def test_a_plan_names_the_chain_of_a_pivot(self, rig: Rig, work: Work) -> None:
        names = rig.names()
        job = await rig.job(**work.spec(rig))
        assert job.after.top.path == result(rig, work)
        assert len(job.after.layers) == 1
        assert rig.names() - names <= {rig.dest}

    @on_rigs(*READY)
    async def test_a_job_is_ready_only_when_it_is_in_sync_and_proves_nothing(self, rig: Rig, work: Work) -> None:
        job = await rig.started(**work.spec(rig))
        names = rig.names()
        seen = await rig.until(job, Phase.READY)
        assert seen.cursor is not None
        assert seen.cursor.cur == seen.cursor.end > 0
        assert not seen.proven
        assert not seen.done
        assert rig.names() == names
        await rig.driver.cancel(job)
        await rig.until(job, Phase.CONCLUDED)
        await discarded(rig, job, State.ABORTED)

    @on_rigs(*READY)
    async def test_a_job_that_is_not_ready_is_not_completed(self, rig: Rig, work: Work) -> None:
        job = await rig.started(**work.spec(rig), bandwidth=BANDWIDTH)
        assert (await rig.driver.observe(job)).phase is Phase.RUNNING
        for completion in Completion:
            await rig.driver.complete(replace(job, completion=completion))
            assert (await rig.driver.observe(job)).phase is Phase.RUNNING
        await rig.driver.cancel(job)
        await rig.until(job, Phase.CONCLUDED)
        await discarded(rig, job, State.ABORTED)

    @on_rigs(*READY)
    async def test_starting_twice_is_one_job_of_one_target(self, rig: Rig, work: Work) -> None:
        job = await ready(rig, work)
        names = rig.names()
        for _ in range(2):
            assert not await rig.driver.prepare(job)
            await rig.driver.start(job)
        assert (await rig.driver.observe(job)).phase is Phase.READY
        assert rig.names() == names
        job = await completed(rig, job, Completion.FINISH)
        await rig.driver.seal(job)
        await rig.end(job, State.COMPLETED)
        assert rig.same(result(rig, work))

    # Ends

    @on_rigs(*READY)
    async def test_a_finish_keeps_the_chain_and_its_result_is_whole_when_sealed(self, rig: Rig, work: Work) -> None:
        before = rig.backing()
        job = await completed(rig, await ready(rig, work), Completion.FINISH)
        assert not (await rig.driver.observe(job)).proven
        assert work is not NEW or rig.dest not in rig.names()
        for _ in range(2):
            await rig.driver.seal(job)
        assert (await rig.driver.observe(job)).proven is (work is NEW)
        assert rig.serves() == job.before.top.file
        await rig.end(job, State.COMPLETED)
        assert rig.same(result(rig, work))
        assert rig.backing() == before
        self.assert_no_other_names(rig)

    @on_rigs(*READY)
    async def test_a_pivot_changes_the_chain(self, rig: Rig, work: Work) -> None:
        job = await completed(rig, await ready(rig, work), Completion.PIVOT)
        assert not (await rig.driver.observe(job)).proven
        for _ in range(2):
            await rig.driver.seal(job)

        async def record(sharers: object) -> Job:
            return replace(job, state=State.COMPLETED, finished=NOW)

        await rig.driver.conclude(job, record)
        assert rig.serves() == job.after.top.file
        await rig.end(job, State.COMPLETED)
        assert rig.same(result(rig, work))
        self.assert_no_other_names(rig)

    @on_rigs(NEW)
    async def test_a_sealed_target_is_proven_when_the_daemon_is_dead(self, rig: Rig, work: Work) -> None:
        job = await completed(rig, await ready(rig, work), Completion.FINISH)
        await rig.driver.seal(job)
        await gone(rig, job)
        assert (await rig.driver.observe(job)).proven
        await rig.end(job, State.COMPLETED)
        assert rig.same(rig.dest)

    @on_rigs(NEW)
    async def test_a_name_that_is_taken_is_not_sealed_over(self, rig: Rig, work: Work) -> None:
        job = await completed(rig, await ready(rig, work), Completion.FINISH)
        rig.make(rig.dest)
        with pytest.raises(JobError) as refused:
            await rig.driver.seal(job)
        assert refused.value.code == "conflict"
        assert not (await rig.driver.observe(job)).proven
        await discarded(rig, job, State.FAILED)
        assert rig.dest in rig.names()
        self.assert_no_other_names(rig)

    @on_rigs(ACTIVE, BELOW)
    async def test_what_was_committed_is_deleted_and_nothing_else(self, rig: Rig, work: Work) -> None:
        names = rig.names()
        job = await rig.started(**work.spec(rig), delete=True)
        if work.below:
            await rig.until(job, Phase.PENDING)
            await rig.driver.finalize(job)
            await rig.until(job, Phase.CONCLUDED)
        else:
            await rig.until(job, Phase.READY)
            job = await completed(rig, job, Completion.PIVOT)
            await rig.driver.seal(job)
        job = await rig.end(job, State.COMPLETED)
        for _ in range(2):
            await rig.driver.delete_dropped(job, ())
        assert names - rig.names() == ({rig.middle} if work.below else {rig.middle, rig.top})
        assert rig.same(rig.top if work.below else rig.base)

    # What does not complete

    @on_rigs(*READY, BELOW)
    async def test_a_job_that_is_cancelled_while_it_runs_leaves_nothing(self, rig: Rig, work: Work) -> None:
        names, backing = rig.names(), rig.backing()
        spec = work.spec(rig)
        job = await rig.started(**spec, bandwidth=BANDWIDTH)
        for _ in range(2):
            await rig.driver.cancel(job)
        seen = await rig.until(job, Phase.CONCLUDED)
        assert (seen.done, seen.proven) == (False, False)
        await discarded(rig, job, State.ABORTED)
        assert rig.names() - {rig.dest} == names - {rig.dest}
        assert (rig.dest in rig.names()) == (work is EXISTING)
        assert rig.backing() == backing

    @on_rigs(*READY)
    async def test_a_job_that_is_cancelled_while_it_is_ready_leaves_nothing_and_can_be_made_again(
        self, rig: Rig, work: Work
    ) -> None:
        job = await ready(rig, work)
        await rig.driver.cancel(job)
        seen = await rig.until(job, Phase.CONCLUDED)
        assert (seen.done, seen.proven) == (False, False)
        await discarded(rig, job, State.ABORTED)
        assert (rig.dest in rig.names()) == (work is EXISTING)
        self.assert_no_other_names(rig)
        again = await completed(rig, await ready(rig, work), Completion.FINISH)
        await rig.driver.seal(again)
        await rig.end(again, State.COMPLETED)
        assert rig.same(result(rig, work))

    @on_rigs(*READY)
    async def test_a_daemon_that_is_killed_before_the_seal_proves_nothing(self, rig: Rig, work: Work) -> None:
        backing = rig.backing()
        job = await completed(rig, await ready(rig, work), Completion.PIVOT)
        await gone(rig, job)
        assert not (await rig.driver.observe(job)).proven
        for call in (rig.driver.seal(job), rig.driver.complete(job)):
            with pytest.raises(JobError) as refused:
                await call
            assert refused.value.code == "storage_daemon_died"
        await rig.driver.cancel(job)
        await discarded(rig, job, State.FAILED)
        assert (rig.dest in rig.names()) == (work is EXISTING)
        assert rig.backing() == backing
        self.assert_no_other_names(rig)

    @on_rigs(*READY, BELOW)
    async def test_a_daemon_that_is_killed_while_the_job_runs_proves_nothing(self, rig: Rig, work: Work) -> None:
        job = await rig.started(**work.spec(rig), bandwidth=BANDWIDTH)
        await gone(rig, job)
        assert not (await rig.driver.observe(job)).proven
        await discarded(rig, job, State.FAILED)
        assert (rig.dest in rig.names()) == (work is EXISTING)
        self.assert_no_other_names(rig)

    @on_rigs(*READY)
    async def test_what_was_prepared_and_never_started_leaves_nothing(self, rig: Rig, work: Work) -> None:
        job = await rig.prepared(await rig.job(**work.spec(rig)))
        assert not await rig.driver.prepare(job)
        await discarded(rig, job, State.ABORTED)
        assert (rig.dest in rig.names()) == (work is EXISTING)
        self.assert_no_other_names(rig)

    # Below the top

    @on_rigs(BELOW)
    async def test_a_commit_below_the_top_goes_from_start_to_proof(self, rig: Rig, work: Work) -> None:
        job = await rig.started(**work.spec(rig))
        assert not (await rig.until(job, Phase.PENDING)).proven
        backing = rig.backing()
        for _ in range(2):
            await rig.driver.finalize(job)
        seen = await rig.until(job, Phase.CONCLUDED)
        assert (seen.error, seen.proven) == (None, True)
        assert rig.backing() != backing
        await gone(rig, job)
        assert (await rig.driver.observe(job)).proven
        await rig.end(job, State.COMPLETED)
        assert [layer.path for layer in (await rig.job()).before.layers] == [rig.top, rig.base]

    @on_rigs(BELOW)
    async def test_a_pending_commit_can_still_be_cancelled(self, rig: Rig, work: Work) -> None:
        backing = rig.backing()
        job = await rig.started(**work.spec(rig))
        await rig.until(job, Phase.PENDING)
        await rig.driver.cancel(job)
        assert not (await rig.until(job, Phase.CONCLUDED)).proven
        await rig.end(job, State.ABORTED)
        assert rig.backing() == backing

    def assert_no_other_names(self, rig: Rig) -> None:
        """What jobs give their unfinished files is gone."""
        assert rig.names() <= {rig.top, rig.middle, rig.base, rig.dest}
