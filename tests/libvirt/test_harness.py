"""The private libvirtd, its guests and what they write: what every other test here stands on."""

from __future__ import annotations

import io
import os
import pwd
from pathlib import Path

import pytest

from hostagent.access.holders import find_open
from jobs.model import FileId
from tests.harness import TEST_USER
from tests.libvirt import pattern
from tests.libvirt.private import PrivateLibvirt


def test_a_guest_outlives_libvirtd_and_what_it_flushed_is_on_its_disk(libvirt: PrivateLibvirt, disk: Path) -> None:
    guest = libvirt.guest("web1", disk)
    guest.start()
    before = guest.until_flushed(5)
    qemu = guest.pid
    libvirt.kill()
    guest.until_flushed(before + 5)
    libvirt.start()
    with guest.domain() as domain:
        assert domain.isActive()
    guest.until_flushed(guest.flushed + 5)
    assert guest.pid == qemu
    guest.kill()
    assert guest.verify() >= before + 10


def test_a_paused_guest_has_its_disk_open_as_the_tests_user_and_does_nothing(
    libvirt: PrivateLibvirt, disk: Path
) -> None:
    guest = libvirt.guest("web1", disk)
    guest.start(paused=True)
    opened = find_open([FileId(disk.stat().st_dev, disk.stat().st_ino)])
    assert [process.pid for process in next(iter(opened.values()))] == [guest.pid]
    assert Path(f"/proc/{guest.pid}").stat().st_uid == pwd.getpwnam(TEST_USER).pw_uid
    assert guest.flushed == 0


def test_its_guests_are_unknown_outside(libvirt: PrivateLibvirt, disk: Path) -> None:
    libvirt.guest("web1", disk)
    assert not Path("/etc/libvirt/qemu/web1.xml").exists()
    assert (libvirt.root / "etc/libvirt/qemu/web1.xml").exists()


def test_a_closed_one_leaves_no_process(tmp_path: Path) -> None:
    with PrivateLibvirt(tmp_path) as other:
        assert other.processes("libvirtd")
    assert other.processes("") == []
    assert not other.runtime.exists()


def disk_of(numbers: range, blocks: int) -> bytearray:
    disk = bytearray(blocks * pattern.BLOCK)
    for number in numbers:
        offset, data = pattern.block(number, blocks)
        disk[offset : offset + pattern.BLOCK] = data
    return disk


def test_the_pattern_is_verified() -> None:
    found = pattern.verify(io.BytesIO(disk_of(range(1, 30), 16)), 29)
    assert found == pattern.Verdict(16, [])


@pytest.mark.parametrize("spoil", ["lost", "torn", "misplaced", "old", "zeros"])
def test_a_spoilt_disk_is_found(spoil: str) -> None:
    disk = disk_of(range(1, 21), 64)
    here, data = pattern.block(20, 64)
    there, _ = pattern.block(7, 64)
    if spoil == "lost":
        disk[here : here + 4096] = os.urandom(4096)
    elif spoil == "torn":
        disk[here + 2048 : here + 4096] = bytes(2048)
    elif spoil == "misplaced":
        disk[there : there + 4096] = data
    elif spoil == "old":
        disk = disk_of(range(1, 20 + 1), 16)
        place, old = pattern.block(4, 16)
        disk[place : place + 4096] = old
    else:
        disk[here : here + 4096] = bytes(4096)
    assert len(pattern.verify(io.BytesIO(disk), 20).wrong) == 1
