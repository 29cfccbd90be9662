"""Copies of running guests' disks when something is killed, full or done by somebody else: one outcome, and no bytes lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, overlay, raw_image, reachable, same_content, sound
from tests.libvirt.guest import Guest
from tests.libvirt.jobs import abort, block_job, command, live_paths, pivot, terminal_events
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.test_guest_copy import Disk, copy, left_over, ready
from tests.qemu.faults import Tmpfs

SIZE = 48 * MIB
"""QEMU copies 16 MiB at any speed: only more can be looked at while it is copied."""
SLOW = MIB


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with room for 8 MiB. libvirtd sees what was mounted before it was started."""
    folder = tmp_path_factory.mktemp("full")
    with reachable(folder), Tmpfs(folder, 8 * MIB):
        yield folder


@pytest.fixture(scope="module")
def daemon(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateLibvirt]:
    home = tmp_path_factory.mktemp("libvirt")
    with reachable(home), PrivateLibvirt(home) as process:
        yield process


@pytest.fixture
def agent(module_agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    until(lambda: module_agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
    return module_agent


@pytest.fixture
def disk(folder: Path) -> Disk:
    return Disk(folder, SIZE)


@pytest.fixture
def paused(libvirt: PrivateLibvirt, disk: Disk) -> Guest:
    guest = libvirt.guest("web1", disk.top)
    guest.start(paused=True)
    return guest


def under_way(agent: AgentProcess, disk: Disk, **spec: object) -> Json:
    job = copy(agent, disk.copy, bandwidth=SLOW, **spec)
    return agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] >= 16 * MIB)


def hurry(agent: AgentProcess, job: Json) -> None:
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})


def stays(agent: AgentProcess, job: Json, disk: Disk, guest: Guest, code: str) -> None:
    """It failed, once, and nothing is left of it; the disk is what it was. Ends the guest."""
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["dest"]["state"]) == ("failed", code, "deleted"), job["error"]
    assert len(terminal_events(agent, job)) == 1
    assert not disk.copy.exists() and not left_over(disk.copy.parent)
    assert live_paths(guest)[0] == str(disk.top)
    guest.remove()
    assert sound(disk.top) and same_content(disk.top, disk.truth, first="qcow2")


def arrived(agent: AgentProcess, job: Json, disk: Disk, guest: Guest) -> None:
    """The guest has gone over, which is said once. Ends it."""
    job = agent.until_ended(job["id"])
    assert job["state"] == "completed", job["error"]
    assert len(terminal_events(agent, job)) == 1
    assert live_paths(guest) == [str(disk.copy)]
    guest.remove()
    assert sound(disk.copy) and same_content(disk.copy, disk.truth, first="qcow2")


@pytest.mark.parametrize("end", ["pivot", "finish"])
def test_an_agent_that_was_killed_takes_its_copy_up_again(
    agent: AgentProcess, disk: Disk, paused: Guest, end: str
) -> None:
    job = under_way(agent, disk, completion=end)
    agent.kill()
    assert block_job(paused)
    agent.start()
    agent.until(job["id"], lambda job: job["state"] == "running")
    hurry(agent, job)
    if end == "pivot":
        arrived(agent, job, disk, paused)
    else:
        assert agent.until_ended(job["id"])["state"] == "completed"
        assert same_content(disk.copy, disk.truth, first="qcow2") and not left_over(disk.copy.parent)


