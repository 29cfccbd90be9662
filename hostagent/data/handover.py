"""Descriptors that the agent hands over: images that the daemon may use and could not open.

One message on a socket of its own (SOCK_SEQPACKET, which keeps messages whole): JSON `{"ticket": UUID, "name": …,
"files": N}` with N descriptors, or with `"files": 0` to take the name back. The answer is `{"ok": true}` or
`{"error": …}`. They wait for the ticket of that id, which comes next, and are its own from then on: whoever else may
make tickets has no part in them, not even by another one of the same id, and they are closed when it is revoked. A
backend gets duplicates.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from hostagent.data.front import Front
from hostagent.errors import AgentError

MESSAGE_MOST = 64 * 1024
FILES_MOST = 201
"""The layers of the longest chain, and a map."""
HANDED = "handed"
"""Its name in Ticket.shared, and so in Opening.shared."""


class Handed:
    """What was handed over for one ticket, by name. Of a ticket that has ended nothing is left, nor comes."""

    def __init__(self) -> None:
        self._held: dict[str, list[int]] = {}
        self._closed = False
        self._lock = threading.Lock()

    def put(self, name: str, fds: list[int]) -> None:
        """Takes the descriptors. No descriptor takes the name back."""
        with self._lock:
            old = self._held.pop(name, [])
            if fds and not self._closed:
                self._held[name], fds = fds, []
        _close([*old, *fds])

    def claim(self, name: str) -> list[int]:
        """Duplicates, which are the caller's; AgentError not_found."""
        with self._lock:
            held = self._held.get(name)
            if held is None:
                raise AgentError("not_found", f"no image {name!r} was handed over for this ticket", field="url")
            found: list[int] = []
            try:
                for fd in held:
                    found.append(os.dup(fd))
            except OSError as error:
                _close(found)
                raise AgentError("limit", f"no descriptors are left: {error.strerror}") from error
            return found

    def close(self) -> None:
        with self._lock:
            held, self._held, self._closed = self._held, {}, True
        for fds in held.values():
            _close(fds)

    def __len__(self) -> int:
        return len(self._held)


class Descriptors:
    """What waits for its ticket: `most` names, for `patience` s each."""

    def __init__(self, most: int, patience: float) -> None:
        self._most = most
        self._patience = patience
        self._waiting: dict[str, tuple[Handed, float]] = {}
        self._lock = threading.Lock()

    def put(self, ticket: str, name: str, fds: list[int]) -> None:
        """Takes the descriptors."""
        with self._lock:
            if fds and sum(len(one) for one, _ in self._waiting.values()) >= self._most:
                _close(fds)
                raise AgentError("limit", f"{self._most} names wait for tickets already", remedy="take some back")
            handed, _ = self._waiting.get(ticket) or (Handed(), 0.0)
            handed.put(name, fds)
            if len(handed):
                self._waiting[ticket] = handed, time.monotonic()
            else:
                self._waiting.pop(ticket, None)

    def take(self, ticket: str) -> Handed:
        """What waited for this ticket, which is there now."""
        with self._lock:
            return self._waiting.pop(ticket, (Handed(), 0.0))[0]

    def look(self) -> None:
        """Close what was for tickets that did not come."""
        limit = time.monotonic() - self._patience
        with self._lock:
            late = [ticket for ticket, (_, since) in self._waiting.items() if since < limit]
            ended = [self._waiting.pop(ticket)[0] for ticket in late]
        for handed in ended:
            handed.close()


def claim(shared: Mapping[str, Any], name: str) -> list[int]:
    """What was handed over by that name for the ticket that shares these; AgentError not_found."""
    handed: Handed = shared.get(HANDED) or Handed()
    return handed.claim(name)


class Handover(Front):
    """Listens for the agent, and for nobody else: the socket is its own user's."""

    name = "handover"

    def __init__(self, listener: socket.socket, descriptors: Descriptors, timeout: float) -> None:
        super().__init__(listener, timeout)
        self._descriptors = descriptors

    def talk(self, sock: socket.socket) -> None:
        while (message := receive(sock)) is not None:
            text, fds = message
            try:
                found = json.loads(text)
                ticket, name, files = found["ticket"], found["name"], found["files"]
                if not all(isinstance(one, str) and 0 < len(one) <= 128 for one in (ticket, name)) or files != len(fds):
                    raise ValueError("ticket, name, files")
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                _close(fds)
                sock.sendall(json.dumps({"error": f"not understood: {error}"[:200]}).encode())
                continue
            try:
                self._descriptors.put(ticket, name, fds)
            except AgentError as error:
                sock.sendall(json.dumps({"error": error.message}).encode())
            else:
                sock.sendall(b'{"ok": true}')


def receive(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    """One message with its descriptors; None at the end."""
    fds = array.array("i")
    text, ancillary, flags, _ = sock.recvmsg(MESSAGE_MOST, socket.CMSG_SPACE(FILES_MOST * fds.itemsize))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        _close(list(fds))
        raise AgentError("limit", "a handover with too much in it")
    if not text:
        _close(list(fds))
        return None
    return text, list(fds)


def _close(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
