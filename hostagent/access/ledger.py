"""The ledger says who needs which file; the converger makes the files match it.

Access is a function of the rows and nothing else. `converge` may run at any time and any number of times: after a
job's end, at start, by timer. It gives a file the most that any row asks, and takes back what we gave when no row asks
for anything; so a lost event, a crash between any two steps or a restart still ends in revocation, and nothing is taken
that a row still holds. What we do to a file is written down before it is done (`before`, the ACL to go back to), and
what is said of it is proven afterwards, as the hypervisor user: `revoked` means that this user could not open the file.

A row with a label asks for nothing: libvirt makes the file the domain's own. When no row is left, what libvirt leaves
so is given back as owner.py says.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from events.model import Event, GrantEvent, GrantEventKind
from hostagent.access import holders, owner
from hostagent.access.files import Files
from hostagent.access.grants import Grants, cleared
from hostagent.access.identity import Identity
from hostagent.access.ownership import Ownership
from hostagent.access.subject import Mode, Probe, Subject
from hostagent.access.threads import Threads
from hostagent.locks import Locks
from hostagent.records import AccessFile, AccessRow, Label, Taken, Use
from jobs.errors import JobError
from jobs.model import FileId, Holder, Need
from jobs.ports import AccessResult, AccessVerdict, Clock

log = logging.getLogger(__name__)

AT_ONCE = 4
"""Files that one call settles side by side: each takes some looks at its storage, in a thread."""

PASSING = 0.05
"""Seconds after which a file that is open is looked at again: who only looked at it, as file(1) does, has closed it."""


class LedgerStore(Protocol):
    async def add_needs(self, holder: Holder, needs: Sequence[Need]) -> None: ...

    async def replace_needs(self, holder: Holder, uses: Sequence[Use], *, name: str) -> list[FileId]: ...

    async def share_needs(self, holder: Holder, uses: Sequence[Use]) -> None: ...

    async def lose_needs(
        self, image: Holder, uses: Sequence[Use], *, name: str, file: FileId | None = None
    ) -> None: ...

    async def forget_needs(self, holder: Holder, files: Sequence[FileId]) -> None: ...

    async def release(self, holder: Holder, events: Sequence[Event] = ()) -> list[FileId]: ...

    async def access_rows(self, files: Sequence[FileId] | None = None) -> list[AccessRow]: ...

    async def access_files(self, files: Sequence[FileId] | None = None) -> list[AccessFile]: ...

    async def delete_rows(self, ids: Sequence[str]) -> None: ...

    async def put_access_file(self, entry: AccessFile, events: Sequence[Event] = ()) -> None: ...

    async def forget_access_file(self, file: FileId) -> None: ...


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
        self._settings = settings
        self._clock = clock
        self._daemons = daemons
        self._observe = observe
        self._locks = Locks()
        self._files = Files()
        self._threads = Threads(settings.converge_timeout)
        self._identity = Identity(store, self._files, self._threads)
        self._grants = Grants(self._files, subject, probe, manage_shared=settings.manage_shared)
        self._ownership = Ownership(
            self._files, uid=subject.uid, unknown=settings.unknown_owner, manage_shared=settings.manage_shared
        )
        self._domains_known = False
        self._named: Mapping[FileId, str] = {}

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
        taken = await self.converge(left, trigger=trigger)  # first: somebody waits for that
        return taken | await self.converge([use.need.layer.file for use in uses], trigger=trigger)

    async def share(self, holder: Holder, uses: Sequence[Use], *, trigger: str) -> None:
        """The holder needs these, too, beside what it has."""
        await self._store.share_needs(holder, uses)
        await self.converge([use.need.layer.file for use in uses], trigger=trigger)

    async def lose(
        self, image: Holder, uses: Sequence[Use], *, name: str, trigger: str, file: FileId | None = None
    ) -> None:
        """The disk `name` stands on these no more, and its image, that `file`, may: it needs them until the contrary is
        proven."""
        await self._store.lose_needs(image, uses, name=name, file=file)
        await self.converge([use.need.layer.file for use in uses], trigger=trigger)

    async def forget(self, holder: Holder, files: Sequence[FileId], *, trigger: str) -> None:
        """The holder does not need these files any more."""
        await self._store.forget_needs(holder, files)
        await self.converge(files, trigger=trigger)

    async def delete(self, rows: Sequence[AccessRow], *, trigger: str) -> dict[FileId, AccessResult]:
        """These very rows are not needed any more, where they are still there."""
        await self._store.delete_rows([row.id for row in rows])
        return await self.converge([row.file for row in rows], trigger=trigger)

    def know_domains(self, known: bool, named: Mapping[FileId, str] | None = None) -> None:
        """Whether the rows of all domains, running and defined, are in the ledger. Until they are, no file that libvirt
        owns is given back: somebody could need it. `named` are those that have no row, and whose disk may need them."""
        self._domains_known = known
        self._named = named or {}

    async def undo(self, file: FileId) -> AccessResult:
        """Give a file back to the user from whom we took it, unless somebody changed its owner since.

        JobError not_found where no owner was changed, busy where somebody needs the file by now, conflict or
        image_changed where it is not as we left it; then nothing is changed.
        """
        async with self._locks.alone(file):
            known = await self._known(file)
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
            await self._threads.run(file, functools.partial(self._ownership.check_undo, known, taken))
            # Without labels it is not taken again; `owner` is who gets it after the next domain.
            known = replace(known, verdict=AccessVerdict.PENDING, labels=(), owner=taken.now)
            await self._store.put_access_file(known)
            await self._threads.run(file, functools.partial(self._ownership.change, known, taken.now, taken.was))
            found = await self._threads.run(file, lambda: self._take_back(replace(known, taken=None), "operator", None))
            return await self._record(known, found, "operator")

    async def _acquire(self, file: FileId) -> None:
        async with self._locks.alone(file):
            await self._settle(file, "grant", strict=True)

    async def converge(
        self, files: Sequence[FileId], *, trigger: str, at: Mapping[FileId, str] | None = None
    ) -> dict[FileId, AccessResult]:
        """Make these files match the ledger. A file that cannot be settled now is `pending`, and never an exception.

        `at` is where the caller found them: of a file that no row names, nothing else tells it from a deleted one whose
        inode number it has.
        """
        width = asyncio.Semaphore(AT_ONCE)

        async def settled(file: FileId) -> AccessResult:
            async with width, self._locks.alone(file):
                try:
                    return await self._settle(file, trigger, at=(at or {}).get(file))
                except JobError:  # the store's
                    raise
                except Exception as error:
                    log.exception("a fault of the agent")
                    return AccessResult("", AccessVerdict.PENDING, f"a fault of the agent: {error!r}")

        done = await asyncio.gather(*map(settled, files), return_exceptions=True)
        results = {}
        for file, result in zip(files, done, strict=True):
            if isinstance(result, BaseException):
                raise result
            results[file] = result
        return results

    async def converge_all(self, *, trigger: str) -> dict[FileId, AccessResult]:
        """Every file that a row names, or that we gave access to and have not proven gone."""
        rows = await self._store.access_rows()
        entries = await self._store.access_files()
        files = {row.file for row in rows} | {e.file for e in entries if e.verdict != AccessVerdict.REVOKED}
        return await self.converge(sorted(files), trigger=trigger)

    def close(self) -> None:
        self._files.close()

    async def run(self, interval: float) -> None:
        """Converge by timer, for what no event tells: a process that closed a file, somebody's chmod."""
        while True:
            await asyncio.sleep(interval)
            try:
                await self.converge_all(trigger="timer")
            except JobError as error:
                log.warning("the ledger cannot be read", extra={"fields": {"error": error.message}})

    async def rows(self, file: FileId) -> list[AccessRow]:
        """The file's rows, oldest first; none that tells of a deleted one which had its inode number."""
        async with self._locks.alone(file):
            return await self._identity.rows(file)

    async def keepers(self, file: FileId, leaving: Collection[Holder], path: str) -> list[str]:
        """Who would keep the file when `leaving` need it no more: other rows, and foreign processes."""
        rows = [row for row in await self.rows(file) if row.holder not in leaving]
        entry = await self._known(file)
        if entry is None or await self._identity.is_reused(entry, [path]):
            entry = self._blank(file, path)
        async with self._locks.alone(file):  # no look while the file is settled: each could be in the other's way
            processes = await self._open_in(entry)
        mine = set(self._daemons())
        keepers = [row.title for row in rows] + [str(p) for p in processes if p.pid not in mine]
        if entry.labels and file in self._named:
            keepers.append(self._named[file])
        if (place := await self._protector(entry)) is not None:
            keepers.append(f"protected:{place}")
        return keepers

    # The converger

    async def _settle(self, file: FileId, trigger: str, *, strict: bool = False, at: str | None = None) -> AccessResult:
        """One file. `strict` raises what stands in the way of a grant. A network image is its server's to give and to
        take: there is nothing to do here, and nothing to say of it."""
        if file.network:
            return AccessResult("", AccessVerdict.UNCHANGED, "a network image: access is its server's to give and take")
        rows: list[AccessRow] = []
        known = gone = None
        try:
            rows = await self._identity.rows(file)
            known = await self._known(file)
            entry, gone = await self._judged(known, rows, at, trigger) if known else (None, None)
        except JobError as error:
            if strict:
                raise
            if known is None or rows or known.verdict == AccessVerdict.REVOKED:
                return AccessResult("", AccessVerdict.PENDING, error.message)
            return await self._record(known, self._pending(known, error), trigger)
        if gone is not None and not rows and at is None:
            return gone
        if not rows and (entry is None or entry.verdict == AccessVerdict.REVOKED):
            return await self._nothing_to_do(entry)
        was = entry or self._blank(file, rows[-1].path)
        try:
            finding = await self._grant(was, rows) if rows else await self._revoke(was, trigger)
        except JobError as error:
            if strict:
                raise
            # What was written down before it was to be done must not be forgotten: it may have been done.
            latest = await self._known(file) or was
            finding = self._pending(latest, error)
        return await self._record(was, finding, trigger)

    def _pending(self, was: AccessFile, error: JobError) -> _Finding:
        log.warning("access is pending", extra={"fields": {"path": was.path, "error": error.message}})
        return _Finding(replace(was, verdict=AccessVerdict.PENDING, reason=error.message, holders=()), None)

    async def _judged(
        self, known: AccessFile, rows: Sequence[AccessRow], at: str | None, trigger: str
    ) -> tuple[AccessFile | None, AccessResult | None]:
        """The entry, if it is the file's that has the number now, and else what there is to tell of the deleted one."""
        paths = [*(row.path for row in rows), *([at] if at else [])]
        reused = await self._identity.is_reused(known, paths)
        if reused:
            return None, await self._forget(known, trigger)
        if reused is None and await self._identity.seems_another(known, paths, needed=bool(rows)):
            return None, None
        return known, None

    async def _known(self, file: FileId) -> AccessFile | None:
        """What was done to the file that has this number, or to a deleted one that had it."""
        return next(iter(await self._store.access_files([file])), None)

    async def _forget(self, entry: AccessFile, trigger: str) -> AccessResult | None:
        """The entry's file was deleted: told, unless its end was told before, and remembered no longer."""
        told = None
        if entry.verdict != AccessVerdict.REVOKED:
            told = await self._record(entry, self._gone(entry), trigger)
        await self._store.forget_access_file(entry.file)
        return told

    async def _nothing_to_do(self, known: AccessFile | None) -> AccessResult:
        """What was proven once may have changed: somebody else gave access."""
        if self._subject.own:
            return AccessResult(known.path if known else "", AccessVerdict.KEPT, self._own_reason)
        if known is None:
            return AccessResult("", AccessVerdict.UNCHANGED)
        try:
            reason = await self._threads.run(known.file, lambda: self._open_again(known))
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
            with self._files.opened(known) as fd:
                return self._grants.still_open(fd)
        finally:
            self._files.forget(known.file)

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
            given = await self._threads.run(was.file, functools.partial(self._ownership.note, given, labels))
        given = replace(given, access="acl" if asking or given.mode else "owner")
        if not asking:
            if given.mode:  # by an ACL, to somebody who needs it no more; libvirt sees to the others
                with contextlib.suppress(FileNotFoundError, JobError):  # where it cannot be now, at the next look
                    given = await self._threads.run(was.file, functools.partial(self._withdraw, given))
            return _Finding(given, None)
        if was.mode == "":
            plan = await self._threads.run(was.file, functools.partial(self._grants.plan, given, need))
            if plan.mode == "":
                return _Finding(plan, GrantEventKind.GRANTED)
            # Written down before it is done: a crash after this line still knows what to go back to.
            await self._store.put_access_file(plan)
            given = replace(plan, verdict=AccessVerdict.GRANTED)
        applied = await self._threads.run(was.file, functools.partial(self._grants.apply, given, need))
        return _Finding(applied, GrantEventKind.GRANTED)

    def _withdraw(self, given: AccessFile) -> AccessFile:
        """Undo what we gave, of a file that is still needed."""
        with self._files.opened(given) as fd:
            self._grants.undo(fd, given)
        self._files.forget(given.file)
        return replace(cleared(given), access="owner")

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
        if was.labels and (disk := self._named.get(was.file)) is not None:
            reason = "the image of a domain's disk names it as what it stands on"
            return _Finding(replace(kept, reason=reason, holders=(disk,)), GrantEventKind.KEPT)
        obstacle = None
        try:
            if (kept_open := await self._kept_open(was)) is not None:
                return kept_open
            if was.labels:
                was, obstacle = await self._give_back(was)
                if was.taken is not None and (kept_open := await self._kept_open(was)) is not None:
                    return kept_open
        except FileNotFoundError:
            return self._not_found(was, trigger)
        return await self._threads.run(was.file, lambda: self._take_back(was, trigger, obstacle))

    async def _kept_open(self, was: AccessFile) -> _Finding | None:
        """The verdict on a file that is open. Who opened it while its owner was changed, or began to need it, keeps it
        whole."""
        processes = await self._open_in(was)
        begun = was.taken is not None and bool(was.labels)  # not proven yet
        if processes and not begun and was.verdict != AccessVerdict.KEPT:  # what was just taken goes back at once
            await asyncio.sleep(PASSING)
            processes = await self._open_in(was)
        rows = await self._store.access_rows([was.file]) if begun else []
        if not processes and not rows:
            return None
        if was.taken is not None and begun:
            undo = functools.partial(self._ownership.change, was, was.taken.now, was.taken.was)
            await self._threads.run(was.file, undo)
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
            with self._files.opened(was) as fd:
                if was.mode:
                    self._grants.undo(fd, was)
                gone = bool(was.labels) and os.fstat(fd).st_nlink == 0
                reason = None if gone else obstacle or self._grants.still_open(fd)
        except FileNotFoundError:
            return self._not_found(was, trigger)
        self._files.forget(was.file)
        entry = replace(cleared(was), verdict=AccessVerdict.REVOKED, reason=None, holders=())
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
        """Deleted or moved while the agent was away: that cannot be told, unless the operator says that it is gone; or
        when nothing of libvirt's can have gone with it, as with the disk of a guest that was shut down."""
        what = f"an ACL entry for {self._subject.name}" if was.mode else f"{self._subject.name}'s ownership"
        reason = f"it is not in its folder; if it was moved, {what} went with it"
        told = was.verdict == AccessVerdict.KEPT and was.reason != reason  # that it stays open, before it went
        if trigger == "operator" or not (was.mode or (was.labels and not (told or was.rests))):
            return self._gone(was)
        return _Finding(replace(was, verdict=AccessVerdict.KEPT, reason=reason, holders=()), GrantEventKind.KEPT)

    def _gone(self, was: AccessFile) -> _Finding:
        """What was given, or libvirt's, went with the file."""
        gone = replace(cleared(was), verdict=AccessVerdict.REVOKED, labels=(), taken=None, holders=())
        return _Finding(replace(gone, reason="the file is gone"), GrantEventKind.REVOKED)

    async def _protector(self, entry: AccessFile) -> str | None:
        """Which setting of access.protected keeps the file."""
        if not self._settings.protected:
            return None
        return await self._threads.run(entry.file, lambda: self._ownership.protector(entry, self._settings.protected))

    async def _give_back(self, was: AccessFile) -> tuple[AccessFile, str | None]:
        """Make the file its owner's again: the entry, and what stood in the way. FileNotFoundError as `_opened`."""
        plan = await self._threads.run(was.file, functools.partial(self._ownership.plan, was))
        if not isinstance(plan, Taken):
            return was, plan
        reason = f"it is being given back to {owner.named(plan.now)}"
        was = replace(was, taken=plan, verdict=AccessVerdict.PENDING, reason=reason, holders=())
        await self._store.put_access_file(was)  # before it is done, as for ACLs
        if rows := await self._store.access_rows([was.file]):
            raise JobError("busy", f"{was.path!r} is needed again, by {rows[0].title}")
        await self._threads.run(was.file, functools.partial(self._ownership.change, was, plan.was, plan.now))
        return was, None

    async def _open_in(self, entry: AccessFile) -> list[holders.Process]:
        """The user's processes that have the file open; anybody's, where its owner is to be changed: others may have
        opened it by its group. Hundreds of our own storage daemons, with a dozen descriptors each, would take seconds
        to look at: those that cannot have it are left out."""
        if await self._threads.run(entry.file, functools.partial(self._files.is_alone, entry)):
            return []
        file, uids = entry.file, None if entry.labels else [self._subject.uid]
        others = {pid for pid, inodes in self._daemons().items() if file.ino not in inodes}
        skip = {os.getpid(), *others}
        made = {} if entry.born is None else {file: entry.born}
        search = functools.partial(holders.find_open, [file], uids=uids, skip_pids=skip, made=made)
        return (await self._threads.run(file, search))[file]
