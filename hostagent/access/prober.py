"""Ask as the hypervisor user: can it open this very inode?

Only the kernel knows: mode, ACL, groups, immutable files and security modules all have a say. So a small process runs
as that user and tries. It gets an O_PATH descriptor (which by itself gives no access to data) and a mode over a socket
pair, opens /proc/self/fd/N, closes it at once and answers the errno. It never creates, truncates, reads or writes.

The parents of the file are not walked: the question is about the inode. A prober is started at the first question and
stays; it is started again when it died, and ends by itself when our end of the socket is closed. It runs from the
distribution's interpreter with its program on the command line, so that the user need not be able to read our files.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Literal

from jobs.errors import JobError

PYTHON = Path("/usr/bin/python3")
NO_ACCESS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
STOP_TIMEOUT = 1.0  # for a killed child; one that a dead NFS server holds is left behind rather than waited for

# Not dumpable: a process of the same user must not trace it and answer in its place. Without capabilities: those that a
# service manager gave the agent would pass every check. A root user keeps its own, for there they are the answer.
PROGRAM = """
import ctypes, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(4, 0, 0, 0, 0):
    raise SystemExit(1)
header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
if os.geteuid() and libc.capset(header, nothing):
    raise SystemExit(1)
questions = socket.socket(fileno=0)
questions.send(b"ready")
while True:
    mode, fds, _, _ = socket.recv_fds(questions, 8, 4)
    if not mode or len(fds) != 1:
        break
    answer = 0
    try:
        access = os.O_RDWR if mode == b"rw" else os.O_RDONLY
        os.close(os.open(f"/proc/self/fd/{fds[0]}", access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError as error:
        answer = error.errno
    os.close(fds[0])
    questions.send(str(answer).encode())
"""


class Prober:
    """Answers for one user. Thread-safe: one question at a time, each within `timeout` seconds."""

    def __init__(self, uid: int, gid: int, groups: Collection[int] = (), *, timeout: float) -> None:
        self._uid, self._gid, self._groups = uid, gid, sorted(set(groups))
        self._timeout = timeout
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def __repr__(self) -> str:
        return f"Prober(uid={self._uid}, gid={self._gid}, groups={self._groups})"

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def can_open(self, fd: int, mode: Literal["r", "rw"]) -> bool:
        """Whether the user can open the file behind `fd`, which may be any descriptor of it, also an O_PATH one."""
        inode = os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
        try:
            with self._lock:
                number = self._ask_twice(inode, mode)
        finally:
            os.close(inode)
        if number in NO_ACCESS:
            return False
        if number:
            raise JobError(
                "io_error",
                f"user {self._uid} opening {Path(f'/proc/self/fd/{fd}').readlink()}: {os.strerror(number)}",
                remedy="see the storage and the kernel's log; this says nothing about permissions",
            )
        return True

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _ask_twice(self, inode: int, mode: str) -> int:
        """A prober that died since the last question (the OOM killer, an operator) is started again, once."""
        fresh = self._socket is None
        try:
            return self._ask(self._socket or self._start(), inode, mode)
        except ConnectionError:
            self._stop()
            if fresh:
                raise self._unavailable("it ended without an answer") from None
        try:
            return self._ask(self._start(), inode, mode)
        except ConnectionError:
            self._stop()
            raise self._unavailable("it ended without an answer, twice") from None

    def _ask(self, questions: socket.socket, inode: int, mode: str) -> int:
        try:
            socket.send_fds(questions, [mode.encode()], [inode])
            answer = questions.recv(8)
        except TimeoutError:
            self._stop()
            raise JobError(
                "timeout",
                f"user {self._uid} opening a file: no answer in {self._timeout} s",
                remedy="see whether its storage answers (a dead NFS server?)",
            ) from None
        if not answer:
            raise ConnectionResetError
        return int(answer)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(self._timeout)
        self._socket = ours
        with theirs:
            try:
                self._child = self._spawn(theirs)
            except OSError as error:
                self._stop()
                raise self._unavailable(error.strerror or "it cannot be started") from error
        try:
            if ours.recv(8) != b"ready":
                raise ConnectionResetError
        except TimeoutError:
            self._stop()
            raise self._unavailable(f"it is not ready after {self._timeout} s") from None
        return ours

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        # A plain user's agent asks for itself, and may not even set the groups that it has.
        switch = os.geteuid() == 0 or self._uid != os.geteuid()
        return subprocess.Popen(
            [_interpreter(), "-I", "-S", "-c", PROGRAM],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            start_new_session=True,  # Ctrl-C at a terminal is for the agent
            user=self._uid if switch else None,
            group=self._gid if switch else None,
            extra_groups=self._groups if switch else None,
        )

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._child is not None:
            self._child.kill()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(STOP_TIMEOUT)
            self._child = None

    def _unavailable(self, why: str) -> JobError:
        return JobError(
            "unavailable",
            f"the prober cannot run as user {self._uid} (group {self._gid}): {why}",
            remedy=f"let that user execute {_interpreter()}, and run the agent with CAP_SETUID and CAP_SETGID or as it",
        )


def _interpreter() -> str:
    return str(PYTHON) if PYTHON.exists() else os.path.realpath(sys.executable)
