"""What retention does not keep is forgotten, oldest first: the SQL, within a transaction of the store's.

Each forgets up to `most` rows and says how many it did.
"""

from __future__ import annotations

from hostagent.database import Connection
from jobs.model import TERMINAL, Revocation


def jobs(db: Connection, horizon: str, count: int, most: int) -> tuple[int, int]:
    ended = f"finished IS NOT NULL AND revocation != '{Revocation.PENDING}'"
    delete = f"DELETE FROM jobs WHERE id IN (SELECT id FROM jobs WHERE {ended}"  # noqa: S608
    old = db.execute(f"{delete} AND finished < ? ORDER BY finished LIMIT ?)", (horizon, most)).rowcount
    states = ",".join(f"'{state}'" for state in sorted(TERMINAL))
    (present,) = db.execute(f"SELECT total(jobs) FROM job_counts WHERE state IN ({states})").fetchone()  # noqa: S608
    owed = f"SELECT count(*) FROM jobs WHERE finished IS NOT NULL AND revocation = '{Revocation.PENDING}'"  # noqa: S608
    excess = int(present) - db.execute(owed).fetchone()[0] - count
    over = db.execute(f"{delete} ORDER BY finished LIMIT ?)", (max(0, min(excess, most)),)).rowcount
    return old, over


def exports(db: Connection, kept: int, most: int) -> int:
    (present,) = db.execute("SELECT count(*) FROM exports WHERE stopped IS NOT NULL").fetchone()
    oldest = "SELECT id FROM exports WHERE stopped IS NOT NULL ORDER BY stopped LIMIT ?"
    number = max(0, min(present - kept, most))
    return db.execute(f"DELETE FROM exports WHERE id IN ({oldest})", (number,)).rowcount  # noqa: S608


def verdicts(db: Connection, horizon: str, most: int) -> int:
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
