"""Who has a file open, by /proc: processes, their descriptors, and the locks that they hold on them.

A file is its device and inode, never a path. An O_PATH descriptor gives no access to data and does not count. What is
missed by nature: a file that is only mapped, one in flight over a socket, and the processes that this agent may not
look into; as root there are none of the last kind. A process that goes away while it is looked at is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from hostagent.access.birth import is_later
from jobs.model import FileId

PROC = Path("/proc")
NOT_FILES = ("socket:", "pipe:", "anon_inode:")
GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


class Process(NamedTuple):
    """`writes` says that at least one of its descriptors of the file is open for writing."""

    pid: int
    name: str
    uid: int
    writes: bool

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


class _Opened(NamedTuple):
    file: FileId
    writes: bool
    locked: tuple[range, ...]  # the bytes on which this open file description holds record locks


def find_open(
    files: Collection[FileId],
    *,
    uids: Collection[int] | None = None,
    pids: Iterable[int] | None = None,
    skip_pids: Collection[int] = (),
    made: Mapping[FileId, int] | None = None,
) -> dict[FileId, list[Process]]:
    """The processes that have each of the files open: an empty list for a file that nobody has.

    `uids` limits the search to processes of these users, `pids` to these processes. `made` is when files were made, in
    ns since 1970: a later one with the inode number of a deleted one is not it.
    """
    found: dict[FileId, list[Process]] = {file: [] for file in files}
    for pid, uid in _processes(uids, pids, skip_pids):
        opened = list(_opened(pid, files, made or {}))
        for file in {one.file for one in opened}:
            writes = any(one.writes for one in opened if one.file == file)
            found[file].append(Process(pid, process_name(pid), uid, writes))
    return found


def find_lockers(file: FileId, byte: int, *, skip_pids: Collection[int] = ()) -> list[Process]:
    """The processes with a record lock on this byte of the file."""
    found = []
    for pid, uid in _processes(None, None, skip_pids):
        opened = [one for one in _opened(pid, {file}, {}) if any(byte in locked for locked in one.locked)]
        if opened:
            found.append(Process(pid, process_name(pid), uid, any(one.writes for one in opened)))
    return found


def process_name(pid: int) -> str:
    try:
        return (PROC / str(pid) / "comm").read_text(errors="replace").strip()
    except GONE:
        return "?"


def _processes(
    uids: Collection[int] | None, pids: Iterable[int] | None, skip_pids: Collection[int]
) -> Iterator[tuple[int, int]]:
    """(pid, effective uid) of the processes to look at."""
    candidates = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()) if pids is None else iter(pids)
    for pid in candidates:
        if pid in skip_pids:
            continue
        try:
            uid = (PROC / str(pid)).stat().st_uid  # unlike what is in it, the process's even if not dumpable
        except GONE:
            continue
        if uids is None or uid in uids:
            yield pid, uid


def _opened(pid: int, files: Collection[FileId], made: Mapping[FileId, int]) -> Iterator[_Opened]:
    folder = f"{PROC}/{pid}"
    try:
        descriptors = os.listdir(f"{folder}/fd")  # noqa: PTH208 - thousands of them, and Path costs; so below
    except GONE:
        return
    inodes = {file.ino for file in files}
    for descriptor in descriptors:
        link = f"{folder}/fd/{descriptor}"
        try:
            if os.readlink(link).startswith(NOT_FILES):  # noqa: PTH115
                continue
            fdinfo = _text(f"{folder}/fdinfo/{descriptor}")
            if not _may_be(fdinfo, inodes):
                continue
            info = os.stat(link)  # noqa: PTH116
            file = FileId(info.st_dev, info.st_ino)
            if file in files and not (file in made and _is_later(link, made[file])):
                yield from _described(file, fdinfo)
        except OSError:  # gone, or on storage that answers with an error: then it is not the file that we could stat
            continue


def _text(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = b""
        while more := os.read(fd, 1 << 16):
            text += more
        return text.decode()
    finally:
        os.close(fd)


def _is_later(link: str, when: int) -> bool:
    fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
    try:
        return is_later(fd, when)
    finally:
        os.close(fd)


def _may_be(fdinfo: str, inodes: Collection[int]) -> bool:
    """Whether the inode number is one of these (Linux 5.14): a stat of another file, on dead storage, would hang."""
    _, found, rest = fdinfo.partition("\nino:")
    return not found or int(rest.split(None, 1)[0]) in inodes


def _described(file: FileId, fdinfo: str) -> Iterator[_Opened]:
    flags, locked = 0, []
    for line in fdinfo.splitlines():
        key, _, value = line.partition(":")
        if key == "flags":
            flags = int(value, 8)
        elif key == "lock":
            start, end = value.split()[-2:]
            locked.append(range(int(start), 2**63 if end == "EOF" else int(end) + 1))
    if not flags & os.O_PATH:
        yield _Opened(file, flags & os.O_ACCMODE != os.O_RDONLY, tuple(locked))
