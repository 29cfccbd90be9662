"""SQLite (WAL): jobs, the access ledger, exports, storage daemons, the event log.

One connection in one thread of its own; every public coroutine is one transaction, durable when it returns
(synchronous=FULL); those that come at the same time share a commit. Events are rows of the same transaction as the
change that they tell of, and are published after it. A folder belongs to one agent: a second one is refused at open.
Rows hold whole records as JSON beside the few columns that queries need; MIGRATIONS takes an older file forward.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from events import cloudevents
from events.model import Event, Record, now
from hostagent import records, selection
from hostagent.records import AccessFile, AccessRow, DaemonRecord, ExportRecord, Label, Use, encode
from hostagent.schema import MIGRATIONS
from hostagent.turns import Outcome, Turns
from jobs.errors import JobError
from jobs.model import TERMINAL, FileId, Holder, Job, Need, Revocation
from jobs.ports import AccessChange

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], Any]


class Store:
    """See the module. `publish` is called on the event loop with each durable event, in order."""

    def __init__(
        self,
        folder: Path,
        *,
        host: str,
        publish: Callable[[Record], None],
        busy_timeout: float = 5.0,
    ) -> None:
        self._folder = folder
        self._host = host
        self._publish = publish
        self._busy_timeout = busy_timeout
        self._turns = Turns("store", self._together)
        self._db: sqlite3.Connection
        self._lock_fd: int
        self._last_seq = 0
        self._first_seq = 1

    async def open(self) -> None:
        """Take the folder, bring the schema up to date. Raises JobError busy when another agent has it."""
        self._lock_fd = _lock(self._folder)
        try:
            self._db = await self._turns.first(self._connect)
        except BaseException as error:
            os.close(self._lock_fd)
            if not isinstance(error, sqlite3.Error):
                raise
            raise JobError(
                "unavailable",
                f"the store in {str(self._folder)!r} cannot be opened: {error}",
                remedy="see that its file system has room; a damaged store can be moved away: images are safe",
            ) from error

    async def close(self) -> None:
        await self._turns.close(self._db.close)
        os.close(self._lock_fd)

    def _connect(self) -> sqlite3.Connection:
        path = self._folder / "hostagent.db"
        db = sqlite3.connect(path, timeout=self._busy_timeout, isolation_level=None)
        path.chmod(0o600)
        # EXCLUSIVE: no shared-memory file, which a full tmpfs could not back; we are the only reader anyway.
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
            db.execute(f"PRAGMA {pragma}")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise JobError(
                "conflict",
                f"{str(path)!r} was written by a newer hostagent (schema {version}, this one knows {len(MIGRATIONS)})",
                remedy="run that version, or another --state-dir",
            )
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            db.executescript(f"BEGIN; {script} PRAGMA user_version={number}; COMMIT;")
        first = db.execute("SELECT min(seq) FROM events").fetchone()[0]
        last = db.execute("SELECT seq FROM sqlite_sequence WHERE name='events'").fetchone()
        self._last_seq = last[0] if last else 0
        self._first_seq = first or self._last_seq + 1
        return db

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` in the store's thread, as one transaction; it may run twice, and must do nothing but to `db`."""
        done: T = await self._turns.take(work)
        return done

    def _together(self, works: Sequence[Work]) -> list[Outcome]:
        """One commit, and so one fsync, for all; each work fails alone. Where the transaction itself fails (no space,
        which a reader need not suffer from), each is tried again by itself."""
        if len(works) > 1:
            with contextlib.suppress(JobError, sqlite3.Error):
                return self._transaction(lambda db: [_apart(db, work) for work in works])
        return [self._alone(work) for work in works]

    def _alone(self, work: Work) -> Outcome:
        try:
            return self._transaction(work), None
        except Exception as error:  # noqa: BLE001 - it is the caller's, on the loop
            return None, error

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                result = work(db)
                db.execute("COMMIT")
                return result
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            raise JobError(
                "store_full",
                f"the store in {str(self._folder)!r} cannot be written: {error}",
                remedy="make space on its file system; running work goes on and is recorded then",
            ) from error

    # Events

    def _log(self, db: sqlite3.Connection, events: Sequence[Event]) -> list[Record]:
        logged = []
        for event in events:
            seq = db.execute("INSERT INTO events (body) VALUES ('')").lastrowid
            assert seq is not None
            record = Record(seq, now(), event)
            body = json.dumps(cloudevents.to_json(record, self._host))
            db.execute("UPDATE events SET body=? WHERE seq=?", (body, seq))
            logged.append(record)
        return logged

    def _published(self, logged: Iterable[Record]) -> None:
        for record in logged:
            self._last_seq = max(self._last_seq, record.seq)
            self._publish(record)

    async def _change(self, work: Callable[[sqlite3.Connection], T], events: Sequence[Event] = ()) -> T:
        async def change() -> T:
            result, logged = await self._run(lambda db: (work(db), self._log(db, events)))
            self._published(logged)
            return result

        # Shielded: a caller that is cancelled must not keep a stored event from its subscribers.
        return await asyncio.shield(asyncio.ensure_future(change()))

    async def record(self, events: Sequence[Event]) -> None:
        """Events that go with no other change."""
        await self._change(lambda db: None, events)

    def last_seq(self) -> int:
        return self._last_seq

    async def events_since(self, seq: int, limit: int) -> list[Record] | None:
        """Up to `limit` records after `seq`; None when some of them are no longer kept."""

        def work(db: sqlite3.Connection) -> list[Any] | None:
            if seq + 1 < self._first_seq or seq > self._last_seq:  # here, where no pruning comes in between
                return None
            return db.execute("SELECT body FROM events WHERE seq>? ORDER BY seq LIMIT ?", (seq, limit)).fetchall()

        rows = await self._run(work)
        if rows is None:
            return None
        return [cloudevents.from_json(json.loads(body)) for (body,) in rows]

    # Jobs

    async def save(self, job: Job, events: Sequence[Event] = ()) -> None:
        await self._change(lambda db: _put_job(db, job), events)

    async def save_all(self, jobs: Sequence[Job]) -> None:
        def work(db: sqlite3.Connection) -> None:
            for job in jobs:
                _put_job(db, job)

        await self._change(work)

    async def finish(self, job: Job, events: Sequence[Event], change: AccessChange) -> list[FileId]:
        def work(db: sqlite3.Connection) -> list[FileId]:
            _put_job(db, job)
            as_before = {holder: _manner(db, holder) for holder, _ in change.gains}
            released = [file for holder in change.release for file in _release(db, holder)]
            for file in change.forget:
                for holder in change.sharers:
                    db.execute(
                        "DELETE FROM access_rows WHERE dev=? AND ino=? AND holder_kind=? AND holder_id=?",
                        (*_key(file), *holder),
                    )
            for holder, need in change.gains:
                label, name = as_before[holder]
                _add(db, holder, [Use(need, label)], keep=True, name=name)
            return released

        return await self._change(work, events)

    async def get(self, job_id: str) -> Job | None:
        rows = await self._run(lambda db: db.execute("SELECT body FROM jobs WHERE id=?", (job_id,)).fetchall())
        return records.job(json.loads(rows[0][0])) if rows else None

    async def delete(self, job_id: str) -> None:
        await self._run(lambda db: db.execute("DELETE FROM jobs WHERE id=?", (job_id,)))

    async def unsettled(self) -> list[Job]:
        query = "SELECT body FROM jobs WHERE finished IS NULL OR revocation='pending' ORDER BY created, id"
        rows = await self._run(lambda db: db.execute(query).fetchall())
        return [records.job(json.loads(body)) for (body,) in rows]

    async def jobs(
        self, *, state: str | None = None, path: str | None = None, origin: str | None = None,
        group: str | None = None, after: str | None = None, limit: int = 100, labels: Mapping[str, str] | None = None,
    ) -> list[Job]:  # fmt: skip
        """Newest first; `after` is the id of the last one of the page before."""
        given = labels or {}

        def work(db: sqlite3.Connection) -> list[Any]:
            counted = db.execute("SELECT jobs FROM job_counts WHERE state=?", (state,)).fetchone()
            found = selection.jobs(state, path, origin, group, given, after, in_state=counted[0] if counted else 0)
            return db.execute(found.sql, (*found.values, limit)).fetchall()

        return [records.job(json.loads(body)) for (body,) in await self._run(work)]

    async def counts(self) -> dict[str, int]:
        """How many jobs there are, by state."""
        rows = await self._run(lambda db: db.execute("SELECT state, jobs FROM job_counts WHERE jobs > 0").fetchall())
        return dict(rows)

    async def prune(self, at: datetime, *, days: float, count: int, exports: int, events: int, most: int) -> bool:
        """Forget what retention does not keep at the time `at`, oldest first, up to `most` of each kind.

        True when there may be more. Kept is what has not ended, a job whose revocation is pending, and every verdict
        while there is such a job; `events` is how many of them stay. The file does not shrink: a VACUUM would need the
        room of a second one, and hold up all jobs while it runs. Free pages are used again, so retention bounds it.
        """
        horizon = (at - timedelta(days=days)).isoformat()

        def work(db: sqlite3.Connection) -> bool:
            gone = [
                *_prune_jobs(db, horizon, count, most),
                _prune_exports(db, exports, most),
                _prune_verdicts(db, horizon, most),
                self._prune_events(db, events, most),
            ]
            return max(gone) >= most

        return await self._run(work)

    def _prune_events(self, db: sqlite3.Connection, kept: int, most: int) -> int:
        first = min(self._first_seq + most, max(self._first_seq, self._last_seq - kept + 1))
        gone = db.execute("DELETE FROM events WHERE seq < ?", (first,)).rowcount
        self._first_seq = first
        return gone

    # The access ledger

    async def add_needs(self, holder: Holder, needs: Sequence[Need]) -> None:
        """The holder needs these files from now on; a second time changes the mode and the reason only."""
        await self._run(lambda db: _add(db, holder, [Use(need, None) for need in needs], keep=False))

    async def replace_needs(self, holder: Holder, uses: Sequence[Use], *, name: str) -> list[FileId]:
        """The holder, called `name`, needs these files and no others any more: those that it needed until now."""

        def work(db: sqlite3.Connection) -> list[FileId]:
            needed = {use.need.layer.file for use in uses}
            left = [file for file in _files_of(db, holder) if file not in needed]
            for file in left:
                query = "DELETE FROM access_rows WHERE dev=? AND ino=? AND holder_kind=? AND holder_id=?"
                db.execute(query, (*_key(file), *holder))
            _add(db, holder, uses, keep=False, name=name)
            return left

        return await self._run(work)

    async def release(self, holder: Holder, events: Sequence[Event] = ()) -> list[FileId]:
        return await self._change(lambda db: _release(db, holder), events)

    async def delete_row(self, row_id: str) -> None:
        await self._run(lambda db: db.execute("DELETE FROM access_rows WHERE id=?", (row_id,)))

    async def access_rows(self, files: Sequence[FileId] | None = None) -> list[AccessRow]:
        def work(db: sqlite3.Connection) -> list[Any]:
            columns = "id, dev, ino, path, holder_kind, holder_id, mode, since, reason, label, name"
            select = f"SELECT {columns} FROM access_rows"  # noqa: S608
            if files is None:
                return db.execute(f"{select} ORDER BY path, since").fetchall()
            found: list[Any] = []
            for file in files:
                found += db.execute(f"{select} WHERE dev=? AND ino=? ORDER BY since", _key(file)).fetchall()
            return found

        return [
            AccessRow(i, _file(dev, ino), path, Holder(kind, holder), mode, _when(since), reason, _label(label), name)
            for i, dev, ino, path, kind, holder, mode, since, reason, label, name in await self._run(work)
        ]

    async def access_files(self, files: Sequence[FileId] | None = None) -> list[AccessFile]:
        def work(db: sqlite3.Connection) -> list[Any]:
            if files is None:
                return db.execute("SELECT body FROM access_files").fetchall()
            found: list[Any] = []
            for file in files:
                query = "SELECT body FROM access_files WHERE dev=? AND ino=?"
                found += db.execute(query, _key(file)).fetchall()
            return found

        return [records.access_file(json.loads(body)) for (body,) in await self._run(work)]

    async def access_gauges(self) -> tuple[int, datetime | None, dict[str, int]]:
        """How many revocations are pending, since when the oldest, and how many rows there are of each mode."""

        def work(db: sqlite3.Connection) -> tuple[int, str | None, dict[str, int]]:
            query = "SELECT count(*), min(json_extract(body, '$.since')) FROM access_files WHERE verdict='pending'"
            pending, oldest = db.execute(query).fetchone()
            modes = dict(db.execute("SELECT mode, count(*) FROM access_rows GROUP BY mode").fetchall())
            return pending, oldest, modes

        pending, oldest, modes = await self._run(work)
        return pending, datetime.fromisoformat(oldest) if oldest else None, modes

    async def put_access_file(self, entry: AccessFile, events: Sequence[Event] = ()) -> None:
        body = json.dumps(encode(entry))

        def work(db: sqlite3.Connection) -> None:
            query = "INSERT OR REPLACE INTO access_files (dev, ino, verdict, body) VALUES (?,?,?,?)"
            db.execute(query, (*_key(entry.file), entry.verdict, body))

        await self._change(work, events)

    async def forget_access_file(self, file: FileId) -> None:
        await self._run(lambda db: db.execute("DELETE FROM access_files WHERE dev=? AND ino=?", _key(file)))

    async def rekey(self, moves: Mapping[FileId, FileId]) -> None:
        """File systems got other device numbers at boot: the same files, under new identities, perhaps swapped."""

        def work(db: sqlite3.Connection) -> None:
            for old in moves:  # out of the way first, to numbers that no device has
                aside = (-1 - old.dev, _key(old)[1])
                for table in ("access_rows", "access_files"):
                    db.execute(f"UPDATE {table} SET dev=?, ino=? WHERE dev=? AND ino=?", (*aside, *_key(old)))  # noqa: S608
            for old, new in moves.items():
                aside = (-1 - old.dev, _key(old)[1])
                query = "UPDATE OR REPLACE access_rows SET dev=?, ino=? WHERE dev=? AND ino=?"
                db.execute(query, (*_key(new), *aside))
                found = db.execute("SELECT body FROM access_files WHERE dev=? AND ino=?", aside).fetchone()
                if found:
                    body = json.dumps({**json.loads(found[0]), "file": list(new)})
                    query = "UPDATE OR REPLACE access_files SET dev=?, ino=?, body=? WHERE dev=? AND ino=?"
                    db.execute(query, (*_key(new), body, *aside))

        await self._run(work)

    # Exports and storage daemons

    async def put_export(
        self, export: ExportRecord, events: Sequence[Event] = (), *, end: Holder | None = None
    ) -> None:
        """Store an export; with `end`, in the same transaction its rows of the ledger go."""

        def work(db: sqlite3.Connection) -> None:
            stopped = export.stopped.isoformat() if export.stopped else None
            db.execute(
                "INSERT OR REPLACE INTO exports (id, state, created, stopped, body) VALUES (?,?,?,?,?)",
                (export.id, export.state, export.created.isoformat(), stopped, json.dumps(encode(export))),
            )
            if end is not None:
                _release(db, end)

        await self._change(work, events)

    async def forget_export(self, export: ExportRecord) -> None:
        """An export that could not be started: neither it nor its rows were ever there."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM exports WHERE id=?", (export.id,))
            _release(db, export.holder)

        await self._run(work)

    async def exports(
        self, *, active: bool | None = None, state: str | None = None, image: str | None = None,
        labels: Mapping[str, str] | None = None, after: str | None = None, limit: int = -1,
    ) -> list[ExportRecord]:  # fmt: skip
        """Newest first, all of them unless `limit` says how many. `image` is the path, resolved or as it was named."""
        found = selection.exports(active, state, image, labels or {}, after)
        rows = await self._run(lambda db: db.execute(found.sql, (*found.values, limit)).fetchall())
        return [records.export(json.loads(body)) for (body,) in rows]

    async def export(self, export_id: str) -> ExportRecord | None:
        rows = await self._run(lambda db: db.execute("SELECT body FROM exports WHERE id=?", (export_id,)).fetchall())
        return records.export(json.loads(rows[0][0])) if rows else None

    async def put_daemon(self, daemon: DaemonRecord) -> None:
        body = json.dumps(encode(daemon))
        query = "INSERT OR REPLACE INTO daemons (id, body) VALUES (?,?)"
        await self._run(lambda db: db.execute(query, (daemon.id, body)))

    async def delete_daemon(self, daemon_id: str) -> None:
        await self._run(lambda db: db.execute("DELETE FROM daemons WHERE id=?", (daemon_id,)))

    async def daemons(self) -> list[DaemonRecord]:
        rows = await self._run(lambda db: db.execute("SELECT body FROM daemons").fetchall())
        return [records.daemon(json.loads(body)) for (body,) in rows]

    # Facts: single values

    async def fact(self, name: str) -> str | None:
        rows = await self._run(lambda db: db.execute("SELECT value FROM facts WHERE name=?", (name,)).fetchall())
        return rows[0][0] if rows else None

    async def set_fact(self, name: str, value: str) -> None:
        await self._run(lambda db: db.execute("INSERT OR REPLACE INTO facts VALUES (?,?)", (name, value)))


def _apart(db: sqlite3.Connection, work: Work) -> Outcome:
    """`work` in a savepoint. What SQLite itself says is the whole transaction's."""
    db.execute("SAVEPOINT work")
    try:
        outcome: Outcome = work(db), None
    except sqlite3.Error:
        raise
    except Exception as error:  # noqa: BLE001 - it is the caller's, on the loop
        db.execute("ROLLBACK TO work")
        outcome = None, error
    db.execute("RELEASE work")
    return outcome


