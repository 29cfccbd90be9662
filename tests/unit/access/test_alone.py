"""The kernel's own count of who has a file open, by a lease that is given back at once."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hostagent.access import alone
from hostagent.access.alone import is_alone

NOBODY = 65534

WITH_CAPABILITIES = """
import ctypes, os, struct, sys
from hostagent.access.alone import is_alone
path, user = sys.argv[1], int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
os.setresgid(user, user, user)
os.setresuid(user, user, user)
# CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER SETGID SETUID: no CAP_LEASE
mask = sum(1 << number for number in (0, 1, 2, 3, 6, 7))
header, data = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", mask, mask, 0, 0, 0, 0)
assert libc.capset(header, data) == 0
fd = os.open(path, os.O_RDONLY)
first = is_alone(fd)
other = os.open(path, os.O_RDONLY)
second = is_alone(fd)
os.chown(path, 1234, 1234)
print(first, second, os.stat(path).st_uid)
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
@pytest.mark.parametrize("user", [0, 900])
@pytest.mark.parametrize(("owner", "first", "second"), [(NOBODY, "True", "False"), (0, "None", "None")])
def test_without_the_capability_it_asks_as_the_owner_and_keeps_its_others(
    tmp_path: Path, user: int, owner: int, first: str, second: str
) -> None:
    """As the packaged service, root or not: root's files it then does not ask about, unless it is root."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    disk = tmp_path / "disk"
    disk.touch()
    os.chown(disk, owner, owner)
    found = subprocess.run(
        [sys.executable, "-c", WITH_CAPABILITIES, str(disk), str(user)],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    expected = [first, second] if owner != user else ["True", "False"]
    assert (found.stdout.split(), found.stderr) == ([*expected, "1234"], "")


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
    real, through, threads = alone._libc.fcntl, [], []

    def slow(fd: int, command: int, value: int) -> int:
        if (command, value) == (fcntl.F_SETLEASE, fcntl.F_UNLCK):
            opener = threading.Thread(target=lambda: through.append(os.open(disk, os.O_RDONLY)), daemon=True)
            opener.start()
            time.sleep(0.3)
            assert not through, "the lease did not hold"
            threads.append(opener)
        return real(fd, command, value)

    monkeypatch.setattr(alone, "_libc", SimpleNamespace(fcntl=slow))
    assert is_alone(fd) is True
    threads[0].join(10)
    assert len(through) == 1
    monkeypatch.undo()
    assert is_alone(fd) is False
    os.close(through[0])
