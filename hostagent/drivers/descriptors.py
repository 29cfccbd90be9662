"""What the kernel says of another process's descriptors. Blocking: /proc alone is asked where that is enough."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from jobs.model import FileId


def inodes(pid: int) -> frozenset[int]:
    """The inode numbers of all that the process has open, O_PATH too."""
    found = set()
    for entry in entries(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(OSError, ValueError):
            found.add(_fdinfo(pid, entry)[1])
    return frozenset(found)


def reading(pid: int, file: FileId) -> set[int]:
    """The descriptors by which the process has `file` open for reading only."""
    found = set()
    for entry in entries(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(OSError, ValueError):
            flags, inode = _fdinfo(pid, entry)
            if inode == file.ino and not flags & os.O_PATH and flags & os.O_ACCMODE == os.O_RDONLY:
                stat = Path(f"/proc/{pid}/fd/{entry}").stat()
                if FileId(stat.st_dev, stat.st_ino) == file:
                    found.add(int(entry))
    return found


def sockets(pid: int) -> set[int]:
    """The inode numbers of the process's sockets: a connection that was made anew is another one."""
    found = set()
    for entry in entries(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(OSError):
            name = str(Path(f"/proc/{pid}/fd/{entry}").readlink())
            if name.startswith("socket:["):
                found.add(int(name[len("socket:[") : -1]))
    return found


def open_modes(pid: int, files: Collection[FileId]) -> dict[FileId, bool]:
    """Which of `files` the process has open for data, and whether for writing.

    Only what has the inode number of one of them is asked for its device: others may lie on dead storage.
    """
    numbers = {file.ino for file in files}
    found: dict[FileId, bool] = {}
    for entry in entries(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(OSError, ValueError):
            flags, inode = _fdinfo(pid, entry)
            if flags & os.O_PATH or inode not in numbers:
                continue
            stat = Path(f"/proc/{pid}/fd/{entry}").stat()
            file = FileId(stat.st_dev, stat.st_ino)
            if file in files:
                found[file] = found.get(file, False) or flags & os.O_ACCMODE == os.O_RDWR
    return found


def entries(folder: Path) -> list[str]:
    """The names in a folder of /proc; none when the process has ended."""
    try:
        return os.listdir(folder)  # noqa: PTH208 - names only, hot path
    except OSError:
        return []


def _fdinfo(pid: int, fd: str) -> tuple[int, int]:
    """A descriptor's flags and inode number (proc(5); before Linux 5.14, which has no `ino`, the file is asked)."""
    lines = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    inode = int(values["ino"]) if "ino" in values else Path(f"/proc/{pid}/fd/{fd}").stat().st_ino
    return int(values["flags"], 8), inode
