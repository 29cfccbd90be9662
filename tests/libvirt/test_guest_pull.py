"""Pulls of running guests' disks, by a real agent: their bytes, their chains, and one outcome each, whoever is killed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness import (
    MIB,
    AgentProcess,
    Json,
    backing_of,
    check_clean,
    overlay,
    raw_image,
    same_content,
    sound,
)
from tests.libvirt import pattern
from tests.libvirt.guest import Guest
from tests.libvirt.jobs import abort, block_job, command, error_of, index_of, speed_up, terminal_events, write
from tests.libvirt.private import PrivateLibvirt, until

SLOW = MIB
"""Bytes per second at which a pull of the test's disks still runs when it is looked at."""


@pytest.fixture
def agent(module_agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    until(lambda: module_agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
    return module_agent


class Disk:
    """A chain base.raw ← middle.qcow2 ← top.qcow2, each with data of its own, and a copy of what it reads as."""

    def __init__(self, folder: Path, size: int = 16 * MIB) -> None:
        self.base = raw_image(folder / "base.raw", size)
        self.middle = overlay(folder / "middle.qcow2", self.base)
        self.top = overlay(folder / "top.qcow2", self.middle, "qcow2")
        write(self.middle, 11, 2 * MIB, MIB)
        write(self.top, 22, 5 * MIB, MIB)
        self.truth = folder / "truth.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(self.top), str(self.truth)], check=True)

    def whole(self) -> bool:
        """It reads as it did, also without the files that it does not name, and its tables are right. When QEMU is gone."""
        if backing_of(self.top) is None:
            for path in (self.base, self.middle):
                shutil.move(path, path.with_suffix(".away"))
        return same_content(self.top, self.truth, first="qcow2") and check_clean(self.top)


@pytest.fixture
def chain(folder: Path) -> Disk:
    return Disk(folder)


@pytest.fixture
def paused(libvirt: PrivateLibvirt, chain: Disk) -> Guest:
    """It runs and does nothing: what its disk reads as must stay what it was."""
    guest = libvirt.guest("web1", chain.top)
    guest.start(paused=True)
    return guest


def pull(agent: AgentProcess, target: str = "web1/vda", **spec: object) -> Json:
    job: Json = agent.post("/v1/jobs", {"operation": "pull", "target": target, **spec})
    return job


def running(agent: AgentProcess, job: Json, least: int = 1) -> Json:
    return agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] >= least)


def finish(agent: AgentProcess, job: Json, guest: Guest, disk: Disk) -> Json:
    """End a guest that does nothing: what QEMU has pulled is written now, and not before."""
    agent.until(job["id"], lambda job: job["cursor"]["cur"] == job["cursor"]["end"])
    until(lambda: block_job(guest) is None, "QEMU is done")
    assert agent.job(job["id"])["state"] == "running"
    guest.destroy()
    job = agent.until_ended(job["id"])
    assert len(terminal_events(agent, job)) == 1
    assert disk.whole()
    return job


def test_a_pull_completes_as_of_an_image(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    job = finish(agent, pull(agent), paused, chain)
    assert (job["state"], job["domain"], job["disk"], job["target"]) == ("completed", "web1", "vda", "web1/vda")
    assert job["path"] == str(chain.top)
    assert job["chain"]["before"] == [str(chain.top), str(chain.middle), str(chain.base)]
    assert job["chain"]["after"] == [str(chain.top)]
    assert job["cursor"] == {"cur": 16 * MIB, "end": 16 * MIB}
    (event,) = terminal_events(agent, job)
    assert (event["data"]["status"], event["data"]["domain"], event["data"]["disk"]) == ("COMPLETED", "web1", "vda")
    assert (set(job["chain"]["revoked"]), job["chain"]["kept"]) == ({str(chain.middle), str(chain.base)}, [])
    assert backing_of(chain.top) is None


def test_a_pull_to_a_base_stops_there(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    refused = error_of(agent, base="/elsewhere.raw")
    assert refused["code"] == "invalid" and refused["field"] == "base"
    assert error_of(agent, base="vda[9]")["code"] == "invalid"
    plan = pull(agent, base=str(chain.base), dry_run=True)
    assert plan["after"] == [str(chain.top), str(chain.base)]
    job = finish(agent, pull(agent, base=f"vda[{index_of(paused, chain.base)}]"), paused, chain)
    assert (job["state"], job["chain"]["after"]) == ("completed", [str(chain.top), str(chain.base)])
    assert backing_of(chain.top) == str(chain.base)


def test_speed_pause_and_resume(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    job = running(agent, pull(agent, bandwidth=SLOW))
    agent.post(f"/v1/jobs/{job['id']}/pause")
    stands = agent.job(job["id"])
    assert stands["state"] == "paused"
    assert block_job(paused) is None
    assert agent.post(f"/v1/jobs/{job['id']}/pause")["cursor"] == stands["cursor"]
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 2 * SLOW})
    assert agent.post(f"/v1/jobs/{job['id']}/resume")["state"] == "running"
    assert block_job(paused)["bandwidth"] == 2 * SLOW
    assert running(agent, job)["cursor"]["cur"] >= stands["cursor"]["cur"]
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    assert finish(agent, job, paused, chain)["state"] == "completed"


def test_an_aborted_pull_leaves_the_chain_and_a_later_one_goes_on(
    agent: AgentProcess, chain: Disk, paused: Guest
) -> None:
    job = running(agent, pull(agent, bandwidth=SLOW))
    assert agent.post("/v1/jobs", {"operation": "pull", "target": "web1/vda", "id": job["id"], "bandwidth": SLOW})
    assert error_of(agent)["code"] == "busy"
    agent.post(f"/v1/jobs/{job['id']}/abort")
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["revocation"]) == ("aborted", "cancelled", "none")
    assert job["chain"]["after"] == job["chain"]["before"]
    assert len(terminal_events(agent, job)) == 1
    assert backing_of(chain.top) == "middle.qcow2"
    assert finish(agent, pull(agent), paused, chain)["state"] == "completed"


