"""SQLite (WAL): jobs, the access ledger, exports, storage daemons, the event log.

Every public coroutine is one transaction, durable when it returns. Events are rows of the same transaction as the
change that they tell of, and are published after it. Rows hold whole records as JSON beside the few columns that
queries need.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from events import cloudevents
from events.model import Event, Record, now
from hostagent import forgetting, ledger_rows, records, selection
from hostagent.database import Connection, Database
from hostagent.ledger_rows import file_of, image_of, key, label_of
from hostagent.records import AccessFile, AccessRow, DaemonRecord, ExportRecord, Use, encode
from jobs.model import FileId, Holder, Job, Need
from jobs.ports import AccessChange

T = TypeVar("T")


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
        self._db = Database(folder, busy_timeout=busy_timeout)
        self._host = host
        self._publish = publish
        self._last_seq = 0
        self._first_seq = 1

    async def open(self) -> None:
        """Take the folder, bring the schema up to date. Raises JobError busy when another agent has it."""
        await self._db.open(self._count_events)

    async def close(self) -> None:
        await self._db.close()

    def _count_events(self, db: Connection) -> None:
        first = db.execute("SELECT min(seq) FROM events").fetchone()[0]
        last = db.execute("SELECT seq FROM sqlite_sequence WHERE name='events'").fetchone()
        self._last_seq = last[0] if last else 0
        self._first_seq = first or self._last_seq + 1

    # Events

    def _log(self, db: Connection, events: Sequence[Event]) -> list[Record]:
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

    async def _change(self, work: Callable[[Connection], T], events: Sequence[Event] = ()) -> T:
        async def change() -> T:
            result, logged = await self._db.run(lambda db: (work(db), self._log(db, events)))
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

        def work(db: Connection) -> list[Any] | None:
            if seq + 1 < self._first_seq or seq > self._last_seq:  # here, where no pruning comes in between
                return None
            return db.execute("SELECT body FROM events WHERE seq>? ORDER BY seq LIMIT ?", (seq, limit)).fetchall()

        rows = await self._db.run(work)
        if rows is None:
            return None
        return [cloudevents.from_json(json.loads(body)) for (body,) in rows]

    # Jobs

    async def save(self, job: Job, events: Sequence[Event] = ()) -> None:
        await self._change(lambda db: _put_job(db, job), events)

    async def save_all(self, jobs: Sequence[Job]) -> None:
        def work(db: Connection) -> None:
            for job in jobs:
                _put_job(db, job)

        await self._change(work)

    async def finish(self, job: Job, events: Sequence[Event], change: AccessChange) -> list[FileId]:
        def work(db: Connection) -> list[FileId]:
            _put_job(db, job)
            as_before = {holder: ledger_rows.manner(db, holder) for holder, _ in change.gains}
            released = [file for holder in change.release for file in ledger_rows.release(db, holder)]
            for holder in change.sharers:
                ledger_rows.forget(db, holder, change.forget)
            ledger_rows.delete(db, change.rows)
            for holder, need in change.gains:
                label, name = as_before[holder]
                image = job.before.top.file if holder.kind == "image" else None
                ledger_rows.add(db, holder, [Use(need, label)], keep=True, name=name, image=image)
            return released

        return await self._change(work, events)

    async def get(self, job_id: str) -> Job | None:
        rows = await self._db.run(lambda db: db.execute("SELECT body FROM jobs WHERE id=?", (job_id,)).fetchall())
        return records.job(json.loads(rows[0][0])) if rows else None

    async def delete(self, job_id: str) -> None:
        await self._db.run(lambda db: db.execute("DELETE FROM jobs WHERE id=?", (job_id,)))

    async def unsettled(self) -> list[Job]:
        query = "SELECT body FROM jobs WHERE finished IS NULL OR revocation='pending' ORDER BY created, id"
        rows = await self._db.run(lambda db: db.execute(query).fetchall())
        return [records.job(json.loads(body)) for (body,) in rows]

    async def jobs(
        self, *, state: str | None = None, path: str | None = None, origin: str | None = None,
        group: str | None = None, after: str | None = None, limit: int = 100, labels: Mapping[str, str] | None = None,
    ) -> list[Job]:  # fmt: skip
        """Newest first; `after` is the id of the last one of the page before."""
        given = labels or {}

        def work(db: Connection) -> list[Any]:
            counted = db.execute("SELECT jobs FROM job_counts WHERE state=?", (state,)).fetchone()
            found = selection.jobs(state, path, origin, group, given, after, in_state=counted[0] if counted else 0)
            return db.execute(found.sql, (*found.values, limit)).fetchall()

        return [records.job(json.loads(body)) for (body,) in await self._db.run(work)]

    async def counts(self) -> dict[str, int]:
        """How many jobs there are, by state."""
        rows = await self._db.run(lambda db: db.execute("SELECT state, jobs FROM job_counts WHERE jobs > 0").fetchall())
        return dict(rows)

    async def prune(self, at: datetime, *, days: float, count: int, exports: int, events: int, most: int) -> bool:
        """Forget what retention does not keep at the time `at`, oldest first, up to `most` of each kind.

        True when there may be more. Kept is what has not ended, a job whose revocation is pending, and every verdict
        while there is such a job; `events` is how many of them stay. The file does not shrink: a VACUUM would need the
        room of a second one, and hold up all jobs while it runs. Free pages are used again, so retention bounds it.
        """
        horizon = (at - timedelta(days=days)).isoformat()

        def work(db: Connection) -> bool:
            gone = [
                *forgetting.jobs(db, horizon, count, most),
                forgetting.exports(db, exports, most),
                forgetting.verdicts(db, horizon, most),
                self._prune_events(db, events, most),
            ]
            return max(gone) >= most

        return await self._db.run(work)

    def _prune_events(self, db: Connection, kept: int, most: int) -> int:
        first = min(self._first_seq + most, max(self._first_seq, self._last_seq - kept + 1))
        gone = db.execute("DELETE FROM events WHERE seq < ?", (first,)).rowcount
        self._first_seq = first
        return gone

    # The access ledger

    async def add_needs(self, holder: Holder, needs: Sequence[Need]) -> None:
        """The holder needs these files from now on; a second time changes the mode and the reason only."""
        await self._db.run(lambda db: ledger_rows.add(db, holder, [Use(need, None) for need in needs], keep=False))

    async def replace_needs(self, holder: Holder, uses: Sequence[Use], *, name: str) -> list[FileId]:
        """The holder, called `name`, needs these files and no others any more: those that it needed until now."""

        def work(db: Connection) -> list[FileId]:
            needed = {use.need.layer.file for use in uses}
            left = [file for file in ledger_rows.files_of(db, holder) if file not in needed]
            ledger_rows.forget(db, holder, left)
            ledger_rows.add(db, holder, uses, keep=False, name=name)
            return left

        return await self._db.run(work)

    async def share_needs(self, holder: Holder, uses: Sequence[Use]) -> None:
        """The holder needs these files, too, beside what it has."""
        await self._db.run(lambda db: ledger_rows.add(db, holder, uses, keep=True))

    async def lose_needs(self, image: Holder, uses: Sequence[Use], *, name: str, file: FileId | None = None) -> None:
        """What the disk `name` stands on no more, its image needs until it is proven that it does not; `file` is which
        file that is."""
        await self._db.run(lambda db: ledger_rows.lose(db, image, uses, name, file))

    async def forget_needs(self, holder: Holder, files: Sequence[FileId]) -> None:
        """The holder does not need these files any more."""
        await self._db.run(lambda db: ledger_rows.forget(db, holder, files))

    async def release(self, holder: Holder, events: Sequence[Event] = ()) -> list[FileId]:
        return await self._change(lambda db: ledger_rows.release(db, holder), events)

    async def delete_rows(self, ids: Sequence[str]) -> None:
        """These very rows, where they are still there."""
        await self._db.run(lambda db: ledger_rows.delete(db, ids))

    async def explain_rows(self, ids: Sequence[str], reason: str) -> None:
        """Why these rows are there, for people."""

        def work(db: Connection) -> None:
            for row_id in ids:
                db.execute("UPDATE access_rows SET reason=? WHERE id=?", (reason, row_id))

        await self._db.run(work)

    async def access_rows(self, files: Sequence[FileId] | None = None) -> list[AccessRow]:
        def work(db: Connection) -> list[Any]:
            columns = "id, dev, ino, path, holder_kind, holder_id, mode, since, reason, label, name, format, image"
            select = f"SELECT {columns} FROM access_rows"  # noqa: S608
            if files is None:
                return db.execute(f"{select} ORDER BY path, since").fetchall()
            found: list[Any] = []
            for file in files:
                found += db.execute(f"{select} WHERE dev=? AND ino=? ORDER BY since", key(file)).fetchall()
            return found

        when, rows = datetime.fromisoformat, await self._db.run(work)
        return [
            AccessRow(
                *(i, file_of(dev, ino), path, Holder(kind, id_), mode, when(since), reason),
                *(label_of(label), name, format_, image_of(image)),
            )
            for i, dev, ino, path, kind, id_, mode, since, reason, label, name, format_, image in rows
        ]

    async def access_files(self, files: Sequence[FileId] | None = None) -> list[AccessFile]:
        def work(db: Connection) -> list[Any]:
            if files is None:
                return db.execute("SELECT body FROM access_files").fetchall()
            found: list[Any] = []
            for file in files:
                query = "SELECT body FROM access_files WHERE dev=? AND ino=?"
                found += db.execute(query, key(file)).fetchall()
            return found

        return [records.access_file(json.loads(body)) for (body,) in await self._db.run(work)]

    async def owed_files(self) -> list[AccessFile]:
        """Those that are still to be taken back: also the one whose last row has gone this moment."""
        query = f"SELECT body FROM access_files WHERE {ledger_rows.OWED}"  # noqa: S608
        found = await self._db.run(lambda db: db.execute(query).fetchall())
        return [records.access_file(json.loads(body)) for (body,) in found]

    async def access_gauges(self) -> tuple[int, datetime | None, dict[str, int]]:
        """How many revocations are owed, since when the oldest is pending, and how many rows there are of each mode."""

        def work(db: Connection) -> tuple[int, str | None, dict[str, int]]:
            since = "min(json_extract(body, '$.since')) FILTER (WHERE verdict = 'pending')"
            query = f"SELECT count(*), {since} FROM access_files WHERE {ledger_rows.OWED}"  # noqa: S608
            pending, oldest = db.execute(query).fetchone()
            modes = dict(db.execute("SELECT mode, count(*) FROM access_rows GROUP BY mode").fetchall())
            return pending, oldest, modes

        pending, oldest, modes = await self._db.run(work)
        return pending, datetime.fromisoformat(oldest) if oldest else None, modes

    async def put_access_file(self, entry: AccessFile, events: Sequence[Event] = ()) -> None:
        body = json.dumps(encode(entry))

        def work(db: Connection) -> None:
            query = "INSERT OR REPLACE INTO access_files (dev, ino, verdict, body) VALUES (?,?,?,?)"
            db.execute(query, (*key(entry.file), entry.verdict, body))

        await self._change(work, events)

    async def forget_access_file(self, file: FileId) -> None:
        await self._db.run(lambda db: db.execute("DELETE FROM access_files WHERE dev=? AND ino=?", key(file)))

    async def rekey(self, moves: Mapping[FileId, FileId]) -> None:
        """File systems got other device numbers at boot: the same files, under new identities, perhaps swapped."""

        def work(db: Connection) -> None:
            for old in moves:  # out of the way first, to numbers that no device has
                aside = (-1 - old.dev, key(old)[1])
                for table in ("access_rows", "access_files"):
                    db.execute(f"UPDATE {table} SET dev=?, ino=? WHERE dev=? AND ino=?", (*aside, *key(old)))  # noqa: S608
            for old, new in moves.items():
                aside = (-1 - old.dev, key(old)[1])
                query = "UPDATE OR REPLACE access_rows SET dev=?, ino=? WHERE dev=? AND ino=?"
                db.execute(query, (*key(new), *aside))
                found = db.execute("SELECT body FROM access_files WHERE dev=? AND ino=?", aside).fetchone()
                if found:
                    body = json.dumps({**json.loads(found[0]), "file": list(new)})
                    query = "UPDATE OR REPLACE access_files SET dev=?, ino=?, body=? WHERE dev=? AND ino=?"
                    db.execute(query, (*key(new), body, *aside))

        await self._db.run(work)

    # Exports and storage daemons

    async def put_export(
        self, export: ExportRecord, events: Sequence[Event] = (), *, end: Holder | None = None
    ) -> None:
        """Store an export; with `end`, in the same transaction its rows of the ledger go."""

        def work(db: Connection) -> None:
            stopped = export.stopped.isoformat() if export.stopped else None
            db.execute(
                "INSERT OR REPLACE INTO exports (id, state, created, stopped, body) VALUES (?,?,?,?,?)",
                (export.id, export.state, export.created.isoformat(), stopped, json.dumps(encode(export))),
            )
            if end is not None:
                ledger_rows.release(db, end)

        await self._change(work, events)

    async def forget_export(self, export: ExportRecord) -> None:
        """An export that could not be started: neither it nor its rows were ever there."""

        def work(db: Connection) -> None:
            db.execute("DELETE FROM exports WHERE id=?", (export.id,))
            ledger_rows.release(db, export.holder)

        await self._db.run(work)

    async def exports(
        self, *, active: bool | None = None, state: str | None = None, image: str | None = None,
        labels: Mapping[str, str] | None = None, after: str | None = None, limit: int = -1,
    ) -> list[ExportRecord]:  # fmt: skip
        """Newest first, all of them unless `limit` says how many. `image` is the path, resolved or as it was named."""
        found = selection.exports(active, state, image, labels or {}, after)
        rows = await self._db.run(lambda db: db.execute(found.sql, (*found.values, limit)).fetchall())
        return [records.export(json.loads(body)) for (body,) in rows]

    async def export(self, export_id: str) -> ExportRecord | None:
        rows = await self._db.run(lambda db: db.execute("SELECT body FROM exports WHERE id=?", (export_id,)).fetchall())
        return records.export(json.loads(rows[0][0])) if rows else None

    async def put_daemon(self, daemon: DaemonRecord) -> None:
        body = json.dumps(encode(daemon))
        query = "INSERT OR REPLACE INTO daemons (id, body) VALUES (?,?)"
        await self._db.run(lambda db: db.execute(query, (daemon.id, body)))

    async def delete_daemon(self, daemon_id: str) -> None:
        await self._db.run(lambda db: db.execute("DELETE FROM daemons WHERE id=?", (daemon_id,)))

    async def daemons(self) -> list[DaemonRecord]:
        rows = await self._db.run(lambda db: db.execute("SELECT body FROM daemons").fetchall())
        return [records.daemon(json.loads(body)) for (body,) in rows]

    # Facts: single values

    async def fact(self, name: str) -> str | None:
        rows = await self._db.run(lambda db: db.execute("SELECT value FROM facts WHERE name=?", (name,)).fetchall())
        return rows[0][0] if rows else None

    async def set_fact(self, name: str, value: str) -> None:
        await self._db.run(lambda db: db.execute("INSERT OR REPLACE INTO facts VALUES (?,?)", (name, value)))


def _put_job(db: Connection, job: Job) -> None:
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
