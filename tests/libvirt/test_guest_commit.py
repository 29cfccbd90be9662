"""Commits on running guests' disks, by a real agent: the bytes in the base, where the guest stands, and who is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, Json, backing_of, overlay, raw_image, same_content, sound
from tests.libvirt.guest import Guest
from tests.libvirt.jobs import block_job, error_of, live_paths, terminal_events, write
from tests.libvirt.private import PrivateLibvirt, until

SLOW = MIB


@pytest.fixture
def agent(module_agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    until(lambda: module_agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
    return module_agent


class Disk:
    """base.raw ← low.qcow2 ← high.qcow2 ← top.qcow2, each with data of its own, and what the disk reads as. `large`:
    the top has more than QEMU commits at any speed."""

    def __init__(self, folder: Path, *, large: bool = False) -> None:
        self.base = raw_image(folder / "base.raw", (48 if large else 8) * MIB)
        self.low = overlay(folder / "low.qcow2", self.base)
        self.high = overlay(folder / "high.qcow2", self.low, "qcow2")
        self.top = overlay(folder / "top.qcow2", self.high, "qcow2")
        write(self.low, 11, 0, 2 * MIB)
        write(self.high, 22, MIB, 2 * MIB)
        write(self.top, 33, 2 * MIB, (40 if large else 2) * MIB)
        self.truth = folder / "truth.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(self.top), str(self.truth)], check=True)

    @property
    def chain(self) -> list[str]:
        return [str(path) for path in (self.top, self.high, self.low, self.base)]

    def reads_right(self, top: Path) -> bool:
        """By `top`, with its chain. When QEMU is gone."""
        format_ = "raw" if top == self.base else "qcow2"
        return same_content(top, self.truth, first=format_) and (format_ == "raw" or sound(top))


@pytest.fixture
def disk(folder: Path) -> Disk:
    return Disk(folder)


@pytest.fixture
def paused(libvirt: PrivateLibvirt, disk: Disk) -> Guest:
    return run(libvirt, disk)


def run(libvirt: PrivateLibvirt, disk: Disk) -> Guest:
    guest = libvirt.guest("web1", disk.top)
    guest.start(paused=True)
    return guest


def commit(agent: AgentProcess, **spec: object) -> Json:
    job: Json = agent.post("/v1/jobs", {"operation": "commit", "target": "web1/vda", **spec})
    return job


def completed(agent: AgentProcess, job: Json) -> Json:
    job = agent.until_ended(job["id"])
    assert job["state"] == "completed", job["error"]
    assert len(terminal_events(agent, job)) == 1
    return job


def test_the_guest_goes_over_to_its_base(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = completed(agent, commit(agent, completion="pivot"))
    assert job["chain"]["before"] == disk.chain
    assert job["chain"]["after"] == live_paths(paused) == [str(disk.base)]
    paused.kill()
    for path in (disk.low, disk.high, disk.top):
        assert path.exists()
        path.unlink()
    assert disk.reads_right(disk.base)


def test_a_commit_into_a_layer_deletes_what_it_took(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = agent.until(commit(agent, base=str(disk.low), delete=True)["id"], lambda job: job["state"] == "ready")
    assert live_paths(paused) == disk.chain
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "pivot"})
    job = completed(agent, job)
    assert live_paths(paused) == [str(disk.low), str(disk.base)]
    until(lambda: agent.job(job["id"])["revocation"] != "pending", "its access is settled")
    assert not disk.top.exists() and not disk.high.exists(), agent.job(job["id"])["warnings"]
    paused.kill()
    assert disk.reads_right(disk.low)


def test_what_another_domain_came_to_need_meanwhile_is_not_deleted(
    agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk, paused: Guest
) -> None:
    job = agent.until(commit(agent, base=str(disk.low), delete=True)["id"], lambda job: job["state"] == "ready")
    other = libvirt.guest("web2", disk.high)
    path = f"/v1/grants?path={disk.high}"
    until(lambda: f"{other.uuid}/vda" in str(agent.get(path)["items"]), "it is known what the other needs")
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "pivot"})
    completed(agent, job)
    until(lambda: agent.job(job["id"])["revocation"] != "pending", "its access is settled")
    job = agent.job(job["id"])
    assert disk.high.exists() and not disk.top.exists()
    assert [kept["path"] for kept in job["chain"]["kept"]] == [str(disk.high)]
    assert any(f"{disk.high} was not deleted" in warning for warning in job["warnings"]), job["warnings"]


def test_a_commit_that_keeps_the_overlay(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = completed(agent, commit(agent, completion="finish"))
    assert job["chain"]["after"] == live_paths(paused) == disk.chain
    paused.kill()
    assert disk.reads_right(disk.base) and disk.reads_right(disk.top)


def test_a_commit_below_the_top_is_written_when_it_is_said(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    job = completed(agent, commit(agent, top=str(disk.high), base=str(disk.low)))
    paused.kill()
    assert job["chain"]["after"] == [str(disk.top), str(disk.low), str(disk.base)]
    assert backing_of(disk.top) == "low.qcow2", "named as it was, by name alone"
    disk.high.unlink()
    assert disk.reads_right(disk.top)


def test_the_disk_of_a_guest_that_writes(agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk) -> None:
    guest = libvirt.guest("web1", disk.top)
    guest.start()
    guest.until_flushed(3)
    job = agent.until(commit(agent)["id"], lambda job: job["state"] == "ready")
    guest.until_flushed(guest.flushed + 3)
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "pivot"})
    completed(agent, job)
    guest.until_flushed(guest.flushed + 3)
    guest.kill()
    guest.verify(disk.base)


def test_who_stands_on_what_is_written_is_named(agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk) -> None:
    guest = run(libvirt, disk)
    sibling = overlay(disk.base.parent / "sibling.qcow2", disk.low, "qcow2")
    refused = error_of(agent, operation="commit")
    assert refused["code"] == "busy" and str(sibling) in refused["detail"]
    sibling.unlink()
    libvirt.guest("web2", disk.high)
    refused = until(lambda: _refused(agent), "the other domain is known")
    assert refused["code"] == "busy" and "web2/vda" in refused["detail"]
    assert error_of(agent, operation="commit", top="/elsewhere")["code"] == "invalid"
    assert error_of(agent, operation="commit", prune_bitmaps=True)["code"] == "not_supported"
    assert live_paths(guest) == disk.chain and block_job(guest) is None
    guest.destroy()
    assert disk.reads_right(disk.top)


def _refused(agent: AgentProcess) -> Json | None:
    plan = {"operation": "commit", "target": "web1/vda", "dry_run": True}
    status, _, body = agent.call("POST", "/v1/jobs", plan)
    return body if status >= 400 else None


# Who is killed


def under_way(agent: AgentProcess, **spec: object) -> Json:
    job = commit(agent, bandwidth=SLOW, **spec)
    return agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] > 0)


@pytest.mark.parametrize("killed", ["agent", "libvirtd"])
def test_a_commit_goes_on(agent: AgentProcess, libvirt: PrivateLibvirt, folder: Path, killed: str) -> None:
    disk = Disk(folder, large=True)
    guest = run(libvirt, disk)
    job = under_way(agent, completion="pivot")
    if killed == "agent":
        agent.kill()
        agent.start()
    else:
        libvirt.kill()
        agent.until(job["id"], lambda job: job["state"] == "unknown")
        libvirt.start()
    agent.until(job["id"], lambda job: job["state"] == "running")
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    completed(agent, job)
    assert live_paths(guest) == [str(disk.base)]
    guest.kill()
    assert disk.reads_right(disk.base)


def test_a_guest_killed_in_a_commit_has_its_overlay(agent: AgentProcess, libvirt: PrivateLibvirt, folder: Path) -> None:
    disk = Disk(folder, large=True)
    guest = run(libvirt, disk)
    job = under_way(agent, completion="pivot")
    guest.kill()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "guest_stopped")
    assert live_paths(guest)[0] == str(disk.top)
    assert disk.reads_right(disk.top)


def test_an_aborted_commit_leaves_the_disk(agent: AgentProcess, libvirt: PrivateLibvirt, folder: Path) -> None:
    disk = Disk(folder, large=True)
    guest = run(libvirt, disk)
    job = under_way(agent)
    agent.post(f"/v1/jobs/{job['id']}/abort")
    job = agent.until_ended(job["id"])
    assert (job["state"], job["chain"]["after"]) == ("aborted", disk.chain)
    assert live_paths(guest) == disk.chain
    guest.destroy()
    assert disk.reads_right(disk.top)
