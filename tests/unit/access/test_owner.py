"""What libvirt's relabelling leaves, on real files and as a real other user. libvirt's part is played by chown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_ledger import USER, Crash, Host, Play, identity, look, need, opened_by_guest, play, verdict

from hostagent import forgetting
from hostagent.access import acl, alone, ledger, owner
from hostagent.access.acl import FileSystem
from hostagent.access.prober import Prober
from hostagent.database import Connection
from hostagent.records import AccessFile, Label, Use
from jobs.errors import JobError
from jobs.model import FileId, Holder
from jobs.ports import AccessResult, AccessVerdict

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files another owner"),
]

LIBVIRT, ALICE, ROOT = Label(USER, USER), Label(64051, 64051), Label(0, 0)
WEB, DB = Holder("domain", "6d1a-web/vda"), Holder("domain", "77c0-db/vda")
EXPORT = Holder("export", "e")


@pytest.fixture(scope="module")
def guest() -> Iterator[Prober]:
    with Prober(USER, USER, (USER,), timeout=10) as prober:
        yield prober


@pytest.fixture
def given_user(tmp_path: Path, guest: Prober) -> Play:
    return lambda scenario, **kind: play(tmp_path, guest, scenario, **kind)


def relabel(path: Path, label: Label = LIBVIRT) -> None:
    """What libvirt does when a domain starts."""
    os.chown(path, *label)


def owned(path: Path) -> Label:
    found = path.stat()
    return Label(found.st_uid, found.st_gid)


async def hold(host: Host, holder: Holder, *paths: Path, label: Label | None = LIBVIRT) -> dict[FileId, AccessResult]:
    uses = [Use(need(path, "r"), label) for path in paths]
    return await host.ledger.hold(holder, uses, name=f"{holder.id[5:]}", trigger="define")


async def pulled(host: Host, file: Path, *, of: Label = ALICE) -> None:
    """A base of a running domain, whose definition was seen before."""
    relabel(file, of)
    await hold(host, WEB, file)
    relabel(file)
    await hold(host, WEB, file)
    host.ledger.know_domains(True)


async def entry_of(host: Host, file: Path) -> AccessFile:
    (entry,) = await host.store.access_files([identity(file)])
    return entry


async def drop(host: Host, holder: Holder = WEB) -> AccessResult:
    (result,) = (await hold(host, holder)).values()
    return result


def test_a_domain_needs_a_file_and_nothing_is_changed(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        before = look(file), owned(file)
        (result,) = (await hold(host, WEB, file)).values()
        assert result.verdict is AccessVerdict.GRANTED
        assert (look(file), owned(file)) == before
        assert (not host.can(file), host.grants()) == (True, [])
        entry = await entry_of(host, file)
        assert (entry.access, entry.mode, entry.owner, entry.labels) == ("owner", "", ROOT, (LIBVIRT,))
        (row,) = await host.store.access_rows()
        assert (row.label, row.title) == (LIBVIRT, "domain:6d1a-web/vda (web/vda)")
        assert await host.ledger.keepers(identity(file), [], str(file)) == ["domain:6d1a-web/vda (web/vda)"]

    given_user(scenario)


def test_the_last_domain_gone_the_file_is_its_owners_again_and_closed(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        assert host.can(file, "rw")
        assert (await drop(host)).verdict is AccessVerdict.REVOKED
        assert (owned(file), host.can(file)) == (ALICE, False)
        entry = await entry_of(host, file)
        assert (entry.access, entry.verdict, entry.taken) == ("owner", "revoked", (LIBVIRT, ALICE))
        assert host.grants() == [("revoked", "base", "")]
        said = len(host.heard)
        await host.ledger.converge_all(trigger="timer")
        assert (len(host.heard), owned(file)) == (said, ALICE)

    given_user(scenario)


@pytest.mark.parametrize("heir", [None, ROOT])
def test_an_owner_that_was_not_seen_is_replaced_only_where_that_is_configured(
    given_user: Play, heir: Label | None
) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        relabel(file)
        await hold(host, WEB, file)
        host.ledger.know_domains(True)
        result = await drop(host)
        if heir is None:
            assert result.verdict is AccessVerdict.KEPT
            assert "access.unknown_owner" in str(result.reason)
            assert (owned(file), host.can(file)) == (LIBVIRT, True)
        else:
            assert (result.verdict, owned(file), host.can(file)) == (AccessVerdict.REVOKED, ROOT, False)

    given_user(scenario, unknown_owner=heir)


def test_what_only_the_header_of_a_domains_image_names_is_kept_and_all_else_is_given_back(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file, other = host.file("base"), host.file("other")
        for owner_ in (ALICE, LIBVIRT):
            for path in (file, other):
                relabel(path, owner_)
            await hold(host, WEB, file, other)
        host.ledger.know_domains(True, {identity(file): "domain:db/vda (db/vda)"})
        results = await hold(host, WEB)
        assert results[identity(other)].verdict is AccessVerdict.REVOKED and owned(other) == ALICE
        kept = results[identity(file)]
        assert (kept.verdict, kept.holders) == (AccessVerdict.KEPT, ("domain:db/vda (db/vda)",))
        assert owned(file) == LIBVIRT
        assert await host.ledger.keepers(identity(file), [], str(file)) == ["domain:db/vda (db/vda)"]
        host.ledger.know_domains(True)
        assert verdict(await host.ledger.converge([identity(file)], trigger="domain")) is AccessVerdict.REVOKED
        assert owned(file) == ALICE

    given_user(scenario)


def test_what_a_job_was_given_goes_with_it_though_a_domain_needs_the_file(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file, job = host.file("base"), Holder("job", "j1")
        relabel(file, ALICE)
        await hold(host, WEB, file)
        before = look(file)
        await host.acquire(job, (file, "rw"))
        assert (host.can(file, "rw"), (await entry_of(host, file)).access) == (True, "acl")
        await host.release(job)
        assert (host.can(file), look(file), owned(file)) == (False, before, ALICE)
        entry = await entry_of(host, file)
        assert (entry.verdict, entry.access, entry.mode) == ("granted", "owner", "")
        relabel(file)  # as it is started
        await hold(host, WEB, file)
        host.ledger.know_domains(True)
        assert (await drop(host)).verdict is AccessVerdict.REVOKED
        assert owned(file) == ALICE

    given_user(scenario)


def test_until_all_domains_are_known_nothing_is_given_back(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        host.restart()
        assert (await drop(host)).verdict is AccessVerdict.PENDING
        await host.ledger.converge_all(trigger="timer")
        assert owned(file) == LIBVIRT
        host.ledger.know_domains(True)
        assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED
        assert owned(file) == ALICE

    given_user(scenario)


def test_a_base_that_another_domain_needs_stays_until_that_is_gone_too(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        await hold(host, DB, file)
        result = await drop(host)
        assert (result.verdict, result.holders) == (AccessVerdict.GRANTED, ("domain:77c0-db/vda (db/vda)",))
        assert (owned(file), host.can(file, "rw")) == (LIBVIRT, True)
        assert (await drop(host, DB)).verdict is AccessVerdict.REVOKED
        assert owned(file) == ALICE

    given_user(scenario)


def test_a_file_with_an_acl_and_libvirts_owner_loses_both_with_the_last_row(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        relabel(file, ALICE)
        before = look(file)
        await host.acquire(EXPORT, (file, "r"))
        assert (await entry_of(host, file)).access == "acl"
        await pulled(host, file)
        await host.release(EXPORT)
        assert host.can(file, "rw")
        assert (await entry_of(host, file)).verdict == "granted"
        assert (await drop(host)).verdict is AccessVerdict.REVOKED
        assert (owned(file), look(file), host.can(file)) == (ALICE, before, False)

    given_user(scenario)


def test_an_export_still_opens_the_file_when_libvirt_restored_its_owner(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("top")
        await pulled(host, file)
        before = look(file)
        await host.acquire(EXPORT, (file, "r"))
        assert look(file) == before  # nothing to give: the user owns it
        relabel(file, ALICE)  # libvirt's own work at the end of the domain
        assert (await drop(host)).verdict is AccessVerdict.GRANTED
        assert (host.can(file), host.can(file, "rw")) == (True, False)
        await host.release(EXPORT)
        assert (owned(file), look(file), host.can(file)) == (ALICE, before, False)

    given_user(scenario)


def test_a_domain_that_libvirt_does_not_relabel_gets_an_acl(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        before = look(file)
        await hold(host, WEB, file, label=None)
        assert (host.can(file), (await entry_of(host, file)).access) == (True, "acl")
        assert (await drop(host)).verdict is AccessVerdict.REVOKED
        assert (look(file), host.can(file)) == (before, False)

    given_user(scenario)


def test_what_somebody_else_owns_by_now_is_left_to_them(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file, grouped = host.file("base"), host.file("grouped")
        await pulled(host, file)
        relabel(file, Label(64052, 64052))
        assert (await drop(host)).verdict is AccessVerdict.REVOKED
        assert owned(file) == (64052, 64052)
        assert (await entry_of(host, file)).taken is None
        await pulled(host, grouped)
        relabel(grouped, Label(USER, 64053))  # not exactly what libvirt gave
        result = await drop(host)
        assert (result.verdict, owned(grouped)) == (AccessVerdict.KEPT, (USER, 64053))
        assert "owned by" in str(result.reason)

    given_user(scenario)


def test_a_mode_that_lets_everybody_read_is_kept_with_that_reason(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base", 0o644)
        await pulled(host, file)
        result = await drop(host)
        assert (result.verdict, owned(file), host.can(file, "rw")) == (AccessVerdict.KEPT, ALICE, False)
        assert "0644" in str(result.reason)
        file.chmod(0o600)
        assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED

    given_user(scenario)


def hard_link(file: Path) -> None:
    os.link(file, file.with_name("another"))


def remembered(file: Path) -> None:
    try:
        os.setxattr(file, owner.REMEMBERED, b"1")
    except OSError:
        pytest.skip("this file system has no trusted attributes")


@pytest.mark.parametrize(
    ("spoil", "words"), [(hard_link, "hard links"), (remembered, owner.REMEMBERED)], ids=["link", "remembered"]
)
def test_what_cannot_be_decided_is_only_reported(given_user: Play, spoil: Callable[[Path], None], words: str) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        spoil(file)
        result = await drop(host)
        assert (result.verdict, owned(file)) == (AccessVerdict.KEPT, LIBVIRT)
        assert words in str(result.reason)

    given_user(scenario)


def test_it_is_given_back_when_libvirts_note_is_removed(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("top")
        await pulled(host, file)
        remembered(file)
        assert (await drop(host)).verdict is AccessVerdict.KEPT
        os.removexattr(file, owner.REMEMBERED)
        assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED
        assert owned(file) == ALICE

    given_user(scenario)


@pytest.mark.parametrize("manage", [False, True])
def test_on_a_shared_file_system_it_is_only_reported(
    given_user: Play, monkeypatch: pytest.MonkeyPatch, manage: bool
) -> None:
    monkeypatch.setattr(acl, "file_system", lambda fd: FileSystem("nfs4", shared=True))

    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        result = await drop(host)
        kept = (AccessVerdict.KEPT, LIBVIRT)
        assert (result.verdict, owned(file)) == ((AccessVerdict.REVOKED, ALICE) if manage else kept)
        assert manage or "nfs4" in str(result.reason)

    given_user(scenario, manage_shared=manage)


def test_a_file_of_another_user_than_the_one_it_can_be_proven_for_is_only_reported(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file, other = host.file("base"), Label(64055, 64055)
        await hold(host, WEB, file, label=other)
        relabel(file, other)
        host.ledger.know_domains(True)
        assert (await drop(host)).verdict is AccessVerdict.KEPT
        assert owned(file) == other

    given_user(scenario)


@pytest.mark.parametrize("by", ["file", "folder", "link"])
def test_a_protected_file_is_never_taken_back_and_has_a_holder(tmp_path: Path, given_user: Play, by: str) -> None:
    place = {"file": tmp_path / "base", "folder": tmp_path, "link": tmp_path / "link"}[by]
    if by == "link":
        place.symlink_to(tmp_path / "base")

    async def scenario(host: Host) -> None:
        file = host.file("base")
        relabel(file, ALICE)
        await host.acquire(EXPORT, (file, "r"))
        await pulled(host, file)
        assert f"protected:{place}" in await host.ledger.keepers(identity(file), [WEB], str(file))
        await host.release(EXPORT)
        result = await drop(host)
        assert (result.verdict, result.holders) == (AccessVerdict.KEPT, (f"protected:{place}",))
        assert "access.protected" in str(result.reason)
        assert (owned(file), host.can(file)) == (LIBVIRT, True)
        host.protected = ()
        host.restart()
        host.ledger.know_domains(True)
        assert verdict(await host.ledger.converge_all(trigger="start")) is AccessVerdict.REVOKED
        assert (owned(file), host.can(file)) == (ALICE, False)

    given_user(scenario, protected=(str(place),))


def test_a_file_that_a_process_has_open_is_kept_until_it_is_closed(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        with opened_by_guest(file):
            assert (await drop(host)).verdict is AccessVerdict.KEPT
            assert owned(file) == LIBVIRT
        assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED
        assert owned(file) == ALICE

    given_user(scenario)


def test_who_only_looked_at_it_keeps_nothing_open(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        passing = contextlib.ExitStack()
        with passing:
            passing.enter_context(opened_by_guest(file))
            asyncio.get_running_loop().call_later(0.02, passing.close)
            assert (await drop(host)).verdict is AccessVerdict.REVOKED
        assert owned(file) == ALICE

    given_user(scenario)


@pytest.mark.parametrize("leases", [True, False])
def test_who_opens_it_in_the_moment_of_the_change_keeps_it_whole(
    given_user: Play, monkeypatch: pytest.MonkeyPatch, leases: bool
) -> None:
    """A domain that starts between our look and our chown: the second look finds it, and its file is libvirt's again."""
    late = contextlib.ExitStack()
    change = owner.change

    def opened_just_before(fd: int, was: Label, now: Label) -> None:
        if was == LIBVIRT and now == ALICE:
            late.enter_context(opened_by_guest(Path(f"/proc/self/fd/{fd}").readlink()))
        change(fd, was, now)

    if not leases:
        monkeypatch.setattr(alone, "is_alone", lambda _: None)
    monkeypatch.setattr(ledger, "PASSING", 3600.0)  # its user has it back at once

    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        with late:
            monkeypatch.setattr(owner, "change", opened_just_before)
            result = await drop(host)
            assert (result.verdict, owned(file)) == (AccessVerdict.KEPT, LIBVIRT)
            assert "it is open in" in str(result.reason)
            assert (await entry_of(host, file)).taken is None
            monkeypatch.setattr(owner, "change", change)
        assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED
        assert owned(file) == ALICE

    given_user(scenario)


