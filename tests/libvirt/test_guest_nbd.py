"""Copies of running guests' disks into NBD exports: the bytes that the server has, one outcome, and servers that fail."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, overlay, raw_image, reachable, same_content, stand_still
from tests.libvirt.guest import Guest
from tests.libvirt.jobs import abort, block_job, command, live_paths, terminal_events
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.test_guest_copy import SIZE, Disk
from tests.libvirt.test_guest_copy_faults import SLOW
from tests.qemu.faults import HASTE
from tests.qemu.remote_storage import nbd_server, needs_nbdkit

pytestmark = needs_nbdkit

LARGE = 48 * MIB
"""QEMU may copy 16 MiB at any speed."""
ANSWER, ABORT = 4, 3
"""exports.nbd_timeout and jobs.abort_timeout, in seconds."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateLibvirt]:
    home = tmp_path_factory.mktemp("libvirt")
    with reachable(home), PrivateLibvirt(home, monitor=True) as process:
        yield process


@pytest.fixture(scope="module")
def module_agent(tmp_path_factory: pytest.TempPathFactory, daemon: PrivateLibvirt) -> Iterator[AgentProcess]:
    home = tmp_path_factory.mktemp("agent")
    settings = {
        **HASTE,
        "LIBVIRT_URI": daemon.uri,
        "LIBVIRT_RECONNECT_WAIT": "0.1",
        "EXPORTS_NBD_TIMEOUT": str(ANSWER),
        "JOBS_ABORT_TIMEOUT": str(ABORT),
    }
    with reachable(home), AgentProcess(home, settings) as process:
        yield process


@pytest.fixture
def agent(module_agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    until(lambda: module_agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
    return module_agent


@pytest.fixture
def disk(folder: Path) -> Disk:
    return Disk(folder)


@pytest.fixture
def large(folder: Path) -> Disk:
    return Disk(folder, LARGE)


def paused(libvirt: PrivateLibvirt, disk: Disk) -> Guest:
    guest = libvirt.guest("web1", disk.top)
    guest.start(paused=True)
    return guest


def writing(libvirt: PrivateLibvirt, disk: Disk) -> Guest:
    guest = libvirt.guest("web1", disk.top)
    guest.start()
    guest.until_flushed(3)
    return guest


def copy(agent: AgentProcess, uri: str, **spec: object) -> Json:
    job: Json = agent.post("/v1/jobs", {"operation": "copy", "target": "web1/vda", "dest": uri, **spec})
    return job


def finished(agent: AgentProcess, uri: str, **spec: object) -> Json:
    return agent.until_ended(copy(agent, uri, completion="finish", **spec)["id"])


def failure(agent: AgentProcess, uri: str, **spec: object) -> Json:
    """Of a request that was refused, or of a job that failed because of it."""
    try:
        job = finished(agent, uri, **spec)
    except ApiError as refused:
        return refused.body
    assert job["state"] == "failed"
    error: Json = job["error"]
    return error


def ready(agent: AgentProcess, job: Json) -> Json:
    return agent.until(job["id"], lambda job: job["state"] == "ready")


def under_way(agent: AgentProcess, uri: str, **spec: object) -> Json:
    job = copy(agent, uri, bandwidth=SLOW, **spec)
    return agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] > 0)


def on_disk(guest: Guest) -> bool:
    return block_job(guest) is not None