def test_a_pivot_that_nobody_saw_is_found(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = ready(agent, copy(agent, disk.copy))
    agent.kill()
    pivot(paused)
    until(lambda: block_job(paused) is None, "it has gone over")
    agent.start()
    arrived(agent, job, disk, paused)


def test_a_finish_that_nobody_saw_is_no_success(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = ready(agent, copy(agent, disk.copy))
    agent.kill()
    abort(paused)
    agent.start()
    stays(agent, job, disk, paused, "job_failed")


def test_libvirtd_killed_while_it_copies(
    agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk, paused: Guest
) -> None:
    job = under_way(agent, disk, completion="finish")
    libvirt.kill()
    agent.until(job["id"], lambda job: job["state"] == "unknown")
    libvirt.start()
    agent.until(job["id"], lambda job: job["state"] == "running")
    hurry(agent, job)
    job = agent.until_ended(job["id"])
    assert job["state"] == "completed", job["error"]
    assert same_content(disk.copy, disk.truth, first="qcow2")


@pytest.mark.parametrize("how", ["kill", "destroy"])
def test_a_guest_that_ends_while_it_is_copied(agent: AgentProcess, disk: Disk, paused: Guest, how: str) -> None:
    job = under_way(agent, disk, completion="pivot")
    getattr(paused, how)()
    stays(agent, job, disk, paused, "guest_stopped")


def test_a_guest_killed_in_a_pivot_may_have_gone_over(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = ready(agent, copy(agent, disk.copy))
    with paused.frozen():
        agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "pivot"})
        paused.kill()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["dest"]["state"]) == ("failed", "guest_stopped", "unusable")
    assert str(disk.copy) in job["error"]["message"] and disk.copy.exists()
    assert len(terminal_events(agent, job)) == 1
    assert live_paths(paused)[0] == str(disk.top)
    assert sound(disk.top) and same_content(disk.top, disk.truth, first="qcow2")


@pytest.mark.parametrize("end", ["pivot", "finish"])
def test_a_full_disk_fails_the_copy(agent: AgentProcess, disk: Disk, paused: Guest, full: Path, end: str) -> None:
    job = copy(agent, full / "copy.qcow2", completion=end)
    assert any("bytes" in warning for warning in job["warnings"])
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["dest"]["state"]) == ("failed", "no_space", "deleted")
    assert not [path for path in full.iterdir() if "copy" in path.name or path.name.startswith(".hostagent")]
    stays_as_it_was(disk, paused)


def stays_as_it_was(disk: Disk, guest: Guest) -> None:
    assert live_paths(guest) == [str(disk.top), str(disk.base)] and block_job(guest) is None
    guest.destroy()
    assert sound(disk.top) and same_content(disk.top, disk.truth, first="qcow2")


def test_an_abort_while_it_copies(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = under_way(agent, disk, completion="pivot")
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 2 * SLOW})
    assert (block_job(paused) or {})["bandwidth"] == 2 * SLOW
    agent.post(f"/v1/jobs/{job['id']}/abort")
    job = agent.until_ended(job["id"])
    assert (job["state"], job["dest"]["state"]) == ("aborted", "deleted")
    assert not disk.copy.exists() and not left_over(disk.copy.parent)
    stays_as_it_was(disk, paused)


def test_two_disks_of_a_guest_take_turns(agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk) -> None:
    folder = disk.top.parent
    second = overlay(folder / "second.qcow2", raw_image(folder / "second.raw", 4 * MIB), "raw")
    guest = libvirt.guest("web1", disk.top, disks={"vdb": second})
    guest.start(paused=True)
    copies = [("web1/vda", disk.copy), ("web1/vdb", folder / "second.copy")]
    with pytest.raises(ApiError) as refused:
        disks = [{"target": target, "dest": str(dest)} for target, dest in copies]
        agent.post("/v1/groups", {"disks": disks, "completion": "finish"})
    assert (refused.value.code, refused.value.body["field"]) == ("not_supported", "disks")
    assert "copy each disk alone" in refused.value.body["remedy"], "which is what follows"
    words = [str(word) for pair in copies for word in pair]
    done = command(agent, "job", "copy", *words, "--finish")
    assert done.returncode == 1 and "copy each disk alone" in done.stderr
    first = under_way(agent, disk, completion="finish")
    waits = copy(agent, folder / "second.copy", "web1/vdb", completion="finish")
    assert waits["state"] == "queued" and any(first["id"] in warning for warning in waits["warnings"])
    agent.post(f"/v1/jobs/{waits['id']}/abort")
    assert agent.until_ended(waits["id"])["state"] == "aborted", "also while it waits"
    waits = copy(agent, folder / "second.copy", "web1/vdb", completion="finish")
    hurry(agent, first)
    assert agent.until_ended(first["id"])["state"] == "completed"
    assert agent.until_ended(waits["id"])["state"] == "completed"
    assert same_content(folder / "second.copy", folder / "second.raw", first="qcow2")
