"""Cutting a QEMU's connections to one server, from outside: nothing else ends a request that the server never answers.

QEMU waits for an NBD server without end. While it opens an image there, and while it drains a disk whose guest waits
for the server, its whole guest stands still; and neither QMP nor libvirt gets in a word then. A socket whose peer is
silent can be shut down by any process that has it, so a descriptor of it is taken (pidfd_getfd(2)) and used for that.
QEMU gets an error, as if the server had died. All of this blocks, though not for long.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.errors import JobError

log = logging.getLogger(__name__)

PIDFD_GETFD = 438
"""The same on all architectures (Linux 5.6)."""
SO_SNDBUFFORCE = 32
"""socket(7), which Python does not name."""
ROOM = 64 << 20
"""Bytes: a writer is woken when a quarter of them would do for what lies in the socket."""
MOST_ARGUMENTS = 1 << 20
"""Bytes of a command line that are looked at."""

Address = str | tuple[str, int]
"""A socket's path; or a number address, and a port."""


def addresses(server: Mapping[str, Any]) -> frozenset[Address]:
    """What a connection to the server has at its other end, for a SocketAddress of QEMU's. Names are looked up."""
    if server["type"] == "unix":
        return frozenset({server["path"], os.path.realpath(server["path"])})
    try:
        found = socket.getaddrinfo(server["host"], int(server["port"]), type=socket.SOCK_STREAM)
    except OSError as error:
        log.warning("a server's name leads nowhere", extra={"fields": {"host": server["host"], "error": str(error)}})
        return frozenset()
    return frozenset(_inet(address) for *_, address in found)


def process_of(domain: str) -> int | None:
    """The pid of the QEMU that runs the domain with this UUID, as libvirt starts it."""
    mark = f"\0-uuid\0{domain}\0".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError), (entry / "cmdline").open("rb") as file:
                if mark in file.read(MOST_ARGUMENTS):
                    return int(entry.name)
    return None


def count(pid: int, wanted: Collection[Address]) -> int:
    """How many connections to these the process has."""
    return sum(1 for _ in _connections(pid, wanted))


def cut(pid: int, wanted: Collection[Address]) -> int:
    """Shut down the process's connections to these; how many there were."""
    found = 0
    for connection in _connections(pid, wanted):
        _end(connection)
        found += 1
    return found


def _connections(pid: int, wanted: Collection[Address]) -> Iterator[socket.socket]:
    """As sockets of ours, one after the other."""
    with contextlib.suppress(ProcessLookupError), _pidfd(pid) as handle:
        for number in _sockets(pid):
            if (connection := _taken(handle, number)) is not None:
                with connection:
                    if _peer(connection) in wanted:
                        yield connection


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    handle = os.pidfd_open(pid)
    try:
        yield handle
    finally:
        os.close(handle)


def _sockets(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for entry in list(Path(f"/proc/{pid}/fd").iterdir()):
            with contextlib.suppress(OSError):
                if str(entry.readlink()).startswith("socket:"):
                    yield int(entry.name)


def _taken(handle: int, number: int) -> socket.socket | None:
    """The process's socket as ours, too; None when it has just been closed."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = int(libc.syscall(PIDFD_GETFD, handle, number, 0))
    if own >= 0:
        try:
            return socket.socket(fileno=own)
        except OSError:  # its number went to something else meanwhile
            os.close(own)
            return None
    if (error := ctypes.get_errno()) in (errno.EBADF, errno.ESRCH):
        return None
    remedy = "let the agent have CAP_SYS_PTRACE; or end the server"
    raise JobError("not_supported", f"QEMU's connections cannot be had: {os.strerror(error)}", remedy=remedy)


def _end(connection: socket.socket) -> None:
    """A writer to a full unix socket hears nothing of its end (unix(7) tells of a hang-up, which QEMU does not wait for
    when it writes): with more room in it he writes on, and gets EPIPE."""
    connection.shutdown(socket.SHUT_RDWR)
    if connection.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, ROOM)


def _peer(connection: socket.socket) -> Address | None:
    try:
        found = connection.getpeername()
    except OSError:  # it listens, or is not connected
        return None
    if connection.family == socket.AF_UNIX:
        return found if isinstance(found, str) else None
    return _inet(found) if connection.family in (socket.AF_INET, socket.AF_INET6) else None


def _inet(address: Any) -> tuple[str, int]:
    """One spelling; an IPv4 address over an IPv6 socket is one all the same."""
    found = ipaddress.ip_address(str(address[0]).partition("%")[0])
    plain = getattr(found, "ipv4_mapped", None) or found
    return str(plain), int(address[1])