def _lock(folder: Path) -> int:
    """Take the folder for this agent. The lock goes with the process, however it ends."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise JobError(
            "busy",
            f"another agent uses the state folder {str(folder)!r}",
            remedy="stop it, or choose another --state-dir",
        ) from None
    return fd


def _key(file: FileId) -> tuple[int, int]:
    """Inode numbers are unsigned 64 bit, SQLite's integers signed."""
    return file.dev, file.ino - (1 << 64) if file.ino >= 1 << 63 else file.ino


def _file(dev: int, ino: int) -> FileId:
    return FileId(dev, ino + (1 << 64) if ino < 0 else ino)


def _prune_jobs(db: sqlite3.Connection, horizon: str, count: int, most: int) -> tuple[int, int]:
    ended = f"finished IS NOT NULL AND revocation != '{Revocation.PENDING}'"
    delete = f"DELETE FROM jobs WHERE id IN (SELECT id FROM jobs WHERE {ended}"  # noqa: S608
    old = db.execute(f"{delete} AND finished < ? ORDER BY finished LIMIT ?)", (horizon, most)).rowcount
    states = ",".join(f"'{state}'" for state in sorted(TERMINAL))
    (present,) = db.execute(f"SELECT total(jobs) FROM job_counts WHERE state IN ({states})").fetchone()  # noqa: S608
    owed = f"SELECT count(*) FROM jobs WHERE finished IS NOT NULL AND revocation = '{Revocation.PENDING}'"  # noqa: S608
    excess = int(present) - db.execute(owed).fetchone()[0] - count
    over = db.execute(f"{delete} ORDER BY finished LIMIT ?)", (max(0, min(excess, most)),)).rowcount
    return old, over


