"""http.client over a unix socket. A module of its own, because importing http.client takes longer than `--help`."""

from __future__ import annotations

import os
import socket
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

CONNECT_TIMEOUT = 5.0  # seconds; a unix socket connects at once, unless the agent's queue is full

__all__ = ["HTTPException", "HTTPResponse", "UnixConnection"]


class UnixConnection(HTTPConnection):
    def __init__(self, path: Path, *, timeout: float) -> None:
        super().__init__("hostagent", timeout=timeout)
        self._path = path
        self._answer_timeout = timeout

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(min(CONNECT_TIMEOUT, self._answer_timeout))
        self.sock.connect(os.fspath(self._path))
        self.sock.settimeout(self._answer_timeout)
