"""Descriptors that the agent hands over: images that the daemon may use and could not open.

One message on a socket of its own (SOCK_SEQPACKET, which keeps messages whole): JSON `{"ticket": UUID, "name": …,
"files": N}` with N descriptors, or with `"files": 0` to take the name back. The answer is `{"ok": true}` or
`{"error": …}`. They are that ticket's alone, whoever else may make tickets, and go with it: so the ticket comes after
them, and soon. A backend gets a duplicate, so that what is taken back ends with the last transfer that uses it.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from hostagent.data.front import Front
from hostagent.errors import AgentError

MESSAGE_MOST = 64 * 1024
FILES_MOST = 201
"""The layers of the longest chain, and a map."""
MOMENT = 1.0
"""Seconds; a ticket that is given anew is not there for less."""


@dataclass(slots=True)
class _Held:
    """`since` when, on the monotonic clock, it is here, or its ticket was seen (`used`)."""

    fds: list[int]
    since: float
    used: bool = False


class Descriptors:
    """What was handed over, by ticket and name: `most` of them, for `patience` s without their ticket."""

    def __init__(self, most: int, patience: float) -> None:
        self._most = most
        self._patience = patience
        self._held: dict[tuple[str, str], _Held] = {}
        self._lock = threading.Lock()

    def put(self, ticket: str, name: str, fds: list[int]) -> None:
        """Takes the descriptors. No descriptor takes the name back."""
        key = (ticket, name)
        with self._lock:
            if fds and key not in self._held and len(self._held) >= self._most:
                _close(fds)
                raise AgentError("limit", f"there are {self._most} names already", remedy="take some back")
            old = self._held.pop(key, None)
            if fds:
                self._held[key] = _Held(fds, time.monotonic())
        if old is not None:
            _close(old.fds)

    def look(self, is_there: Callable[[str], bool]) -> None:
        """Close what was for tickets that have gone, or did not come."""
        now, ended = time.monotonic(), []
        with self._lock:
            for key, held in list(self._held.items()):
                if is_there(key[0]):
                    held.used, held.since = True, now
                elif now - held.since > (MOMENT if held.used else self._patience):
                    ended.append(self._held.pop(key))
        for held in ended:
            _close(held.fds)

    def claim(self, ticket: str, name: str) -> list[int]:
        """Duplicates, which are the caller's; AgentError not_found."""
        with self._lock:
            held = self._held.get((ticket, name))
            if held is None:
                message = f"no image {name!r} was handed over for this ticket"
                raise AgentError("not_found", message, field="url", value=f"fd:{name}")
            held.used, held.since = True, time.monotonic()
            found: list[int] = []
            try:
                for fd in held.fds:
                    found.append(os.dup(fd))
            except OSError as error:
                _close(found)
                raise AgentError("limit", f"no descriptors are left: {error.strerror}") from error
            return found


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
            except (ValueError, LookupError, TypeError) as error:
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
    return (text, list(fds)) if text else None


def _close(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