def test_increments_stop_where_they_should(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    job = pull(agent, increment=6 * MIB, bandwidth=32 * MIB)
    job = agent.until(job["id"], lambda job: job["state"] == "waiting")
    assert 6 * MIB <= job["cursor"]["cur"] < 16 * MIB
    assert block_job(paused) is None and backing_of(chain.top) == "middle.qcow2"
    while (last := job["cursor"]["cur"]) < 16 * MIB:
        agent.post(f"/v1/jobs/{job['id']}/next", {"cursor": last})
        job = agent.until(job["id"], lambda job: job["state"] == "waiting" or job["cursor"]["cur"] == 16 * MIB)
        assert job["cursor"]["cur"] >= min(last + 6 * MIB, 16 * MIB)
    assert finish(agent, job, paused, chain)["state"] == "completed"


def test_the_disk_of_a_guest_that_writes(agent: AgentProcess, libvirt: PrivateLibvirt, folder: Path) -> None:
    base = raw_image(folder / "base.raw", 16 * MIB)
    guest = libvirt.guest("web1", overlay(folder / "top.qcow2", base))
    guest.start()
    guest.until_flushed(3)
    job = running(agent, pull(agent, bandwidth=4 * SLOW))
    guest.until_flushed(guest.flushed + 3)
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    done = command(agent, "job", "watch", job["id"])
    assert done.returncode == 0 and "completed" in done.stdout, done.stderr
    assert agent.until_ended(job["id"])["chain"]["revoked"] == [str(base)]
    assert len(terminal_events(agent, job)) == 1
    guest.until_flushed(guest.flushed + 1)
    guest.kill()
    shutil.move(base, folder / "away")
    assert sound(guest.disk)
    guest.verify()
    raw = folder / "raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(guest.disk), str(raw)], check=True, timeout=60)
    now, before = raw.read_bytes(), (folder / "away").read_bytes()
    places = range(0, len(before), pattern.BLOCK)
    kept = [now[at : at + pattern.BLOCK] == before[at : at + pattern.BLOCK] for at in places]
    written = [now[at : at + 5] == b"BLOCK" for at in places]
    assert all(one or other for one, other in zip(kept, written, strict=True)) and any(kept)


# Who is killed


def test_an_agent_that_was_killed_takes_its_pull_up_again(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    job = running(agent, pull(agent, bandwidth=SLOW))
    agent.kill()
    assert block_job(paused)
    agent.start()
    again = running(agent, job)
    assert again["cursor"]["cur"] >= job["cursor"]["cur"]
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    assert finish(agent, job, paused, chain)["state"] == "completed"


def test_a_pull_that_ended_without_the_agent_is_judged_by_the_chain(
    agent: AgentProcess, libvirt: PrivateLibvirt, folder: Path
) -> None:
    guests, jobs = [], []
    for name in ("web1", "web2"):
        (folder / name).mkdir(mode=0o755)
        disk = Disk(folder / name)
        guest = libvirt.guest(name, disk.top)
        guest.start(paused=True)
        guests.append((guest, disk))
        jobs.append(running(agent, pull(agent, f"{name}/vda", bandwidth=SLOW)))
    agent.kill()
    speed_up(guests[0][0])
    abort(guests[1][0])
    until(lambda: not any(block_job(guest) for guest, _ in guests), "both pulls have ended")
    guests[0][0].destroy()
    agent.start()
    first, second = (agent.until_ended(job["id"]) for job in jobs)
    assert first["state"] == "completed"
    assert (second["state"], backing_of(guests[1][1].top)) == ("failed", "middle.qcow2")
    for job in (first, second):
        assert len(terminal_events(agent, job)) == 1
    guests[1][0].destroy()
    assert all(disk.whole() for _, disk in guests)


def test_libvirtd_killed_while_one_pull_runs_and_another_ends(
    agent: AgentProcess, libvirt: PrivateLibvirt, folder: Path
) -> None:
    guests, jobs = [], []
    for name, speed in (("web1", SLOW), ("web2", 8 * SLOW)):
        (folder / name).mkdir(mode=0o755)
        disk = Disk(folder / name)
        guest = libvirt.guest(name, disk.top)
        guest.start(paused=True)
        guests.append((guest, disk))
        jobs.append(running(agent, pull(agent, f"{name}/vda", bandwidth=speed)))
    libvirt.kill()
    for job in jobs:
        agent.until(job["id"], lambda job: job["state"] == "unknown")
    until(lambda: backing_of(guests[1][1].top) is None, "the second has ended")
    libvirt.start()
    running(agent, jobs[0])
    agent.patch(f"/v1/jobs/{jobs[0]['id']}", {"bandwidth": 0})
    for job, (guest, disk) in zip(jobs, guests, strict=True):
        assert finish(agent, job, guest, disk)["state"] == "completed"


@pytest.mark.parametrize("how", ["kill", "destroy"])
def test_a_guest_that_ends_fails_the_pull_and_keeps_its_chain(
    agent: AgentProcess, chain: Disk, paused: Guest, how: str
) -> None:
    job = running(agent, pull(agent, bandwidth=SLOW))
    getattr(paused, how)()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "guest_stopped")
    assert {"kill": "lost its QEMU", "destroy": "was destroyed"}[how] in job["error"]["message"]
    assert len(terminal_events(agent, job)) == 1
    assert backing_of(chain.top) == "middle.qcow2" and chain.whole()
    assert error_of(agent)["code"] == "conflict"


def test_a_guest_killed_before_it_wrote_what_was_pulled_is_no_success(
    agent: AgentProcess, chain: Disk, paused: Guest
) -> None:
    job = pull(agent)
    until(lambda: backing_of(chain.top) is None and block_job(paused) is None, "QEMU is done")
    assert agent.job(job["id"])["state"] == "running"
    paused.kill()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["revocation"]) == ("failed", "guest_stopped", "none")
    assert not same_content(chain.top, chain.truth, first="qcow2"), "then this test proves nothing"
    command = job["error"]["message"].rpartition("used: ")[2].split()
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    assert chain.whole()


