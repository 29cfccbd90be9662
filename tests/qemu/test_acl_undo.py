"""Grants and undos on real file systems, tried as the user: ext4, XFS and tmpfs, each freshly made."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.access import acl
from hostagent.access.acl import Snapshot
from hostagent.access.prober import Prober
from jobs.errors import JobError

NOBODY = 65534
MKFS = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"], "tmpfs": []}
XFS_SMALLEST = 320 << 20

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for mounts and other users"),
    pytest.mark.skipif(not shutil.which("setfacl"), reason="needs setfacl (package acl)"),
]


@pytest.fixture(scope="module", params=MKFS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    kind: str = request.param
    where = tmp_path_factory.mktemp(kind)
    mount = ["mount", "-t", kind]
    if kind == "tmpfs":
        mount += ["tmpfs"]
    else:
        if not shutil.which(MKFS[kind][0]):
            pytest.skip(f"needs {MKFS[kind][0]}")
        disk = where.with_suffix(".img")
        with disk.open("w") as file:
            file.truncate(XFS_SMALLEST)
        subprocess.run([*MKFS[kind], str(disk)], check=True)
        mount += ["-o", "loop", str(disk)]
    done = subprocess.run([*mount, str(where)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount {kind} here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@pytest.fixture
def disk(folder: Path) -> Iterator[int]:
    """A descriptor of a fresh file, root's, 0640. O_PATH, which is the least that anything may need."""
    path = folder / "disk"
    path.touch()
    path.chmod(0o640)
    fd = os.open(path, os.O_PATH)
    yield fd
    os.close(fd)
    path.unlink()


@pytest.fixture(scope="module")
def nobody() -> Iterator[Prober]:
    with Prober(NOBODY, NOBODY, timeout=10) as prober:
        yield prober


def setfacl(fd: int, *what: str) -> None:
    subprocess.run(["setfacl", *what, os.readlink(f"/proc/self/fd/{fd}")], check=True)


def chmod(fd: int, mode: int) -> None:
    os.chmod(f"/proc/self/fd/{fd}", mode)


def test_the_file_system_is_a_local_one_with_acls(disk: int, folder: Path) -> None:
    kind = acl.file_system(disk)
    assert folder.name.startswith(kind.type) and not kind.shared
    assert acl.supports_acl(disk)


@pytest.mark.parametrize("need", ["r", "rw"])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o6750, 0o2640])
def test_a_grant_opens_the_file_and_its_undo_is_exact(disk: int, nobody: Prober, mode: int, need: acl.Need) -> None:
    chmod(disk, mode)
    fresh = acl.read(disk)
    before, given = acl.apply_grant(disk, NOBODY, need)
    assert before == fresh == Snapshot(mode, 0, 0, None)
    assert nobody.can_open(disk, "r") and nobody.can_open(disk, "rw") is (need == "rw")
    assert given.mode & 0o7000 == mode & 0o7000, "set-id bits stay"
    assert acl.apply_undo(disk, NOBODY, before, given) == before
    assert not nobody.can_open(disk, "r")


def test_an_acl_that_was_there_comes_back_to_the_byte_also_in_an_order_of_its_own(disk: int, nobody: Prober) -> None:
    """The kernel keeps the order in which the named entries were written."""
    entries = [acl.Entry(acl.USER_OBJ, acl.UNDEFINED_ID, 6), acl.Entry(acl.USER, 4002, 4), acl.Entry(acl.USER, 4001, 6)]
    entries += [
        acl.Entry(tag, acl.UNDEFINED_ID, perms) for tag, perms in ((acl.GROUP_OBJ, 4), (acl.MASK, 6), (acl.OTHER, 0))
    ]
    raw = b"\2\0\0\0" + b"".join(
        b"".join(number.to_bytes(size, "little") for number, size in ((one.tag, 2), (one.perms, 2), (one.id, 4)))
        for one in entries
    )
    os.setxattr(f"/proc/self/fd/{disk}", acl.XATTR, raw)
    before, given = acl.apply_grant(disk, NOBODY, "rw")
    assert before.xattr == raw and nobody.can_open(disk, "rw")
    assert acl.apply_undo(disk, NOBODY, before, given) == before
    assert os.getxattr(f"/proc/self/fd/{disk}", acl.XATTR) == raw


def test_doing_either_twice_changes_nothing(disk: int) -> None:
    before, given = acl.apply_grant(disk, NOBODY, "r")
    changed = os.stat(f"/proc/self/fd/{disk}").st_ctime_ns
    assert acl.apply_grant(disk, NOBODY, "r") == (given, given)
    assert os.stat(f"/proc/self/fd/{disk}").st_ctime_ns == changed
    assert acl.apply_undo(disk, NOBODY, before, given) == before
    assert acl.apply_undo(disk, NOBODY, before, given) == before
    assert acl.apply_undo(disk, NOBODY, before, None) == before


def test_a_chmod_in_between_closes_the_file_and_stands_after_the_undo(disk: int, nobody: Prober) -> None:
    before, given = acl.apply_grant(disk, NOBODY, "r")
    chmod(disk, 0o600)
    assert not nobody.can_open(disk, "r")
    assert acl.apply_undo(disk, NOBODY, before, given) == Snapshot(0o600, 0, 0, None)


