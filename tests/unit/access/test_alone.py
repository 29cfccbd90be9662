"""The kernel's own count of who has a file open, by a lease that is given back at once."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.access import alone
from hostagent.access.alone import is_alone

NOBODY = 65534

WITHOUT_CAP_LEASE = """
import ctypes, os, struct, sys
from hostagent.access.alone import is_alone
libc = ctypes.CDLL(None, use_errno=True)
header, data = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
assert libc.capget(header, data) == 0
words = list(struct.unpack("=6I", data.raw))
words[0] &= ~(1 << 28)
words[1] &= ~(1 << 28)
assert libc.capset(header, struct.pack("=6I", *words)) == 0
fd = os.open(sys.argv[1], os.O_RDONLY)
first = is_alone(fd)
other = os.open(sys.argv[1], os.O_RDONLY)
second = is_alone(fd)
made = os.stat(os.open(sys.argv[1] + ".made", os.O_CREAT | os.O_WRONLY)).st_uid
print(first, second, made)
"""


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    disk = tmp_path / "disk"
    disk.write_bytes(b"x" * 4096)
    fd = os.open(disk, os.O_RDONLY)
    yield disk, fd
    os.close(fd)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_whoever_else_has_it_open_is_seen(opened: tuple[Path, int], flags: int) -> None:
    disk, fd = opened
    assert is_alone(fd) is True
    other = os.open(disk, flags)
    assert is_alone(fd) is False
    os.close(other)
    assert is_alone(fd) is True


def test_one_that_is_only_mapped_is_seen_and_one_that_cannot_read_does_not_count(opened: tuple[Path, int]) -> None:
    disk, fd = opened
    other = os.open(disk, os.O_RDONLY)
    mapped = mmap.mmap(other, 4096, prot=mmap.PROT_READ)
    os.close(other)
    assert is_alone(fd) is False
    mapped.close()
    path_only = os.open(disk, os.O_PATH)
    assert is_alone(fd) is True
    os.close(path_only)


@pytest.mark.root
def test_of_somebody_elses_file_too_without_the_capability_and_nothing_else_changes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    os.chown(disk, NOBODY, NOBODY)
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_CAP_LEASE, str(disk)], check=True, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.split() == ["True", "False", "0"]


def test_where_there_are_no_leases_it_is_not_known() -> None:
    reading, writing = os.pipe()
    try:
        assert is_alone(reading) is None
    finally:
        os.close(reading)
        os.close(writing)


def test_who_opens_it_meanwhile_waits_and_kills_nobody(
    opened: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, fd = opened
    real, through = alone.fcntl.fcntl, []

    def slow(fd: int, command: int, value: int) -> int:
        if command == alone.fcntl.F_SETLEASE and value == alone.fcntl.F_UNLCK:
            opener = threading.Thread(target=lambda: through.append(os.open(disk, os.O_RDONLY)), daemon=True)
            opener.start()
            time.sleep(0.3)
            assert not through, "the lease did not hold"
            threads.append(opener)
        return real(fd, command, value)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(alone.fcntl, "fcntl", slow)
    assert is_alone(fd) is True
    threads[0].join(10)
    assert len(through) == 1
    monkeypatch.undo()
    assert is_alone(fd) is False
    os.close(through[0])
