"""Getting to an NBD server in bounded time, and being stopped from another thread.

libnbd would do it too, but resolves a name for as long as the resolver likes, gives up at once where a unix socket's
backlog is full, and cannot be stopped: `nbd_shutdown` waits for the handle, which a wait on the storage holds. What
wakes every wait is shutting the socket down (tests/qemu/test_nbd_faults.py), so the socket is made and kept here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hostagent.errors import AgentError

PORT = 10809
TICK = 0.02
"""Seconds after which a wait for a connection looks whether it is still wanted."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where an export is: at a unix socket's path, or at a host and port."""

    export: str = ""
    socket: str = ""
    host: str = ""
    port: int = PORT

    def __str__(self) -> str:
        return f"export {self.export!r} at {self.socket or f'{self.host}:{self.port}'!r}"


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds: to be connected, without any progress later on, and of a flush, which else is an answer like others; and
    the names of these settings, for messages."""

    connect: float
    answer: float
    connect_setting: str
    answer_setting: str
    flush: float | None = None
    flush_setting: str = ""


SEND_BUFFER = 512 * 1024
"""Bytes that a unix socket may queue; the kernel's 208 KiB let a write of 1 MiB wait for its server five times, each
for a change of processes. Measured: a third more throughput of uploads (docs/data.md)."""


class Fenced(Exception):
    """The fence was closed: this connection ends, and no other may begin."""


class Fence:
    """Ends connections from another thread. It stays closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._socket: socket.socket | None = None

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Whoever waits for the storage is woken at once, and gets an error."""
        self._closed.set()
        with self._lock:  # or the descriptor might be another file's by now
            if self._socket is not None:
                _shutdown(self._socket)

    def connected(self) -> bool:
        """Whether there is a connection whose other end has not closed it."""
        with self._lock:
            if self._socket is None or self.closed:
                return False
            poll = select.poll()
            poll.register(self._socket, select.POLLRDHUP)
            return not poll.poll(0)

    def hold(self, one: socket.socket | None) -> None:
        """Stand for this connection from now on, or for none; the one before is closed."""
        with self._lock:
            before, self._socket = self._socket, one
            if before is not None:
                _shutdown(before)  # libnbd's own lives on in the traceback of an error
                before.close()
            if one is not None and self.closed:
                _shutdown(one)

    def pause(self, seconds: float) -> None:
        """Raise Fenced, if not at once then while waiting."""
        if self._closed.wait(seconds):
            raise Fenced


def dial(server: Server, waits: Waits, fence: Fence) -> socket.socket:
    """A connected socket that does not block. AgentError unavailable or timeout; Fenced."""
    deadline = time.monotonic() + waits.connect
    try:
        if server.socket:
            return _to_path(server.socket, deadline, fence)
        return _to_host(server, deadline, fence)
    except TimeoutError as error:
        message = f"{server} took no connection within {waits.connect:g} s ({waits.connect_setting})"
        remedy = "see whether its server runs, and has room for another client"
        raise AgentError("timeout", message, remedy=remedy) from error
    except OSError as error:
        message = f"{server} cannot be reached: {error.strerror or error}"
        raise AgentError("unavailable", message, remedy="see whether its server still runs") from error


def _to_path(path: str, deadline: float, fence: Fence) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with _closed_on_error(one):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        while True:
            try:
                one.connect(path)
            except BlockingIOError:  # its backlog is full, and nothing tells when it is no more
                _wait(deadline, fence)
            else:
                return one


def _to_host(server: Server, deadline: float, fence: Fence) -> socket.socket:
    failure: OSError = OSError(errno.EHOSTUNREACH, "no address")
    for family, _, _, _, address in _addresses(server, deadline, fence):
        one = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with _closed_on_error(one):
            number = one.connect_ex(address)
            if number == errno.EINPROGRESS:
                poll = select.poll()
                poll.register(one, select.POLLOUT)
                while not poll.poll(TICK * 1000):
                    _wait(deadline, fence, 0)
                number = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number == 0:
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                return one
        one.close()
        failure = OSError(number, os.strerror(number))
    raise failure


def _addresses(server: Server, deadline: float, fence: Fence) -> list[Any]:
    """What the name stands for. The resolver keeps its own time, in a thread that may be left behind."""
    with contextlib.suppress(socket.gaierror):
        return socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    answer: queue.SimpleQueue[list[Any] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(list(socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)))
        except OSError as error:
            answer.put(error)

    threading.Thread(target=ask, name="nbd-resolver", daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            found = answer.get(timeout=TICK)
            if isinstance(found, OSError):
                raise found
            return found
        _wait(deadline, fence, 0)


def _wait(deadline: float, fence: Fence, seconds: float = TICK) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError
    fence.pause(seconds)


@contextlib.contextmanager
def _closed_on_error(one: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        one.close()
        raise


def _shutdown(one: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side was quicker
        one.shutdown(socket.SHUT_RDWR)
