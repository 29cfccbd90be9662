"""What is refused, and whose fault the log and the metrics say that it is."""

from __future__ import annotations

import logging
import socket
from typing import Any

import pytest

from hostagent.data.connection import Connection, Patience
from hostagent.data.errors import HttpError


class Refusing:
    """A handler that answers with an error of `status`."""

    def __init__(self, status: int) -> None:
        self._status = status

    def handle(self, request: Any, connection: Connection) -> bool:
        raise HttpError(self._status, "no")

    def headers(self, request: Any) -> list[tuple[str, str]]:
        return []


@pytest.mark.parametrize(
    ("version", "status", "counted", "level"),
    [
        ("3.7", 505, "refused", logging.DEBUG),
        ("1.1", 501, "refused", logging.DEBUG),
        ("1.1", 404, "refused", logging.DEBUG),
        ("1.1", 500, "failed", logging.WARNING),
        ("1.1", 503, "failed", logging.WARNING),
    ],
)
def test_what_a_client_does_wrong_is_no_warning(
    caplog: pytest.LogCaptureFixture, version: str, status: int, counted: str, level: int
) -> None:
    caplog.set_level(logging.DEBUG, logger="hostagent.data")
    ours, theirs = socket.socketpair()
    counts: list[str] = []
    with theirs:
        theirs.sendall(f"GET / HTTP/{version}\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        theirs.shutdown(socket.SHUT_WR)
        patience = Patience(handshake=5, header=5, idle=5)
        Connection(ours, Refusing(status), patience, tls=None, peer="test", count=counts.append).run()
        assert theirs.recv(12) == f"HTTP/1.1 {status}".encode()
    assert counts == [counted]
    assert [record.levelno for record in caplog.records if record.message == "refused"] == [level]
