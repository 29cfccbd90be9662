"""Descriptors that the agent hands over: images that the daemon may use and could not open.

One message on a socket of its own (SOCK_SEQPACKET, which keeps messages whole): JSON `{"name": …, "files": N}` with N
descriptors, or `{"name": …, "files": 0}` to take the name back. The answer is `{"ok": true}` or `{"error": …}`. A
backend gets a duplicate, so that what is taken back ends with the last transfer that uses it.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import threading

from hostagent.data.front import Front
from hostagent.errors import AgentError

MESSAGE_MOST = 64 * 1024
FILES_MOST = 201
"""The layers of the longest chain, and a map."""


class Descriptors:
    """What was handed over, by name; `most` names."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def put(self, name: str, fds: list[int]) -> None:
        """Takes the descriptors. No descriptor takes the name back."""
        with self._lock:
            if fds and name not in self._held and len(self._held) >= self._most:
                _close(fds)
                raise AgentError("limit", f"there are {self._most} names already", remedy="take some back")
            old = self._held.pop(name, [])
            if fds:
                self._held[name] = fds
        _close(old)

    def claim(self, name: str) -> list[int]:
        """Duplicates, which are the caller's; AgentError not_found."""
        with self._lock:
            held = self._held.get(name)
            if held is None:
                raise AgentError("not_found", f"no image {name!r} was handed over", field="url", value=f"fd:{name}")
            found: list[int] = []
            try:
                for fd in held:
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
                name, files = found["name"], found["files"]
                if not isinstance(name, str) or not 0 < len(name) <= 128 or files != len(fds):
                    raise ValueError("name, files")
            except (ValueError, LookupError, TypeError) as error:
                _close(fds)
                sock.sendall(json.dumps({"error": f"not understood: {error}"[:200]}).encode())
                continue
            try:
                self._descriptors.put(name, fds)
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
