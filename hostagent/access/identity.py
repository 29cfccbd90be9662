"""Whether what the ledger says of an inode number is said of the file that has it now: the numbers of deleted files are
used again, and images come and go behind the agent's back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from hostagent.access.files import Files, is_deleted, is_former, is_reused
from hostagent.access.grants import still_has
from hostagent.access.threads import Threads
from hostagent.records import AccessFile, AccessRow
from jobs.model import FileId


class Rows(Protocol):
    async def access_rows(self, files: Sequence[FileId] | None = None) -> list[AccessRow]: ...

    async def delete_rows(self, ids: Sequence[str]) -> None: ...


class Identity:
    """Use it under the file's lock."""

    def __init__(self, store: Rows, files: Files, threads: Threads) -> None:
        self._store = store
        self._files = files
        self._threads = threads

    async def rows(self, file: FileId) -> list[AccessRow]:
        """The file's rows, oldest first. Those of images that are gone, or stood on one that is, are deleted."""
        rows = await self._store.access_rows([file])
        images = [row for row in rows if row.holder.kind == "image"]
        alone, disks = len(rows) == 1, list[AccessRow]()
        if any(row.lost for row in images):
            disks = [row for row in await self._store.access_rows() if row.holder.kind == "domain"]
        there = {disk.name for disk in disks} | {disk.file for disk in disks}
        moved = [row for row in images if row.lost and not there.isdisjoint((row.name, row.image))]
        stale = await self._threads.run(
            file, lambda: [row for row in images if self._is_stale(row, alone=alone, moved=row in moved)]
        )
        for row in stale:
            await self._store.delete_rows([row.id])
        return [row for row in rows if row not in stale]

    async def is_reused(self, entry: AccessFile, paths: Sequence[str]) -> bool | None:
        """Whether the entry is a deleted file's, whose inode number another one has by now; None when nothing tells."""
        if self._files.held(entry.file) is not None:
            return False
        return await self._threads.run(entry.file, lambda: is_reused(entry, paths))

    async def seems_another(self, entry: AccessFile, paths: Sequence[str], *, needed: bool) -> bool:
        """The same without a birth to go by. What we gave it proves a file that is found by another name; and what is
        still to be taken back is not let go of because its file cannot be found."""
        if not paths or ((entry.mode or entry.labels) and not needed):
            return False
        return await self._threads.run(entry.file, lambda: is_former(entry.path, entry.file) and not still_has(entry))

    def _is_stale(self, row: AccessRow, *, alone: bool, moved: bool) -> bool:
        """Whether the image was deleted, or the row tells of a deleted file: inode numbers are used again. One that is
        only away comes back. `moved`: a disk has the image, or the disk that lost this is there, so the image is
        elsewhere, perhaps."""
        if not moved and is_deleted(row.holder.id, row.file.dev, row.image):
            return True
        if (handle := self._files.held(row.file)) is not None:
            return os.fstat(handle).st_nlink == 0
        return is_former(row.path, row.file) and (os.path.lexists(row.path) or not alone)
