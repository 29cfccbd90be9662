"""Copies of running guests' disks onto block devices: raw ones of any size, and qcow2 images that are made there."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, Json, backing_of, check_clean, same_content
from tests.libvirt.guest import Guest
from tests.libvirt.jobs import block_job, error_of, live_paths, terminal_events
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.test_guest_copy import SIZE, Disk, copy, ready
from tests.qemu.test_device_exports import loop

Device = Callable[..., Path]


@pytest.fixture
def agent(module_agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    until(lambda: module_agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
    return module_agent


@pytest.fixture
def disk(folder: Path) -> Disk:
    return Disk(folder)


@pytest.fixture
def device(folder: Path, libvirt: PrivateLibvirt) -> Iterator[Device]:
    """Makes loop devices of so many bytes, empty or full of `fill`; the guests, which have them open, end before."""
    with contextlib.ExitStack() as stack:

        def make(size: int, fill: int = 0) -> Path:
            file = folder / f"device-{size}-{fill}"
            file.write_bytes(bytes([fill]) * size if fill else b"")
            os.truncate(file, size)
            return stack.enter_context(loop(file))

        stack.callback(libvirt.remove_guests)
        yield make
        libvirt.remove_guests()


@pytest.fixture
def paused(device: Device, libvirt: PrivateLibvirt, disk: Disk) -> Guest:
    guest = libvirt.guest("web1", disk.top)
    guest.start(paused=True)
    return guest


def done(agent: AgentProcess, dest: Path, **spec: object) -> Json:
    job = agent.until_ended(copy(agent, dest, **spec)["id"])
    assert job["state"] == "completed", job["error"]
    assert len(terminal_events(agent, job)) == 1
    return job


def nothing_given(agent: AgentProcess, device: Path) -> bool:
    listed = subprocess.run(["getfacl", "-cp", str(device)], capture_output=True, text=True, check=True).stdout
    return f"user:{agent.user}" not in listed


def test_a_guest_goes_over_to_a_device(agent: AgentProcess, disk: Disk, paused: Guest, device: Device) -> None:
    there = device(SIZE)
    done(agent, there, completion="pivot")
    assert live_paths(paused) == [str(there)]
    assert same_content(there, disk.truth, first="raw", running=True)
    paused.destroy()
    assert same_content(there, disk.truth, first="raw")
    full = error_of(agent, operation="copy", dest=str(there), target=str(disk.top))
    assert full["field"] == "dest", "it is nobody's to write over"


def test_a_larger_device_is_filled_as_far_as_the_disk_goes(
    agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk, paused: Guest, device: Device
) -> None:
    """The guest's disk has the size that it had, also when the guest is started anew or copied again."""
    there = device(SIZE + 3 * MIB, 0xEE)
    assert error_of(agent, operation="copy", dest=str(there))["code"] == "conflict"
    done(agent, there, completion="finish", reuse_external=True)
    assert there.read_bytes() == disk.truth.read_bytes() + b"\xee" * 3 * MIB
    done(agent, there, completion="pivot", reuse_external=True)
    paused.destroy()
    paused.start(paused=True)
    with paused.domain() as domain:
        assert domain.blockInfo("vda")[0] == SIZE
    plan = agent.post("/v1/jobs", {"operation": "copy", "target": "web1/vda", "dest": str(disk.copy), "dry_run": True})
    assert plan["before"] == [str(there)]
    done(agent, disk.copy, completion="finish", format="raw")
    assert disk.copy.read_bytes() == disk.truth.read_bytes()


