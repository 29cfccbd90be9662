"""The very file that an entry of the ledger tells of, wherever it was moved to: found, opened and held.

An O_PATH descriptor stands for each file from the first grant to the last revocation, so that neither a rename nor a
swap leads to another one. After a restart it is looked for at its path, and in its folder by inode; one with its inode
number that was made at another time is another file. Everything here may wait for storage: it belongs into a thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from hostagent.access import acl, alone
from hostagent.access.birth import born, is_later
from hostagent.records import AccessFile
from jobs.errors import JobError
from jobs.model import FileId

MOST_ENTRIES = 100_000
"""Entries of one folder that are looked through for a file that was renamed."""


class Files:
    """The descriptors, by file."""

    def __init__(self) -> None:
        self._handles: dict[FileId, int] = {}

    def held(self, file: FileId) -> int | None:
        """The descriptor that stands for the file, if one does."""
        return self._handles.get(file)

    @contextlib.contextmanager
    def opened(self, entry: AccessFile) -> Iterator[int]:
        """The file for reading; from now on it is held. FileNotFoundError when it cannot be found."""
        handle = self._handles.get(entry.file)
        if handle is None:
            handle = self._handles[entry.file] = find(entry)
        with reading(handle) as fd:
            yield fd

    @contextlib.contextmanager
    def grasped(self, entry: AccessFile) -> Iterator[int]:
        """An O_PATH descriptor for the moment: a domain that is off must not hold a file system against an unmount."""
        if (handle := self._handles.get(entry.file)) is not None:
            yield handle
            return
        handle = find(entry)
        try:
            yield handle
        finally:
            os.close(handle)

    def is_alone(self, entry: AccessFile) -> bool:
        """Whether the kernel says that nobody has the file open: False where it does not, or cannot, as of file systems
        that other hosts share: these have leases of their own, for which they may ask a server."""
        try:
            with self.grasped(entry) as handle, reading(handle) as fd:
                return not acl.file_system(fd).shared and alone.is_alone(fd) is True
        except (OSError, JobError):
            return False

    def forget(self, file: FileId) -> None:
        if (handle := self._handles.pop(file, None)) is not None:
            os.close(handle)

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


@contextlib.contextmanager
def reading(handle: int) -> Iterator[int]:
    """The file of an O_PATH descriptor, opened for reading."""
    fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def find(entry: AccessFile) -> int:
    """An O_PATH descriptor of the file: at its path, else by inode in its folder. FileNotFoundError when not there."""
    handle = _numbered(entry)
    if is_later(handle, entry.born):
        os.close(handle)
        raise FileNotFoundError(entry.path)
    return handle


def is_reused(entry: AccessFile, paths: Collection[str]) -> bool | None:
    """Whether another file has the inode number now: then the entry's is gone for good. None when that cannot be told.

    `paths` are where the file with that number is said to be, besides the entry's own path and folder.
    """
    if entry.born is None:
        return None
    handle = next((one for path in paths if (one := _grasp(path, entry.file)) is not None), None)
    try:
        handle = _numbered(entry) if handle is None else handle
    except (FileNotFoundError, JobError):
        return None
    try:
        made = born(handle)
    finally:
        os.close(handle)
    return None if made is None else made != entry.born


def _numbered(entry: AccessFile) -> int:
    """What has the entry's device and inode number, at its path or in its folder."""
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
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = os.fstat(handle)
    if FileId(found.st_dev, found.st_ino) == file:
        return handle
    os.close(handle)
    return None


def is_former(path: str, file: FileId) -> bool:
    """Whether the path leads to nothing, or to another file."""
    try:
        found = os.lstat(path)
    except OSError:
        return True
    return FileId(found.st_dev, found.st_ino) != file


def is_deleted(path: str, dev: int, file: FileId | None = None) -> bool:
    """Whether there is no such file in a folder that is there: a file system that is away says nothing. Where it is
    known which `file` it was, its folder may be gone, too: what is left above is on the file's own file system then."""
    try:
        folders = Path(path).parents
        left = next(one for one in folders if file is None or os.path.lexists(one))
        return left.stat().st_dev == (dev if file is None else file.dev) and not os.path.lexists(path)
    except OSError:
        return False
