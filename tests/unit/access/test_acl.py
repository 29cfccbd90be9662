"""The pure part of the ACLs, against properties, and `allows` against the kernel itself."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostagent.access import acl
from hostagent.access.acl import Acl, Entry, Snapshot
from hostagent.access.prober import Prober
from jobs.errors import JobError

UIDS, GIDS = (4001, 4002, 4003), (5001, 5002, 5003)
US = UIDS[0]
PERMS = st.integers(0, 7)
WANTS = (4, 2, 6)

root = pytest.mark.root
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to try as other users")


def named(ids: tuple[int, ...]) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    return st.dictionaries(st.sampled_from(ids), PERMS).map(lambda entries: tuple(sorted(entries.items())))


@st.composite
def acls(draw: st.DrawFn) -> Acl:
    users, groups = draw(named(UIDS)), draw(named(GIDS))
    bare = Acl(owner=draw(PERMS), group=draw(PERMS), other=draw(PERMS), users=users, groups=groups)
    return replace(bare, mask=draw(PERMS)) if users or groups or draw(st.booleans()) else bare


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    return snapshot(draw(acls()), uid=draw(st.sampled_from((0, *UIDS))), gid=draw(st.sampled_from((0, *GIDS))))


def snapshot(value: Acl, uid: int = 0, gid: int = 0) -> Snapshot:
    middle = value.group if value.mask is None else value.mask
    mode = value.owner << 6 | middle << 3 | value.other
    return Snapshot(mode, uid, gid, None if value.mask is None else value.serialize())


WHO = st.tuples(st.sampled_from((*UIDS, 4999)), st.sets(st.sampled_from((*GIDS, 5999))))


@given(acls())
def test_parsing_reads_what_serializing_writes(value: Acl) -> None:
    assert Acl.parse(value.serialize()) == value


@given(st.binary(max_size=80) | st.binary(max_size=8).map(lambda tail: struct.pack("<I", 2) + tail * 8))
def test_bytes_that_are_no_acl_are_refused_and_nothing_else_happens(data: bytes) -> None:
    try:
        value = Acl.parse(data)
    except JobError as error:
        assert error.code == "io_error"
    else:
        assert len(value.serialize()) == len(data)


def test_entries_come_in_the_order_that_the_kernel_demands() -> None:
    value = Acl(6, 4, 0, users=((9, 4), (3, 6)), groups=((8, 4), (2, 6)), mask=6)
    assert [(entry.tag, entry.id) for entry in value.entries() if entry.id != acl.UNDEFINED_ID] == [
        (acl.USER, 3),
        (acl.USER, 9),
        (acl.GROUP, 2),
        (acl.GROUP, 8),
    ]
    assert [entry.tag for entry in value.entries()] == sorted(entry.tag for entry in value.entries())


@given(st.integers(0, 0o777))
def test_a_mode_is_a_minimal_acl(mode: int) -> None:
    value = Acl.from_mode(mode)
    assert (value.owner, value.group, value.other, value.mask) == (mode >> 6, mode >> 3 & 7, mode & 7, None)


@given(snapshots(), st.sampled_from(("r", "rw")), st.sets(st.sampled_from(GIDS)))
def test_a_grant_gives_what_is_needed_and_takes_nothing_away(before: Snapshot, need: acl.Need, gids: set[int]) -> None:
    before = replace(before, uid=0)
    has = sum(bit for bit in (4, 2, 1) if acl.allows(before, US, gids, bit))
    try:
        after = snapshot(acl.grant(before.acl, US, need, has=has), gid=before.gid)
    except JobError as error:
        assert error.code == "access_refused" and error.remedy
        return
    assert acl.allows(after, US, gids, acl.NEEDS[need])
    assert all(acl.allows(after, US, gids, bit) for bit in (4, 2, 1) if has & bit)


@given(snapshots(), st.sampled_from(("r", "rw")), WHO)
def test_a_grant_widens_nobody_else(before: Snapshot, need: acl.Need, who: tuple[int, set[int]]) -> None:
    uid, gids = who
    try:
        after = snapshot(acl.grant(before.acl, US, need), before.uid, before.gid)
    except JobError:
        return
    if uid != US:
        for want in WANTS:
            assert acl.allows(before, uid, gids, want) or not acl.allows(after, uid, gids, want)


@given(acls(), st.sampled_from(("r", "rw")))
def test_an_undo_of_what_nobody_changed_is_exact(before: Acl, need: acl.Need) -> None:
    try:
        given_ = acl.grant(before, US, need)
    except JobError:
        return
    assert acl.undo(given_, given_, before, US) == before


@given(acls(), acls(), st.sampled_from(("r", "rw")), WHO, st.sampled_from(GIDS))
def test_an_undo_after_any_change_leaves_others_alone_and_us_with_no_more_than_before(
    before: Acl, current: Acl, need: acl.Need, who: tuple[int, set[int]], gid: int
) -> None:
    uid, gids = who
    after = acl.undo(current, None, before, US)
    had, entry = before.user(US), after.user(US)
    if entry is not None:
        assert had is not None and entry & ~had & 7 == 0 and entry & ~(before.mask or 0) & 7 == 0
    if uid != US:
        for want in WANTS:
            changed = acl.allows(snapshot(current, 0, gid), uid, gids, want)
            assert bool(acl.allows(snapshot(after, 0, gid), uid, gids, want)) == bool(changed)
    assert acl.undo(after, None, before, US) == after


def test_raising_the_mask_over_a_masked_entry_is_refused_by_name_with_a_remedy() -> None:
    masked = Acl(6, 4, 0, users=((4002, 6),), mask=4)
    with pytest.raises(JobError) as refused:
        acl.grant(masked, US, "rw")
    assert refused.value.code == "access_refused"
    assert "user:4002:rw-, now r--" in refused.value.message
    assert "setfacl -n -m user:4002:r--" in str(refused.value.remedy)
    assert acl.grant(masked, US, "r").mask == 4


def test_a_minimal_acl_gets_a_mask_and_its_group_stays() -> None:
    after = acl.grant(Acl.from_mode(0o640), US, "rw")
    assert (after.group, after.mask, after.users) == (4, 6, ((US, 6),))


def test_a_chmod_in_between_is_kept_when_the_grant_goes() -> None:
    given_ = acl.grant(Acl.from_mode(0o640), US, "r")
    assert acl.undo(replace(given_, mask=0), given_, Acl.from_mode(0o640), US) == Acl.from_mode(0o600)


def test_an_entry_that_the_user_had_before_comes_back() -> None:
    before = Acl(6, 4, 0, users=((US, 4),), mask=4)
    given_ = acl.grant(before, US, "rw")
    changed = given_.with_user(4002, 4)
    assert acl.undo(changed, given_, before, US).users == ((US, 4), (4002, 4))


@pytest.mark.parametrize(
    ("shot", "want", "reason"),
    [
        pytest.param(Snapshot(0o644, 0, 0, None), "r", "mode 0644 lets everybody read", id="other"),
        pytest.param(Snapshot(0o666, 0, 0, None), "rw", "mode 0666 lets everybody read and write", id="other-rw"),
        pytest.param(Snapshot(0o640, 0, 5001, None), "r", "mode 0640 lets group 5001 read", id="group"),
        pytest.param(Snapshot(0o600, US, 0, None), "rw", "owned by 4001 with mode 0600", id="owner"),
        pytest.param(
            snapshot(Acl(6, 0, 0, users=((US, 4),), mask=4)), "r", "another ACL entry user:4001:r--", id="acl-user"
        ),
        pytest.param(
            snapshot(Acl(6, 0, 0, groups=((5001, 4),), mask=4)),
            "r",
            "another ACL entry group:5001:r--, and 4001 is in that group",
            id="acl-group",
        ),
        pytest.param(Snapshot(0o640, 0, 0, None), "r", None, id="closed"),
        pytest.param(Snapshot(0o644, 0, 0, None), "rw", None, id="read-is-not-write"),
        pytest.param(Snapshot(0o406, US, 0, None), "rw", None, id="the-owner-is-not-everybody"),
    ],
)
def test_who_lets_the_user_in_is_said(shot: Snapshot, want: acl.Need, reason: str | None) -> None:
    assert acl.explain(shot, US, {5001}, want) == reason


def test_root_is_kept_out_by_nothing() -> None:
    assert "root" in str(acl.explain(Snapshot(0, 4001, 0, None), 0, {0}, "rw"))


def test_the_file_system_is_named(tmp_path: Path) -> None:
    with (tmp_path / "disk").open("w") as file, open("/proc/self/stat") as proc:
        kind = acl.file_system(file.fileno())
        assert kind.type and not kind.shared
        assert acl.supports_acl(file.fileno())
        assert acl.file_system(proc.fileno()).type == "proc"
        assert not acl.supports_acl(proc.fileno())
        with pytest.raises(JobError) as refused:
            acl.apply_grant(proc.fileno(), os.geteuid() + 1, "r")
    assert refused.value.code in ("access_refused", "denied") and "/stat" in refused.value.message


def test_a_descriptor_that_is_closed_is_an_error_of_ours() -> None:
    with pytest.raises(JobError):
        acl.read(1_000_000)


PEOPLE = [(4001, (5001,)), (4002, (5002, 5003)), (4999, (5999,))]


@pytest.fixture(scope="module")
def probers() -> Iterator[list[Prober]]:
    people = [Prober(uid, gids[0], gids, timeout=10) for uid, gids in PEOPLE]
    yield people
    for prober in people:
        prober.close()


@root
@needs_root
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shot=snapshots())
def test_allows_agrees_with_the_kernel(tmp_path: Path, probers: list[Prober], shot: Snapshot) -> None:
    with (tmp_path / "disk").open("w") as file:
        fd = file.fileno()
        os.fchown(fd, shot.uid, shot.gid)
        os.fchmod(fd, shot.mode)
        if shot.xattr is not None:
            os.setxattr(fd, acl.XATTR, shot.xattr)
        else:
            os.setxattr(fd, acl.XATTR, Acl.from_mode(shot.mode).serialize())
        assert acl.read(fd) == shot
        for (uid, gids), prober in zip(PEOPLE, probers, strict=True):
            assert prober.can_open(fd, "r") == bool(acl.allows(shot, uid, gids, acl.READ))
            assert prober.can_open(fd, "rw") == bool(acl.allows(shot, uid, gids, acl.READ | acl.WRITE))


def test_an_entry_reads_like_getfacl() -> None:
    assert str(Entry(acl.GROUP_OBJ, acl.UNDEFINED_ID, 5)) == "group::r-x"
    assert str(Entry(acl.USER, 4001, 6)) == "user:4001:rw-"
