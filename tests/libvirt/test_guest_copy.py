"""Copies of running guests' disks, by a real agent: the copy's bytes, where the guest stands, and one outcome each."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, overlay, raw_image, same_content, sound
from tests.libvirt.guest import Guest
from tests.libvirt.jobs import block_job, error_of, live_paths, terminal_events, write
from tests.libvirt.private import PrivateLibvirt, until

SIZE = 16 * MIB


@pytest.fixture
def agent(module_agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    until(lambda: module_agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
    return module_agent


class Disk:
    """base.raw with random data, top.qcow2 with some of its own, and what that reads as."""

    def __init__(self, folder: Path, size: int = SIZE) -> None:
        self.base = raw_image(folder / "base.raw", size)
        self.top = overlay(folder / "top.qcow2", self.base, "raw")
        write(self.top, 22, 5 * MIB, MIB)
        self.truth = folder / "truth.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(self.top), str(self.truth)], check=True)
        self.copy = folder / "copy.qcow2"


@pytest.fixture
def disk(folder: Path) -> Disk:
    return Disk(folder)


@pytest.fixture
def paused(libvirt: PrivateLibvirt, disk: Disk) -> Guest:
    guest = libvirt.guest("web1", disk.top)
    guest.start(paused=True)
    return guest


def copy(agent: AgentProcess, dest: Path, target: str = "web1/vda", **spec: object) -> Json:
    job: Json = agent.post("/v1/jobs", {"operation": "copy", "target": target, "dest": str(dest), **spec})
    return job


def ready(agent: AgentProcess, job: Json) -> Json:
    return agent.until(job["id"], lambda job: job["state"] == "ready")


def left_over(folder: Path) -> list[Path]:
    return list(folder.glob(".hostagent-*"))


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
def test_a_finished_copy_is_whole_and_the_guest_stays(
    agent: AgentProcess, disk: Disk, paused: Guest, format_: str
) -> None:
    job = agent.until_ended(copy(agent, disk.copy, completion="finish", format=format_)["id"])
    assert job["state"] == "completed", job["error"]
    assert job["chain"]["after"] == job["chain"]["before"] == [str(disk.top), str(disk.base)]
    assert live_paths(paused) == [str(disk.top), str(disk.base)]
    assert len(terminal_events(agent, job)) == 1
    assert same_content(disk.copy, disk.truth, first=format_)
    assert format_ == "raw" or sound(disk.copy)
    assert not left_over(disk.copy.parent) and block_job(paused) is None
    paused.kill()
    assert same_content(disk.copy, disk.truth, first=format_), "QEMU held back what it had said is done"


def test_a_copy_has_no_name_before_it_is_whole(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = copy(agent, disk.copy)
    job = ready(agent, job)
    with pytest.raises(ApiError) as refused:
        agent.post(f"/v1/jobs/{job['id']}/pause")
    assert refused.value.body["code"] in ("not_supported", "conflict")
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert same_content(disk.copy, disk.truth, first="qcow2") and not left_over(disk.copy.parent)


def test_a_guest_goes_over_to_its_copy(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = agent.until_ended(copy(agent, disk.copy, completion="pivot")["id"])
    assert job["state"] == "completed", job["error"]
    assert job["chain"]["after"] == [str(disk.copy)] == live_paths(paused)
    assert len(terminal_events(agent, job)) == 1
    assert not left_over(disk.copy.parent)
    paused.kill()
    disk.base.unlink()
    disk.top.unlink()
    assert same_content(disk.copy, disk.truth, first="qcow2") and sound(disk.copy)
    paused.start(paused=True)
    assert live_paths(paused) == [str(disk.copy)]


def test_a_shallow_copy_stands_where_the_disk_did(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = agent.until_ended(copy(agent, disk.copy, completion="pivot", shallow=True)["id"])
    assert job["state"] == "completed", job["error"]
    assert job["chain"]["after"] == [str(disk.copy), str(disk.base)] == live_paths(paused)
    paused.destroy()
    disk.top.unlink()
    assert same_content(disk.copy, disk.truth, first="qcow2")


def test_an_image_that_is_there_is_written_over_when_it_fits(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk.copy), str(SIZE)], check=True)
    write(disk.copy, 99, 0, 2 * MIB)
    disk.copy.chmod(0o600)
    assert error_of(agent, operation="copy", dest=str(disk.copy))["code"] == "conflict"
    job = copy(agent, disk.copy, completion="finish", reuse_external=True)
    job = agent.until_ended(job["id"])
    assert job["state"] == "completed", job["error"]
    assert same_content(disk.copy, disk.truth, first="qcow2")


def test_the_disk_of_a_guest_that_writes_goes_over(agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk) -> None:
    guest = libvirt.guest("web1", disk.top)
    guest.start()
    guest.until_flushed(3)
    job = ready(agent, copy(agent, disk.copy))
    guest.until_flushed(guest.flushed + 3)
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "pivot"})
    assert agent.until_ended(job["id"])["state"] == "completed"
    guest.until_flushed(guest.flushed + 3)
    guest.kill()
    disk.base.unlink()
    disk.top.unlink()
    assert sound(disk.copy)
    guest.verify(disk.copy)


def test_a_finished_copy_of_a_guest_that_writes(agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk) -> None:
    guest = libvirt.guest("web1", disk.top)
    guest.start()
    job = ready(agent, copy(agent, disk.copy))
    flushed = guest.until_flushed(guest.flushed + 3)
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
    assert agent.until_ended(job["id"])["state"] == "completed"
    guest.until_flushed(flushed + 3)
    guest.verify(disk.copy, flushed=flushed)
    guest.kill()
    assert sound(disk.copy)
    guest.verify(disk.copy, flushed=flushed)
    guest.verify()


def test_an_aborted_copy_leaves_nothing(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = ready(agent, copy(agent, disk.copy))
    agent.post(f"/v1/jobs/{job['id']}/abort")
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["dest"]["state"]) == ("aborted", "cancelled", "deleted")
    assert live_paths(paused) == [str(disk.top), str(disk.base)] and block_job(paused) is None
    assert not disk.copy.exists() and not left_over(disk.copy.parent)
    paused.destroy()
    assert same_content(disk.top, disk.truth, first="qcow2")
