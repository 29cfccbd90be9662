"""CloudStack's image server, for its agent and its clients: another control front, and two more requests.

Transfers are registered as one line of JSON on a unix socket, answered by one: `{"action": "register", "transfer_id":
…, "config": {…}}`, `unregister`, `status`. Each is a ticket like any other, with that server's notion of time: it is
over when nothing has run for `idle_timeout_seconds`, and never while something runs; to unregister waits for what runs.
Clients find what they find there: `POST /images/{id}/flush`, and a PATCH with a Range that writes it.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from hostagent.data import answers
from hostagent.data.connection import Connection
from hostagent.data.errors import HttpError
from hostagent.data.front import Front
from hostagent.data.images import Answerer
from hostagent.data.ranges import parse_range
from hostagent.data.ticket import Spec, read_object
from hostagent.data.tickets import Tickets
from hostagent.data.uploads import Uploads
from hostagent.data.wire import Request
from hostagent.errors import AgentError

IDLE, LONGEST = 600, 86400
"""Seconds: what a transfer gets that names no time, and what one gets that names none above 0."""
_LINE_MOST = 4096
_NAME = re.compile(r"[A-Za-z0-9._~:@-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Settings:
    """Seconds: for a line, for what runs when a transfer is unregistered (`drain`, then `revoke`)."""

    line: float
    drain: float
    revoke: float
    inactivity: int


class CloudStack(Front):
    """The socket. `usable` raises AgentError for an image that no backend serves."""

    name = "cloudstack"

    def __init__(
        self, listener: socket.socket, tickets: Tickets, usable: Callable[[Spec], None], settings: Settings
    ) -> None:
        super().__init__(listener, settings.line)
        self._tickets = tickets
        self._usable = usable
        self._settings = settings

    def talk(self, sock: socket.socket) -> None:
        sock.sendall(json.dumps(self.answer(_line(sock))).encode() + b"\n")

    def answer(self, line: bytes) -> dict[str, Any]:
        try:
            found = read_object(line, "not a JSON object", 4)
            action = found.get("action")
            if action == "register":
                self._register(found)
            elif action == "unregister":
                ticket_id = _transfer_id(found)
                self._tickets.remove(ticket_id, self._settings.revoke, "cloudstack", drain=self._settings.drain)
            elif action != "status":
                raise HttpError(400, f"unknown action: {str(action)[:100]}")
        except (HttpError, AgentError) as error:
            return {"status": "error", "message": error.message}
        return {"status": "ok", "active_transfers": len(self._tickets.all())}

    def _register(self, found: dict[str, Any]) -> None:
        spec = spec_of(_transfer_id(found), found.get("config"), self._settings.inactivity)
        self._usable(spec)
        self._tickets.add(spec, self._settings.revoke, "cloudstack")


def spec_of(transfer_id: str, config: object, inactivity: int) -> Spec:
    """A ticket of CloudStack's config; HttpError 400, naming what is wrong."""
    if not isinstance(config, dict):
        raise HttpError(400, "config: expecting an object")
    backend = config.get("backend", "nbd")
    bitmap = _text(config, "export_bitmap", None)
    if backend == "nbd":
        socket_path, export = _path(config, "socket"), _text(config, "export", None) or ""
        url = f"nbd+unix:///{quote(export, safe='')}?socket={quote(socket_path, safe='/')}"
    elif backend == "file":
        url = "file://" + quote(_path(config, "file"), safe="/")
    else:
        raise HttpError(400, f"config: unknown backend: {str(backend)[:100]}")
    idle = config.get("idle_timeout_seconds", IDLE)
    if isinstance(idle, bool) or not isinstance(idle, int):
        raise HttpError(400, "config: idle_timeout_seconds: expecting a whole number")
    return Spec(
        uuid=transfer_id,
        size=2**63 - 1,
        ops=("read", "write"),
        timeout=min(idle, LONGEST) if idle >= 1 else LONGEST,
        url=url,
        inactivity_timeout=inactivity,
        dirty=True,
        bitmap=bitmap,
        dirty_fallback=True,
        drains=True,
    )


def _transfer_id(found: dict[str, Any]) -> str:
    transfer_id = found.get("transfer_id")
    if not isinstance(transfer_id, str) or not _NAME.fullmatch(transfer_id) or transfer_id in (".", ".."):
        raise HttpError(400, "transfer_id: expecting one path component of 1 to 128 plain characters")
    return transfer_id


def _text(config: dict[str, Any], name: str, default: str | None) -> str | None:
    value = config.get(name, default)
    if value is not None and (not isinstance(value, str) or len(value) > 1024):
        raise HttpError(400, f"config: {name}: expecting text")
    return value


def _path(config: dict[str, Any], name: str) -> str:
    value = _text(config, name, None)
    if not value or not value.startswith("/") or ".." in value.split("/") or "\0" in value:
        raise HttpError(400, f"config: {name}: expecting an absolute path without '..'")
    return value


def _line(sock: socket.socket) -> bytes:
    """Up to the newline, or the end of what is sent."""
    found = bytearray()
    while b"\n" not in found and len(found) <= _LINE_MOST:
        piece = sock.recv(_LINE_MOST)
        if not piece:
            break
        found += piece
    return bytes(found.partition(b"\n")[0][: _LINE_MOST + 1])


class Forms:
    """Requests that only this dialect has, below /images/{id}."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads

    def add_to(self, routes: dict[str, dict[str, Answerer]]) -> None:
        routes["flush"] = {"POST": self._flush}
        routes[""]["PATCH"] = self._patch

    def _flush(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        self._uploads.flush(request, connection, ticket_id)
        return connection.reply(request, answers.of_json({"ok": True}))

    def _patch(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        """A Range and bytes write these; anything else is the zero and flush of both dialects."""
        if "range" not in request.headers or "json" in request.headers.get("content-type", ""):
            return self._uploads.patch(request, connection, ticket_id)
        asked = parse_range(request.headers["range"])
        if asked.first is None or asked.last is None:
            raise HttpError(400, "Range: expecting bytes=FIRST-LAST", close=True)
        length = asked.last - asked.first + 1
        if request.length != length:
            raise HttpError(400, f"Range has {length} bytes, and the body {request.length}", close=True)
        written = self._uploads.write(request, connection, ticket_id, offset=asked.first, length=length, flush=False)
        return connection.reply(request, answers.of_json({"ok": True, "bytes_written": written}))
