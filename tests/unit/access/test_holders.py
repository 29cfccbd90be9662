from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostagent.access import holders
from hostagent.qemu_locks import FLOCK
from jobs.model import FileId

Holding = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def holding() -> Iterator[Holding]:
    """Starts a real process that runs `program` (with `path`, `os` and `fcntl`) and then waits."""
    children: list[subprocess.Popen[str]] = []

    def start(program: str, path: Path, **options: object) -> subprocess.Popen[str]:
        whole = f"import os, sys, fcntl\npath = sys.argv[1]\n{program}\nprint('ready', flush=True)\nsys.stdin.read()"
        child: subprocess.Popen[str] = subprocess.Popen(  # type: ignore[call-overload]
            [sys.executable, "-c", whole, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options,
        )  # fmt: skip
        children.append(child)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def identity(path: Path) -> FileId:
    return FileId(path.stat().st_dev, path.stat().st_ino)


def test_readers_and_writers_are_found_by_inode_whatever_the_path(tmp_path: Path, holding: Holding) -> None:
    disk, other = tmp_path / "disk", tmp_path / "other"
    disk.touch()
    other.touch()
    reader = holding("fd = os.open(path, os.O_RDONLY)", disk)
    writer = holding("fd = os.open(path, os.O_RDWR)", disk)
    file = identity(disk)
    disk.rename(tmp_path / "moved")
    found = holders.find_open([file, identity(other)], uids={os.getuid()})
    assert {(one.pid, one.uid, one.writes) for one in found[file]} == {
        (reader.pid, os.getuid(), False),
        (writer.pid, os.getuid(), True),
    }
    assert found[identity(other)] == []
    assert str(found[file][0]).endswith(f"(pid {found[file][0].pid})") and found[file][0].name.startswith("python")


def test_a_process_with_both_kinds_of_descriptor_writes_and_is_named_once(tmp_path: Path, holding: Holding) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    child = holding("fds = [os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY), os.open(path, os.O_RDONLY)]", disk)
    assert [(one.pid, one.writes) for one in holders.find_open([identity(disk)])[identity(disk)]] == [(child.pid, True)]


def test_a_descriptor_without_access_to_data_does_not_count(tmp_path: Path, holding: Holding) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    holding("fd = os.open(path, os.O_PATH)", disk)
    assert holders.find_open([identity(disk)]) == {identity(disk): []}


def test_the_search_keeps_to_the_processes_asked_for(tmp_path: Path, holding: Holding) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    file = identity(disk)
    child = holding("fd = os.open(path, os.O_RDONLY)", disk)
    assert holders.find_open([file], pids=[child.pid])[file]
    assert not holders.find_open([file], pids=[os.getpid()])[file]
    assert not holders.find_open([file], skip_pids={child.pid})[file]
    assert not holders.find_open([file], uids={4_000_000})[file]
    assert not holders.find_open([file], pids=[2**22 + 1])[file]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run as another user")
def test_a_process_that_is_not_dumpable_is_still_found_by_its_user(tmp_path: Path, holding: Holding) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    hidden = "import ctypes\nctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\nfd = 0"
    with disk.open() as file:
        child = holding(f"os.setgid(4001); os.setuid(4001)\n{hidden}", disk, pass_fds=[file.fileno()])
    assert Path(f"/proc/{child.pid}/fd").stat().st_uid == 0, "hidden from its own user"
    found = holders.find_open([identity(disk)], uids={4001})[identity(disk)]
    assert [(one.pid, one.uid) for one in found] == [(child.pid, 4001)]


def test_who_locks_a_byte_is_told_from_who_only_reads(tmp_path: Path, holding: Holding) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    holding("fd = os.open(path, os.O_RDONLY)", disk)
    lock = FLOCK.pack(fcntl.F_RDLCK, 0, 100, 4, 0)
    locker = holding(f"fd = os.open(path, os.O_RDONLY)\nfcntl.fcntl(fd, fcntl.F_OFD_SETLK, {lock!r})", disk)
    file = identity(disk)
    assert [one.pid for one in holders.find_lockers(file, 103)] == [locker.pid]
    assert holders.find_lockers(file, 104) == []
    assert holders.find_lockers(file, 100, skip_pids=[locker.pid]) == []


def test_a_process_is_named_as_it_calls_itself(tmp_path: Path, holding: Holding) -> None:
    child = holding("open('/proc/self/comm', 'w').write('a) R 1 (b')", tmp_path)
    assert holders.process_name(child.pid) == "a) R 1 (b"