@contextlib.contextmanager
def ended(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def another_guest(libvirt: PrivateLibvirt, folder: Path) -> Iterator[Path]:
    """The disk of web2, which has nothing to do with the server."""
    top = overlay(folder / "other.qcow2", raw_image(folder / "other.raw", MIB))
    libvirt.guest("web2", top).start(paused=True)
    yield top


def other_copy(agent: AgentProcess, folder: Path) -> float:
    """A copy of web2's disk, from beginning to end; its seconds."""
    dest, began = folder / "other.copy", time.monotonic()
    body = {"operation": "copy", "target": "web2/vda", "dest": str(dest), "completion": "finish"}
    job = agent.until_ended(agent.post("/v1/jobs", body)["id"])
    assert job["state"] == "completed", job["error"]
    assert same_content(dest, folder / "other.raw", first="qcow2")
    dest.unlink()
    return time.monotonic() - began


# What is copied


def test_a_finished_copy_is_what_the_server_has(agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk) -> None:
    """qemu-nbd serves one client and ends: the agent, which asks first, must not be that one."""
    guest = paused(libvirt, disk)
    remote = disk.copy.with_suffix(".raw")
    with remote.open("wb") as file:
        file.truncate(SIZE)
    where = Path(tempfile.mkdtemp(prefix="nbd-"))
    where.chmod(0o755)
    command = ["qemu-nbd", "-f", "raw", "-k", str(where / "s"), "-x", "vol 1/ü&'\"<", str(remote)]
    with ended(command) as server:
        until((where / "s").exists, "qemu-nbd listens")
        (where / "s").chmod(0o666)
        uri = f"nbd+unix:///vol%201/%C3%BC%26%27%22%3C?socket={where / 's'}"
        job = finished(agent, uri)
        assert job["state"] == "completed", job["error"]
        assert job["dest"] == {"path": uri, "format": "raw", "state": "complete"}
        assert job["chain"]["after"] == job["chain"]["before"] == [str(disk.top), str(disk.base)]
        assert server.wait(30) == 0, "QEMU has disconnected"
    (where / "s").unlink(missing_ok=True)
    where.rmdir()
    assert live_paths(guest) == [str(disk.top), str(disk.base)] and not on_disk(guest)
    assert len(terminal_events(agent, job)) == 1
    guest.kill()
    assert same_content(remote, disk.truth, first="raw")


def test_a_copy_over_tcp(agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk) -> None:
    """One server for the agent, which asks, and one in the network of the guests' QEMU, which writes."""
    paused(libvirt, disk)
    remote = disk.copy.with_suffix(".raw")
    with remote.open("wb") as file:
        file.truncate(SIZE)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", str(remote)]
    with ended(server), ended(libvirt.inside(server)):
        until(lambda: _listens(port), "nbdkit listens")
        listening = libvirt.inside(["bash", "-c", f": < /dev/tcp/127.0.0.1/{port}"])
        until(lambda: subprocess.run(listening, capture_output=True).returncode == 0, "the other one, too")
        job = finished(agent, f"nbd://127.0.0.1:{port}/vol1")
        assert job["state"] == "completed", job["error"]
    assert same_content(remote, disk.truth, first="raw")


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def test_a_guest_that_writes_is_copied_and_can_wait_for_the_copy(
    agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk
) -> None:
    guest = writing(libvirt, disk)
    with nbd_server(disk.copy.parent, SIZE) as (uri, remote, _):
        job = ready(agent, copy(agent, uri, synchronous_writes=True))
        assert job["synchronous_writes"] is True
        assert libvirt.asked("blockdev-mirror")[-1]["copy-mode"] == "write-blocking"
        flushed = guest.until_flushed(guest.flushed + 3)
        with pytest.raises(ApiError) as refused:
            agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "pivot"})
        assert refused.value.body["code"] == "invalid" and "--finish" in refused.value.body["remedy"]
        agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
        job = agent.until_ended(job["id"])
        assert job["state"] == "completed", job["error"]
        guest.until_flushed(flushed + 3)
    guest.verify(remote, flushed=flushed)


@pytest.mark.parametrize("synchronous", [False, True])
def test_only_where_it_is_asked_do_writes_wait_for_the_copy(
    agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk, synchronous: bool
) -> None:
    paused(libvirt, disk)
    words = ["job", "copy", "web1/vda", str(disk.copy), *(["--synchronous-writes"] if synchronous else []), "--wait"]
    done = command(agent, *words, "--finish")
    assert done.returncode == 0, done.stderr
    mirror = libvirt.asked("blockdev-mirror")[-1]
    assert mirror.get("copy-mode") == ("write-blocking" if synchronous else None)
    assert same_content(disk.copy, disk.truth, first="qcow2")


# What is refused


