"""A deleted file's inode number is another file's: nothing that was given or said of the one is taken for the other."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_ledger import JOB, USER, Host, Play, identity, look, opened_by_guest, play, verdict

from hostagent.access import holders
from hostagent.access import identity as identity_module
from hostagent.access.birth import born, is_later
from hostagent.access.prober import Prober
from jobs.model import FileId, Holder
from jobs.ports import AccessVerdict

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give another user access and to try it"),
]

OTHER = Holder("job", "other")


@pytest.fixture(scope="module")
def guest() -> Iterator[Prober]:
    with Prober(USER, USER, (USER,), timeout=30) as prober:
        yield prober


@pytest.fixture
def given_user(tmp_path: Path, guest: Prober) -> Play:
    return lambda scenario, **kind: play(tmp_path, guest, scenario, **kind)


def successor(file: Path, to: Path, mode: int = 0o600) -> Path:
    """Delete `file`, and make another one with its inode number at `to`; the test is skipped where none can be had."""
    was, when = identity(file), _birth(file)
    if when is None:
        pytest.skip("this file system does not say when a file was made")
    file.unlink()
    tries = [file.with_name(f"next{n}") for n in range(200)]  # in its folder: inodes are looked for near there
    try:
        for path in tries:
            path.write_bytes(b"another")
            if identity(path) == was and _birth(path) != when:
                path.chmod(mode)
                path.rename(to)
                return to
    finally:
        for path in tries:
            path.unlink(missing_ok=True)
    pytest.skip("this file system does not use an inode number again so soon")


def _birth(path: Path) -> int | None:
    fd = os.open(path, os.O_PATH)
    try:
        return born(fd)
    finally:
        os.close(fd)


@contextmanager
def opened_by(uid: int, path: Path) -> Iterator[int]:
    with path.open("rb") as file:
        process = subprocess.Popen(["/bin/sleep", "60"], stdin=file, user=uid, group=uid, cwd="/")
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait(30)


async def entries(host: Host, file: FileId) -> list[str]:
    return [entry.path for entry in await host.store.access_files([file])]


def test_a_verdict_is_not_told_of_the_next_file_in_the_folder(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("old")
        await host.acquire(JOB, (file, "r"))
        assert verdict(await host.release(JOB)) is AccessVerdict.REVOKED
        new = successor(file, host.folder / "new")
        found = await host.ledger.converge([identity(new)], trigger="pull")
        assert verdict(found) is AccessVerdict.UNCHANGED
        assert await entries(host, identity(new)) == []
        assert host.grants()[-1] == ("revoked", "old", "")

    given_user(scenario)


def test_what_was_kept_of_a_deleted_file_is_not_revoked_of_one_elsewhere(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        elsewhere = host.folder / "elsewhere"
        elsewhere.mkdir()
        file = host.file("old", 0o644)
        await host.acquire(JOB, (file, "r"))
        assert verdict(await host.release(JOB)) is AccessVerdict.KEPT
        host.restart()
        new = successor(file, elsewhere / "new", 0o644)
        found = await host.ledger.converge([identity(new)], trigger="pull", at={identity(new): str(new)})
        assert verdict(found) is AccessVerdict.UNCHANGED
        assert host.can(new)
        assert host.grants()[-1] == ("revoked", "old", "")

    given_user(scenario)


def test_what_was_given_to_a_deleted_file_is_not_taken_from_the_next(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("old")
        await host.acquire(JOB, (file, "r"))
        await host.store.release(JOB)
        host.restart()  # nothing holds the file any more
        new = successor(file, host.folder / "new")
        subprocess.run(["setfacl", "-m", f"u:{USER}:r", str(new)], check=True)
        before = look(new)
        assert verdict(await host.ledger.converge_all(trigger="start")) is AccessVerdict.REVOKED
        assert (look(new), host.can(new)) == (before, True)
        assert host.grants()[-1] == ("revoked", "old", "")
        assert await host.ledger.converge_all(trigger="timer") == {}

    given_user(scenario)


def test_the_next_file_in_its_place_is_given_and_taken_for_itself(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("disk")
        await host.acquire(JOB, (file, "rw"))
        await host.store.release(JOB)
        host.restart()
        new = successor(file, file)
        before = look(new)
        await host.acquire(OTHER, (new, "r"))
        assert (host.can(new), host.can(new, "rw")) == (True, False)
        assert verdict(await host.release(OTHER)) is AccessVerdict.REVOKED
        assert (look(new), host.can(new)) == (before, False)

    given_user(scenario)


def test_a_file_that_was_moved_to_another_folder_is_the_same(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("disk")
        before = look(file)
        await host.acquire(JOB, (file, "r"))
        if (await host.store.access_files())[0].born is None:
            pytest.skip("this file system does not say when a file was made")
        await host.store.release(JOB)
        host.restart()
        (host.folder / "elsewhere").mkdir()
        moved = file.rename(host.folder / "elsewhere" / "disk")
        await host.acquire(OTHER, (moved, "r"))
        assert verdict(await host.release(OTHER)) is AccessVerdict.REVOKED
        assert (look(moved), host.can(moved)) == (before, False)

    given_user(scenario)


def test_storage_that_does_not_say_leaves_the_revocation_owed_and_told(
    given_user: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("disk")
        await host.acquire(JOB, (file, "r"))
        await host.store.release(JOB)
        host.restart()

        def broken(*_: object) -> bool:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(identity_module, "is_reused", broken)
            assert verdict(await host.ledger.converge_all(trigger="start")) is AccessVerdict.PENDING
        pending, since, _ = await host.store.access_gauges()
        assert pending == 1 and since is not None
        assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED
        assert not host.can(file)

    given_user(scenario)


def test_who_has_the_next_file_open_does_not_keep_the_deleted_one(given_user: Play) -> None:
    async def scenario(host: Host) -> None:
        elsewhere = host.folder / "elsewhere"
        elsewhere.mkdir()
        file = host.file("old")
        await host.acquire(JOB, (file, "r"))
        with opened_by_guest(file):
            assert verdict(await host.release(JOB)) is AccessVerdict.KEPT
        host.restart()
        with opened_by(USER, successor(file, elsewhere / "new")):
            await host.ledger.converge_all(trigger="timer")
            (entry,) = await host.store.access_files()
            assert entry.verdict != AccessVerdict.KEPT or "open in" not in str(entry.reason)

    given_user(scenario)


def test_who_has_a_later_file_open_is_told_from_who_has_this_one(tmp_path: Path) -> None:
    file = tmp_path / "old"
    file.write_bytes(b"data")
    when, number = _birth(file), identity(file)
    if when is None:
        pytest.skip("this file system does not say when a file was made")
    with opened_by(USER, file) as pid:
        assert [one.pid for one in holders.find_open([number], made={number: when})[number]] == [pid]
    with opened_by(USER, successor(file, tmp_path / "new")) as pid:
        assert holders.find_open([number], made={number: when}) == {number: []}
        assert [one.pid for one in holders.find_open([number])[number]] == [pid]


def test_a_birth_that_is_not_known_proves_nothing(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        assert not is_later(file.fileno(), None)
        assert not is_later(file.fileno(), born(file.fileno()))
        assert is_later(file.fileno(), 1) is (born(file.fileno()) is not None)