@pytest.mark.parametrize("swap", [False, True])
def test_a_file_that_was_moved_is_never_confused_with_the_one_at_its_path(given_user: Play, swap: bool) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        moved = file.rename(host.folder / "moved")
        if swap:
            host.file("base")
            relabel(file)
        result = await drop(host)
        assert result.verdict is AccessVerdict.KEPT
        assert str(moved) in str(result.reason)
        assert owned(moved) == LIBVIRT
        assert not swap or owned(file) == LIBVIRT

    given_user(scenario)


def test_a_file_that_got_its_name_late_and_is_closed_is_no_riddle(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("unfinished")
        await pulled(host, file)
        relabel(file, ALICE)  # as libvirt does itself when a copy is finished
        file.rename(host.folder / "copy")
        assert (await drop(host)).verdict is AccessVerdict.REVOKED

    given_user(scenario)


def test_a_link_at_its_path_leads_nowhere(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file, other = host.file("base"), host.file("other")
        relabel(other)
        await pulled(host, file)
        file.unlink()
        file.symlink_to(other)
        await drop(host)
        assert owned(other) == LIBVIRT

    given_user(scenario)


def test_a_file_that_is_deleted_after_it_was_kept_is_gone(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        relabel(file)
        await hold(host, WEB, file)
        host.ledger.know_domains(True)
        assert (await drop(host)).verdict is AccessVerdict.KEPT
        file.unlink()
        assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED

    given_user(scenario)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2])
def test_a_crash_anywhere_in_giving_back_is_made_good_and_can_be_undone(given_user: Play, at: int, after: bool) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        host.store.left, host.store.after = at, after
        with pytest.raises(Crash):
            await drop(host)
        assert owned(file) == (LIBVIRT if at == 1 else ALICE)
        host.restart()
        host.ledger.know_domains(True)
        await host.ledger.converge_all(trigger="start")
        assert (owned(file), host.can(file), (await entry_of(host, file)).verdict) == (ALICE, False, "revoked")
        assert host.grants() == [("revoked", "base", "")]
        await host.ledger.undo(identity(file))
        assert owned(file) == LIBVIRT

    given_user(scenario)


def test_an_undo_gives_it_back_and_it_is_not_taken_again(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        await drop(host)
        result = await host.ledger.undo(identity(file))
        assert (result.verdict, owned(file), host.can(file, "rw")) == (AccessVerdict.KEPT, LIBVIRT, True)
        for _ in range(2):
            await host.ledger.converge_all(trigger="timer")
        assert owned(file) == LIBVIRT
        with pytest.raises(JobError) as refused:
            await host.ledger.undo(identity(file))
        assert refused.value.code == "not_found"
        await hold(host, WEB, file)  # the next domain: at its end its owner is still known
        assert (await drop(host)).verdict is AccessVerdict.REVOKED
        assert owned(file) == ALICE

    given_user(scenario)


def test_an_undo_of_what_changed_since_changes_nothing(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        await drop(host)
        relabel(file, Label(64052, 64052))
        with pytest.raises(JobError) as refused:
            await host.ledger.undo(identity(file))
        assert refused.value.code == "conflict"
        assert "64052:64052" in refused.value.message
        assert owned(file) == (64052, 64052)
        relabel(file, ALICE)
        taken = identity(file)
        file.rename(host.folder / "moved")
        relabel(host.file("base"), ALICE)
        with pytest.raises(JobError) as refused:
            await host.ledger.undo(taken)
        assert refused.value.code == "image_changed"
        assert (owned(file), owned(host.folder / "moved")) == (ALICE, ALICE)

    given_user(scenario)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2])
def test_a_crash_anywhere_in_an_undo_leaves_a_true_verdict(given_user: Play, at: int, after: bool) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        await drop(host)
        host.store.left, host.store.after = at, after
        with pytest.raises(Crash):
            await host.ledger.undo(identity(file))
        host.restart()
        host.ledger.know_domains(True)
        await host.ledger.converge_all(trigger="start")
        said = {"revoked": False, "kept": True}[(await entry_of(host, file)).verdict]
        assert said == host.can(file) == (owned(file) == LIBVIRT)
        if not said:
            await host.ledger.undo(identity(file))
        assert owned(file) == LIBVIRT

    given_user(scenario)


def test_an_immutable_file_is_pending_and_says_so(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        if subprocess.run(["chattr", "+i", str(file)], capture_output=True, check=False).returncode:
            pytest.skip("no immutable files on this file system")
        try:
            result = await drop(host)
            assert (result.verdict, owned(file)) == (AccessVerdict.PENDING, LIBVIRT)
            assert "cannot be changed" in str(result.reason)
        finally:
            subprocess.run(["chattr", "-i", str(file)], check=True)
        assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED

    given_user(scenario)


def test_what_can_be_undone_is_remembered_as_long_as_jobs(tmp_path: Path, given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file, other = host.file("base"), host.file("other")
        await pulled(host, file)
        await drop(host)
        relabel(other)
        await hold(host, WEB, other)
        await drop(host)

        def pruned(horizon: str) -> Callable[[Connection], int]:
            return lambda db: forgetting.verdicts(db, horizon, 10)

        await host.store._db.run(pruned("2000-01-01"))
        assert {e.file for e in await host.store.access_files()} == {identity(file), identity(other)}
        await host.store._db.run(pruned("9999-01-01"))
        assert {e.file for e in await host.store.access_files()} == {identity(other)}  # libvirt's still

    given_user(scenario)


def test_many_at_once_end_as_the_rows_say(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        others = [Holder("domain", f"{n}/vda") for n in range(6)]
        await asyncio.gather(*(hold(host, one, file) for one in others))
        await asyncio.gather(*(hold(host, one) for one in (WEB, *others)))
        assert (owned(file), host.can(file)) == (ALICE, False)

    given_user(scenario)


@pytest.mark.parametrize("text", ["root", "root:", "nobody-of-that-name:root", ":root"])
def test_an_owner_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(KeyError):
        owner.parse(text)


def test_an_owner_is_named_or_numbered() -> None:
    assert (owner.parse("root:root"), owner.parse("0:7")) == (ROOT, Label(0, 7))


@pytest.mark.parametrize("runs", [False, True])
def test_a_deleted_disk_is_a_riddle_only_where_libvirt_had_it_last(given_user: Play, runs: bool) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("top")
        await pulled(host, file)
        if not runs:
            relabel(file, ALICE)  # libvirt's own work at the end of the domain
            await hold(host, WEB, file)
        file.unlink()
        result = await drop(host)
        assert result.verdict is (AccessVerdict.KEPT if runs else AccessVerdict.REVOKED)
        assert str(result.reason).startswith("it is not in its folder" if runs else "the file is gone")

    given_user(scenario)