def test_what_an_export_cannot_be_is_refused(agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk) -> None:
    guest = paused(libvirt, disk)
    with nbd_server(disk.copy.parent, SIZE // 2) as (uri, _, _):
        for wrong in ({"completion": "pivot"}, {"shallow": True}, {"format": "qcow2"}):
            with pytest.raises(ApiError) as refused:
                copy(agent, uri, **wrong)
            assert (refused.value.code, refused.value.body["field"]) == ("invalid", "dest")
        error = failure(agent, uri)
        assert error["code"] == "invalid" and str(SIZE) in error["message"], error
    assert failure(agent, "nbd+unix:///?socket=/nowhere/s")["code"] == "unavailable"
    assert failure(agent, "nbd+unix:///?socket=relative")["code"] == "invalid"
    with nbd_server(disk.copy.parent, SIZE) as (uri, remote, _):
        os.chmod(uri.partition("socket=")[2], 0o600)
        error = failure(agent, uri)
        assert error["code"] == "access_refused" and f"u:{agent.user}:rw" in error["remedy"], error
        assert not any(remote.read_bytes())
    with nbd_server(disk.copy.parent, SIZE, "--filter=exitlast") as (uri, _, _):
        assert failure(agent, f"{uri}x")["code"] == "unavailable"
    assert live_paths(guest)[0] == str(disk.top) and not on_disk(guest)


def test_one_export_has_one_writer(agent: AgentProcess, libvirt: PrivateLibvirt, large: Disk) -> None:
    paused(libvirt, large)
    folder = large.copy.parent
    image = raw_image(folder / "image.raw", LARGE)
    with nbd_server(folder, LARGE) as (uri, remote, _):
        job = under_way(agent, uri)
        for _ in range(2):
            with pytest.raises(ApiError) as refused:
                offline = {"target": str(image), "source_format": "raw", "completion": "finish"}
                agent.post("/v1/jobs", {"operation": "copy", "dest": uri, **offline})
            assert refused.value.code == "busy" and f"job:{job['id']}" in refused.value.body["holders"]
            agent.kill()  # and the lease is taken again
            agent.start()
            agent.until(job["id"], lambda job: job["state"] == "running")
        agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
        ready(agent, job)
        agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
        assert agent.until_ended(job["id"])["state"] == "completed"
        assert same_content(remote, large.truth, first="raw")
        again = finished(agent, uri)
        assert again["state"] == "completed", "nobody has it any more"


def test_a_finish_that_nobody_heard_is_no_success(agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk) -> None:
    guest = paused(libvirt, disk)
    with nbd_server(disk.copy.parent, SIZE) as (uri, _, _):
        job = ready(agent, copy(agent, uri))
        agent.kill()
        abort(guest)
        agent.start()
        job = agent.until_ended(job["id"])
        assert (job["state"], job["dest"]["state"]) == ("failed", "unusable"), job
        assert len(terminal_events(agent, job)) == 1


# Servers that fail


@pytest.mark.slow
def test_a_slow_server_holds_up_nobody(agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk) -> None:
    guest = writing(libvirt, disk)
    folder = disk.copy.parent
    with another_guest(libvirt, folder), nbd_server(folder, SIZE, "--filter=delay", "wdelay=3") as (uri, _, _):
        job = agent.until(copy(agent, uri)["id"], lambda job: job["state"] == "running")
        flushed = guest.flushed
        other_copy(agent, folder)
        guest.until_flushed(flushed + 5)
        agent.post(f"/v1/jobs/{job['id']}/abort")
        job = agent.until_ended(job["id"])
        assert (job["state"], job["dest"]["state"]) == ("aborted", "unusable")
    assert not on_disk(guest)


def test_a_server_that_dies_fails_the_copy_and_nothing_else(
    agent: AgentProcess, libvirt: PrivateLibvirt, large: Disk
) -> None:
    guest = writing(libvirt, large)
    folder = large.copy.parent
    with another_guest(libvirt, folder), nbd_server(folder, LARGE) as (uri, _, server):
        job = under_way(agent, uri, completion="finish")
        server.kill()
        job = agent.until_ended(job["id"])
        assert (job["state"], job["dest"]["state"]) == ("failed", "unusable")
        assert job["error"]["code"] == "io_error" and "server" in job["error"]["remedy"], job["error"]
        guest.until_flushed(guest.flushed + 5)
        other_copy(agent, folder)
        assert failure(agent, uri)["code"] == "unavailable"
    assert live_paths(guest)[0] == str(large.top) and not on_disk(guest)


def test_a_server_that_is_silent_is_never_shown_to_qemu(
    agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk
) -> None:
    guest = writing(libvirt, disk)
    with nbd_server(disk.copy.parent, SIZE) as (uri, _, server):
        before = len(libvirt.asked("blockdev-add"))
        stand_still(server.pid)
        flushed = guest.flushed
        error = failure(agent, uri)
        assert error["code"] == "timeout" and "exports.nbd_timeout" in error["message"], error
        assert len(libvirt.asked("blockdev-add")) == before
        guest.until_flushed(flushed + 5)


@contextlib.contextmanager
def silent_from_the_second_on(path: Path) -> Iterator[str]:
    """A way to a server that only its first client finds: of all later ones it takes the connection, and no more. The
    server's URI by that way; the way is at `path` and `path`.way."""
    listener = socket.socket(socket.AF_UNIX)
    way = path.with_name("way")
    listener.bind(str(way))
    way.chmod(0o666)
    listener.listen()
    kept: list[socket.socket] = []

    def pass_on(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            first, _ = listener.accept()
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(path))
            for pair in ((first, server), (server, first)):
                threading.Thread(target=pass_on, args=pair, daemon=True).start()
            kept.extend((first, server))
            while True:
                kept.append(listener.accept()[0])

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"nbd+unix:///?socket={way}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for one in kept:
            one.close()
        way.unlink()


@pytest.mark.slow
def test_a_server_that_falls_silent_as_qemu_opens_it_is_cut_off(
    agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk
) -> None:
    """QEMU stands still until it is let in, and its guest with it."""
    guest = writing(libvirt, disk)
    folder = disk.copy.parent
    with another_guest(libvirt, folder), nbd_server(folder, SIZE) as (uri, _, _):
        real = Path(uri.partition("socket=")[2])
        with silent_from_the_second_on(real) as way:
            job = copy(agent, way, completion="finish")
            other_copy(agent, folder)
            job = agent.until_ended(job["id"])
            assert job["state"] == "failed" and "blockdev-add" in job["error"]["message"], job["error"]
            guest.until_flushed(guest.flushed + 5)
    assert not on_disk(guest)


@pytest.mark.parametrize("synchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_abort_ends_although_the_server_is_silent(
    agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk, synchronous: bool
) -> None:
    guest = writing(libvirt, disk)
    folder = disk.copy.parent
    with another_guest(libvirt, folder), nbd_server(folder, SIZE) as (uri, _, server):
        job = ready(agent, copy(agent, uri, synchronous_writes=synchronous))
        guest.until_flushed(guest.flushed + 3)
        stand_still(server.pid)
        time.sleep(0.5)  # requests of the mirror wait for it now
        if not synchronous:
            guest.until_flushed(guest.flushed + 3)
        agent.post(f"/v1/jobs/{job['id']}/abort")
        other_copy(agent, folder)
        job = agent.until_ended(job["id"])
        assert (job["state"], job["dest"]["state"]) == ("aborted", "unusable"), job
        guest.until_flushed(guest.flushed + 5)
        assert not on_disk(guest) and live_paths(guest) == [str(disk.top), str(disk.base)]
    guest.verify(running=True)


@pytest.mark.slow
def test_a_finish_of_a_silent_server_fails_where_the_guest_waits_for_it(
    agent: AgentProcess, libvirt: PrivateLibvirt, disk: Disk
) -> None:
    guest = writing(libvirt, disk)
    with nbd_server(disk.copy.parent, SIZE) as (uri, _, server):
        job = ready(agent, copy(agent, uri, synchronous_writes=True))
        stand_still(server.pid)
        time.sleep(0.5)
        agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
        job = agent.until_ended(job["id"])
        assert (job["state"], job["dest"]["state"]) == ("failed", "unusable"), job
        guest.until_flushed(guest.flushed + 5)
    guest.verify(running=True)
