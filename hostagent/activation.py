"""Sockets that the service manager bound before it started us, and keeps open over our restarts (sd_listen_fds(3)): who
connects meanwhile waits, and is not refused."""

from __future__ import annotations

import os
import socket

from hostagent.errors import AgentError

FIRST = 3


def listeners() -> dict[str, socket.socket]:
    """By the names that their units give them (FileDescriptorName=). To be called once: children must not think that
    the descriptors are theirs."""
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    pid, number = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "0")
    if pid != str(os.getpid()) or not number.isdecimal():
        return {}
    return {name: taken(fd) for fd, name in zip(range(FIRST, FIRST + int(number)), names, strict=False)}


def taken(fd: int) -> socket.socket:
    """The socket that a descriptor is, closed in children."""
    try:
        os.set_inheritable(fd, False)
        return socket.socket(fileno=fd)
    except OSError as error:
        message, remedy = f"descriptor {fd} is no socket: {error.strerror}", "leave it to who started this"
        raise AgentError("invalid", message, field="LISTEN_FDS", value=fd, remedy=remedy) from error