def _prune_exports(db: sqlite3.Connection, kept: int, most: int) -> int:
    (present,) = db.execute("SELECT count(*) FROM exports WHERE stopped IS NOT NULL").fetchone()
    oldest = "SELECT id FROM exports WHERE stopped IS NOT NULL ORDER BY stopped LIMIT ?"
    number = max(0, min(present - kept, most))
    return db.execute(f"DELETE FROM exports WHERE id IN ({oldest})", (number,)).rowcount  # noqa: S608


def _prune_verdicts(db: sqlite3.Connection, horizon: str, most: int) -> int:
    """What is closed, or was never ours to close, needs no memory once no job may still ask for the verdict. One whose
    owner we changed is remembered as long as jobs are, for an undo; one that libvirt still owns, until it does not."""
    owed = "SELECT 1 FROM jobs WHERE revocation = 'pending'"
    needed = "SELECT 1 FROM access_rows r WHERE r.dev = f.dev AND r.ino = f.ino"
    closed = "verdict = 'revoked' AND json_extract(body, '$.taken') IS NULL"
    foreign = "json_extract(body, '$.mode') = '' AND json_extract(body, '$.labels[0]') IS NULL"
    old = f"(verdict = 'revoked' OR (verdict = 'kept' AND {foreign})) AND json_extract(body, '$.since') < ?"
    settled = f"({closed} OR ({old})) AND NOT EXISTS ({owed}) AND NOT EXISTS ({needed})"
    found = f"SELECT rowid FROM access_files f WHERE {settled} LIMIT ?"  # noqa: S608
    return db.execute(f"DELETE FROM access_files WHERE rowid IN ({found})", (horizon, most)).rowcount  # noqa: S608


