"""Leases on image files that other agents respect, and QEMU too.

QEMU marks what it does with an image by locks on single bytes (hostagent.qemu_locks). A lease speaks that language, and
adds byte 150, which QEMU does not use, for agents among themselves:

* shared, for a file that is read and must not change: we use CONSISTENT_READ, share neither WRITE nor RESIZE. While it
  stands `qemu-io write` and `qemu-img commit` into the file fail, and readers and streams from it do not;
* exclusive, for a file that our own storage daemon will write: byte 150 alone, because QEMU's bytes would stop that
  daemon too. QEMU guards the file from the moment at which the daemon opens it. A block device is claimed from the
  kernel as well (open(2), O_EXCL), for as long as the lease stands: these locks belong to one node in /dev, and the
  claim to the device, its partitions, mounts and other nodes included.

A block device has its data in a file or in other devices (access.stacking), which are other inodes with locks of their
own. So its lease marks those, too: the agent's byte says that a part of them is used, byte 151 that a part is written.
A file under a loop device is not written by its own name at all: the two have caches that know nothing of each other.

Locks are taken first and the others' tested after, and given back when refused: two who try at once can both be
refused, never both succeed. A lock belongs to an open file description, so a lease opens its own. It does not outlive
this process, and is taken again at start.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path

from hostagent import qemu_locks
from hostagent.access import holders, stacking
from hostagent.qemu_locks import AGENT_BYTE, PART_WRITTEN, READERS, READING, WRITERS
from jobs.errors import JobError
from jobs.model import FileId


class LeaseMode(StrEnum):
    SHARED = "shared"
    EXCLUSIVE = "exclusive"


class Lease:
    """A lease on one file, by its inode. Thread-safe; a context manager that releases it.

    `ours` are the process ids of our own storage daemons, whose locks are no reason to refuse.
    """

    def __init__(self, fd: int, mode: LeaseMode, path: str) -> None:
        """Takes over `fd`, which holds the locks already: use `Lease.shared` or `Lease.exclusive`."""
        info = os.fstat(fd)
        self.file = FileId(info.st_dev, info.st_ino)
        self.path = path
        self.mode = mode
        self._fd = fd
        self._footing = _Footing(fd)
        self._guard = threading.Lock()

    @classmethod
    def shared(cls, fd: int, *, ours: Collection[int] = ()) -> Lease:
        own, path = _reopened(fd, os.O_RDONLY)
        try:
            _lock(own, path, fcntl.F_RDLCK, (AGENT_BYTE, *READING))
            _refuse_others(own, path, (PART_WRITTEN, *WRITERS), ours)
            return cls(own, LeaseMode.SHARED, path)._standing(ours)
        except BaseException:
            os.close(own)
            raise

    @classmethod
    def exclusive(cls, fd: int, *, tolerate_readers: bool = False, ours: Collection[int] = ()) -> Lease:
        """`tolerate_readers`: our storage daemon has the file open read-only and does not share writing. QEMU itself
        refuses its reopening for writing while anybody else reads so."""
        own, path = _reopened(fd, os.O_RDWR | _claim(fd))
        try:
            _lock(own, path, fcntl.F_WRLCK, (AGENT_BYTE,))
            _refuse_others(own, path, WRITERS if tolerate_readers else WRITERS + READERS, ours)
            _refuse_loops(own, path)
            return cls(own, LeaseMode.EXCLUSIVE, path)._standing(ours)
        except BaseException:
            os.close(own)
            raise

    def _standing(self, ours: Collection[int]) -> Lease:
        try:
            self._footing.take(ours, writes=self.mode is LeaseMode.EXCLUSIVE)
        except BaseException:
            self._footing.release()
            raise
        return self

    def __repr__(self) -> str:
        return f"Lease({self.path}, {self.mode}, {'released' if self._fd < 0 else 'held'})"

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def held(self) -> bool:
        return self._fd >= 0

    def convert(self, mode: LeaseMode, *, tolerate_readers: bool = False, ours: Collection[int] = ()) -> None:
        """Make it `mode`. A refusal leaves it as it was, and no other agent can come between."""
        with self._guard:
            if self._fd < 0:
                raise JobError("conflict", f"the lease on {self.path} was released", field="path", value=self.path)
            if mode is self.mode:
                return
            if mode is LeaseMode.EXCLUSIVE:
                self._raise(WRITERS if tolerate_readers else WRITERS + READERS, ours)
            else:
                self._lower(ours)
            self.mode = mode

    def release(self) -> None:
        with self._guard:
            if self._fd >= 0:
                # Unlocked, not only closed: a child that was just forked has the description until its exec.
                _lock(self._fd, self.path, fcntl.F_UNLCK, (AGENT_BYTE, *READING))
                os.close(self._fd)
                self._fd = -1
                self._footing.release()

    def _raise(self, refused: tuple[int, ...], ours: Collection[int]) -> None:
        """Through a second description, as the first may be read-only: it joins, takes over, becomes the writer."""
        writable, _ = _reopened(self._fd, os.O_RDWR | _claim(self._fd))
        try:
            _lock(writable, self.path, fcntl.F_RDLCK, (AGENT_BYTE, *READING))
        except BaseException:
            os.close(writable)
            raise
        os.close(self._fd)
        self._fd = writable
        try:
            _lock(writable, self.path, fcntl.F_WRLCK, (AGENT_BYTE,))
            _refuse_others(writable, self.path, refused, ours)
            _refuse_loops(writable, self.path)
            self._footing.take(ours, writes=True)
        except JobError:
            _lock(writable, self.path, fcntl.F_RDLCK, (AGENT_BYTE,))
            if _claim(writable):
                self._unclaim()
            raise
        _lock(writable, self.path, fcntl.F_UNLCK, READING)

    def _lower(self, ours: Collection[int]) -> None:
        _lock(self._fd, self.path, fcntl.F_RDLCK, READING)
        try:
            _refuse_others(self._fd, self.path, WRITERS, ours)
        except JobError:
            _lock(self._fd, self.path, fcntl.F_UNLCK, READING)
            raise
        _lock(self._fd, self.path, fcntl.F_RDLCK, (AGENT_BYTE,))
        self._footing.write_no_more()
        if _claim(self._fd):
            self._unclaim()

    def _unclaim(self) -> None:
        """Give a device's claim back: it goes with its description, so another one takes over the locks."""
        plain, _ = _reopened(self._fd, os.O_RDONLY)
        try:
            _lock(plain, self.path, fcntl.F_RDLCK, (AGENT_BYTE, *READING))
        except BaseException:
            os.close(plain)
            raise
        os.close(self._fd)
        self._fd = plain


