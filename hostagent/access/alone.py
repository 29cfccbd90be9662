"""Whether anybody at all has a file open, as the kernel itself counts: what a look through /proc need not find then.

A write lease is given only for a file that nobody else has open or mapped, in whatever namespace (fcntl(2), "Leases").
It is taken and given back at once: it is the kernel's answer that is wanted, no lock. Who opens the file in these few
microseconds waits for them, or gets EAGAIN with O_NONBLOCK.
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

_libc = ctypes.CDLL(None, use_errno=True)


def is_alone(fd: int) -> bool | None:
    """Whether this descriptor of a regular file, open for reading, is the only one there is. None where the file system
    gives no leases."""
    try:
        return _ask(fd)
    except PermissionError:  # without CAP_LEASE a lease is for the file's owner only
        with contextlib.suppress(PermissionError), _as(os.fstat(fd).st_uid):
            return _ask(fd)
        return None


def _ask(fd: int) -> bool | None:
    try:
        # What tells the holder of a lease that somebody waits kills it, unless it is another signal; each time anew.
        fcntl.fcntl(fd, F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return False
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK):
            return None
        raise


@contextlib.contextmanager
def _as(uid: int) -> Iterator[None]:
    """This thread alone, for what concerns files (setfsuid(2)): it needs CAP_SETUID."""
    before = _libc.setfsuid(uid)
    try:
        yield
    finally:
        _libc.setfsuid(before)
