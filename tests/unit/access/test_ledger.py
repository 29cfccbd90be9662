"""The ledger on real files, tried as a real other user; no part is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from events.model import Event, GrantEvent, Record
from hostagent.access import acl
from hostagent.access.acl import FileSystem
from hostagent.access.ledger import Ledger, Settings
from hostagent.access.prober import Prober
from hostagent.access.subject import OwnProbe, Subject
from hostagent.records import AccessFile, Label, Use
from hostagent.store import Store
from jobs.errors import JobError
from jobs.model import FileId, Holder, Layer, Need
from jobs.ports import AccessResult, AccessVerdict, SystemClock

USER = 64042
"""A numeric user that nobody has."""
JOB, EXPORT = Holder("job", "j"), Holder("export", "e")


class Crash(BaseException):
    """The agent is killed here."""


class CrashingStore(Store):
    """Dies at the n-th change of an access file, before or after it is durable."""

    left: int | None = None
    after = False

    async def put_access_file(self, entry: AccessFile, events: Sequence[Event] = ()) -> None:
        if self.left is not None:
            self.left -= 1
        if self.left == 0 and not self.after:
            raise Crash
        await super().put_access_file(entry, events)
        if self.left == 0:
            raise Crash


@dataclass
class Host:
    """A store, a user, and the ledger of the present agent."""

    folder: Path
    store: CrashingStore
    probe: Prober | OwnProbe
    heard: list[Record]
    own: bool = False
    manage_shared: bool = False
    protected: tuple[str, ...] = ()
    unknown_owner: Label | None = None
    daemons: dict[int, frozenset[int]] = field(default_factory=dict)
    observed: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = self._ledger()

    def _ledger(self) -> Ledger:
        return Ledger(
            self.store,
            Subject("us" if self.own else "guest", os.geteuid() if self.own else USER, (USER,), own=self.own),
            self.probe,
            settings=Settings(5.0, self.manage_shared, self.protected, self.unknown_owner),
            clock=SystemClock(),
            daemons=lambda: self.daemons,
            observe=lambda trigger, result: self.observed.append((trigger, result)),
        )

    def restart(self) -> None:
        """Another agent on the same store."""
        self.ledger.close()
        self.store.left = None
        self.ledger = self._ledger()

    def file(self, name: str, mode: int = 0o600) -> Path:
        path = self.folder / name
        path.write_bytes(b"data")
        path.chmod(mode)
        return path

    def can(self, path: Path, mode: str = "r") -> bool:
        fd = os.open(path, os.O_PATH)
        try:
            return self.probe.can_open(fd, mode)  # type: ignore[arg-type]
        finally:
            os.close(fd)

    async def acquire(self, holder: Holder, *needs: tuple[Path, str]) -> None:
        await self.ledger.acquire(holder, [need(path, mode) for path, mode in needs])

    async def release(self, holder: Holder, trigger: str = "pull") -> dict[FileId, AccessResult]:
        return await self.ledger.converge(await self.store.release(holder), trigger=trigger)

    def grants(self) -> list[tuple[str, str, str]]:
        events = [record.event for record in self.heard]
        return [(e.kind.value, Path(e.path).name, e.mode) for e in events if isinstance(e, GrantEvent)]


def identity(path: Path) -> FileId:
    found = path.stat()
    return FileId(found.st_dev, found.st_ino)


def need(path: Path, mode: str) -> Need:
    return Need(Layer(str(path), "raw", identity(path), 4, 4), mode, "a test needs it")


def look(path: Path) -> tuple[int, bytes | None]:
    """Mode and ACL, to the byte."""
    xattr = None
    with contextlib.suppress(OSError):
        xattr = os.getxattr(path, "system.posix_acl_access")
    return path.stat().st_mode, xattr


@pytest.fixture(scope="module")
def guest() -> Iterator[Prober]:
    with Prober(USER, USER, (USER,), timeout=10) as prober:
        yield prober


def play(
    folder: Path, probe: Prober | OwnProbe, scenario: Callable[[Host], Coroutine[Any, Any, None]], **kind: Any
) -> None:
    async def go() -> None:
        state = folder / "state"
        state.mkdir()
        heard: list[Record] = []
        store = CrashingStore(state, host="h", publish=heard.append)
        await store.open()
        host = Host(folder, store, probe, heard, **kind)
        try:
            await asyncio.wait_for(scenario(host), 30)
        finally:
            host.ledger.close()
            await store.close()

    asyncio.run(go())


Play = Callable[..., None]


@pytest.fixture
def given_user(tmp_path: Path, guest: Prober) -> Play:
    return lambda scenario, **kind: play(tmp_path, guest, scenario, **kind)


def verdict(results: dict[FileId, AccessResult]) -> AccessVerdict:
    (result,) = results.values()
    return result.verdict


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give another user access and to try it")
class TestAnotherUser:
    def test_a_file_is_given_raised_lowered_and_taken_back_to_the_byte(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("disk")
            before = look(file)
            await host.acquire(EXPORT, (file, "r"))
            assert (host.can(file), host.can(file, "rw")) == (True, False)
            await host.acquire(JOB, (file, "rw"))
            assert (host.can(file), host.can(file, "rw")) == (True, True)
            assert verdict(await host.release(JOB)) is AccessVerdict.GRANTED
            assert (host.can(file), host.can(file, "rw")) == (True, False)
            assert verdict(await host.release(EXPORT)) is AccessVerdict.REVOKED
            assert not host.can(file)
            assert look(file) == before
            modes = [("granted", "disk", "r"), ("granted", "disk", "rw"), ("granted", "disk", "r")]
            assert host.grants() == [*modes, ("revoked", "disk", "")]
            assert host.observed == [("pull", "revoked")]

        given_user(scenario)

    def test_an_acl_that_was_there_is_there_again(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("disk", 0o640)
            subprocess.run(["setfacl", "-m", "u:64043:rw,g:64044:r,m::r", str(file)], check=True)
            before = look(file)
            await host.acquire(JOB, (file, "r"))
            assert host.can(file)
            await host.release(JOB)
            assert look(file) == before

        given_user(scenario)

    def test_converging_again_changes_nothing_and_says_nothing(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("disk")
            await host.acquire(JOB, (file, "rw"))
            held, said = look(file), len(host.heard)
            for _ in range(3):
                await host.ledger.converge([identity(file)], trigger="timer")
                await host.ledger.converge_all(trigger="timer")
            assert (look(file), len(host.heard)) == (held, said)
            await host.release(JOB)
            said = len(host.heard)
            for _ in range(3):
                assert verdict(await host.ledger.converge([identity(file)], trigger="timer")) is AccessVerdict.REVOKED
                await host.ledger.converge_all(trigger="timer")
            assert len(host.heard) == said

        given_user(scenario)

    def test_revoked_is_said_only_of_what_is_closed_now(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("disk")
            await host.acquire(JOB, (file, "r"))
            assert verdict(await host.release(JOB)) is AccessVerdict.REVOKED
            file.chmod(0o644)  # or libvirt gave it to the user
            found = (await host.ledger.converge([identity(file)], trigger="pull"))[identity(file)]
            assert (found.verdict, found.reason) == (AccessVerdict.KEPT, "mode 0644 lets everybody read")
            file.rename(file.with_name("elsewhere"))
            Path(file).write_bytes(b"another file")
            moved = (await host.ledger.converge([identity(file.with_name("elsewhere"))], trigger="pull")).popitem()[1]
            assert moved.verdict is AccessVerdict.KEPT

        given_user(scenario)

    def test_what_was_told_of_a_file_that_is_gone_is_not_told_of_its_inode_number(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("disk")
            number = identity(file)
            await host.acquire(JOB, (file, "r"))
            file.unlink()
            await host.ledger.converge_all(trigger="timer")
            await host.release(JOB)
            await host.ledger.converge([number], trigger="operator")
            found = (await host.ledger.converge([number], trigger="pull"))[number]
            assert found.verdict is AccessVerdict.UNCHANGED

        given_user(scenario)

    def test_a_file_that_another_holder_needs_is_not_taken(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("base")
            await host.acquire(JOB, (file, "r"))
            await host.acquire(EXPORT, (file, "r"))
            assert await host.ledger.keepers(identity(file), [JOB], str(file)) == ["export:e"]
            (result,) = (await host.release(JOB)).values()
            assert (result.verdict, result.holders) == (AccessVerdict.GRANTED, ("export:e",))
            assert host.can(file)
            assert verdict(await host.release(EXPORT)) is AccessVerdict.REVOKED
            assert not host.can(file)

        given_user(scenario)

    def test_a_file_that_everybody_may_read_is_kept_and_says_why(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("base", 0o644)
            before = look(file)
            await host.acquire(JOB, (file, "r"))
            assert look(file) == before
            (result,) = (await host.release(JOB)).values()
            assert result.verdict is AccessVerdict.KEPT
            assert result.reason is not None
            assert "0644" in result.reason
            assert look(file) == before
            file.chmod(0o600)
            assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED

        given_user(scenario)

    def test_a_readable_file_that_must_be_written_is_given_and_taken_back_to_what_it_was(
        self, given_user: Play
    ) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("top", 0o644)
            before = look(file)
            await host.acquire(JOB, (file, "rw"))
            assert host.can(file, "rw")
            assert verdict(await host.release(JOB)) is AccessVerdict.KEPT
            assert (look(file), host.can(file, "rw")) == (before, False)

        given_user(scenario)

    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize("at", [1, 2])
    def test_a_crash_anywhere_in_a_grant_is_undone_or_completed(self, given_user: Play, at: int, after: bool) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("disk")
            before = look(file)
            host.store.left, host.store.after = at, after
            with pytest.raises(Crash):
                await host.acquire(JOB, (file, "rw"))
            host.restart()
            await host.ledger.converge_all(trigger="start")
            assert host.can(file, "rw")  # the row is there, and the file matches it
            await host.release(JOB)
            assert (host.can(file), look(file)) == (False, before)

        given_user(scenario)

    @pytest.mark.parametrize("after", [False, True])
    def test_a_crash_in_a_grant_whose_holder_is_gone_leaves_no_access(self, given_user: Play, after: bool) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("disk")
            before = look(file)
            host.store.left, host.store.after = 2, after
            with pytest.raises(Crash):
                await host.acquire(JOB, (file, "r"))
            assert host.can(file)
            host.restart()
            await host.store.release(JOB)
            await host.ledger.converge_all(trigger="start")
            assert (host.can(file), look(file)) == (False, before)

        given_user(scenario)

    @pytest.mark.parametrize("after", [False, True])
    def test_a_crash_in_a_revocation_is_made_good(self, given_user: Play, after: bool) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("disk")
            before = look(file)
            await host.acquire(JOB, (file, "r"))
            host.store.left, host.store.after = 1, after
            with pytest.raises(Crash):
                await host.release(JOB)
            host.restart()
            await host.ledger.converge_all(trigger="start")
            assert (host.can(file), look(file)) == (False, before)
            (entry,) = await host.store.access_files()
            assert (entry.verdict, entry.mode, entry.before) == ("revoked", "", None)
            assert host.grants().count(("revoked", "disk", "")) == 1

        given_user(scenario)

    def test_a_grant_that_fails_for_one_file_leaves_none(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            good, gone = host.file("good"), host.file("gone")
            before = look(good)
            wanted = [need(good, "rw"), need(gone, "r")]
            gone.unlink()
            with pytest.raises(JobError) as refused:
                await host.ledger.acquire(JOB, wanted)
            assert refused.value.code == "image_changed"
            assert (host.can(good), look(good)) == (False, before)
            assert await host.store.access_rows() == []

        given_user(scenario)

    def test_a_file_that_another_file_replaced_is_not_touched(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("base")
            was = identity(file)
            await host.acquire(JOB, (file, "r"))
            moved = file.rename(host.folder / "moved")
            other = host.file("base")
            before = look(other)
            await host.release(JOB)
            assert look(other) == before
            assert identity(moved) == was
            assert not host.can(moved)

        given_user(scenario)

    @pytest.mark.parametrize("restart", [False, True])
    def test_a_file_that_was_moved_in_its_folder_is_taken_back_there(self, given_user: Play, restart: bool) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("base")
            before = look(file)
            await host.acquire(JOB, (file, "r"))
            moved = file.rename(host.folder / "moved")
            if restart:
                host.restart()
            assert verdict(await host.release(JOB)) is AccessVerdict.REVOKED
            assert (host.can(moved), look(moved)) == (False, before)

        given_user(scenario)

    def test_a_file_that_got_its_name_late_is_still_known_after_a_restart(self, given_user: Play) -> None:
        """A copy's target: the agent is killed after it was renamed, while somebody needs it."""

        async def scenario(host: Host) -> None:
            file = host.file("part")
            before = look(file)
            await host.acquire(JOB, (file, "rw"))
            named = file.rename(host.folder / "named")
            host.restart()
            await host.acquire(EXPORT, (named, "r"))
            await host.ledger.converge_all(trigger="start")
            await host.release(JOB)
            await host.release(EXPORT)
            assert (host.can(named), look(named)) == (False, before)

        given_user(scenario)

    def test_a_file_that_was_deleted_is_revoked_and_its_inode_can_come_again(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("base")
            await host.acquire(JOB, (file, "r"))
            file.unlink()
            assert verdict(await host.release(JOB)) is AccessVerdict.REVOKED
            for n in range(20):
                again = host.file(f"new{n}")
                before = look(again)
                await host.acquire(JOB, (again, "r"))
                assert host.can(again)
                await host.release(JOB)
                assert (host.can(again), look(again)) == (False, before)
                again.unlink()

        given_user(scenario)

    def test_what_an_operator_gives_meanwhile_stays(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("base")
            await host.acquire(JOB, (file, "r"))
            subprocess.run(["setfacl", "-m", "u:64043:r", str(file)], check=True)
            assert verdict(await host.release(JOB)) is AccessVerdict.REVOKED
            listed = subprocess.run(["getfacl", "-n", str(file)], capture_output=True, text=True, check=True).stdout
            assert "user:64043:r--" in listed
            assert f"user:{USER}" not in listed

        given_user(scenario)

    def test_a_chmod_that_disables_a_grant_is_mended(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("base")
            await host.acquire(JOB, (file, "r"))
            file.chmod(0o600)
            assert not host.can(file)
            await host.ledger.converge_all(trigger="timer")
            assert host.can(file)
            await host.release(JOB)
            assert not host.can(file)

        given_user(scenario)

    def test_a_file_that_a_foreign_process_has_open_is_kept_until_it_is_closed(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("base")
            await host.acquire(JOB, (file, "r"))
            with opened_by_guest(file) as process:
                assert len(await host.ledger.keepers(identity(file), [JOB], str(file))) == 1
                (result,) = (await host.release(JOB)).values()
                assert result.verdict is AccessVerdict.KEPT
                assert str(process.pid) in result.holders[0]
                assert host.can(file)
            assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED
            assert not host.can(file)

        given_user(scenario)

    def test_a_file_that_our_storage_daemon_has_open_is_pending_until_it_is_closed(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("base")
            await host.acquire(JOB, (file, "r"))
            with opened_by_guest(file) as process:
                host.daemons[process.pid] = frozenset({1, identity(file).ino})
                assert verdict(await host.release(JOB)) is AccessVerdict.PENDING
                assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.PENDING
            assert verdict(await host.ledger.converge_all(trigger="timer")) is AccessVerdict.REVOKED
            assert not host.can(file)

        given_user(scenario)

    def test_only_the_storage_daemons_that_may_have_a_file_are_searched(self, given_user: Play) -> None:
        """A daemon can open what it was given and nothing else; hundreds of others would take seconds to look at."""

        async def scenario(host: Host) -> None:
            file, other = host.file("base"), host.file("other")
            await host.acquire(JOB, (file, "r"))
            with opened_by_guest(file) as guest, opened_by_guest(other) as daemon:
                host.daemons[daemon.pid] = frozenset({identity(other).ino})
                looked_at: list[int] = []
                listed = os.listdir

                def spying(folder: Any) -> list[str]:
                    if str(folder).endswith("/fd"):
                        looked_at.append(int(str(folder).split("/")[2]))
                    return listed(folder)

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("hostagent.access.holders.os.listdir", spying)
                    assert verdict(await host.release(JOB)) is AccessVerdict.KEPT
                assert guest.pid in looked_at
                assert daemon.pid not in looked_at

        given_user(scenario)

    def test_a_shared_file_system_is_refused_and_not_touched(
        self, given_user: Play, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kind of file system is the one thing that is made up: a real NFS server is not at hand."""
        monkeypatch.setattr(acl, "file_system", lambda fd: FileSystem("nfs4", shared=True))

        async def refused(host: Host) -> None:
            file = host.file("disk")
            before = look(file)
            with pytest.raises(JobError) as error:
                await host.acquire(JOB, (file, "r"))
            assert error.value.code == "access_refused"
            assert "nfs4" in error.value.message
            assert error.value.remedy
            assert look(file) == before
            assert await host.store.access_rows() == []
            readable = host.file("readable", 0o644)
            await host.acquire(JOB, (readable, "r"))

        given_user(refused)

    def test_a_shared_file_system_that_this_host_owns_is_managed(
        self, given_user: Play, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(acl, "file_system", lambda fd: FileSystem("nfs4", shared=True))

        async def managed(host: Host) -> None:
            file = host.file("disk")
            await host.acquire(JOB, (file, "r"))
            assert host.can(file)
            await host.release(JOB)
            assert not host.can(file)

        given_user(managed, manage_shared=True)

    def test_the_row_of_an_image_ends_with_the_image(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            overlay, base = host.file("top"), host.file("base")
            await host.acquire(Holder("image", str(overlay)), (base, "r"))
            await host.ledger.converge_all(trigger="timer")
            assert host.can(base)
            overlay.unlink()
            await host.ledger.converge_all(trigger="timer")
            assert not host.can(base)
            assert await host.store.access_rows() == []

        given_user(scenario)

    def test_what_a_disk_lost_is_kept_when_its_image_is_moved_until_the_disk_is_gone(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            overlay, base = host.file("top"), host.file("base")
            disk = Holder("domain", "uuid/vda")
            await host.ledger.hold(disk, [Use(need(overlay, "rw"), None)], name="web1/vda", trigger="domain")
            image = Holder("image", str(overlay))
            await host.ledger.lose(image, [Use(need(base, "r"), None)], name="web1/vda", trigger="domain")
            moved = overlay.rename(overlay.with_name("moved"))
            await host.ledger.converge_all(trigger="timer")
            assert host.can(base)
            await host.ledger.hold(disk, [Use(need(moved, "rw"), None)], name="web1/vda", trigger="domain")
            await host.ledger.converge_all(trigger="timer")
            assert host.can(base)
            await host.ledger.release(disk, trigger="domain")
            await host.ledger.converge_all(trigger="timer")
            assert not host.can(base)
            assert await host.store.access_rows() == []

        given_user(scenario)

    def test_an_image_that_a_disk_of_another_name_has_now_keeps_what_it_lost(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            overlay, base = host.file("top"), host.file("base")
            uses = [Use(need(base, "r"), None)]
            image = Holder("image", str(overlay))
            await host.ledger.lose(image, uses, name="web1/vda", trigger="domain", file=identity(overlay))
            moved = overlay.rename(overlay.with_name("moved"))
            disk = Holder("domain", "uuid/vda")
            await host.ledger.hold(disk, [Use(need(moved, "rw"), None)], name="web2/vda", trigger="domain")
            await host.ledger.converge_all(trigger="timer")
            assert host.can(base)
            assert [row.image for row in await host.store.access_rows([identity(base)])] == [identity(moved)]

        given_user(scenario)

    @pytest.mark.parametrize("mounted", [True, False])
    def test_an_image_that_was_deleted_with_its_folder_needs_nothing(self, given_user: Play, mounted: bool) -> None:
        """But one whose file system is away comes back."""

        async def scenario(host: Host) -> None:
            base = host.file("base")
            file = identity(base) if mounted else FileId(identity(base).dev + 1, 1)
            image = Holder("image", str(host.folder / "vm" / "disks" / "top"))
            uses = [Use(need(base, "r"), None)]
            await host.ledger.lose(image, uses, name="web1/vda", trigger="domain", file=file)
            assert len(await host.ledger.rows(identity(base))) == (not mounted)
            await host.ledger.converge_all(trigger="timer")
            assert host.can(base) == (not mounted)

        given_user(scenario)

    def test_many_at_once_on_one_file_end_as_the_rows_say(self, given_user: Play) -> None:
        async def scenario(host: Host) -> None:
            file = host.file("base")
            before = look(file)
            holders = [Holder("export", f"{n}") for n in range(8)]
            await asyncio.gather(*(host.acquire(holder, (file, "r")) for holder in holders))
            assert host.can(file)
            await asyncio.gather(*(host.release(holder) for holder in holders))
            assert (host.can(file), look(file)) == (False, before)

        given_user(scenario)


# A model: whatever is acquired, released, converged and crashed, a private file opens exactly to whom a row lets in

HOLDERS = [Holder("job", "a"), Holder("export", "b")]
acts = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "acquire", "release", "release", "converge", "restart", "chmod", "forget"]),
        st.sampled_from(HOLDERS),
        st.sampled_from(["one", "two"]),
        st.sampled_from(["r", "rw"]),
    ),
    max_size=8,
)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give another user access and to try it")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(acts)
def test_a_private_file_opens_to_the_user_exactly_while_a_row_needs_it(
    guest: Prober, steps: list[tuple[str, Holder, str, str]]
) -> None:
    async def scenario(host: Host) -> None:
        files = {name: host.file(name) for name in ("one", "two")}
        before = {name: look(path) for name, path in files.items()}
        rows: dict[tuple[Holder, str], str] = {}
        for what, holder, name, mode in steps:
            if what == "acquire":
                await host.acquire(holder, (files[name], mode))
                rows[holder, name] = mode
            elif what in ("release", "forget"):
                for key in [key for key in rows if key[0] == holder]:
                    del rows[key]
                if what == "release":
                    await host.release(holder)
                else:  # a crash between the transaction and the files
                    await host.store.release(holder)
                    host.restart()
            elif what == "restart":
                host.restart()
            elif what == "chmod":
                files[name].chmod(0o600)
            if what in ("converge", "restart", "chmod", "forget"):
                await host.ledger.converge_all(trigger="timer")
            for one, path in files.items():
                modes = {mode for (_, file), mode in rows.items() if file == one}
                assert host.can(path) == bool(modes)
                assert host.can(path, "rw") == ("rw" in modes)
        for holder in HOLDERS:
            await host.release(holder)
        if not any(what == "chmod" for what, *_ in steps):  # chmod changes an ACL's mask: then only access counts
            assert {name: look(path) for name, path in files.items()} == before
        assert not any(host.can(path) for path in files.values())

    with tempfile.TemporaryDirectory() as folder:
        play(Path(folder), guest, scenario)


# As a plain user


def test_an_agent_of_the_same_user_touches_no_mode_and_says_so(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("disk")
        before = look(file)
        await host.acquire(JOB, (file, "rw"))
        assert look(file) == before
        (result,) = (await host.release(JOB)).values()
        assert result.verdict is AccessVerdict.KEPT
        assert result.reason is not None
        assert "us" in result.reason
        assert look(file) == before
        assert await host.store.access_files() == []

    play(tmp_path, OwnProbe(), scenario, own=True)


def test_an_agent_of_the_same_user_keeps_its_files_while_another_needs_them(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("disk")
        await host.acquire(JOB, (file, "rw"))
        await host.acquire(EXPORT, (file, "r"))
        assert verdict(await host.release(JOB)) is AccessVerdict.GRANTED
        assert verdict(await host.release(EXPORT)) is AccessVerdict.KEPT

    play(tmp_path, OwnProbe(), scenario, own=True)


def test_a_file_that_nobody_ever_needed_is_left_alone(tmp_path: Path) -> None:
    async def scenario(host: Host) -> None:
        file = host.file("disk")
        await host.ledger.converge([identity(file)], trigger="pull")
        assert await host.store.access_files() == []
        assert host.heard == []

    play(tmp_path, OwnProbe(), scenario, own=True)


@contextlib.contextmanager
def opened_by_guest(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the user that has the file open."""
    with path.open("rb") as file:
        process = subprocess.Popen(["/bin/sleep", "60"], stdin=file, user=USER, group=USER, extra_groups=[], cwd="/")
    try:
        yield process
    finally:
        process.kill()
        process.wait(5)
