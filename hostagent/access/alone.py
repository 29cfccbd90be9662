"""Whether anybody at all has a file open, as the kernel itself counts: what a look through /proc need not find then.

A write lease is given only for a file that nobody else has open or mapped, in whatever namespace (fcntl(2), "Leases").
It is taken and given back at once: it is the kernel's answer that is wanted, no lock. Who opens the file in these few
microseconds waits for them, or gets EAGAIN with O_NONBLOCK. Only for local file systems, where it does not wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
from collections.abc import Iterator

F_SETSIG = 10
"""Linux's; the fcntl module does not have it."""

_libc = ctypes.PyDLL(None, use_errno=True)
"""Its calls keep the interpreter: else another thread could have its turn, for milliseconds, while the lease holds."""


def is_alone(fd: int) -> bool | None:
    """Whether this descriptor of a regular file, open for reading, is the only one there is. None where the file system
    gives no leases, and where we may not ask."""
    found = _ask(fd)
    owner = os.fstat(fd).st_uid
    # Without CAP_LEASE a lease is for the file's owner only. Who is root for a moment loses capabilities afterwards.
    if found == errno.EACCES and owner != 0:
        with _as(owner):
            found = _ask(fd)
    return {0: True, errno.EAGAIN: False}.get(found)


def _ask(fd: int) -> int:
    """0, or the error's number."""
    # What tells the holder of a lease that somebody waits kills it, unless it is another signal; each time anew.
    fcntl.fcntl(fd, F_SETSIG, signal.SIGURG)
    if _libc.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK):
        return ctypes.get_errno()
    _libc.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return 0


@contextlib.contextmanager
def _as(uid: int) -> Iterator[None]:
    """This thread alone, for what concerns files (setfsuid(2)): it needs CAP_SETUID. No core dump is written afterwards
    (PR_SET_DUMPABLE)."""
    before = _libc.setfsuid(uid)
    try:
        yield
    finally:
        _libc.setfsuid(before)
