"""What libvirt left, of a file that is made anew, opened by others, or needed again in the moment in which it goes back."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_ledger import USER, Host, Play, identity, need, play, verdict
from test_owner import ALICE, DB, LIBVIRT, ROOT, WEB, drop, entry_of, hold, owned, pulled, relabel
from test_reused_inodes import successor

from hostagent.access.ownership import Ownership
from hostagent.access.prober import Prober
from hostagent.records import Label, Use
from jobs.errors import JobError
from jobs.ports import AccessVerdict

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files another owner"),
]


@pytest.fixture(scope="module")
def guest() -> Iterator[Prober]:
    with Prober(USER, USER, (USER,), timeout=30) as prober:
        yield prober


@pytest.fixture
def given_user(tmp_path: Path, guest: Prober) -> Play:
    return lambda scenario, **kind: play(tmp_path, guest, scenario, **kind)


def made_anew(file: Path, of: Label) -> Path:
    """Another file in the place of this one, with its inode number."""
    successor(file, file)
    relabel(file, of)
    return file


def test_the_owner_of_a_deleted_file_is_not_the_one_of_its_successor(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        made_anew(file, LIBVIRT)
        await hold(host, WEB, file)
        assert (await entry_of(host, file)).owner is None
        assert (await drop(host)).verdict is AccessVerdict.REVOKED
        assert owned(file) == ROOT

    given_user(scenario, unknown_owner=ROOT)


def test_the_user_of_a_domain_that_was_not_known_yet_is_no_owner_to_go_back_to(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file, other = host.file("base"), Label(64077, 64077)
        await pulled(host, file, of=other)
        await hold(host, DB, file, label=other)
        await drop(host, DB)
        assert (await drop(host)).verdict is AccessVerdict.REVOKED
        assert owned(file) == ROOT

    given_user(scenario, unknown_owner=ROOT)


def test_a_file_that_was_made_after_the_last_domain_is_not_taken(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        made_anew(file, LIBVIRT)
        assert (await drop(host)).verdict is AccessVerdict.REVOKED
        assert owned(file) == LIBVIRT

    given_user(scenario)


def test_an_undo_does_not_give_a_later_file_to_guests(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        await drop(host)
        made_anew(file, ALICE)
        with pytest.raises(JobError) as refused:
            await host.ledger.undo(identity(file))
        assert (refused.value.code, owned(file), host.can(file)) == ("image_changed", ALICE, False)

    given_user(scenario)


def test_a_process_of_another_user_that_has_the_file_open_keeps_it(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        with file.open("rb") as opened:
            process = subprocess.Popen(["/bin/sleep", "60"], stdin=opened, user=64077, group=USER, cwd="/")
        try:
            assert len(await host.ledger.keepers(identity(file), [WEB], str(file))) == 1
            result = await drop(host)
            assert (result.verdict, owned(file)) == (AccessVerdict.KEPT, LIBVIRT)
            assert str(process.pid) in result.holders[0]
        finally:
            process.kill()
            process.wait(30)
        assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED
        assert owned(file) == ALICE

    given_user(scenario)


def test_a_file_that_moved_while_it_was_given_back_is_told_and_stops_nobody(
    given_user: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(host: Host) -> None:
        file, other = host.file("base"), host.file("other")
        await pulled(host, other)
        await pulled(host, file)
        with monkeypatch.context() as crash:
            crash.setattr(Ownership, "change", late)
            assert (await hold(host, WEB, other))[identity(file)].verdict is AccessVerdict.PENDING
        host.restart()
        host.ledger.know_domains(True)
        away = file.with_name("away")
        away.mkdir()
        with file.rename(away / file.name).open("rb") as opened:
            process = subprocess.Popen(["/bin/sleep", "60"], stdin=opened, user=64077, group=USER, cwd="/")
        try:
            found = await host.ledger.converge_all(trigger="timer")
        finally:
            process.kill()
            process.wait(30)
        moved = found[identity(away / file.name)]
        assert moved.verdict is AccessVerdict.KEPT
        assert "not in its folder" in str(moved.reason)

    given_user(scenario)


def late(*_: object) -> None:
    raise JobError("timeout", "its storage hangs")


@pytest.mark.parametrize("after", [False, True])
def test_a_domain_that_is_defined_in_the_moment_of_the_change_keeps_its_file(
    given_user: Play, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """Its row is there before the ledger comes to it: the file is busy then, and libvirt's as it was."""

    async def scenario(host: Host) -> None:
        file = host.file("base")
        await pulled(host, file)
        rows, looked = host.store.access_rows, []

        async def appearing(files=None):  # type: ignore[no-untyped-def]
            looked.append(owned(file))
            if len(looked) == (3 if after else 2):
                await host.store.replace_needs(DB, uses, name="db/vda")
            return await rows(files)

        await hold(host, DB, file)
        (row,) = [row for row in await rows([identity(file)]) if row.holder == DB]
        uses = [Use(need(file, "r"), row.label)]
        await hold(host, DB)
        with monkeypatch.context() as patch:
            patch.setattr(host.store, "access_rows", appearing)
            result = await drop(host)
        assert looked[-1] == (ALICE if after else LIBVIRT)
        assert (result.verdict, owned(file)) == (AccessVerdict.PENDING, LIBVIRT)
        assert "db/vda" in str(result.reason)
        assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.GRANTED
        assert (await entry_of(host, file)).taken is None
        assert (await drop(host, DB)).verdict is AccessVerdict.REVOKED
        assert owned(file) == ALICE

    given_user(scenario)


def test_a_protected_file_that_the_ledger_does_not_know_has_a_keeper(tmp_path: Path, given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("base")
        assert await host.ledger.keepers(identity(file), [], str(file)) == [f"protected:{tmp_path}"]

    given_user(scenario, protected=(str(tmp_path),))
