"""The files that the daemon has open, once for all its connections, and QEMU's marks on them while they are used.

A file that is read is marked so that QEMU does not begin to write it, and one that is written so that QEMU does not
open it at all; who has it open already refuses us. Marks belong to an open file description, and each connection has a
backend of its own, so the description is shared: as many as like may read a file, or as many write it, but not both.
Of files that were handed over that is seen to here: their readers and their writers may have one description.

A file that we opened ourselves is marked for the agent, too (byte 150). One that was handed over it has leased itself.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from hostagent import qemu_locks
from hostagent.blocks import alignment
from hostagent.data.backends.unflushed import Unflushed
from hostagent.errors import AgentError
from hostagent.qemu_locks import AGENT_BYTE, PART_WRITTEN, READERS, READING, WRITERS

WRITING = tuple(sorted({*READING, *WRITERS}))
"""Of who writes a file that nobody else may even read: it is not whole before it is written."""


class _File:
    """What is known of one file, whoever has it open."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.unflushed = Unflushed()
        self.handed: Held | None = None
        """Which of those that were handed over bears marks."""
        self.open = 0


class Held:
    """An open file. `fd` is shared between threads: use calls that take an offset. Thread-safe."""

    def __init__(
        self,
        fd: int,
        name: str,
        *,
        writable: bool,
        ours: bool,
        direct: int | None = None,
        file: _File | None = None,
    ) -> None:
        self.fd = fd
        self.name = name
        self.writable = writable
        self.device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self.step = alignment(fd)
        self.users = 0
        self.retired = False
        """Another file has its name now."""
        self.file = file or _File()
        self._ours = ours
        self._turn = threading.Lock()
        self._marks = 0
        self._locked: list[int] = []
        self._direct = direct
        self._buffered = False

    def direct(self) -> int | None:
        """A descriptor that writes past the page cache; None where there is no such thing."""
        with self._turn:
            if self._direct is None and not self._buffered:
                try:
                    flags = os.O_WRONLY | os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC
                    self._direct = os.open(f"/proc/self/fd/{self.fd}", flags)
                except OSError:
                    self._buffered = True
            return None if self._buffered else self._direct

    def only_buffered(self) -> None:
        """What `direct` gave does not take what is aligned to `step`."""
        self._buffered = True

    def writing(self, begin: int, end: int) -> AbstractContextManager[None]:
        """Around each write of these bytes."""
        return self.file.unflushed.writing(begin, end)

    def sync(self) -> None:
        """What was written is on stable storage. A failure is remembered until it is written again."""
        self.file.unflushed.sync(self.fd, self.name)

    @contextmanager
    def marked(self) -> Iterator[None]:
        """For as long as it is used; AgentError busy when somebody else uses it otherwise."""
        self.mark()
        try:
            yield
        finally:
            self.unmark()

    def mark(self) -> None:
        with self.file.turn:
            if self._marks == 0:
                self._refuse_beside()
                try:
                    self._take()
                except BaseException:
                    self._give_back()
                    raise
                if not self._ours:
                    self.file.handed = self
            self._marks += 1

    def unmark(self) -> None:
        with self.file.turn:
            self._marks -= 1
            if self._marks == 0:
                self._give_back()
                if self.file.handed is self:
                    self.file.handed = None

    def close(self) -> None:
        _close(self.fd, self._direct)

    def _refuse_beside(self) -> None:
        """A description is not refused for its own locks."""
        other = self.file.handed
        if not self._ours and other is not None and other is not self:
            raise self._busy(WRITERS[0] if other.writable else READERS[0])

    def _take(self) -> None:
        """Ours first, the others' after: two who try at once can both be refused, never both succeed."""
        mine, others = (WRITING, WRITING) if self.writable else (READING, WRITERS)
        if self._ours:
            self._lock(fcntl.F_WRLCK if self.writable else fcntl.F_RDLCK, AGENT_BYTE)
            others = (*others, PART_WRITTEN)
        for byte in mine:
            self._lock(fcntl.F_RDLCK, byte)
        taken = qemu_locks.first_taken(self.fd, others)
        if taken is not None:
            raise self._busy(taken)

    def _lock(self, kind: int, byte: int) -> None:
        try:
            taken = qemu_locks.take(self.fd, kind, byte)
        except OSError as error:
            remedy = "use a file system with POSIX record locks, and on NFS see that its lock service runs"
            message = f"{self.name} cannot be locked: {error.strerror}"
            raise AgentError("unavailable", message, value=self.name, remedy=remedy) from error
        if not taken:
            raise self._busy(byte)
        self._locked.append(byte)

    def _give_back(self) -> None:
        """Unlocked, not only closed: whoever handed it over, or a child until its exec, has the description too."""
        locked, self._locked = self._locked, []
        for byte in locked:
            qemu_locks.take(self.fd, fcntl.F_UNLCK, byte)

    def _busy(self, byte: int) -> AgentError:
        if byte in WRITERS or byte == PART_WRITTEN:
            why, remedy = "is open for writing elsewhere", "end the guest, job or program that writes it"
        elif byte in READERS:
            why, remedy = "is open elsewhere, where it must not change", "wait until it is done, or end it"
        elif byte == AGENT_BYTE:
            why, remedy = "is leased by the agent", "wait until its job or export ends (`hostagent status`)"
        else:
            why, remedy = "is open elsewhere", "end the guest, job or program that has it open"
        return AgentError("busy", f"{self.name} {why}", value=self.name, remedy=remedy, byte=byte)


class Holds:
    """All of them. Thread-safe; one for the process."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._held: dict[tuple[int, int, bool, bool], Held] = {}
        self._files: dict[tuple[int, int], _File] = {}

    def join(self, fd: int, name: str, *, writable: bool, ours: bool, direct: int | None = None) -> Held:
        """Takes `fd` over, and `direct`, which writes the same file past the page cache. Give it back with `leave`.
        `ours`: we opened it; otherwise it was handed over."""
        found = os.fstat(fd)
        key = found.st_dev, found.st_ino, writable, ours
        with self._turn:
            held = self._held.get(key)
            known = held is not None
            if held is None:
                file = self._files.setdefault(key[:2], _File())
                held = self._held[key] = Held(fd, name, writable=writable, ours=ours, direct=direct, file=file)
                file.open += 1
            held.users += 1
        if known:
            _close(fd, direct)
        return held

    @contextmanager
    def used(self, held: Held) -> Iterator[None]:
        """Marked, and open for that time whoever leaves it."""
        with self._turn:
            held.users += 1
        try:
            with held.marked():
                yield
        finally:
            self.leave(held)

    def retire(self, old: Held) -> None:
        """The file of `old` was replaced: who has it open, and does not use it just then, opens the new one."""
        with self._turn:
            for held in self._held.values():
                held.retired |= os.path.sameopenfile(held.fd, old.fd)

    def leave(self, held: Held) -> None:
        with self._turn:
            held.users -= 1
            if held.users:
                return
            self._held = {key: one for key, one in self._held.items() if one is not held}
            held.file.open -= 1
            if not held.file.open and not held.file.unflushed.lost:
                self._files = {key: one for key, one in self._files.items() if one is not held.file}
        held.close()  # may take long where it has something to write


def _close(*fds: int | None) -> None:
    for fd in fds:
        if fd is not None:
            os.close(fd)
