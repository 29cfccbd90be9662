"""What libvirt can do to a job on a guest's disk, and what is said of it then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from events.model import DiskJobEvent, DiskJobKind, DomainEvent, DomainEventKind, QemuJobEvent
from hostagent.drivers.libvirt import BlockJobInfo
from hostagent.guests import driver
from jobs.errors import JobError
from jobs.machine import Signal
from jobs.model import Chain, Cursor, Failure, Holder, Job, State
from jobs.outcome import failure_of
from jobs.ports import Contact, Observation, Phase
from jobs.settle import decide
from tests.unit.guests.fake_libvirt import DRIVE, END, NOW, RUNNING, Host, play

QEMU_SAID = QemuJobEvent(DRIVE.uuid, "web1", "vda", "pull", good=False, error="Input/output error")


def on_a_host(test: Callable[[Host], Awaitable[None]]) -> Callable[[Path], None]:
    def run(tmp_path: Path) -> None:
        play(test(Host(tmp_path)))

    run.__name__ = test.__name__
    return run


@on_a_host
async def test_a_pull_is_done_when_header_libvirt_and_file_say_so(host: Host) -> None:
    job = await host.started()
    assert await host.driver.observe(job) == Observation(Contact.ALIVE, Phase.RUNNING, Cursor(5, END))
    host.disks.job = None
    assert not (await host.driver.observe(job)).proven
    host.proof.header = True
    assert not (await host.driver.observe(job)).proven, "libvirt says otherwise"
    host.done()
    host.file.lost = 1
    assert (await host.driver.observe(job)).phase is Phase.PENDING
    assert decide(job, await host.driver.observe(job)).signal is None
    host.file.lost = 0
    seen = await _until_not_pending(host, job)
    assert seen == Observation(Contact.ALIVE, Phase.ABSENT, None, None, True)
    assert decide(job, seen).signal is Signal.PROVEN_COMPLETED


async def _until_not_pending(host: Host, job: object) -> Observation:
    while (seen := await host.driver.observe(job)).phase is Phase.PENDING:  # type: ignore[arg-type]
        await asyncio.sleep(0)
    return seen


@on_a_host
async def test_what_cannot_be_seen_on_the_file_is_not_done(host: Host) -> None:
    job = await host.started()
    host.done()
    host.file.error = JobError("denied", "no")
    assert (await host.driver.observe(job)).phase is Phase.PENDING
    host.disks.run = None
    dead = await host.driver.observe(job)
    assert (dead.contact, dead.proven) == (Contact.DEAD, False)
    failure = decide(job, dead).failure
    assert failure is not None and failure.code == "guest_stopped" and "qemu-img rebase" in failure.message
    with pytest.raises(JobError) as gone:  # as it is seen by who is about to join the pull
        await host.driver.start(job)
    known = Failure(gone.value.code, gone.value.message, "")
    assert decide(job, dead, known).failure == failure, "what is to be done is said, too"
    host.file.error = None
    assert (await host.driver.observe(job)).proven, "it ended in order"


@on_a_host
async def test_a_guest_that_was_started_anew_is_not_the_one_that_pulled(host: Host) -> None:
    job = await host.started()
    host.done()
    host.file.lost, host.disks.run = 4096, 2
    seen = await host.driver.observe(job)
    assert (seen.contact, seen.proven) == (Contact.DEAD, False)
    assert seen.error is not None and "4096 bytes" in seen.error


@on_a_host
async def test_libvirt_away_is_unknown_but_for_a_paused_job(host: Host) -> None:
    job = await host.started()
    await host.driver.pause(job)
    host.disks.away = True
    assert await host.driver.observe(job) == Observation(Contact.UNRESPONSIVE)
    paused = replace(job, state=State.PAUSED)
    assert (await host.driver.observe(paused)).phase is Phase.PAUSED
    with pytest.raises(JobError) as refused:
        await host.driver.resume(paused)
    assert refused.value.code == "unavailable"
    host.disks.away = False
    assert (await host.driver.observe(paused)).phase is Phase.PAUSED
    await host.driver.resume(paused)
    assert (await host.driver.observe(job)).phase is Phase.RUNNING


@on_a_host
async def test_a_pause_whose_job_hangs_is_unknown_and_paused_when_it_is_gone(host: Host) -> None:
    job = await host.started()
    host.disks.stuck = True
    with pytest.raises(JobError) as late:
        await host.driver.pause(job)
    assert late.value.code == "unresponsive"
    host.disks.job = None
    unknown = replace(job, state=State.UNKNOWN)
    assert (await host.driver.observe(unknown)).phase is Phase.PAUSED


@on_a_host
async def test_a_paused_pull_that_is_aborted_has_ended(host: Host) -> None:
    job = await host.started()
    await host.driver.pause(job)
    aborting = replace(job, state=State.ABORTING, intent="abort")
    await host.driver.cancel(aborting)
    seen = await host.driver.observe(aborting)
    assert seen.phase is Phase.ABSENT
    assert decide(aborting, seen).signal is Signal.PROVEN_ABORTED
    failed = replace(job, state=State.COMPLETING, error=Failure("internal", "a fault", ""))
    assert decide(failed, await host.driver.observe(failed), failed.error).signal is Signal.PROVEN_FAILED


@on_a_host
async def test_a_pause_that_libvirt_refused_hides_no_end(host: Host) -> None:
    job = await host.started()
    host.disks.error = JobError("busy", "another call has the domain")
    with pytest.raises(JobError, match="another call"):
        await host.driver.pause(job)
    host.disks.error, host.disks.job = None, None
    host.driver.event(QEMU_SAID)
    assert decide(job, await host.driver.observe(job)).signal is Signal.PROVEN_FAILED


@on_a_host
async def test_a_job_that_ran_is_never_begun_again_by_a_start(host: Host) -> None:
    job = await host.started()
    host.disks.job = None
    await host.driver.start(job)
    assert host.disks.calls.count("pull to None") == 1
    assert decide(job, await host.driver.observe(job)).signal is Signal.PROVEN_FAILED


@on_a_host
async def test_after_a_restart_a_pull_on_the_disk_is_joined(host: Host) -> None:
    host.driver.recover(host.job)
    host.disks.job = BlockJobInfo(1, 7, END, 0)
    await host.driver.prepare(host.job)
    await host.driver.start(host.job)
    assert not any(call.startswith("pull") for call in host.disks.calls)


@pytest.mark.parametrize("kind", [1, 2, 4, 5])
def test_somebody_elses_job_is_left_alone(tmp_path: Path, kind: int) -> None:
    async def story() -> None:
        host = Host(tmp_path)
        await host.driver.prepare(host.job)
        host.disks.job = BlockJobInfo(kind, 0, END, 0)
        with pytest.raises(JobError) as refused:
            await host.driver.start(host.job)
        assert refused.value.code == "busy"
        await host.driver.cancel(host.job)
        assert "abort" not in host.disks.calls and host.disks.job is not None

    play(story())


@on_a_host
async def test_one_job_on_a_domain(host: Host) -> None:
    await host.driver.prepare(host.job)
    other = replace(host.job, id="4712")
    with pytest.raises(JobError) as refused:
        await host.driver.prepare(other)
    assert refused.value.code == "busy" and "4711" in refused.value.message
    await host.driver.turn(host.job)
    turns = [asyncio.ensure_future(host.driver.turn(replace(host.job, id=id))) for id in ("4712", "4713")]
    await asyncio.sleep(0)
    assert not any(turn.done() for turn in turns)
    for _ in range(2):
        await host.driver.leave(host.job)
    await turns[0]
    await host.driver.prepare(other)
    assert not turns[1].done()
    turns[1].cancel()
    await host.driver.leave(other)
    assert host.claims.holder(DRIVE.uuid) is None


@on_a_host
async def test_a_job_whose_libvirt_is_away_before_it_began_fails(host: Host) -> None:
    host.disks.away = True
    with pytest.raises(JobError) as refused:
        await host.driver.prepare(host.job)
    assert refused.value.code == "unavailable"


@on_a_host
async def test_another_chain_than_the_planned_one_starts_nothing(host: Host) -> None:
    host.disks.paths = host.disks.paths[::2]
    with pytest.raises(JobError) as refused:
        await host.driver.prepare(host.job)
    assert refused.value.code == "image_changed"


@on_a_host
async def test_events_are_hints_and_explain(host: Host) -> None:
    job = await host.started()
    host.driver.event(DomainEvent(DomainEventKind.STOPPED, "another", "web2"))
    assert host.hints == []
    host.disks.job = None
    host.driver.event(DiskJobEvent(DiskJobKind.FAILED, DRIVE.uuid, "web1", "vda", "pull", reason="cancelled"))
    host.driver.resync()
    assert host.hints == [job.id, job.id]
    seen = await host.driver.observe(job)
    assert seen.error is not None and "somebody else" in seen.error
    aborted = decide(replace(job, intent="abort"), seen)
    assert aborted.signal is Signal.PROVEN_ABORTED


def test_a_full_file_system_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def none_left(place: Path, timeout: float) -> int:
        return 0

    async def story() -> None:
        host = Host(tmp_path)
        job = await host.started()
        host.disks.job = None
        host.driver.event(DiskJobEvent(DiskJobKind.FAILED, DRIVE.uuid, "web1", "vda", "pull", reason="failed"))
        other = decide(job, await host.driver.observe(job)).failure
        assert other is not None and other.code == "job_failed" and "web1.log" in other.message
        monkeypatch.setattr(driver, "room", none_left)
        failure = decide(job, await host.driver.observe(job)).failure
        assert failure is not None and failure.code == "no_space"

    play(story())


@on_a_host
async def test_an_increment_ends_past_its_goal_and_the_last_one_at_the_end(host: Host) -> None:
    await host.driver.prepare(host.job)
    spec = replace(host.job.spec, increment=END // 2)
    job = replace(host.job, spec=spec, upto=END // 2, state=State.RUNNING, started=NOW)
    running = asyncio.create_task(host.driver.advance(job, asyncio.Event()))
    while host.disks.job is None:
        await asyncio.sleep(0)
    host.disks.job = BlockJobInfo(1, END // 2 + 9, END, 0)
    assert await running == END // 2 + 9
    assert host.disks.job is None
    last = replace(job, upto=END, cursor=Cursor(END // 2 + 9, END))
    running = asyncio.create_task(host.driver.advance(last, asyncio.Event()))
    while host.disks.job is None:
        await asyncio.sleep(0)
    host.disks.job = BlockJobInfo(1, END, END, 0)
    await asyncio.wait({running}, timeout=0.1)
    assert not running.done(), "cur == end is no end"
    host.done()
    assert await running == END


@on_a_host
async def test_an_increment_that_ends_early_is_an_error_and_one_that_is_stopped_is_not(host: Host) -> None:
    await host.driver.prepare(host.job)
    job = replace(host.job, upto=END // 2, state=State.RUNNING, started=NOW)
    stop = asyncio.Event()
    stop.set()
    assert await host.driver.advance(job, stop) == 5
    running = asyncio.create_task(host.driver.advance(job, asyncio.Event()))
    while host.disks.job is None:
        await asyncio.sleep(0)
    host.disks.job = None
    host.driver.event(QEMU_SAID)
    with pytest.raises(JobError) as failed:
        await running
    assert failed.value.code == "job_failed" and "Input/output error" in failed.value.message
    assert failure_of(job, failed.value).code == "io_error"


@on_a_host
async def test_an_increment_whose_guest_ended_says_so_whatever_libvirt_said_to_who_was_just_asking(host: Host) -> None:
    await host.driver.prepare(host.job)
    job = replace(host.job, upto=END // 2, state=State.RUNNING, started=NOW)
    running = asyncio.create_task(host.driver.advance(job, asyncio.Event()))
    while host.disks.job is None:
        await asyncio.sleep(0)
    host.disks.error = JobError("job_failed", "Unable to read from monitor: Connection reset by peer")
    host.driver.event(DomainEvent(DomainEventKind.STOPPED, DRIVE.uuid, "web1", "failed"))
    with pytest.raises(JobError) as failed:
        await running
    assert failed.value.code == "guest_stopped"


@on_a_host
async def test_a_pull_that_a_new_libvirtd_has_not_found_yet_goes_on(host: Host) -> None:
    """It lists its guests before it has asked QEMU for their jobs."""
    job = await host.started()
    for _ in range(2):
        found, host.disks.job = host.disks.job, None
        look = asyncio.create_task(host.driver.observe(job))
        await asyncio.sleep(0.05)
        host.disks.job = found
        assert (await look).phase is Phase.RUNNING
    host.disks.job = None
    seen = await host.driver.observe(job)
    assert (seen.phase, seen.proven) == (Phase.ABSENT, False)


@on_a_host
async def test_qemus_own_reason_is_the_jobs(host: Host) -> None:
    job = await host.started()
    host.disks.job = None
    host.driver.event(replace(QEMU_SAID, disk="vdb", error="No space left on device"))
    host.driver.event(QEMU_SAID)
    host.driver.event(DiskJobEvent(DiskJobKind.FAILED, DRIVE.uuid, "web1", "vda", "pull", reason="failed"))
    failure = decide(job, await host.driver.observe(job)).failure
    assert failure is not None and (failure.code, "Input/output error" in failure.message) == ("io_error", True)


@on_a_host
async def test_a_guest_is_never_killed(host: Host) -> None:
    job = await host.started()
    with pytest.raises(JobError) as refused:
        await host.driver.cancel(job, force=True)
    assert refused.value.code == "not_supported"
    assert host.disks.job is not None


async def conclude(host: Host, job: Job, state: State) -> list[str]:
    """What was done, in order."""
    done: list[str] = []

    async def record(sharers: tuple[Holder, ...]) -> Job:
        assert sharers == ()
        done.append(f"recorded, {host.renewed} renewed, kept for {[holder for _, holder, _ in host.shared]}")
        return replace(job, state=state)

    await host.driver.conclude(replace(job, state=state), record)
    return done


@on_a_host
async def test_what_the_disk_needs_is_asked_before_a_pull_and_when_it_is_proven(host: Host) -> None:
    job = await host.started()
    disk = f"domain:{DRIVE.uuid}/vda"
    assert (host.renewed, host.shared) == (1, [(disk, str(job.holder), list(job.before.layers))])
    host.shared.clear()
    assert await conclude(host, job, State.FAILED) == ["recorded, 1 renewed, kept for []"]
    assert host.renewed == 1, "a pull that did not complete takes nothing"
    assert await conclude(host, job, State.COMPLETED)
    assert host.renewed == 2
    await host.driver.drop(replace(job, state=State.COMPLETED))
    assert host.renewed == 3
    host.disks.away = True
    with pytest.raises(JobError):  # so it is tried again, and the revocation is pending
        await host.driver.drop(replace(job, state=State.COMPLETED))


@pytest.mark.parametrize("header", [True, None])
def test_an_image_that_may_name_its_base_no_more_has_its_own_rows_before_the_jobs_go(
    tmp_path: Path, header: bool | None
) -> None:
    async def scenario(host: Host) -> None:
        job = await host.started()
        host.shared.clear()
        host.proof.header = header
        image = Holder("image", job.before.top.path)
        assert await conclude(host, job, State.FAILED) == [f"recorded, 1 renewed, kept for ['{image}']"]
        assert host.shared == [(str(job.holder), str(image), list(job.dropped))]

    play(scenario(Host(tmp_path)))


@pytest.mark.parametrize(
    ("reason", "words"),
    [("migrated", "another host"), ("saved", "was saved"), ("shutdown", "shut down"), (None, "ended")],
)
def test_how_a_guest_ended_is_said(tmp_path: Path, reason: str | None, words: str) -> None:
    async def story() -> None:
        host = Host(tmp_path)
        job = await host.started()
        host.disks.run = None
        host.driver.event(DomainEvent(DomainEventKind.STOPPED, DRIVE.uuid, "web1", reason))
        assert host.hints == [job.id]
        failure = decide(job, await host.driver.observe(job)).failure
        assert failure is not None and failure.code == "guest_stopped" and words in failure.message

    play(story())


@on_a_host
async def test_a_disk_that_was_detached_fails_its_job(host: Host) -> None:
    job = await host.started()
    host.disks.job, host.disks.detached = None, True
    host.driver.event(DiskJobEvent(DiskJobKind.FAILED, DRIVE.uuid, "web1", "vda", "pull", reason="failed"))
    failure = decide(job, await host.driver.observe(job)).failure
    assert failure is not None and (failure.code, "detached" in failure.message) == ("job_failed", True)


@on_a_host
async def test_a_job_that_never_began_is_not_somebody_elses(host: Host) -> None:
    await host.driver.prepare(host.job)
    host.disks.job = BlockJobInfo(1, 7, END, 0)
    seen = await host.driver.observe(host.job)
    assert (seen.contact, seen.phase, seen.proven) == (Contact.ALIVE, Phase.ABSENT, False)
    host.done()
    assert not (await host.driver.observe(host.job)).proven


@on_a_host
async def test_files_that_are_taken_from_qemus_user_just_now_are_looked_at_again(host: Host) -> None:
    job = await host.started()
    host.done()
    host.disks.run, host.file.error = None, JobError("denied", "Permission denied")
    asyncio.get_running_loop().call_later(driver.TRY_AGAIN / 2, lambda: setattr(host.file, "error", None))
    assert (await host.driver.observe(job)).proven


@on_a_host
async def test_a_pull_on_another_chain_than_ours_is_somebody_elses(host: Host) -> None:
    """Ours has ended while nobody looked: the chain is what it was to leave."""
    job = await host.started()
    host.driver.recover(job)
    host.disks.job = RUNNING
    assert (await host.driver.observe(job)).phase is Phase.RUNNING
    paths, host.disks.paths = host.disks.paths, host.disks.paths[:2]
    assert (await host.driver.observe(job)).phase is Phase.RUNNING, "nothing was heard, so it is the one that it was"
    host.driver.event(DiskJobEvent(DiskJobKind.COMPLETED, DRIVE.uuid, DRIVE.name, DRIVE.target, "pull"))
    seen = await host.driver.observe(job)
    assert seen.phase is Phase.ABSENT
    await host.driver.cancel(job)
    await host.driver.start(job)
    assert host.disks.job is RUNNING and "abort" not in host.disks.calls
    with pytest.raises(JobError) as busy:
        await host.driver.advance(job, asyncio.Event())
    assert busy.value.code == "busy" and "abort" not in host.disks.calls
    host.disks.paths = paths
    assert (await host.driver.observe(job)).phase is Phase.RUNNING
    await host.driver.cancel(job)
    assert host.disks.calls[-1] == "abort"


@on_a_host
async def test_a_file_that_cannot_be_looked_at_says_nothing_of_whose_a_pull_is(host: Host) -> None:
    job = await host.started()
    host.driver.recover(job)
    host.driver.event(DiskJobEvent(DiskJobKind.READY, DRIVE.uuid, DRIVE.name, DRIVE.target, "pull"))
    host.disks.job = RUNNING
    aside = host.disks.paths[2].rename(host.disks.paths[2].with_suffix(".away"))
    assert (await host.driver.observe(job)).contact is Contact.UNRESPONSIVE
    aside.rename(host.disks.paths[2])
    assert (await host.driver.observe(job)).phase is Phase.RUNNING


@pytest.mark.parametrize("state", [State.ABORTING, State.COMPLETING])
def test_what_somebody_else_began_between_two_increments_is_not_ended_with_the_job(
    tmp_path: Path, state: State
) -> None:
    async def story(host: Host) -> None:
        job = await host.started()
        job = replace(job, spec=replace(job.spec, increment=END // 4), upto=END // 2)
        host.disks.job = None
        host.driver.event(
            DiskJobEvent(DiskJobKind.FAILED, DRIVE.uuid, DRIVE.name, DRIVE.target, "pull", reason="cancelled")
        )
        await host.driver.rest(replace(job, state=State.WAITING))
        host.disks.job = RUNNING
        if state is State.COMPLETING:
            with pytest.raises(JobError, match="somebody else"):
                await host.driver.advance(replace(job, state=State.RUNNING), asyncio.Event())
        await host.driver.cancel(replace(job, state=state))
        assert "abort" not in host.disks.calls
        assert (await host.driver.observe(replace(job, state=state))).phase is Phase.ABSENT

    play(story(Host(tmp_path)))


@on_a_host
async def test_between_two_increments_no_pull_is_ours(host: Host) -> None:
    job = replace(await host.started(), state=State.WAITING)
    host.disks.job = RUNNING
    await host.driver.rest(job)
    with pytest.raises(JobError, match="somebody else"):
        await host.driver.advance(job, asyncio.Event())
    host.driver.recover(job)
    with pytest.raises(JobError, match="somebody else"):
        await host.driver.advance(job, asyncio.Event())
    assert "abort" not in host.disks.calls


@on_a_host
async def test_a_guest_that_ends_between_two_looks_at_its_pull_has_ended(host: Host) -> None:
    """Its definition names the top alone, which says nothing of a chain that keeps a base."""
    job = await host.started()
    job = replace(job, after=Chain(job.before.layers[:2]))
    host.disks.job, host.proof.header = None, True
    host.disks.paths, host.disks.defined = host.disks.paths[:1], True
    assert await host.driver.observe(job) == Observation(Contact.UNRESPONSIVE)
    host.disks.run = None
    assert (await host.driver.observe(job)).proven