def test_an_image_is_made_on_an_empty_device(agent: AgentProcess, disk: Disk, paused: Guest, device: Device) -> None:
    used, there = device(2 * SIZE, 0xEE), device(2 * SIZE)
    assert error_of(agent, operation="copy", dest=str(used), format="qcow2")["code"] == "conflict"
    assert used.read_bytes() == b"\xee" * 2 * SIZE
    job = done(agent, there, completion="finish", format="qcow2")
    assert job["dest"] == {"path": str(there), "format": "qcow2", "state": "complete"}
    assert live_paths(paused)[0] == str(disk.top) and block_job(paused) is None
    assert backing_of(there) is None and check_clean(there)
    until(lambda: nothing_given(agent, there), "it is taken back")
    assert same_content(there, disk.truth, first="qcow2")
    again = error_of(agent, operation="copy", dest=str(there), format="qcow2")
    assert again["code"] == "conflict", "it is an image now"
    done(agent, there, completion="finish", format="qcow2", reuse_external=True)
    assert same_content(there, disk.truth, first="qcow2")


def test_a_guest_goes_over_to_the_top_layer_alone_on_a_device(
    agent: AgentProcess, disk: Disk, paused: Guest, device: Device
) -> None:
    there = device(2 * SIZE)
    job = done(agent, there, completion="pivot", shallow=True)
    assert job["chain"]["after"] == [str(there), str(disk.base)] == live_paths(paused)
    assert backing_of(there) == str(disk.base)
    paused.destroy()
    disk.top.unlink()
    paused.start(paused=True)
    assert live_paths(paused) == [str(there), str(disk.base)]
    paused.destroy()
    assert check_clean(there) and same_content(there, disk.truth, first="qcow2")


def test_a_disk_on_a_device_is_copied_to_a_device_by_the_name_that_lasts(
    agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk, device: Device
) -> None:
    """The kernel's name of the base may be another device's after the next boot."""
    base, there = device(SIZE), device(2 * SIZE)
    base.write_bytes(disk.base.read_bytes())
    link = Path(f"/dev/disk/hostagent-test-{os.getpid()}")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(base)
    try:
        rebase = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(link), str(disk.top)]
        subprocess.run(rebase, check=True)
        guest = libvirt.guest("web1", disk.top)
        guest.start(paused=True)
        done(agent, there, completion="finish", shallow=True)
        assert backing_of(there) == str(link)
        assert same_content(there, disk.truth, first="qcow2", running=True)
        libvirt.remove_guests()
    finally:
        link.unlink()


def test_an_image_that_outgrows_its_device_fails_and_the_guest_stays(
    agent: AgentProcess, disk: Disk, paused: Guest, device: Device
) -> None:
    small = device(2 * MIB)
    job = copy(agent, small, completion="pivot", format="qcow2")
    assert any("free" in warning for warning in job["warnings"]), job["warnings"]
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["dest"]["state"]) == ("failed", "no_space", "unusable"), job
    assert live_paths(paused) == [str(disk.top), str(disk.base)] and block_job(paused) is None
    until(lambda: nothing_given(agent, small), "it is taken back")
    paused.destroy()
    assert same_content(disk.top, disk.truth, first="qcow2")


def test_an_agent_that_was_killed_as_the_copy_began_knows_its_device(
    agent: AgentProcess, disk: Disk, paused: Guest, device: Device
) -> None:
    """By then the image is on the device, which is not empty any more."""
    there = device(2 * SIZE)
    with paused.frozen():
        job = copy(agent, there, format="qcow2")
        until(lambda: there.read_bytes()[:4] == b"QFI\xfb", "the image is made")
        until(lambda: paused.waits_for_qemu, "libvirt asks QEMU for the copy")
        agent.kill()
    until(lambda: block_job(paused), "libvirt does what it was asked for")
    agent.start()
    job = ready(agent, job)
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
    job = agent.until_ended(job["id"])
    assert job["state"] == "completed", job["error"]
    assert same_content(there, disk.truth, first="qcow2")


def test_nobody_gets_between_the_look_at_a_device_and_its_image(
    agent: AgentProcess, disk: Disk, paused: Guest, device: Device
) -> None:
    """A device that somebody has mounted or claimed is never written."""
    there = device(2 * SIZE)
    claim = os.open(there, os.O_RDWR | os.O_EXCL)
    try:
        assert error_of(agent, operation="copy", dest=str(there), format="qcow2")["code"] == "busy"
    finally:
        os.close(claim)
    assert not any(there.read_bytes())