# What is refused, and what failed


def test_what_is_refused_changes_nothing(agent: AgentProcess, libvirt: PrivateLibvirt, chain: Disk) -> None:
    guest = libvirt.guest("web1", chain.top)
    stopped = error_of(agent)
    assert stopped["code"] == "conflict" and "virsh start --paused web1" in stopped["remedy"]
    guest.start(paused=True)
    assert error_of(agent, "web2/vda")["code"] == "not_found"
    assert error_of(agent, "web1/vdb")["code"] == "not_found"
    assert error_of(agent, f"web1/vda[{index_of(guest, chain.base)}]")["code"] == "invalid"
    with guest.domain() as domain:
        domain.blockPull("vda", 1)
    assert error_of(agent)["code"] == "busy"
    abort(guest)
    guest.destroy()
    assert chain.whole()


def test_somebody_elses_abort_is_no_success(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    job = running(agent, pull(agent, bandwidth=SLOW))
    abort(paused)
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "job_failed")
    assert "somebody else" in job["error"]["message"]
    paused.destroy()
    assert backing_of(chain.top) == "middle.qcow2" and chain.whole()


def test_the_command_line(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    planned = command(agent, "job", "pull", "web1/vda", "--dry-run")
    assert planned.returncode == 0 and str(chain.top) in planned.stdout
    started = command(agent, "job", "pull", "web1/vda", "--json")
    assert started.returncode == 0, started.stderr
    job = finish(agent, json.loads(started.stdout), paused, chain)
    shown = command(agent, "job", "show", job["id"]).stdout
    assert "completed" in shown and "web1/vda" in shown
    assert job["id"] in command(agent, "job", "list", "--target", "web1/vda").stdout