class FileLease:
    """A lease that goes back and forth between the modes, as chains have it; `ours` counts once it is exclusive."""

    def __init__(self, fd: int, *, exclusive: bool, ours: Collection[int]) -> None:
        self._lease = Lease.exclusive(fd, ours=ours) if exclusive else Lease.shared(fd, ours=ours)

    def exclude(self, *, ours: Collection[int]) -> None:
        self._lease.convert(LeaseMode.EXCLUSIVE, tolerate_readers=bool(ours), ours=ours)

    def share(self, *, ours: Collection[int]) -> None:
        self._lease.convert(LeaseMode.SHARED, ours=ours)

    def release(self) -> None:
        self._lease.release()


class _Footing:
    """What a leased device stands on, marked as in use; of a file nothing."""

    def __init__(self, fd: int) -> None:
        self._below: list[tuple[int, str]] = []
        for path in stacking.stands_on(fd):
            try:
                self._below.append((os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), str(path)))
            except OSError:  # out of our sight, and so of all who come by that name
                continue

    def take(self, ours: Collection[int], *, writes: bool = False) -> None:
        """Mark all of it, or raise `busy` with the marks as they were."""
        try:
            for fd, path in self._below:
                _lock(fd, path, fcntl.F_RDLCK, (AGENT_BYTE, PART_WRITTEN) if writes else (AGENT_BYTE,))
                _refuse_others(fd, path, WRITERS + READERS if writes else WRITERS, ours)
        except JobError:
            self.write_no_more()
            raise

    def write_no_more(self) -> None:
        for fd, path in self._below:
            _lock(fd, path, fcntl.F_UNLCK, (PART_WRITTEN,))

    def release(self) -> None:
        below, self._below = self._below, []
        for fd, path in below:
            _lock(fd, path, fcntl.F_UNLCK, (AGENT_BYTE, PART_WRITTEN))
            os.close(fd)


