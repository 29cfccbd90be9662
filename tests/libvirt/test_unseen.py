"""Block jobs of somebody else's that began and ended while nobody looked: what they left open is closed when it is proven
that nobody needs it, and not before."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, Json, backing_of, overlay, raw_image, reachable, stand_still
from tests.libvirt.guest import Guest
from tests.libvirt.jobs import block_job, live_paths, write
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.test_guest_access import ALICE, can_open, command, defined, holders, owner, pull, writing
from tests.qemu.faults import HASTE
from tests.qemu.kills import start_and_kill


@pytest.fixture
def agent(tmp_path: Path, libvirt: PrivateLibvirt) -> Iterator[AgentProcess]:
    home = tmp_path / "agent"
    home.mkdir()
    settings = {
        **HASTE,
        "LIBVIRT_URI": libvirt.uri,
        "LIBVIRT_RECONNECT_WAIT": "0.1",
        "LIBVIRT_RECONNECT_WAIT_MAX": "0.5",
        "LIBVIRT_REFRESH": "1",
        "LIBVIRT_AGREE_TIMEOUT": "1",
        "JOBS_SETTLE_RETRY_MAX": "0.5",
    }
    with reachable(home), AgentProcess(home, settings) as process:
        until(lambda: process.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
        yield process


@pytest.fixture
def base(folder: Path) -> Path:
    path = raw_image(folder / "base.raw", 8 * MIB)
    os.chown(path, *ALICE)
    return path


def paused(agent: AgentProcess, libvirt: PrivateLibvirt, base: Path) -> Guest:
    """A guest that does nothing, and flushes nothing."""
    guest = defined(agent, libvirt, "web1", base)
    guest.start(paused=True)
    until(lambda: can_open(libvirt, base), "libvirt has given it")
    return guest


def pulled_by_somebody(guest: Guest) -> None:
    with guest.domain() as domain:
        domain.blockPull("vda", 0)
    until(lambda: backing_of(guest.disk) is None and block_job(guest) is None, "QEMU is done")


def found(agent: AgentProcess) -> Json:
    """The job that was recorded, when its access is settled."""
    (job,) = until(lambda: agent.get("/v1/jobs?origin=external")["items"], "it is found")
    return agent.until_ended(job["id"])


@contextlib.contextmanager
def stopped(agent: AgentProcess) -> Iterator[None]:
    """Its process stands still."""
    assert agent.process is not None
    stand_still(agent.process.pid)
    try:
        yield
    finally:
        agent.process.send_signal(signal.SIGCONT)


def row(agent: AgentProcess, base: Path, image: Path) -> Json:
    """Why the image keeps the base."""
    items = agent.get(f"/v1/grants?path={base}&holder=image:{image}")["items"]
    return items[0] if items else {"reason": ""}


def is_closed(libvirt: PrivateLibvirt, base: Path) -> bool:
    return (owner(base), can_open(libvirt, base)) == (ALICE, False)


def assert_told(agent: AgentProcess, job: Json, guest: Guest, base: Path) -> None:
    assert (job["state"], job["operation"], job["target"]) == ("completed", "pull", "web1/vda")
    assert (job["chain"]["before"], job["chain"]["after"]) == ([str(guest.disk), str(base)], [str(guest.disk)])
    assert (job["revocation"], job["chain"]["revoked"]) == ("done", [str(base)])
    events = [event for event in agent.events() if event["data"].get("job") == job["id"]]
    assert [event["type"] for event in events] == ["org.hostagent.job.completed.v1"]
    assert events[0]["data"]["status"] == "COMPLETED" and events[0]["data"]["origin"] == "external"
    told = [event["data"] for event in agent.events() if event["type"] == "org.hostagent.grant.revoked.v1"]
    assert str(base) in [data["path"] for data in told]


def test_a_pull_while_the_agent_was_dead(agent: AgentProcess, libvirt: PrivateLibvirt, base: Path) -> None:
    guest = writing(agent, libvirt, "web1", base)
    agent.kill()
    pulled_by_somebody(guest)
    agent.start()
    job = found(agent)
    assert_told(agent, job, guest, base)
    assert is_closed(libvirt, base)
    assert "pull (external)" in command(agent, "job", "list").stdout
    shown = command(agent, "job", "show", job["id"])
    assert shown.returncode == 0 and "while the agent or libvirtd was away" in shown.stdout
    guest.until_flushed(guest.flushed + 1)
    guest.destroy()
    guest.verify()


def test_a_pull_that_ended_while_libvirtd_was_away(agent: AgentProcess, libvirt: PrivateLibvirt, base: Path) -> None:
    """Its event is lost, and no look comes in between."""
    agent.stop()
    agent.settings["LIBVIRT_SAMPLE"] = "600"
    agent.start()
    guest = paused(agent, libvirt, base)
    with guest.domain() as domain:
        domain.blockPull("vda", MIB * 3 // 2, 1 << 6)
    libvirt.kill()
    assert backing_of(guest.disk) is not None
    until(lambda: backing_of(guest.disk) is None, "QEMU is done")
    with stopped(agent):  # or it may be back before libvirtd has told what it finds
        libvirt.start()
        until(lambda: live_paths(guest) == [str(guest.disk)] and block_job(guest) is None, "libvirt is done")
    until(lambda: row(agent, base, guest.disk)["reason"], "the image keeps it")
    assert can_open(libvirt, base) and agent.get("/v1/jobs")["items"] == []
    guest.destroy()  # in order: QEMU writes what it holds
    assert_told(agent, found(agent), guest, base)
    assert is_closed(libvirt, base)


@pytest.mark.parametrize("when", ["seen", "unseen"])
def test_a_guest_killed_just_after_such_a_pull(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path, when: str
) -> None:
    """The image names no base, and does not have what it held: only a base that stays open can mend it."""
    guest = paused(agent, libvirt, base)
    truth = base.with_name("truth.raw")
    subprocess.run(["cp", "--sparse=auto", str(base), str(truth)], check=True)
    agent.kill()
    pulled_by_somebody(guest)
    if when == "seen":
        agent.start()
        until(lambda: "QEMU" in row(agent, base, guest.disk)["reason"], "the agent knows, and waits")
        guest.kill()
    else:
        guest.kill()
        agent.start()
    said = until(lambda: row(agent, base, guest.disk)["reason"].partition("before it is used (")[2], "it is said")
    assert (owner(base) != ALICE, can_open(libvirt, base)) == (True, True)
    assert holders(agent, base) == {str(guest.disk)} and agent.get("/v1/jobs")["items"] == []
    assert str(guest.disk) in command(agent, "status").stdout
    subprocess.run(shlex.split(said.partition(")")[0]), check=True)
    guest.start(paused=True)
    until(lambda: holders(agent, base) == {f"{guest.uuid}/vda"}, "it stands on it again")
    pull(agent)
    until(lambda: backing_of(guest.disk) is None and block_job(guest) is None, "QEMU is done")
    guest.destroy()
    until(lambda: is_closed(libvirt, base), "it is closed")
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(truth), str(guest.disk)]
    assert subprocess.run(compare).returncode == 0


def test_a_guest_that_libvirt_forgets_when_it_is_killed(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path
) -> None:
    guest = paused(agent, libvirt, base)
    with guest.domain() as domain:
        domain.undefine()  # transient from now on
    agent.kill()
    pulled_by_somebody(guest)
    guest.kill()
    agent.start()
    until(lambda: "rebase" in row(agent, base, guest.disk)["reason"], "it is said")
    assert can_open(libvirt, base) and holders(agent, base) == {str(guest.disk)}


@pytest.fixture
def middle(base: Path) -> Path:
    """Between the base and the guest's disk, with data of its own."""
    path = overlay(base.with_name("middle.qcow2"), base)
    write(path, 7, 64 * 1024, 2 * MIB)
    os.chown(path, *ALICE)
    return path


