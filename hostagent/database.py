"""The store's SQLite file (WAL): its connection, its lock and its transactions. It knows no table.

One connection in one thread of its own; each `run` is one transaction, durable when it returns (synchronous=FULL);
those that come at the same time share a commit. A folder belongs to one agent: a second one is refused at open.
MIGRATIONS takes an older file forward.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hostagent.schema import MIGRATIONS
from hostagent.turns import Outcome, Turns
from jobs.errors import JobError

T = TypeVar("T")
Connection = sqlite3.Connection
Work = Callable[[Connection], Any]


class Database:
    """`busy_timeout` is store.busy_timeout, in seconds."""

    def __init__(self, folder: Path, *, busy_timeout: float) -> None:
        self._folder = folder
        self._busy_timeout = busy_timeout
        self._turns = Turns("store", self._together)
        self._db: Connection
        self._lock_fd: int

    async def open(self, ready: Callable[[Connection], None]) -> None:
        """Take the folder, bring the schema up to date, and let `ready` look at it.

        JobError busy when another agent has the folder, unavailable when the file cannot be opened.
        """
        self._lock_fd = _lock(self._folder)
        try:
            self._db = await self._turns.first(lambda: self._connect(ready))
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

    def _connect(self, ready: Callable[[Connection], None]) -> Connection:
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
        ready(db)
        return db

    async def run(self, work: Callable[[Connection], T]) -> T:
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

    def _transaction(self, work: Callable[[Connection], T]) -> T:
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


def _apart(db: Connection, work: Work) -> Outcome:
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
