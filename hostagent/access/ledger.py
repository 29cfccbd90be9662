"""The ledger says who needs which file; the converger makes the files match it.

Access is a function of the rows and nothing else. `converge` may run at any time and any number of times: after a
job's end, at start, by timer. It gives a file the most that any row asks, and takes back what we gave when no row is
left; so a lost event, a crash between any two steps or a restart still ends in revocation, and nothing is taken that a
row still holds. What we do to a file is written down before it is done (`before`, the ACL to go back to), and what is
said of it is proven afterwards, as the hypervisor user: `revoked` means that this user could not open the file.

A row with a label asks for nothing: libvirt makes the file the domain's own. When no row is left, what libvirt leaves
so is given back as owner.py says.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from events.model import Event, GrantEvent, GrantEventKind
from hostagent.access import acl, holders, owner
from hostagent.access.acl import Snapshot
from hostagent.locks import Locks
from hostagent.records import AccessFile, AccessRow, Label, Taken, Use
from jobs.errors import JobError
from jobs.model import FileId, Holder, Need
from jobs.ports import AccessResult, AccessVerdict, Clock

log = logging.getLogger(__name__)

Mode = Literal["r", "rw"]
T = TypeVar("T")

MOST_ENTRIES = 100_000
"""Entries of one folder that are looked through for a file that was renamed."""


class LedgerStore(Protocol):
    async def add_needs(self, holder: Holder, needs: Sequence[Need]) -> None: ...

    async def replace_needs(self, holder: Holder, uses: Sequence[Use], *, name: str) -> list[FileId]: ...

    async def release(self, holder: Holder, events: Sequence[Event] = ()) -> list[FileId]: ...

    async def access_rows(self, files: Sequence[FileId] | None = None) -> list[AccessRow]: ...

    async def access_files(self, files: Sequence[FileId] | None = None) -> list[AccessFile]: ...

    async def delete_row(self, row_id: str) -> None: ...

    async def put_access_file(self, entry: AccessFile, events: Sequence[Event] = ()) -> None: ...

    async def forget_access_file(self, file: FileId) -> None: ...


class Probe(Protocol):
    def can_open(self, fd: int, mode: Mode) -> bool: ...


@dataclass(frozen=True, slots=True)
class Subject:
    """The hypervisor user. `own` says that it is the agent's own user: then files are opened by right, not by grant."""

    name: str
    uid: int
    groups: tuple[int, ...]
    own: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """`protected` are files and folders that are never taken back; `unknown_owner` gets what libvirt leaves of files
    whose owner was never seen."""

    converge_timeout: float
    manage_shared: bool
    protected: tuple[str, ...] = ()
    unknown_owner: Label | None = None


@dataclass(frozen=True, slots=True)
class _Finding:
    """What the thread found and did: the entry to store, and what to tell."""

    entry: AccessFile
    kind: GrantEventKind | None


