"""The rows of the access ledger: the SQL, within a transaction of the store's.

Rows of an image (kind `image`) have several writers: jobs, when they end, and whoever reads the domains. So these only
ever add to them, or take back by file or by id what was proven, and never write the whole of it anew.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence

from events.model import now
from hostagent.database import Connection
from hostagent.records import Label, Use
from jobs.model import FileId, Holder

_INSERT = (
    "INSERT INTO access_rows (id, dev, ino, path, holder_kind, holder_id, mode, since, reason, label, name, format, "
    "image) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (dev, ino, holder_kind, holder_id) DO "
)
_AS_NEW = "UPDATE SET " + ", ".join(
    f"{column}=excluded.{column}" for column in ("mode", "reason", "path", "label", "name", "format")
)
_ANEW = (
    "UPDATE SET id=excluded.id, since=excluded.since, reason=excluded.reason, path=excluded.path, name=excluded.name, "
    "mode=max(mode, excluded.mode), format=CASE excluded.format WHEN '' THEN format ELSE excluded.format END, "
    "label=CASE WHEN label IS NULL OR excluded.label IS NULL THEN NULL ELSE label END, "
    "image=coalesce(excluded.image, image)"
)
"""Of two needs the greater: rw is more than r, and no label, which asks us for access, more than one."""

OWED = (
    "(verdict = 'pending' OR (verdict = 'granted' AND NOT EXISTS (SELECT 1 FROM access_rows AS row "
    "WHERE row.dev = access_files.dev AND row.ino = access_files.ino)))"
)
"""Of `access_files`: those that are still to be taken back. Rows go first, and what was given after them."""


def key(file: FileId) -> tuple[int, int]:
    """Inode numbers are unsigned 64 bit, SQLite's integers signed."""
    return file.dev, file.ino - (1 << 64) if file.ino >= 1 << 63 else file.ino


def file_of(dev: int, ino: int) -> FileId:
    return FileId(dev, ino + (1 << 64) if ino < 0 else ino)


def add(
    db: Connection, holder: Holder, uses: Sequence[Use], *, keep: bool, name: str = "", image: FileId | None = None
) -> None:
    """Rows for the holder; `keep` leaves one that exists as it is. `image`: the file of a holder that is one."""
    _insert(db, holder, uses, name, "NOTHING" if keep else _AS_NEW, image)


def lose(db: Connection, image: Holder, uses: Sequence[Use], name: str, file: FileId | None) -> None:
    """What the disk `name` lost, and its image, that `file`, may still need. A row that exists gets another id: whoever
    proved by then that it is not needed does not know of this."""
    _insert(db, image, uses, name, _ANEW, file)


def _insert(
    db: Connection, holder: Holder, uses: Sequence[Use], name: str, conflict: str, image: FileId | None = None
) -> None:
    for need, label in uses:
        layer = need.layer
        db.execute(
            _INSERT + conflict,
            (
                str(uuid.uuid4()),
                *key(layer.file),
                layer.path,
                *holder,
                need.mode,
                now().isoformat(),
                need.reason,
                None if label is None else str(label),
                name,
                layer.format,
                None if image is None else f"{image.dev}:{image.ino}",
            ),
        )


def manner(db: Connection, holder: Holder) -> tuple[Label | None, str]:
    """How the holder opens its files, and what it is called: a new file of its chain is no different."""
    query = "SELECT label, name FROM access_rows WHERE holder_kind=? AND holder_id=? ORDER BY label IS NULL LIMIT 1"
    found = db.execute(query, holder).fetchone()
    return (label_of(found[0]), found[1]) if found else (None, "")


def label_of(text: str | None) -> Label | None:
    return None if text is None else Label(*(int(number) for number in text.split(":")))


def image_of(text: str | None) -> FileId | None:
    return None if text is None else FileId(*(int(number) for number in text.split(":")))


def release(db: Connection, holder: Holder) -> list[FileId]:
    """The holder needs nothing any more. But what a guest's disk lost its image keeps until that is proven: `forget`,
    `delete`."""
    which = "FROM access_rows WHERE holder_kind=? AND holder_id=? AND NOT (holder_kind='image' AND name != '')"
    files = db.execute(f"SELECT dev, ino {which}", holder).fetchall()
    db.execute(f"DELETE {which}", holder)
    return [file_of(dev, ino) for dev, ino in files]


def forget(db: Connection, holder: Holder, files: Collection[FileId]) -> None:
    """The holder does not need these any more."""
    for file in files:
        query = "DELETE FROM access_rows WHERE dev=? AND ino=? AND holder_kind=? AND holder_id=?"
        db.execute(query, (*key(file), *holder))


def delete(db: Connection, ids: Collection[str]) -> None:
    """These very rows, where they are still there."""
    for row_id in ids:
        db.execute("DELETE FROM access_rows WHERE id=?", (row_id,))


def files_of(db: Connection, holder: Holder) -> list[FileId]:
    rows = db.execute("SELECT dev, ino FROM access_rows WHERE holder_kind=? AND holder_id=?", holder).fetchall()
    return [file_of(dev, ino) for dev, ino in rows]
