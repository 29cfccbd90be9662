"""Leases against the real programs: what QEMU honours of ours, and we of QEMU's, on ordinary files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent import qemu_locks
from hostagent.access.leases import Lease, LeaseMode
from jobs.errors import JobError

PROGRAMS = ("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon")
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason="needs the QEMU block tools"),
]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=20)


def until(true: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def serves(path: Path) -> bool:
    """Whether the NBD server answers, which it does once it has its image open and locked."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return client.recv(8) == b"NBDMAGIC"


@pytest.fixture(params=["raw", "qcow2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "base.img"
    assert run("qemu-img", "create", "-f", request.param, path, "4M").returncode == 0
    assert run("qemu-io", "-f", request.param, "-c", "write -P 7 0 1M", path).returncode == 0
    return path, request.param


@pytest.fixture
def overlay(base: tuple[Path, str], tmp_path: Path) -> Path:
    path = tmp_path / "overlay.qcow2"
    assert run("qemu-img", "create", "-f", "qcow2", "-b", base[0], "-F", base[1], path).returncode == 0
    return path


@pytest.fixture
def descriptor(base: tuple[Path, str]) -> Iterator[int]:
    fd = os.open(base[0], os.O_PATH)
    yield fd
    os.close(fd)


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def start(*command: str | Path) -> subprocess.Popen[str]:
        one = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.append(one)
        return one

    yield start
    for one in running:
        one.kill()
        one.communicate()


def another_agent(started: Callable[..., subprocess.Popen[str]], path: Path, take: str) -> subprocess.Popen[str]:
    """Another process that takes a lease and holds it until its input ends; its first line says how it went."""
    program = (
        "import os, sys\nfrom hostagent.access.leases import Lease\nfrom jobs.errors import JobError\n"
        f"try:\n    lease = Lease.{take}(os.open(sys.argv[1], os.O_PATH))\n    print('taken', flush=True)\n"
        "except JobError as error:\n    print(error.code, error.message, flush=True)\nsys.stdin.read()"
    )
    return started(sys.executable, "-c", program, path)


def outcome(agent: subprocess.Popen[str]) -> str:
    assert agent.stdout is not None
    return agent.stdout.readline().strip()


def test_qemu_does_not_write_what_is_leased_for_reading(base: tuple[Path, str], descriptor: int) -> None:
    path, fmt = base
    with Lease.shared(descriptor):
        refused = run("qemu-io", "-f", fmt, "-c", "write 0 4k", path)
        assert refused.returncode and 'Failed to get "write" lock' in refused.stderr
        assert run("qemu-io", "-r", "-f", fmt, "-c", "read -P 7 0 4k", path).returncode == 0
    assert run("qemu-io", "-f", fmt, "-c", "write 0 4k", path).returncode == 0


def test_qemu_does_not_commit_into_what_is_leased_for_reading(overlay: Path, descriptor: int) -> None:
    assert run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", overlay).returncode == 0
    with Lease.shared(descriptor):
        refused = run("qemu-img", "commit", overlay)
        assert refused.returncode and 'Failed to get "write" lock' in refused.stderr
    assert run("qemu-img", "commit", overlay).returncode == 0


@pytest.mark.parametrize("take", [Lease.shared, Lease.exclusive], ids=["shared", "exclusive"])
def test_what_qemu_writes_cannot_be_leased_and_the_refusal_names_it(
    base: tuple[Path, str], descriptor: int, started: Any, take: Callable[[int], Lease], tmp_path: Path
) -> None:
    path, fmt = base
    server = started("qemu-nbd", "-t", "-f", fmt, "-k", tmp_path / "nbd.sock", path)
    until(lambda: serves(tmp_path / "nbd.sock"))
    with pytest.raises(JobError) as refused:
        take(descriptor)
    assert refused.value.code == "busy" and refused.value.remedy
    assert f"{path} is open in qemu-nbd (pid {server.pid})" == refused.value.message
    server.kill()
    server.communicate()
    take(descriptor).release()


def test_a_reader_of_qemus_does_not_hinder_a_shared_lease_but_an_exclusive_one(
    base: tuple[Path, str], descriptor: int, started: Any, tmp_path: Path
) -> None:
    path, fmt = base
    server = started("qemu-nbd", "-r", "-t", "-f", fmt, "-k", tmp_path / "nbd.sock", path)
    until(lambda: serves(tmp_path / "nbd.sock"))
    Lease.shared(descriptor).release()
    with pytest.raises(JobError) as refused:
        Lease.exclusive(descriptor)
    assert refused.value.code == "busy" and refused.value.details["holders"] == [f"qemu-nbd (pid {server.pid})"]
    Lease.exclusive(descriptor, tolerate_readers=True).release()
    Lease.exclusive(descriptor, ours=[server.pid]).release()
    with pytest.raises(JobError):
        Lease.exclusive(descriptor, ours=[os.getpid()])


def test_a_writer_of_our_own_does_not_hinder_the_lease_that_is_taken_again_at_start(
    base: tuple[Path, str], descriptor: int, started: Any, tmp_path: Path
) -> None:
    server = started("qemu-nbd", "-t", "-f", base[1], "-k", tmp_path / "nbd.sock", base[0])
    until(lambda: serves(tmp_path / "nbd.sock"))
    Lease.exclusive(descriptor, ours=[server.pid]).release()


def test_our_own_storage_daemon_may_write_what_is_leased_exclusively(base: tuple[Path, str], descriptor: int) -> None:
    with Lease.exclusive(descriptor):
        assert run("qemu-io", "-f", base[1], "-c", "write 0 4k", base[0]).returncode == 0


@pytest.mark.parametrize(
    ("held", "wanted", "answer"),
    [
        ("shared", "shared", "taken"),
        ("shared", "exclusive", "busy"),
        ("exclusive", "shared", "busy"),
        ("exclusive", "exclusive", "busy"),
    ],
)
def test_agents_respect_each_other(
    base: tuple[Path, str], descriptor: int, started: Any, held: str, wanted: str, answer: str
) -> None:
    with getattr(Lease, held)(descriptor):
        said = outcome(another_agent(started, base[0], wanted))
    assert said.split()[0] == answer
    assert answer == "taken" or f"(pid {os.getpid()})" in said
    assert outcome(another_agent(started, base[0], wanted)) == "taken"


def test_a_lease_ends_with_its_agent(base: tuple[Path, str], descriptor: int, started: Any) -> None:
    agent = another_agent(started, base[0], "exclusive")
    assert outcome(agent) == "taken"
    with pytest.raises(JobError):
        Lease.shared(descriptor)
    agent.kill()
    agent.communicate()
    Lease.shared(descriptor).release()


def test_two_leases_of_one_agent_exclude_each_other_too(descriptor: int) -> None:
    with Lease.shared(descriptor), Lease.shared(descriptor), pytest.raises(JobError) as refused:
        Lease.exclusive(descriptor)
    assert refused.value.code == "busy" and "leased already" in refused.value.message
    Lease.exclusive(descriptor).release()


def test_a_lease_stays_when_the_descriptor_that_it_was_made_of_is_closed(base: tuple[Path, str]) -> None:
    for access in (os.O_PATH, os.O_RDONLY, os.O_RDWR):
        fd = os.open(base[0], access)
        lease = Lease.shared(fd)
        os.close(fd)
        assert run("qemu-io", "-f", base[1], "-c", "write 0 4k", base[0]).returncode
        lease.release()


def test_a_refused_lease_leaves_nothing_behind(base: tuple[Path, str], descriptor: int, started: Any) -> None:
    agent = another_agent(started, base[0], "exclusive")
    assert outcome(agent) == "taken"
    before = len(os.listdir("/proc/self/fd"))
    for take in (Lease.shared, Lease.exclusive):
        with pytest.raises(JobError):
            take(descriptor)
    assert len(os.listdir("/proc/self/fd")) == before
    assert run("qemu-io", "-f", base[1], "-c", "write 0 4k", base[0]).returncode == 0


def test_a_lease_converts_to_exclusive_and_back(base: tuple[Path, str], descriptor: int, started: Any) -> None:
    def qemu_writes() -> bool:
        return run("qemu-io", "-f", base[1], "-c", "write 0 4k", base[0]).returncode == 0

    with Lease.shared(descriptor) as lease:
        lease.convert(LeaseMode.EXCLUSIVE)
        assert lease.mode is LeaseMode.EXCLUSIVE and qemu_writes()
        assert outcome(another_agent(started, base[0], "shared")).startswith("busy")
        lease.convert(LeaseMode.SHARED)
        assert lease.mode is LeaseMode.SHARED and not qemu_writes()
        assert outcome(another_agent(started, base[0], "shared")) == "taken"
    assert not lease.held


def test_a_refused_conversion_leaves_the_lease_as_it_was(
    base: tuple[Path, str], descriptor: int, started: Any, tmp_path: Path
) -> None:
    with Lease.shared(descriptor) as lease:
        other = Lease.shared(descriptor)
        for _ in range(2):
            with pytest.raises(JobError):
                lease.convert(LeaseMode.EXCLUSIVE)
        other.release()
        assert lease.mode is LeaseMode.SHARED
        assert run("qemu-io", "-f", base[1], "-c", "write 0 4k", base[0]).returncode
        assert outcome(another_agent(started, base[0], "exclusive")).startswith("busy")
        lease.convert(LeaseMode.EXCLUSIVE)
        server = started("qemu-nbd", "-t", "-f", base[1], "-k", tmp_path / "nbd.sock", base[0])
        until(lambda: serves(tmp_path / "nbd.sock"))
        with pytest.raises(JobError) as refused:
            lease.convert(LeaseMode.SHARED)
        assert refused.value.code == "busy" and lease.mode is LeaseMode.EXCLUSIVE
        assert outcome(another_agent(started, base[0], "shared")).startswith("busy")
        server.kill()
        server.communicate()
        assert run("qemu-io", "-f", base[1], "-c", "write 0 4k", base[0]).returncode == 0


def test_a_conversion_that_a_reader_refuses_leaves_the_lease_shared_for_others(
    base: tuple[Path, str], descriptor: int, started: Any, tmp_path: Path
) -> None:
    with Lease.shared(descriptor) as lease:
        started("qemu-nbd", "-r", "-t", "-f", base[1], "-k", tmp_path / "nbd.sock", base[0])
        until(lambda: serves(tmp_path / "nbd.sock"))
        with pytest.raises(JobError) as refused:
            lease.convert(LeaseMode.EXCLUSIVE)
        assert refused.value.code == "busy" and lease.mode is LeaseMode.SHARED
        assert outcome(another_agent(started, base[0], "shared")) == "taken"


def test_a_released_lease_cannot_be_converted(descriptor: int) -> None:
    lease = Lease.shared(descriptor)
    lease.release()
    lease.release()
    with pytest.raises(JobError) as refused:
        lease.convert(LeaseMode.EXCLUSIVE)
    assert refused.value.code == "conflict" and "released" in repr(lease)


def test_a_shared_lease_of_a_read_only_file_cannot_become_exclusive_and_stays(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write a read-only file")
    path = tmp_path / "base"
    path.touch(0o400)
    fd = os.open(path, os.O_RDONLY)
    with Lease.shared(fd) as lease, pytest.raises(JobError) as refused:
        lease.convert(LeaseMode.EXCLUSIVE)
    assert refused.value.code == "denied" and lease.mode is LeaseMode.SHARED
    os.close(fd)


class Monitor:
    """A storage daemon's QMP in plain JSON, enough for one job."""

    def __init__(self, path: Path) -> None:
        until(lambda: self._connected(path))
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self.do("qmp_capabilities")

    def _connected(self, path: Path) -> bool:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        try:
            self._socket.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            self._socket.close()
            return False
        return True

    def do(self, command: str, **arguments: object) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while "event" in (answer := json.loads(self._lines.readline())):
            pass
        assert "return" in answer, answer
        return answer["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def test_a_storage_daemon_streams_from_a_leased_base(
    base: tuple[Path, str], overlay: Path, descriptor: int, started: Any, tmp_path: Path
) -> None:
    monitor_path = tmp_path / "qmp.sock"
    with Lease.shared(descriptor):
        started(
            "qemu-storage-daemon",
            "--chardev", f"socket,id=m,path={monitor_path},server=on,wait=off", "--monitor", "chardev=m",
            "--blockdev", f"file,node-name=base-file,filename={base[0]},read-only=on",
            "--blockdev", f"{base[1]},node-name=base,file=base-file,read-only=on",
            "--blockdev", f"file,node-name=top-file,filename={overlay}",
            "--blockdev", "qcow2,node-name=top,file=top-file,backing=base",
        )  # fmt: skip
        monitor = Monitor(monitor_path)
        monitor.do("block-stream", **{"job-id": "pull", "device": "top", "auto-dismiss": False})
        until(lambda: monitor.do("query-jobs")[0]["status"] == "concluded")
        assert "error" not in monitor.do("query-jobs")[0]
        monitor.do("job-dismiss", id="pull")
        monitor.do("quit")
        monitor.close()
        info = json.loads(run("qemu-img", "info", "-U", "--output=json", overlay).stdout)
        assert "backing-filename" not in info
        assert run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 7 0 1M", overlay).returncode == 0


def test_the_bytes_are_those_of_qemu() -> None:
    """block/file-posix.c: RAW_LOCK_PERM_BASE 100, RAW_LOCK_SHARED_BASE 200; BLK_PERM_ bits 0, 1 and 3."""
    assert qemu_locks.READING == (100, 201, 203)
    assert qemu_locks.WRITERS == (101, 103, 200)
    assert qemu_locks.FLOCK.size == 32
