"""Pulls of guests' disks on storage that is full, fails, or is shared with another guest."""

from __future__ import annotations

import contextlib
import pwd
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import (
    MIB,
    AgentProcess,
    backing_of,
    check_clean,
    ensure_user,
    overlay,
    raw_image,
    reachable,
    same_content,
)
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.test_guest_pull import SLOW, abort, block_job, pull, running, terminal_events
from tests.qemu.faults import HASTE, Tmpfs

PAUSED, FOR_IO_ERROR = 3, 5
"""VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_IOERROR"""


@dataclass
class Storage:
    """`small` is a file system that can be filled; `failing` a raw image of which no read succeeds while `fail` is
    there. Mounts that libvirtd is to see are there before it is."""

    small: Tmpfs
    failing: Path
    fail: Path


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    home = tmp_path_factory.mktemp("storage")
    source, mount, fail = raw_image(home / "source.raw", 16 * MIB), home / "failing", home / "fail"
    mount.mkdir()
    image = mount / "base.raw"
    image.touch()
    socket = f"{home}/s"
    server = ["nbdkit", "-f", "-r", "-U", socket, "--filter=error", "file", str(source)]
    server += ["error-pread=EIO", "error-pread-rate=100%", f"error-file={fail}"]
    with reachable(home), Tmpfs(home / "small", 24 * MIB) as small, ended(server):
        until(Path(socket).exists, "nbdkit listens")
        owner = pwd.getpwnam(ensure_user())  # libvirt makes files QEMU's, which nbdfuse does not take
        options = ["-o", "allow_other", "-o", f"uid={owner.pw_uid}", "-o", f"gid={owner.pw_gid}"]
        with ended(["nbdfuse", "-r", *options, str(image), "--unix", socket]):
            until(lambda: image.stat().st_size == 16 * MIB, "the image is mounted")
            try:
                yield Storage(small, image, fail)
            finally:
                fail.unlink(missing_ok=True)
                subprocess.run(["umount", "--lazy", str(image)], check=True)


@contextlib.contextmanager
def ended(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, storage: Storage) -> Iterator[PrivateLibvirt]:
    home = tmp_path_factory.mktemp("libvirt")
    with reachable(home), PrivateLibvirt(home) as process:
        yield process


@pytest.fixture(scope="module")
def module_agent(tmp_path_factory: pytest.TempPathFactory, daemon: PrivateLibvirt) -> Iterator[AgentProcess]:
    home = tmp_path_factory.mktemp("agent")
    with reachable(home), AgentProcess(home, {**HASTE, "LIBVIRT_URI": daemon.uri}) as process:
        yield process


@pytest.fixture
def agent(module_agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    until(lambda: module_agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
    return module_agent


def test_a_full_file_system_fails_the_pull_and_not_the_guest(
    agent: AgentProcess, libvirt: PrivateLibvirt, storage: Storage, folder: Path
) -> None:
    base = raw_image(folder / "base.raw", 16 * MIB)
    top = overlay(storage.small.folder / "top.qcow2", base)
    guest = libvirt.guest("web1", top)
    guest.start(paused=True)
    job = running(agent, pull(agent, bandwidth=SLOW))
    filler = storage.small.fill()
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["revocation"]) == ("failed", "no_space", "none")
    assert len(terminal_events(agent, job)) == 1
    assert block_job(guest) is None and backing_of(top) == str(base)
    filler.unlink()
    again = pull(agent)
    until(lambda: backing_of(top) is None and block_job(guest) is None, "QEMU is done")
    guest.destroy()
    assert agent.until_ended(again["id"])["state"] == "completed"
    assert same_content(top, base, first="qcow2") and check_clean(top)
    top.unlink()


@pytest.mark.slow
def test_a_guest_that_stands_still_for_want_of_space_goes_on_and_so_does_a_later_pull(
    agent: AgentProcess, libvirt: PrivateLibvirt, storage: Storage, folder: Path
) -> None:
    base = raw_image(folder / "base.raw", 16 * MIB)
    guest = libvirt.guest("web1", overlay(storage.small.folder / "still.qcow2", base))
    guest.start()
    guest.until_flushed(2)
    job = running(agent, pull(agent, bandwidth=SLOW))
    filler = storage.small.fill()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "no_space")
    with guest.domain() as domain:
        until(lambda: domain.state() == [PAUSED, FOR_IO_ERROR], "the guest stands still")
        filler.unlink()
        domain.resume()
    guest.until_flushed(guest.flushed + 3)
    again = agent.until_ended(pull(agent)["id"])
    assert again["state"] == "completed"
    guest.until_flushed(guest.flushed + 1)
    guest.destroy()
    guest.verify()
    assert backing_of(guest.disk) is None and check_clean(guest.disk)
    guest.disk.unlink()


def test_a_base_that_cannot_be_read_fails_the_pull_and_a_later_one_completes(
    agent: AgentProcess, libvirt: PrivateLibvirt, storage: Storage, folder: Path
) -> None:
    top = overlay(folder / "top.qcow2", storage.failing)
    guest = libvirt.guest("web1", top)
    guest.start(paused=True)
    job = running(agent, pull(agent, bandwidth=SLOW))
    storage.fail.touch()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["revocation"]) == ("failed", "none")
    assert job["error"]["code"] in ("io_error", "job_failed") and job["error"]["remedy"]
    assert backing_of(top) == str(storage.failing) and block_job(guest) is None
    storage.fail.unlink()
    again = pull(agent)
    until(lambda: backing_of(top) is None and block_job(guest) is None, "QEMU is done")
    guest.destroy()
    assert agent.until_ended(again["id"])["state"] == "completed"
    assert same_content(top, storage.failing, first="qcow2") and check_clean(top)


def test_a_base_that_another_guest_stands_on_stays_its_own(
    agent: AgentProcess, libvirt: PrivateLibvirt, folder: Path
) -> None:
    base = raw_image(folder / "base.raw", 16 * MIB)
    guests = [libvirt.guest(name, overlay(folder / f"{name}.qcow2", base)) for name in ("web1", "web2")]
    guests[0].start(paused=True)
    guests[1].start()
    job = pull(agent)
    until(lambda: backing_of(guests[0].disk) is None and block_job(guests[0]) is None, "QEMU is done")
    guests[0].destroy()
    job = agent.until_ended(job["id"])
    assert job["state"] == "completed"
    (kept,) = job["chain"]["kept"]
    assert kept["path"] == str(base) and kept["reason"]
    guests[1].until_flushed(guests[1].flushed + 3)
    other = running(agent, pull(agent, "web2/vda", bandwidth=SLOW))
    abort(guests[1])
    assert agent.until_ended(other["id"])["state"] == "failed"
    guests[1].until_flushed(guests[1].flushed + 3)
    guests[1].destroy()
    guests[1].verify()
    assert same_content(guests[0].disk, base, first="qcow2")