class Ledger:
    """`daemons` are our own storage daemons, by process id, with the inode numbers of all that each can ever open;
    `observe(trigger, result)` is told of revocations."""

    def __init__(
        self,
        store: LedgerStore,
        subject: Subject,
        probe: Probe,
        *,
        settings: Settings,
        clock: Clock,
        daemons: Callable[[], Mapping[int, Collection[int]]],
        observe: Callable[[str, str], None],
    ) -> None:
        self._store = store
        self._subject = subject
        self._probe = probe
        self._settings = settings
        self._clock = clock
        self._daemons = daemons
        self._observe = observe
        self._files = Locks()
        self._handles: dict[FileId, int] = {}
        self._late: set[FileId] = set()
        self._domains_known = False

    # What others call

    async def acquire(self, holder: Holder, needs: Sequence[Need]) -> None:
        """The holder's rows, and files that match them. A file that cannot be given leaves none of it behind."""
        await self._store.add_needs(holder, needs)
        files = [need.layer.file for need in needs]
        try:
            done = await asyncio.gather(*(self._acquire(file) for file in files), return_exceptions=True)
            for failure in done:
                if isinstance(failure, BaseException):
                    raise failure
        except JobError:
            await self._store.release(holder)
            await self.converge(files, trigger="grant")
            raise

    async def release(self, holder: Holder, *, trigger: str) -> None:
        """The holder needs nothing any more."""
        await self.converge(await self._store.release(holder), trigger=trigger)

    async def hold(self, holder: Holder, uses: Sequence[Use], *, name: str, trigger: str) -> dict[FileId, AccessResult]:
        """A domain's disk needs these files now, and no others: its chain, read anew. `name` is for people.

        With labels nothing is granted; said before libvirt changes their owner, it is seen here who has the files.
        What it needs no more is taken back, unless others need it.
        """
        left = await self._store.replace_needs(holder, uses, name=name)
        return await self.converge([*(use.need.layer.file for use in uses), *left], trigger=trigger)

    def know_domains(self, known: bool) -> None:
        """Whether the rows of all domains, running and defined, are in the ledger. Until they are, no file that libvirt
        owns is given back: somebody could need it."""
        self._domains_known = known

    async def undo(self, file: FileId) -> AccessResult:
        """Give a file back to the user from whom we took it, unless somebody changed its owner since.

        JobError not_found where no owner was changed, busy where somebody needs the file by now, conflict or
        image_changed where it is not as we left it; then nothing is changed.
        """
        async with self._files.alone(file):
            known = next(iter(await self._store.access_files([file])), None)
            if known is None or known.taken is None:
                raise JobError("not_found", "no owner was changed here", remedy="see `hostagent grant list`")
            rows = await self._store.access_rows([file])
            if rows:
                raise JobError(
                    "busy",
                    f"{known.path!r} is needed by {', '.join(row.title for row in rows)}",
                    remedy="end them first; or let it be, they have access",
                )
            taken = known.taken
            await self._thread(file, functools.partial(self._check_undo, known, taken))
            # Without labels it is not taken again; `owner` is who gets it after the next domain.
            known = replace(known, verdict=AccessVerdict.PENDING, labels=(), owner=taken.now)
            await self._store.put_access_file(known)
            await self._thread(file, functools.partial(self._change_owner, known, taken.now, taken.was))
            found = await self._thread(file, lambda: self._take_back(replace(known, taken=None), "operator", None))
            return await self._record(known, found, "operator")

    async def _acquire(self, file: FileId) -> None:
        async with self._files.alone(file):
            await self._settle(file, "grant", strict=True)

    async def converge(self, files: Sequence[FileId], *, trigger: str) -> dict[FileId, AccessResult]:
        """Make these files match the ledger. A file that cannot be settled now is `pending`, and never an exception."""
        results = {}
        for file in files:
            async with self._files.alone(file):
                results[file] = await self._settle(file, trigger)
        return results

    async def converge_all(self, *, trigger: str) -> dict[FileId, AccessResult]:
        """Every file that a row names, or that we gave access to and have not proven gone."""
        rows = await self._store.access_rows()
        entries = await self._store.access_files()
        files = {row.file for row in rows} | {e.file for e in entries if e.verdict != AccessVerdict.REVOKED}
        return await self.converge(sorted(files), trigger=trigger)

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    async def run(self, interval: float) -> None:
        """Converge by timer, for what no event tells: a process that closed a file, somebody's chmod."""
        while True:
            await asyncio.sleep(interval)
            try:
                await self.converge_all(trigger="timer")
            except JobError as error:
                log.warning("the ledger cannot be read", extra={"fields": {"error": error.message}})

    async def keepers(self, file: FileId, leaving: Collection[Holder], path: str) -> list[str]:
        """Who would keep the file when `leaving` need it no more: other rows, and foreign processes."""
        rows = [row for row in await self._store.access_rows([file]) if row.holder not in leaving]
        entry = next(iter(await self._store.access_files([file])), None) or self._blank(file, path)
        processes = await self._open_in(entry)
        mine = set(self._daemons())
        keepers = [row.title for row in rows] + [str(p) for p in processes if p.pid not in mine]
        if (place := await self._protector(entry)) is not None:
            keepers.append(f"protected:{place}")
        return keepers

    # The converger

    async def _settle(self, file: FileId, trigger: str, *, strict: bool = False) -> AccessResult:
        """One file. `strict` raises what stands in the way of a grant. A network image is its server's to give and to
        take: there is nothing to do here, and nothing to say of it."""
        if file.network:
            return AccessResult("", AccessVerdict.UNCHANGED, "a network image: access is its server's to give and take")
        try:
            rows = await self._rows(file)
            known = await self._entry(file, rows)
        except JobError as error:
            if strict:
                raise
            return AccessResult("", AccessVerdict.PENDING, error.message)
        if not rows and (known is None or known.verdict == AccessVerdict.REVOKED):
            return await self._nothing_to_do(known)
        was = known or self._blank(file, rows[-1].path)
        try:
            finding = await self._grant(was, rows) if rows else await self._revoke(was, trigger)
        except JobError as error:
            if strict:
                raise
            # What was written down before it was to be done must not be forgotten: it may have been done.
            latest = next(iter(await self._store.access_files([file])), was)
            finding = _Finding(replace(latest, verdict=AccessVerdict.PENDING, reason=error.message, holders=()), None)
            log.warning("access is pending", extra={"fields": {"path": was.path, "error": error.message}})
        return await self._record(was, finding, trigger)

    async def _rows(self, file: FileId) -> list[AccessRow]:
        """The file's rows, oldest first, without those of images that are gone, or stood on a file which is gone."""
        rows = await self._store.access_rows([file])
        images = [row for row in rows if row.holder.kind == "image"]
        alone = len(rows) == 1
        stale = await self._thread(file, lambda: [row for row in images if self._is_stale(row, alone=alone)])
        for row in stale:
            await self._store.delete_row(row.id)
        return [row for row in rows if row not in stale]

    async def _entry(self, file: FileId, rows: Sequence[AccessRow]) -> AccessFile | None:
        """What was done to the file; nothing, when that was a deleted file whose inode number is used again."""
        found = next(iter(await self._store.access_files([file])), None)
        if found is not None and rows and await self._thread(file, functools.partial(self._was_another, found)):
            return None
        return found

    def _was_another(self, entry: AccessFile) -> bool:
        if entry.file in self._handles or not _is_former(entry.path, entry.file):
            return False
        return not _still_has(entry)

    def _is_stale(self, row: AccessRow, *, alone: bool) -> bool:
        """Whether the image was deleted, or the row tells of a deleted file: inode numbers are used again. One that is
        only away comes back."""
        if _is_deleted(row.holder.id, row.file.dev):
            return True
        if (handle := self._handles.get(row.file)) is not None:
            return os.fstat(handle).st_nlink == 0
        return _is_former(row.path, row.file) and (os.path.lexists(row.path) or not alone)

    async def _nothing_to_do(self, known: AccessFile | None) -> AccessResult:
        """What was proven once may have changed: somebody else gave access, or another file has that inode number
        by now."""
        if self._subject.own:
            return AccessResult(known.path if known else "", AccessVerdict.KEPT, self._own_reason)
        if known is None:
            return AccessResult("", AccessVerdict.UNCHANGED)
        try:
            reason = await self._thread(known.file, lambda: self._open_again(known))
        except FileNotFoundError:  # what is asked about may be another file, somewhere else
            return AccessResult(known.path, AccessVerdict.UNCHANGED)
        except JobError as error:
            return AccessResult(known.path, AccessVerdict.PENDING, error.message)
        if reason is not None:
            return AccessResult(known.path, AccessVerdict.KEPT, reason)
        return AccessResult(known.path, AccessVerdict.REVOKED, known.reason)

    def _open_again(self, known: AccessFile) -> str | None:
        """Why the user can open a file by now that was revoked."""
        try:
            with self._opened(known) as fd:
                return self._still_open(fd)
        finally:
            self._forget_handle(known.file)

    @property
    def _own_reason(self) -> str:
        return f"the agent runs as {self._subject.name} itself: file modes were not touched"

    def _blank(self, file: FileId, path: str) -> AccessFile:
        access = "own" if self._subject.own else "acl"
        return AccessFile(file, path, access, "", "", self._clock.now(), self._subject.uid)

    async def _record(self, was: AccessFile, finding: _Finding, trigger: str) -> AccessResult:
        entry = finding.entry
        if entry != was:
            entry = replace(entry, since=self._clock.now())
            changed = (entry.verdict, entry.mode, entry.reason) != (was.verdict, was.mode, was.reason)
            event = self._event(entry, finding.kind, trigger) if finding.kind and changed else None
            await self._store.put_access_file(entry, [event] if event else [])
            if entry.access == "own" and entry.verdict == AccessVerdict.KEPT:
                await self._store.forget_access_file(entry.file)  # it was never closed, and needs no remembering
            if changed and entry.verdict in (AccessVerdict.REVOKED, AccessVerdict.KEPT, AccessVerdict.PENDING):
                self._observe(trigger, entry.verdict)
            if changed:
                fields = {"path": entry.path, "mode": entry.mode, "trigger": trigger, "reason": entry.reason}
                log.info("access %s", entry.verdict, extra={"fields": fields})
        return AccessResult(entry.path, AccessVerdict(entry.verdict), entry.reason, entry.holders)

    def _event(self, entry: AccessFile, kind: GrantEventKind, trigger: str) -> GrantEvent:
        return GrantEvent(kind, entry.path, entry.mode, trigger, entry.reason, entry.holders)

    # Giving

    async def _grant(self, was: AccessFile, rows: Sequence[AccessRow]) -> _Finding:
        try:
            return await self._give(was, rows)
        except FileNotFoundError:
            raise JobError(
                "image_changed",
                f"{was.path!r} is not the file any more that it was",
                field="path",
                value=was.path,
                remedy="see who moved or replaced it, then try again",
            ) from None

    async def _give(self, was: AccessFile, rows: Sequence[AccessRow]) -> _Finding:
        asking = [row for row in rows if row.label is None]
        labels = [row.label for row in rows if row.label is not None]
        need: Mode = "rw" if any(row.mode == "rw" for row in asking) else "r"
        held = tuple(row.title for row in rows)
        given = replace(was, path=rows[-1].path, verdict=AccessVerdict.GRANTED, holders=held, reason=None, taken=None)
        if self._subject.own:
            return _Finding(replace(given, mode=need), GrantEventKind.GRANTED)
        if labels:
            given = await self._thread(was.file, functools.partial(self._note_owner, given, labels))
        given = replace(given, access="acl" if asking or given.mode else "owner")
        if not asking:  # what we gave before stays while anybody needs the file
            return _Finding(given, None)
        if was.mode == "":
            plan = await self._thread(was.file, functools.partial(self._plan_grant, given, need))
            if plan.mode == "":
                return _Finding(plan, GrantEventKind.GRANTED)
            # Written down before it is done: a crash after this line still knows what to go back to.
            await self._store.put_access_file(plan)
            given = replace(plan, verdict=AccessVerdict.GRANTED)
        applied = await self._thread(was.file, functools.partial(self._apply_grant, given, need))
        return _Finding(applied, GrantEventKind.GRANTED)

    def _plan_grant(self, entry: AccessFile, need: Mode) -> AccessFile:
        """Whether we must give anything; if so, the entry with the ACL to go back to."""
        with self._opened(entry) as fd:
            if self._probe.can_open(fd, need):
                reason = acl.explain(acl.read(fd), self._subject.uid, self._subject.groups, need)
                return replace(entry, reason=reason)
            system = acl.file_system(fd)
            if system.shared and not self._settings.manage_shared:
                raise JobError(
                    "access_refused",
                    f"{entry.path!r} lies on a shared file system ({system.type}), where access is not changed",
                    field="path",
                    value=entry.path,
                    remedy=f"let {self._subject.name} read it, or set access.shared_filesystems if this host owns it",
                )
            if not acl.supports_acl(fd):
                raise JobError(
                    "access_refused",
                    f"the file system of {entry.path!r} ({system.type}) has no POSIX ACLs",
                    field="path",
                    value=entry.path,
                    remedy=f"let {self._subject.name} read the file, or move it to a file system with ACLs",
                )
            before = _encode(acl.read(fd))
            return replace(entry, mode=need, before=before, given=None, verdict=AccessVerdict.PENDING)

    def _apply_grant(self, entry: AccessFile, need: Mode) -> AccessFile:
        uid, groups = self._subject.uid, self._subject.groups
        assert entry.before is not None
        with self._opened(entry) as fd:
            before, given = _decode(entry.before), _decode(entry.given) if entry.given else None
            if entry.mode != need or given is None or not self._probe.can_open(fd, need):
                given = acl.apply_change(fd, uid, need, before=before, given=given, gids=groups)
            if not self._probe.can_open(fd, need):
                raise JobError(
                    "access_refused",
                    f"{self._subject.name} cannot open {entry.path!r} although its ACL says so",
                    field="path",
                    value=entry.path,
                    remedy="see whether AppArmor or SELinux forbids it (`hostagent doctor`)",
                )
            return replace(entry, mode=need, given=_encode(given))

    # Taking back

    async def _revoke(self, was: AccessFile, trigger: str) -> _Finding:
        kept = replace(was, verdict=AccessVerdict.KEPT, holders=())
        if self._subject.own:
            return _Finding(replace(kept, mode="", reason=self._own_reason), GrantEventKind.KEPT)
        if (place := await self._protector(was)) is not None:
            reason = f"it is protected ({place} in access.protected)"
            return _Finding(replace(kept, reason=reason, holders=(f"protected:{place}",)), GrantEventKind.KEPT)
        if was.labels and not self._domains_known:
            raise JobError(
                "unavailable", "which domains need it is not known yet", remedy="see whether libvirt answers"
            )
        if (kept_open := await self._kept_open(was)) is not None:
            return kept_open
        obstacle = None
        if was.labels:
            try:
                was, obstacle = await self._give_back(was)
            except FileNotFoundError:
                return self._not_found(was, trigger)
            if was.taken is not None and (kept_open := await self._kept_open(was)) is not None:
                return kept_open
        return await self._thread(was.file, lambda: self._take_back(was, trigger, obstacle))

    async def _kept_open(self, was: AccessFile) -> _Finding | None:
        """The verdict on a file that is open. Who opened it while its owner was changed, or began to need it, keeps it
        whole."""
        processes = await self._open_in(was)
        begun = was.taken is not None and bool(was.labels)  # not proven yet
        rows = await self._store.access_rows([was.file]) if begun else []
        if not processes and not rows:
            return None
        if was.taken is not None and begun:
            await self._thread(was.file, functools.partial(self._change_owner, was, was.taken.now, was.taken.was))
            was = replace(was, taken=None)
        if not processes:
            raise JobError("busy", f"{was.path!r} is needed again, by {rows[0].title}")
        ours = [process for process in processes if process.pid in self._daemons()]
        if ours:
            raise JobError("busy", f"{was.path!r} is still open in our storage daemon ({ours[0]})")
        foreign = tuple(str(process) for process in processes)
        reason = f"it is open in {', '.join(foreign)}"
        kept = replace(was, verdict=AccessVerdict.KEPT, reason=reason, holders=foreign)
        return _Finding(kept, GrantEventKind.KEPT)

    def _take_back(self, was: AccessFile, trigger: str, obstacle: str | None) -> _Finding:
        """Undo what we gave, and say whether the file is closed; `obstacle` is why libvirt's ownership stays."""
        try:
            with self._opened(was) as fd:
                if was.mode:
                    assert was.before is not None
                    given = _decode(was.given) if was.given else None
                    acl.apply_undo(fd, self._subject.uid, _decode(was.before), given)
                gone = bool(was.labels) and (os.fstat(fd).st_nlink == 0 or owner.is_later(fd, was.born))
                reason = None if gone else obstacle or self._still_open(fd)
        except FileNotFoundError:
            return self._not_found(was, trigger)
        self._forget_handle(was.file)
        entry = replace(_cleared(was), verdict=AccessVerdict.REVOKED, reason=None, holders=())
        if was.labels:
            entry = replace(entry, access="owner")
        if obstacle is None:  # what is not libvirt's any more is an ordinary file
            entry = replace(entry, labels=())
        if reason is not None:
            return _Finding(replace(entry, verdict=AccessVerdict.KEPT, reason=reason), GrantEventKind.KEPT)
        if was.taken is not None:
            entry = replace(entry, reason=f"given back to {owner.named(was.taken.now)}")
        return _Finding(entry, GrantEventKind.REVOKED)

    def _not_found(self, was: AccessFile, trigger: str) -> _Finding:
        """Deleted or moved while the agent was away: that cannot be told, unless the operator says that it is gone."""
        what = f"an ACL entry for {self._subject.name}" if was.mode else f"{self._subject.name}'s ownership"
        reason = f"it is not in its folder; if it was moved, {what} went with it"
        told = was.verdict == AccessVerdict.KEPT and was.reason != reason  # that it stays open, before it went
        if trigger == "operator" or not (was.mode or (was.labels and not told)):
            gone = replace(_cleared(was), verdict=AccessVerdict.REVOKED, labels=(), taken=None, holders=())
            entry = replace(gone, reason="the file is gone")
            return _Finding(entry, GrantEventKind.REVOKED)
        return _Finding(replace(was, verdict=AccessVerdict.KEPT, reason=reason, holders=()), GrantEventKind.KEPT)

    # Owners

    def _note_owner(self, entry: AccessFile, labels: Sequence[Label]) -> AccessFile:
        with self._grasped(entry) as handle:
            if owner.is_later(handle, entry.born):
                entry = replace(entry, labels=(), owner=None)
            return replace(owner.noted(entry, owner.of(handle), labels), born=owner.born(handle))

    async def _protector(self, entry: AccessFile) -> str | None:
        """Which setting of access.protected keeps the file."""
        if not self._settings.protected:
            return None
        return await self._thread(entry.file, functools.partial(self._find_protector, entry))

    def _find_protector(self, entry: AccessFile) -> str | None:
        protected = self._settings.protected
        try:
            with self._grasped(entry) as handle:
                return owner.protector(handle, entry.path, protected)
        except FileNotFoundError:
            return owner.protector(None, entry.path, protected)

    async def _give_back(self, was: AccessFile) -> tuple[AccessFile, str | None]:
        """Make the file its owner's again: the entry, and what stood in the way. FileNotFoundError as `_opened`."""
        plan = await self._thread(was.file, functools.partial(self._plan_owner, was))
        if not isinstance(plan, Taken):
            return was, plan
        reason = f"it is being given back to {owner.named(plan.now)}"
        was = replace(was, taken=plan, verdict=AccessVerdict.PENDING, reason=reason, holders=())
        await self._store.put_access_file(was)  # before it is done, as for ACLs
        if rows := await self._store.access_rows([was.file]):
            raise JobError("busy", f"{was.path!r} is needed again, by {rows[0].title}")
        await self._thread(was.file, functools.partial(self._change_owner, was, plan.was, plan.now))
        return was, None

    def _plan_owner(self, was: AccessFile) -> Taken | str | None:
        held = was.file in self._handles
        with self._opened(was) as fd:
            if not held and _is_former(was.path, was.file):  # an inode number alone is no proof: they are used again
                return f"a file with its inode number goes by another name now, {acl.name(fd)}: chown it yourself"
            if owner.is_later(fd, was.born):
                return None
            return owner.plan(
                fd,
                was,
                uid=self._subject.uid,
                unknown=self._settings.unknown_owner,
                manage_shared=self._settings.manage_shared,
            )

    def _change_owner(self, entry: AccessFile, was: Label, now: Label) -> None:
        with self._opened(entry) as fd:
            owner.change(fd, was, now)

    def _check_undo(self, entry: AccessFile, taken: Taken) -> None:
        former = _is_former(entry.path, entry.file)
        if not former:
            with self._grasped(entry) as handle:
                former = owner.is_later(handle, entry.born)
        if former:
            raise JobError(
                "image_changed",
                f"{entry.path!r} is not the file any more that it was",
                field="path",
                value=entry.path,
                remedy="see who moved or replaced it; chown it by hand",
            )
        with self._grasped(entry) as handle:
            if (here := owner.of(handle)) not in (taken.was, taken.now):
                raise owner.changed(entry.path, here)

    # Files

    @contextlib.contextmanager
    def _opened(self, entry: AccessFile) -> Iterator[int]:
        """The very file, wherever it was moved to, for reading. FileNotFoundError when it cannot be found.

        An O_PATH descriptor stands for each file from the first grant to the last revocation, so that neither a rename
        nor a swap leads to another one. After a restart it is looked for at its path, and in its folder by inode.
        """
        handle = self._handles.get(entry.file)
        if handle is None:
            handle = self._handles[entry.file] = _find(entry)
        fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _grasped(self, entry: AccessFile) -> Iterator[int]:
        """An O_PATH descriptor for the moment: a domain that is off must not hold a file system against an unmount."""
        if (handle := self._handles.get(entry.file)) is not None:
            yield handle
            return
        handle = _find(entry)
        try:
            yield handle
        finally:
            os.close(handle)

    def _forget_handle(self, file: FileId) -> None:
        if (handle := self._handles.pop(file, None)) is not None:
            os.close(handle)

    def _still_open(self, fd: int) -> str | None:
        """Why the user can still open the file, in either mode; None when it cannot."""
        for mode in ("r", "rw"):
            if self._probe.can_open(fd, mode):
                why = acl.explain(acl.read(fd), self._subject.uid, self._subject.groups, mode)
                return why or f"{self._subject.name} can still open it, and its mode does not say why"
        return None

    async def _open_in(self, entry: AccessFile) -> list[holders.Process]:
        """The user's processes that have the file open; anybody's, where its owner is to be changed: others may have
        opened it by its group. Hundreds of our own storage daemons, with a dozen descriptors each, would take seconds
        to look at: those that cannot have it are left out."""
        file, uids = entry.file, None if entry.labels else [self._subject.uid]
        others = {pid for pid, inodes in self._daemons().items() if file.ino not in inodes}
        skip = {os.getpid(), *others}
        search = functools.partial(holders.find_open, [file], uids=uids, skip_pids=skip)
        return (await self._thread(file, search))[file]

    async def _thread(self, file: FileId, work: Callable[[], T]) -> T:
        """Work on a file in a thread, within access.converge_timeout. While work that came late still hangs, no other
        is begun: it could undo, when it comes through, what was given in the meantime."""
        if file in self._late:
            raise JobError("timeout", "an earlier change of the file's access still hangs", remedy="see its storage")
        future = asyncio.get_running_loop().run_in_executor(None, work)
        try:
            return await asyncio.wait_for(asyncio.shield(future), self._settings.converge_timeout)
        except (TimeoutError, asyncio.CancelledError) as error:
            if not future.done():
                self._late.add(file)
                future.add_done_callback(lambda done: self._came_late(file, done))
            if isinstance(error, asyncio.CancelledError):
                raise
            raise JobError(
                "timeout",
                f"access could not be changed within {self._settings.converge_timeout:g} s (access.converge_timeout)",
                remedy="see whether the file's storage hangs",
            ) from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise JobError("io_error", f"access could not be changed: {error}", remedy="look at the storage") from error

    def _came_late(self, file: FileId, work: asyncio.Future[Any]) -> None:
        self._late.discard(file)
        if not work.cancelled() and (error := work.exception()) is not None:
            log.warning("a late change of access failed", extra={"fields": {"error": str(error)}})


