"""The rows of the access ledger: the SQL, within a transaction of the store's."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from events.model import now
from hostagent.database import Connection
from hostagent.records import Label, Use
from jobs.model import FileId, Holder


def key(file: FileId) -> tuple[int, int]:
    """Inode numbers are unsigned 64 bit, SQLite's integers signed."""
    return file.dev, file.ino - (1 << 64) if file.ino >= 1 << 63 else file.ino


def file_of(dev: int, ino: int) -> FileId:
    return FileId(dev, ino + (1 << 64) if ino < 0 else ino)


def add(db: Connection, holder: Holder, uses: Sequence[Use], *, keep: bool, name: str = "") -> None:
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
                *key(need.layer.file),
                need.layer.path,
                *holder,
                need.mode,
                now().isoformat(),
                need.reason,
                None if label is None else str(label),
                name,
            ),
        )


def manner(db: Connection, holder: Holder) -> tuple[Label | None, str]:
    """How the holder opens its files, and what it is called: a new file of its chain is no different."""
    query = "SELECT label, name FROM access_rows WHERE holder_kind=? AND holder_id=? ORDER BY label IS NULL LIMIT 1"
    found = db.execute(query, holder).fetchone()
    return (label_of(found[0]), found[1]) if found else (None, "")


def label_of(text: str | None) -> Label | None:
    return None if text is None else Label(*(int(number) for number in text.split(":")))


def release(db: Connection, holder: Holder) -> list[FileId]:
    files = files_of(db, holder)
    db.execute("DELETE FROM access_rows WHERE holder_kind=? AND holder_id=?", holder)
    return files


def files_of(db: Connection, holder: Holder) -> list[FileId]:
    rows = db.execute("SELECT dev, ino FROM access_rows WHERE holder_kind=? AND holder_id=?", holder).fetchall()
    return [file_of(dev, ino) for dev, ino in rows]
