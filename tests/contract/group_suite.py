"""What every BlockDriver promises of a copy that is one of a group: until the group is decided its target is durable,
may have its name, and can be taken back; from then on it completes whatever happens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.errors import JobError
from jobs.model import Completion, Group, Job, State
from jobs.ports import Phase
from tests.contract.driver_suite import Rig
from tests.contract.ready_suite import (
    EXISTING,
    NEW,
    ReadySuite,
    Work,
    completed,
    discarded,
    gone,
    on_rigs,
    ready,
    result,
)


async def hardened(rig: Rig, work: Work, completion: Completion = Completion.PIVOT) -> Job:
    """A member whose target is whole, while QEMU's job is ready still."""
    job = await ready(rig, work)
    job = replace(job, group=Group("g", (job.id, "another")))
    for _ in range(2):
        await rig.driver.harden(job)
    assert (await rig.driver.observe(job)).phase is Phase.READY
    return replace(job, sealed=completion, state=State.COMPLETING)


class GroupSuite(ReadySuite):
    @on_rigs(NEW, EXISTING)
    async def test_a_hardened_target_has_no_name_and_can_be_taken_back(self, rig: Rig, work: Work) -> None:
        names = rig.names()
        job = await hardened(rig, work)
        assert rig.dest not in rig.names() or work is EXISTING
        assert not (await rig.driver.observe(job)).proven
        await rig.driver.cancel(job)
        await rig.until(job, Phase.CONCLUDED)
        await discarded(rig, job, State.FAILED)
        assert (rig.dest in rig.names()) == (work is EXISTING)
        assert rig.names() - {rig.dest} <= names
        self.assert_no_other_names(rig)

    @on_rigs(NEW)
    async def test_a_name_proves_nothing_before_the_decision_and_is_taken_back(self, rig: Rig, work: Work) -> None:
        job = await hardened(rig, work)
        for _ in range(2):
            await rig.driver.name(job)
        assert rig.dest in rig.names()
        await rig.driver.cancel(job)
        assert not (await rig.until(job, Phase.CONCLUDED)).proven
        await discarded(rig, job, State.FAILED)
        assert rig.dest not in rig.names()
        self.assert_no_other_names(rig)

    @on_rigs(NEW)
    async def test_a_target_is_named_and_taken_back_without_its_daemon(self, rig: Rig, work: Work) -> None:
        job = await hardened(rig, work)
        await gone(rig, job)
        await rig.driver.name(job)
        assert rig.dest in rig.names()
        assert not (await rig.driver.observe(job)).proven
        await discarded(rig, job, State.FAILED)
        assert rig.dest not in rig.names()
        self.assert_no_other_names(rig)

    @on_rigs(NEW)
    async def test_a_name_that_is_taken_is_not_given(self, rig: Rig, work: Work) -> None:
        job = await hardened(rig, work)
        rig.make(rig.dest)
        with pytest.raises(JobError) as refused:
            await rig.driver.name(job)
        assert refused.value.code == "conflict"
        await rig.driver.cancel(job)
        await rig.until(job, Phase.CONCLUDED)
        await discarded(rig, job, State.FAILED)
        assert rig.dest in rig.names()
        self.assert_no_other_names(rig)

    @on_rigs(NEW, EXISTING)
    async def test_a_decided_member_completes(self, rig: Rig, work: Work) -> None:
        job = await hardened(rig, work, Completion.FINISH)
        await rig.driver.name(job)
        job = await completed(rig, job, Completion.FINISH)
        for _ in range(2):
            await rig.driver.seal(job)
        assert (await rig.driver.observe(job)).proven
        await rig.end(job, State.COMPLETED)
        assert rig.same(result(rig, work))
        self.assert_no_other_names(rig)

    @on_rigs(NEW)
    async def test_a_decided_member_goes_over_with_all_who_stand_there(self, rig: Rig, work: Work) -> None:
        job = await hardened(rig, work)
        await rig.driver.name(job)
        job = await completed(rig, job, Completion.PIVOT)
        await rig.driver.seal(job)

        async def record(sharers: object) -> Job:
            return replace(job, state=State.COMPLETED)

        await rig.driver.conclude(job, record)
        assert rig.serves() == job.after.top.file
        await rig.end(job, State.COMPLETED)
        assert rig.same(result(rig, work))
        self.assert_no_other_names(rig)

    @on_rigs(NEW, EXISTING)
    async def test_a_decided_member_completes_without_its_daemon(self, rig: Rig, work: Work) -> None:
        job = await hardened(rig, work)
        await rig.driver.name(job)
        await gone(rig, job)
        job = replace(job, completion=Completion.PIVOT)
        assert (await rig.driver.observe(job)).proven
        await rig.end(job, State.COMPLETED)
        assert rig.same(result(rig, work))
        self.assert_no_other_names(rig)
