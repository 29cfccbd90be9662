"""What the agent says to the data daemon: its control socket, and the one on which descriptors are handed over.

Blocking, for a worker thread; every call ends within its timeout.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hostagent.errors import AgentError
from hostagent.unix_http import HTTPException, UnixConnection

_ANSWER_MOST = 1 << 20


class Control:
    """`revoke` (s) is the longest that the daemon takes to end what a ticket runs (data.revoke_timeout)."""

    def __init__(self, control: Path, handover: Path, *, timeout: float, revoke: float) -> None:
        self._control = control
        self._handover = handover
        self._timeout = timeout
        self._revoke = revoke

    def health(self) -> dict[str, Any]:
        """`status`, `pid`, `version`, `tickets` in use, `mark`. AgentError unavailable where nobody answers."""
        found = self._call("GET", "/healthz")
        if not isinstance(found, dict) or not isinstance(found.get("pid"), int):
            raise AgentError("unavailable", "what answers is no data daemon", remedy="see data.control_socket")
        return found

    def add(self, ticket: Mapping[str, Any]) -> None:
        self._call("PUT", _path(str(ticket["uuid"])), ticket)

    def show(self, ticket_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._call("GET", _path(ticket_id))
        return found

    def extend(self, ticket_id: str, timeout: int) -> None:
        self._call("PATCH", _path(ticket_id), {"timeout": timeout})

    def remove(self, ticket_id: str) -> None:
        """When this returns nobody uses the ticket any more. AgentError conflict when that is not so."""
        self._call("DELETE", _path(ticket_id))

    def hand_over(self, ticket_id: str, name: str, fds: Sequence[int]) -> None:
        """The daemon gets duplicates of these for a ticket of a new id that is added next, under `name`: `fd:NAME` is
        the URL of an image of one file. They go with the ticket. None takes the name back, until that is there."""
        message = json.dumps({"ticket": ticket_id, "name": name, "files": len(fds)}).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(self._timeout)
                sock.connect(str(self._handover))
                socket.send_fds(sock, [message], list(fds))
                answer = json.loads(sock.recv(65536) or b"{}")
        except (OSError, ValueError) as error:
            raise _away(error) from error
        if not answer.get("ok"):
            raise AgentError("conflict", f"the data daemon did not take the image: {answer.get('error', 'no answer')}")

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        connection = UnixConnection(self._control, timeout=self._timeout + self._revoke)
        try:
            connection.request(method, path, body=None if body is None else json.dumps(body).encode())
            response = connection.getresponse()
            text = response.read(_ANSWER_MOST)
        except (OSError, HTTPException) as error:
            raise _away(error) from error
        finally:
            connection.close()
        if response.status >= 400:
            code = {404: "not_found", 409: "conflict", 429: "limit"}.get(response.status, "invalid")
            raise AgentError(code, f"the data daemon says: {text.decode('utf-8', 'replace').strip()[:500]}")
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise AgentError("unavailable", "the data daemon answers what is no JSON", remedy="see its log") from error


def _path(ticket_id: str) -> str:
    return "/tickets/" + quote(ticket_id, safe="")


def _away(error: Exception) -> AgentError:
    remedy = "see `hostagent status`, and data.start in the settings"
    return AgentError("unavailable", f"the data daemon does not answer: {error or type(error).__name__}", remedy=remedy)
