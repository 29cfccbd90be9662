"""http.client over a unix socket. A module of its own, because importing http.client takes longer than `--help`."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Collection
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

CONNECT_TIMEOUT = 5.0  # seconds; a unix socket connects at once, unless the agent's queue is full

__all__ = ["ForeignServer", "HTTPConnection", "HTTPException", "HTTPResponse", "UnixConnection"]


class ForeignServer(PermissionError):
    """Who listens on the socket is none of those who may: `uid`."""

    def __init__(self, uid: int) -> None:
        super().__init__(f"the agent is another user's (uid {uid})")
        self.uid = uid


class UnixConnection(HTTPConnection):
    """`owners`: the users whose server it may be; None lets it be anybody's."""

    def __init__(self, path: Path, *, timeout: float, owners: Collection[int] | None = None) -> None:
        super().__init__("hostagent", timeout=timeout)
        self._path = path
        self._answer_timeout = timeout
        self._owners = owners

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(min(CONNECT_TIMEOUT, self._answer_timeout))
        self.sock.connect(os.fspath(self._path))
        if self._owners is not None:
            found = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if (uid := struct.unpack("3i", found)[1]) not in self._owners:
                raise ForeignServer(uid)
        self.sock.settimeout(self._answer_timeout)
