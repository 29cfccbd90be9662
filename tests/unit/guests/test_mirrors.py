"""How a copy of a guest's disk is judged: by the disk, by QEMU's last word, and never by what was only hoped for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from events.model import DiskJobEvent, DiskJobKind, QemuJobEvent
from hostagent.drivers.domain_claims import DomainClaims
from hostagent.drivers.domain_xml import Disk, LiveLayer, Mirror, SourceType
from hostagent.drivers.libvirt import BlockJobInfo
from hostagent.guests.mirrors import Mirrors, Settings
from hostagent.guests.work import Work
from hostagent.images.member import ChainLimits
from jobs.errors import JobError
from jobs.machine import Signal
from jobs.model import Chain, Completion, Cursor, FileId, Job, JobSpec, Layer, Operation, State, Target
from jobs.ports import Contact, Observation, Phase
from jobs.settle import decide
from tests.unit.guests.fake_libvirt import DRIVE, END, NOW, play

COPYING = BlockJobInfo(2, 5, END, 0)


class FakeDisks:
    """Disks of a guest whose disk is mirrored. `refuses`: what a pivot says; `ended`: the guest does between two looks;
    `ending`: it has, and libvirt sees it in a moment; `stale`: there is a mirror, with or without a job; `half`: a job,
    and no mirror."""

    def __init__(self) -> None:
        self.run: int | None = 1
        self.job: BlockJobInfo | None = None
        self.ready = False
        self.ended = False
        self.stale = False
        self.half = False
        self.ending = False
        self.refuses: JobError | None = None
        self.deaf = False
        self.calls: list[str] = []

    async def look(self, drive: object) -> tuple[int | None, BlockJobInfo | None]:
        return self.run, self.job if self.run is not None else None

    async def describe(self, drive: object) -> Disk:
        top = LiveLayer(SourceType.FILE, "/images/top.qcow2", "qcow2", None if self.ended else 1)
        target = LiveLayer(SourceType.FILE, "/images/copy.qcow2", "qcow2", 3)
        mirror = (
            Mirror("copy", self.ready, target)
            if (self.job or self.stale) and not self.ended and not self.half
            else None
        )
        return Disk("vda", "disk", (top,), True, False, mirror)

    async def ends(self, drive: object) -> bool:
        if self.ending:
            self.run = None
        return self.run is None

    async def contact(self) -> bool:
        return True

    def refuse_deaf(self) -> None:
        if self.deaf:
            raise JobError("not_supported", "not heard")

    async def abort(self, drive: object) -> None:
        self.calls.append("abort")

    async def pivot(self, drive: object) -> None:
        self.calls.append("pivot")
        if self.refuses is not None:
            raise self.refuses


class FakeWork(Work):
    """A copy. `over`: the guest has gone over to it; `deleted` what it was told at its end."""

    types: tuple[int, ...] = (2,)

    def __init__(self) -> None:
        self.over = False
        self.told_over: bool | None = None

    async def make_ready(self, job: Job) -> Mapping[str, Any]:
        return {}

    def is_ours(self, job: Job, disk: Disk) -> bool:
        return disk.mirror is not None

    async def audit(self, job: Job) -> tuple[str, ...]:
        return ()

    async def proven(self, job: Job, disk: Disk) -> bool:
        return self.over

    async def named(self, job: Job) -> bool:
        return False

    async def discard(self, job: Job, disk: Disk | None, *, over: bool) -> bool:
        self.told_over = over
        return not over


class Host:
    def __init__(self, agree_timeout: float = 0.1) -> None:
        self.disks, self.work = FakeDisks(), FakeWork()
        settings = Settings(ChainLimits(), 10, agree_timeout=agree_timeout, pivot_attempts=3, pivot_wait=0.0)
        disks: Any = self.disks
        work: Any = self.work
        finder: Any = None
        holding: Any = self
        self.asked: list[str] = []
        self.driver = Mirrors(
            disks, DomainClaims(), finder, lambda _: work, settings=settings, holding=holding, hint=lambda _: None
        )

    async def begin(self, job: Job) -> None:
        self.asked.append("begin")

    async def end(self, job: Job) -> None:
        self.asked.append(f"end {job.state}")

    async def conclude(self, job: Job, record: Callable[[], Awaitable[object]]) -> None:
        await record()
        await self.end(job)

    def job(self, completion: Completion | None) -> Job:
        """A copy that runs."""
        layer = Layer("/images/top.qcow2", "qcow2", FileId(1, 1), END, 1)
        new = Layer("/images/copy.qcow2", "qcow2", FileId(1, 2), END, 1)
        spec = JobSpec(Operation.COPY, "web1/vda", dest=new.path)
        before = Chain((layer,))
        after = before if completion is Completion.FINISH else Chain((new,))
        job = Job("4711", spec, State.COMPLETING, NOW, NOW, before, after, cursor=Cursor(0, END), drive=DRIVE)
        target = Target(new.path, "qcow2", made=True, file=new.file)
        self.driver.recover(job)
        self.disks.job, self.disks.ready = COPYING, True
        return replace(job, started=NOW, target=target, completion=completion)

    def says(self, good: bool, error: str | None = None) -> None:
        """QEMU's last word; the job is gone."""
        self.driver.event(QemuJobEvent(DRIVE.uuid, DRIVE.name, DRIVE.target, "copy", good, error))
        self.disks.job = None


