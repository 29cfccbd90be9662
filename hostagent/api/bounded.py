"""An HTTP connection with the bounds that uvicorn leaves open: the time that a client may take for the head of a
request, and the time that it may leave an answer unread. What cannot be said by the application is a problem, too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hostagent.api import problem
from hostagent.api.gate import CONNECTION_KEY, Connection

LAST = 0.5
"""Seconds that a connection without a request has at the server's end."""


class Known:
    """The application as one connection sees it: it is told which one that is."""

    def __init__(self, app: ASGIApp, connection: Connection) -> None:
        self._app = app
        self._connection = connection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[CONNECTION_KEY] = self._connection
        await self._app(scope, receive, send)


class Deadline:
    """Does one thing when it was started and not stopped in time. Starting it again does not move it."""

    def __init__(self, seconds: float, act: Callable[[], None]) -> None:
        self._seconds = seconds
        self._act = act
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._act)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class BoundedProtocol(H11Protocol):
    """`stall_timeout`: seconds for either."""

    stall_timeout: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._head = Deadline(self.stall_timeout, transport.abort)
        self._unread = Deadline(self.stall_timeout, transport.abort)
        super().connection_made(transport)
        self._head.start()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._head.start()
        else:  # the head of a request is complete
            self._head.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.stop()
        self._unread.stop()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Who has just been let in is about to ask, and would take an end for a refusal."""
        if self.cycle is None:
            asyncio.get_running_loop().call_later(LAST, super().shutdown)
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread.stop()

    def send_400_response(self, msg: str) -> None:
        self.transport.write(raw_answer("invalid", "that was not an HTTP request", field=None))
        self.transport.close()


def raw_answer(code: str, message: str, *, field: str | None) -> bytes:
    """An answer for a connection that never reaches the application."""
    status, body = problem.describe(code, message, field=field, remedy="try again later" if code == "limit" else None)
    body.pop("request_id", None)  # it would be another request's, whose end led to this one
    content = json.dumps(body).encode()
    head = (
        f"HTTP/1.1 {status} {body['title']}\r\ncontent-type: {problem.MEDIA_TYPE}\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + content