def _put_job(db: sqlite3.Connection, job: Job) -> None:
    finished = job.finished.isoformat() if job.finished else None
    db.execute(
        "INSERT INTO jobs (id, state, path, origin, created, finished, revocation, body) VALUES (?,?,?,?,?,?,?,?) "
        "ON CONFLICT (id) DO UPDATE SET state=excluded.state, finished=excluded.finished, "
        "revocation=excluded.revocation, body=excluded.body",
        (
            job.id,
            job.state,
            job.before.top.path,
            job.origin,
            job.created.isoformat(),
            finished,
            job.revocation,
            json.dumps(encode(job)),
        ),
    )


def _add(db: sqlite3.Connection, holder: Holder, uses: Sequence[Use], *, keep: bool, name: str = "") -> None:
    """Rows for the holder; `keep` leaves one that exists as it is."""
    columns = ("mode", "reason", "path", "label", "name")
    conflict = "NOTHING" if keep else "UPDATE SET " + ", ".join(f"{c}=excluded.{c}" for c in columns)
    for need, label in uses:
        db.execute(
            "INSERT INTO access_rows "  # noqa: S608
            "(id, dev, ino, path, holder_kind, holder_id, mode, since, reason, label, name) "
            f"VALUES (?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (dev, ino, holder_kind, holder_id) DO {conflict}",
            (
                str(uuid.uuid4()),
                *_key(need.layer.file),
                need.layer.path,
                *holder,
                need.mode,
                now().isoformat(),
                need.reason,
                None if label is None else str(label),
                name,
            ),
        )


def _manner(db: sqlite3.Connection, holder: Holder) -> tuple[Label | None, str]:
    """How the holder opens its files, and what it is called: a new file of its chain is no different."""
    query = "SELECT label, name FROM access_rows WHERE holder_kind=? AND holder_id=? ORDER BY label IS NULL LIMIT 1"
    found = db.execute(query, holder).fetchone()
    return (_label(found[0]), found[1]) if found else (None, "")


_when = datetime.fromisoformat


def _label(text: str | None) -> Label | None:
    return None if text is None else Label(*(int(number) for number in text.split(":")))


def _release(db: sqlite3.Connection, holder: Holder) -> list[FileId]:
    files = _files_of(db, holder)
    db.execute("DELETE FROM access_rows WHERE holder_kind=? AND holder_id=?", holder)
    return files


def _files_of(db: sqlite3.Connection, holder: Holder) -> list[FileId]:
    rows = db.execute("SELECT dev, ino FROM access_rows WHERE holder_kind=? AND holder_id=?", holder).fetchall()
    return [_file(dev, ino) for dev, ino in rows]