def on_a_host(test: Callable[[Host], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        play(test(Host()))

    run.__name__ = test.__name__
    return run


@on_a_host
async def test_only_libvirts_word_makes_it_ready(host: Host) -> None:
    job = host.job(None)
    host.disks.job, host.disks.ready = BlockJobInfo(2, END, END, 0), False
    assert (await host.driver.observe(job)).phase is Phase.RUNNING, "all is copied, and it is not in sync"
    await host.driver.complete(replace(job, completion=Completion.FINISH))
    assert host.disks.calls == [], "it would have been a cancelling"
    host.disks.ready = True
    assert await host.driver.observe(job) == Observation(Contact.ALIVE, Phase.READY, Cursor(END, END))


@on_a_host
async def test_a_finish_is_done_when_qemu_says_so(host: Host) -> None:
    job = host.job(Completion.FINISH)
    await host.driver.observe(job)
    host.says(good=True)
    seen = await host.driver.observe(job)
    assert seen.done and not seen.proven, "it is to be sealed"


@pytest.mark.parametrize(
    ("word", "code"),
    [(None, "job_failed"), ("No space left on device", "no_space"), ("Input/output error", "io_error")],
)
def test_a_finish_whose_last_bytes_failed_is_no_success(word: str | None, code: str) -> None:
    """libvirt says "cancelled" of it, as of a good one."""

    async def story() -> None:
        host = Host()
        job = host.job(Completion.FINISH)
        await host.driver.observe(job)
        if word is not None:
            host.says(good=False, error=word)
        host.disks.job = None
        verdict = decide(job, await host.driver.observe(job))
        assert verdict.signal is Signal.PROVEN_FAILED
        assert verdict.failure is not None and verdict.failure.code == code
        assert await host.driver.discard(job)

    play(story())


@pytest.mark.parametrize("completion", list(Completion))
def test_a_job_that_a_new_libvirtd_has_not_found_yet_goes_on(completion: Completion) -> None:
    """It lists its guests before it has asked QEMU for their jobs."""

    async def story() -> None:
        host = Host()
        job = host.job(completion)
        for _ in range(2):
            found, host.disks.job = host.disks.job, None
            look = asyncio.create_task(host.driver.observe(job))
            await asyncio.sleep(0.02)
            host.disks.job = found
            assert (await look).phase is Phase.READY
        host.disks.job = None
        assert (await host.driver.observe(job)).phase is Phase.ABSENT

    play(story())


@on_a_host
async def test_of_a_guest_that_was_killed_its_job_is_said_to_be_cancelled_first(host: Host) -> None:
    job = host.job(None)
    await host.driver.observe(job)
    host.driver.event(
        DiskJobEvent(DiskJobKind.FAILED, DRIVE.uuid, DRIVE.name, DRIVE.target, "copy", reason="cancelled")
    )
    host.disks.job, host.disks.ending = None, True
    failure = decide(job, await host.driver.observe(job)).failure
    assert failure is not None and failure.code == "guest_stopped"


@on_a_host
async def test_what_qemu_said_is_the_reason_whatever_the_guest_did_then(host: Host) -> None:
    job = host.job(None)
    await host.driver.observe(job)
    host.says(good=False, error="No space left on device")
    host.disks.job, host.disks.ending = None, True
    failure = decide(job, await host.driver.observe(job)).failure
    assert failure is not None and "No space left on device" in failure.message


@on_a_host
async def test_what_libvirt_knows_half_of_is_ended(host: Host) -> None:
    """It was killed when the job began."""
    job = replace(host.job(None), started=None)
    host.disks.half = True
    for _ in range(4):
        assert (await host.driver.observe(job)).phase is Phase.RUNNING
    assert host.disks.calls == ["abort"], "when it was seen twice, and once"
    host.says(good=False)
    host.disks.half = False
    failure = decide(job, await host.driver.observe(job)).failure
    assert failure is not None and "libvirt was killed when it began" in failure.message
    assert await host.driver.discard(job)


@on_a_host
async def test_also_when_the_agent_was_killed_with_it(host: Host) -> None:
    job = replace(host.job(None), started=None, state=State.STARTING)
    host.disks.half = True
    with pytest.raises(JobError) as half:
        await host.driver.start(job)
    assert half.value.code == "unresponsive", "so it is looked at until it is known"
    assert host.disks.calls == []


@on_a_host
async def test_but_not_of_a_job_that_it_has_shown(host: Host) -> None:
    job = host.job(Completion.PIVOT)
    await host.driver.observe(job)
    host.disks.half = True
    for _ in range(4):
        await host.driver.observe(job)
    assert host.disks.calls == []


@on_a_host
async def test_a_mirror_without_a_job_proves_nothing_and_both_files_are_named(host: Host) -> None:
    job = host.job(Completion.PIVOT)
    host.disks.job, host.disks.stale = None, True
    failure = decide(job, await host.driver.observe(job)).failure
    assert failure is not None and failure.code == "job_failed"
    assert all(word in failure.message for word in ("/images/top.qcow2", "/images/copy.qcow2", "lsof"))


@on_a_host
async def test_a_guest_that_does_not_go_over_is_asked_so_often(host: Host) -> None:
    job = host.job(Completion.PIVOT)
    await host.driver.observe(job)
    host.disks.refuses = JobError("conflict", "block job is not ready")
    for _ in range(2):
        await host.driver.complete(job)
    with pytest.raises(JobError) as refused:
        await host.driver.complete(job)
    assert refused.value.code == "pivot_refused" and "not ready" in refused.value.message
    assert host.disks.calls == ["pivot"] * 3
    host.disks.job = None
    assert not (await host.driver.observe(job)).proven
    assert not await host.driver.discard(job), "the agent was away: QEMU may have said anything"
    host.says(good=False)
    assert await host.driver.discard(job), "the guest runs on its disk as before"
    host.work.over = True
    assert (await host.driver.observe(job)).proven


@on_a_host
async def test_libvirt_that_does_not_answer_a_pivot_has_not_refused_it(host: Host) -> None:
    job = host.job(Completion.PIVOT)
    host.disks.refuses = JobError("unresponsive", "no answer")
    for _ in range(5):
        with pytest.raises(JobError) as late:
            await host.driver.complete(job)
        assert late.value.code == "unresponsive"


@pytest.mark.parametrize("end", ["stopped", "again", "went"])
def test_what_a_guest_may_have_gone_over_to_is_kept(end: str) -> None:
    async def story() -> None:
        host = Host()
        job = host.job(Completion.PIVOT)
        await host.driver.observe(job)
        host.disks.job = None
        if end == "went":
            host.says(good=True)
        else:
            host.disks.run = None if end == "stopped" else 2
            seen = await host.driver.observe(job)
            failure = decide(job, seen).failure
            assert failure is not None and failure.code == "guest_stopped" and "/images/copy.qcow2" in failure.message
        assert not await host.driver.discard(job)
        assert host.work.told_over is True

    play(story())


@on_a_host
async def test_an_ended_guest_without_a_pivot_leaves_no_doubt(host: Host) -> None:
    job = host.job(None)
    await host.driver.observe(job)
    host.disks.run = None
    failure = decide(job, await host.driver.observe(job)).failure
    assert failure is not None and failure.code == "guest_stopped"
    assert await host.driver.discard(job)


@on_a_host
async def test_a_guest_that_ends_between_two_looks_has_ended(host: Host) -> None:
    job = host.job(None)
    await host.driver.observe(job)
    host.disks.ended = True
    seen = await host.driver.observe(job)
    assert (seen.contact, seen.proven) == (Contact.DEAD, False)
    failure = decide(job, seen).failure
    assert failure is not None and failure.code == "guest_stopped"


@on_a_host
async def test_nobody_pauses_it_or_kills_a_guest_for_it(host: Host) -> None:
    job = host.job(None)
    with pytest.raises(JobError) as refused:
        await host.driver.pause(job)
    assert refused.value.code == "not_supported" and "speed" in str(refused.value.remedy)
    with pytest.raises(JobError):
        await host.driver.cancel(job, force=True)
    assert host.disks.calls == []
    await asyncio.wait_for(host.driver.cancel(job), 5)
    assert host.disks.calls == ["abort"]


@on_a_host
async def test_only_a_finish_needs_qemus_word(host: Host) -> None:
    job = host.job(None)
    host.disks.deaf = True
    assert await host.driver.audit(job) == await host.driver.audit(replace(job, completion=Completion.PIVOT)) == ()
    with pytest.raises(JobError, match="not heard"):
        await host.driver.audit(replace(job, completion=Completion.FINISH))


def test_of_what_never_began_no_word_is_awaited() -> None:
    async def story() -> None:
        host = Host(agree_timeout=60)
        job = replace(host.job(Completion.FINISH), id="4712", started=None)
        host.disks.job = None
        seen = await asyncio.wait_for(host.driver.observe(job), 20)
        assert seen.phase is Phase.ABSENT

    play(story())