def _refuse_loops(fd: int, path: str) -> None:
    loops = [str(device) for device in stacking.loops_on(fd)]
    if loops:
        raise JobError(
            "busy",
            f"{path} cannot be written by this name: {loops[0]} stands on it",
            remedy=f"detach it (losetup -d {loops[0]}), or name the device",
            field="path",
            value=path,
            holders=loops,
        )


def _claim(fd: int) -> int:
    """The flag that claims a block device; none for a file, where it means nothing."""
    return os.O_EXCL if stat.S_ISBLK(os.fstat(fd).st_mode) else 0


def _reopened(fd: int, access: int) -> tuple[int, str]:
    """An open file description of our own of the same inode, and the file's name for people."""
    link = f"/proc/self/fd/{fd}"
    path = str(Path(link).readlink())
    try:
        return os.open(link, access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), path
    except OSError as error:
        if error.errno == errno.EBUSY and access & os.O_EXCL:
            raise JobError(
                "busy",
                f"{path} is claimed: mounted, a part of another device, or written by somebody, whole or in part",
                remedy="see lsblk; unmount it or end its writer, or export it read-only",
                field="path",
                value=path,
            ) from error
        code = "denied" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else "io_error"
        verb = "read" if access == os.O_RDONLY else "write"
        raise JobError(
            code,
            f"cannot open {path} to lease it: {error.strerror}",
            remedy=f"let the agent {verb} the file",
            field="path",
            value=path,
        ) from error


def _lock(fd: int, path: str, kind: int, bytes_: tuple[int, ...]) -> None:
    """Set or clear our lock on each byte, without waiting. What was set before a refusal goes with the descriptor."""
    for byte in bytes_:
        try:
            taken = qemu_locks.take(fd, kind, byte)
        except OSError as error:
            raise JobError(
                "unavailable",
                f"cannot lock {path}: {error.strerror}",
                remedy="use a file system with POSIX record locks, and on NFS see that its lock service runs",
                field="path",
                value=path,
            ) from error
        if not taken:
            raise _busy(fd, path, byte, ())


def _refuse_others(fd: int, path: str, bytes_: tuple[int, ...], ours: Collection[int]) -> None:
    for byte in bytes_:
        taken = qemu_locks.first_taken(fd, (byte,)) is not None
        if taken and not (ours and _only(ours, fd, byte)):
            raise _busy(fd, path, byte, ours)


def _only(ours: Collection[int], fd: int, byte: int) -> bool:
    pids = {process.pid for process in holders.find_lockers(_identity(fd), byte)} - {os.getpid()}
    return bool(pids) and pids <= set(ours)


def _busy(fd: int, path: str, byte: int, ours: Collection[int]) -> JobError:
    who = [str(process) for process in holders.find_lockers(_identity(fd), byte, skip_pids=(os.getpid(), *ours))]
    if who:
        reason = f"is open in {', '.join(who[:8])}"
    elif byte == PART_WRITTEN:
        reason = "is being written by another name: a device stands on it"
    elif byte == AGENT_BYTE:
        reason = "is leased already, by this agent or one that cannot be seen from here"
    else:
        reason = "is open in a process that cannot be seen from here"
    return JobError(
        "busy",
        f"{path} {reason}",
        remedy="wait until it is done with the image, or end it",
        field="path",
        value=path,
        byte=byte,
        holders=who[:8],
    )


def _identity(fd: int) -> FileId:
    info = os.fstat(fd)
    return FileId(info.st_dev, info.st_ino)