def _is_former(path: str, file: FileId) -> bool:
    """Whether the path leads to nothing, or to another file."""
    try:
        found = os.lstat(path)
    except OSError:
        return True
    return FileId(found.st_dev, found.st_ino) != file


def _still_has(entry: AccessFile) -> bool:
    """Whether the file goes by another name in its folder and has, to the byte, what we gave it: a copy's target gets
    its name late. An inode number that is used again has not."""
    if entry.given is None:
        return False
    try:
        handle = _find(entry)
    except FileNotFoundError:
        return False
    try:
        fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(handle)
    try:
        return acl.read(fd) == _decode(entry.given)
    finally:
        os.close(fd)


def _is_deleted(overlay: str, dev: int) -> bool:
    """Whether there is no such file in a folder that is there: a file system that is away says nothing."""
    try:
        return Path(overlay).parent.stat().st_dev == dev and not os.path.lexists(overlay)
    except OSError:
        return False


def _cleared(entry: AccessFile) -> AccessFile:
    return replace(entry, mode="", before=None, given=None)


def _find(entry: AccessFile) -> int:
    """An O_PATH descriptor of the file: at its path, else by inode in its folder. FileNotFoundError when not there."""
    if (handle := _grasp(entry.path, entry.file)) is not None:
        return handle
    folder = Path(entry.path).parent
    if folder.stat().st_dev != entry.file.dev:
        raise JobError(
            "unavailable",
            f"the file system of {entry.path!r} is not mounted",
            remedy="mount it again; what was given there is taken back then",
        )
    with os.scandir(folder) as items:
        for item in itertools.islice(items, MOST_ENTRIES):
            if item.inode() == entry.file.ino and (handle := _grasp(item.path, entry.file)) is not None:
                return handle
    raise FileNotFoundError(entry.path)


def _grasp(path: str, file: FileId) -> int | None:
    try:
        handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    found = os.fstat(handle)
    if FileId(found.st_dev, found.st_ino) == file:
        return handle
    os.close(handle)
    return None


def _encode(snapshot: Snapshot) -> dict[str, Any]:
    xattr = None if snapshot.xattr is None else base64.b64encode(snapshot.xattr).decode()
    return {"mode": snapshot.mode, "uid": snapshot.uid, "gid": snapshot.gid, "xattr": xattr}


def _decode(data: Mapping[str, Any]) -> Snapshot:
    xattr = None if data["xattr"] is None else base64.b64decode(data["xattr"])
    return Snapshot(data["mode"], data["uid"], data["gid"], xattr)