@pytest.mark.parametrize("job", ["commit", "active commit", "copy"])
def test_what_a_commit_or_a_copy_left_open(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path, middle: Path, job: str
) -> None:
    guest = defined_on(agent, libvirt, middle)
    guest.start(paused=True)
    until(lambda: can_open(libvirt, middle), "libvirt has given it")
    copy, truth = base.with_name("copy.qcow2"), base.with_name("truth.raw")
    subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", str(guest.disk), str(truth)], check=True)
    agent.kill()
    stays = {"commit": guest.disk, "active commit": base, "copy": copy}[job]
    with guest.domain() as domain:
        if job == "commit":
            domain.blockCommit("vda", str(base), str(middle), 0, 0)
        elif job == "active commit":
            domain.blockCommit("vda", str(base), None, 0, 1 << 2)
        else:
            xml = f"<disk type='file'><source file='{copy}'/><driver type='qcow2'/></disk>"
            domain.blockCopy("vda", xml, {}, 1 << 2)
        if job != "commit":
            until(lambda: "ready='yes'" in domain.XMLDesc(), "it is in sync")
            domain.blockJobAbort("vda", 1 << 1)
    until(lambda: live_paths(guest)[0] == str(stays) and str(middle) not in live_paths(guest), "it is done")
    agent.start()
    for path in (middle, base) if job == "copy" else (middle,):
        until(lambda path=path: is_closed(libvirt, path), f"{path.name} is closed")  # type: ignore[misc]
    assert job == "copy" or can_open(libvirt, base)
    items = [agent.until_ended(item["id"]) for item in agent.get("/v1/jobs?origin=external")["items"]]
    told = [(item["operation"], item["chain"]["revoked"]) for item in items]
    assert told == ([("commit", [str(middle)])] if job == "commit" else [])
    assert can_open(libvirt, stays)
    guest.destroy()
    format = "raw" if stays == base else "qcow2"
    compare = ["qemu-img", "compare", "-f", "raw", "-F", format, str(truth), str(stays)]
    assert subprocess.run(compare).returncode == 0


def defined_on(agent: AgentProcess, libvirt: PrivateLibvirt, below: Path) -> Guest:
    top = overlay(below.with_name("web1.qcow2"), below, "qcow2")
    write(top, 9, MIB, MIB)
    os.chown(top, *ALICE)
    guest = libvirt.guest("web1", top)
    until(lambda: all(f"{guest.uuid}/vda" in holders(agent, path) for path in (below, top)), "it is known")
    return guest


def test_an_agent_that_is_killed_again_and_again_while_it_settles(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path
) -> None:
    guest = paused(agent, libvirt, base)
    agent.kill()
    pulled_by_somebody(guest)
    start_and_kill(agent, 2.0)  # it has read the domain, and notes what the image lost
    assert can_open(libvirt, base), "nothing is proven"
    guest.destroy()
    for delay in (1.6, 2.1, 2.6):
        start_and_kill(agent, delay)
    agent.start()
    until(lambda: is_closed(libvirt, base), "it is closed")
    assert_told(agent, found(agent), guest, base)