def test_an_entry_of_another_party_in_between_stays_and_ours_goes(disk: int, nobody: Prober) -> None:
    before, given = acl.apply_grant(disk, NOBODY, "r")
    setfacl(disk, "-m", "u:4001:rw")
    left = acl.apply_undo(disk, NOBODY, before, given).acl
    assert left.users == ((4001, 6),) and not nobody.can_open(disk, "r")
    with Prober(4001, 4001, timeout=10) as other:
        assert other.can_open(disk, "rw")


def test_an_acl_that_was_removed_in_between_is_not_brought_back(disk: int) -> None:
    setfacl(disk, "-m", "u:4001:r")
    before, given = acl.apply_grant(disk, NOBODY, "rw")
    setfacl(disk, "-b")
    assert acl.apply_undo(disk, NOBODY, before, given) == Snapshot(0o640, 0, 0, None)


def test_a_lost_record_of_what_was_given_still_ends_the_access(disk: int, nobody: Prober) -> None:
    before, _ = acl.apply_grant(disk, NOBODY, "rw")
    assert acl.apply_undo(disk, NOBODY, before, None) == before
    assert not nobody.can_open(disk, "r")


def test_a_grant_that_would_widen_another_entry_is_refused_and_changes_nothing(disk: int, nobody: Prober) -> None:
    setfacl(disk, "-m", "u:4001:rw,m::r")
    before = acl.read(disk)
    with pytest.raises(JobError) as refused:
        acl.apply_grant(disk, NOBODY, "rw")
    assert refused.value.code == "access_refused" and "user:4001:rw-" in refused.value.message
    assert acl.read(disk) == before and not nobody.can_open(disk, "r")
    _, given = acl.apply_grant(disk, NOBODY, "r")
    assert nobody.can_open(disk, "r")
    assert acl.apply_undo(disk, NOBODY, before, given) == before


def test_the_remedy_of_a_refused_grant_works(disk: int, nobody: Prober) -> None:
    acl.apply_grant(disk, NOBODY, "r")
    chmod(disk, 0o600)  # masks the group's r too, so giving ours back would give the group's back
    with pytest.raises(JobError) as refused:
        acl.apply_grant(disk, NOBODY, "r")
    words = str(refused.value.remedy).split("setfacl ")[1].split(" FILE")[0]
    setfacl(disk, *words.split())
    acl.apply_grant(disk, NOBODY, "r")
    assert nobody.can_open(disk, "r")


def test_a_grant_changes_from_read_to_write_and_back_in_one_step(disk: int, nobody: Prober) -> None:
    before, reading = acl.apply_grant(disk, NOBODY, "r")
    writing = acl.apply_change(disk, NOBODY, "rw", before=before, given=reading)
    assert nobody.can_open(disk, "rw")
    assert acl.apply_change(disk, NOBODY, "r", before=before, given=writing) == reading
    assert nobody.can_open(disk, "r") and not nobody.can_open(disk, "rw")
    assert acl.apply_undo(disk, NOBODY, before, reading) == before


def test_a_grant_does_not_take_away_what_the_mode_gives(disk: int) -> None:
    os.chown(f"/proc/self/fd/{disk}", 0, 5001)
    chmod(disk, 0o660)
    with Prober(NOBODY, NOBODY, (5001,), timeout=10) as member:
        before, given = acl.apply_grant(disk, NOBODY, "r", gids=(NOBODY, 5001))
        assert member.can_open(disk, "rw")
        assert acl.apply_undo(disk, NOBODY, before, given) == before


def test_what_still_opens_the_file_afterwards_is_explained(disk: int, nobody: Prober) -> None:
    chmod(disk, 0o644)
    before, given = acl.apply_grant(disk, NOBODY, "r")
    left = acl.apply_undo(disk, NOBODY, before, given)
    assert nobody.can_open(disk, "r")
    assert acl.explain(left, NOBODY, {NOBODY}, "r") == "mode 0644 lets everybody read"
    os.chown(f"/proc/self/fd/{disk}", NOBODY, 0)
    assert acl.explain(acl.read(disk), NOBODY, {NOBODY}, "r") == "owned by nobody with mode 0644"


def test_an_owner_needs_no_entry_and_one_without_the_right_cannot_get_it_by_one(disk: int) -> None:
    os.chown(f"/proc/self/fd/{disk}", NOBODY, 0)
    before, given = acl.apply_grant(disk, NOBODY, "rw")
    assert before == given == acl.read(disk)
    chmod(disk, 0o440)
    with pytest.raises(JobError) as refused:
        acl.apply_grant(disk, NOBODY, "rw")
    assert refused.value.code == "access_refused" and refused.value.remedy


def test_an_immutable_file_is_denied_with_a_remedy(disk: int) -> None:
    path = os.readlink(f"/proc/self/fd/{disk}")
    if subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
        pytest.skip("this file system has no immutable files")
    try:
        with pytest.raises(JobError) as refused:
            acl.apply_grant(disk, NOBODY, "r")
    finally:
        subprocess.run(["chattr", "-i", path], check=True)
    assert refused.value.code == "denied" and "lsattr" in str(refused.value.remedy)
