"""The requests of clients: /images/{ticket} and what lies below it, and /info/.

The order is always the same: what the request itself has wrong, the ticket, the image, what the request has wrong for
this image; then the operation, which the ticket can stop at any moment. Nothing of an answer is sent before all that
can be refused was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hostagent import __version__
from hostagent.data import access, answers
from hostagent.data.access import Access
from hostagent.data.connection import Connection
from hostagent.data.downloads import Downloads
from hostagent.data.errors import HttpError
from hostagent.data.uploads import Uploads
from hostagent.data.wire import Request

Answerer = Callable[[Request, Connection, str], bool]
"""Answers a request for the ticket of that id; whether the connection may be kept."""

_METHODS = ("OPTIONS", "GET", "HEAD", "PUT", "PATCH", "POST", "DELETE")


class Images:
    """`unix_socket` is where clients on this host find the same; "" for nowhere."""

    def __init__(self, access: Access, downloads: Downloads, uploads: Uploads, unix_socket: str) -> None:
        self._access = access
        self._unix_socket = unix_socket
        self.routes: dict[str, dict[str, Answerer]] = {
            "": {
                "OPTIONS": self._options,
                "GET": downloads.get,
                "HEAD": downloads.get,
                "PUT": uploads.put,
                "PATCH": uploads.patch,
            },
            "extents": {"GET": downloads.extents},
            "checksum": {"GET": downloads.checksum},
            "checksum/algorithms": {"GET": downloads.algorithms},
            "progress": {"GET": uploads.progress},
        }

    def headers(self, request: Request) -> list[tuple[str, str]]:
        _, ticket_id, rest = _split(request.path)
        return answers.cors(request) if ticket_id is None or rest == "" else []

    def handle(self, request: Request, connection: Connection) -> bool:
        if request.method not in _METHODS:
            raise HttpError(405, f"Invalid method {request.method[:20]!r}")
        known, ticket_id, rest = _split(request.path)
        routes = self.routes.get(rest) if known else None
        if routes is None:
            raise HttpError(404, "No handler for this path")
        if ticket_id is None:
            return self._info(request, connection)
        found = routes.get(request.method)
        if found is None:
            allow = ",".join(sorted(routes))
            raise HttpError(405, f"Method {request.method!r} not defined for this path", headers=(("allow", allow),))
        if not ticket_id:
            raise HttpError(400, "Ticket id is required")
        return found(request, connection, ticket_id)

    def _info(self, request: Request, connection: Connection) -> bool:
        if request.method not in ("GET", "OPTIONS", "HEAD"):
            raise HttpError(405, f"Method {request.method!r} not defined for '/info/'", headers=(("allow", "GET"),))
        return connection.reply(request, answers.of_json({"version": __version__}, headers=answers.cors(request)))

    def _options(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        found: dict[str, Any] = {"unix_socket": self._unix_socket} if self._unix_socket else {}
        if ticket_id == "*":
            found["features"] = ["checksum", "extents", "flush", "zero"]
            return self._allowed(request, connection, "OPTIONS,GET,PUT,PATCH", found)
        ticket = self._access.tickets.use(ticket_id, None)
        with self._access.opened(ticket, connection) as backend:
            writable = ticket.spec.writable and not backend.get_capabilities()["read_only"]
            found |= {
                "features": ["checksum", "extents", *(["flush", "zero"] if writable else [])],
                "max_readers": backend.max_readers,
                "max_writers": backend.max_writers,
                "size": access.size(ticket, backend),
                "block_size": backend.block_size,
                "generation": ticket.etag,
            }
        ticket.succeeded()
        return self._allowed(request, connection, "OPTIONS,GET,PUT,PATCH" if writable else "OPTIONS,GET", found)

    def _allowed(self, request: Request, connection: Connection, allow: str, found: dict[str, Any]) -> bool:
        headers = (("allow", allow), *answers.cors(request))
        return connection.reply(request, answers.of_json(found, headers=headers))


def _split(path: str) -> tuple[bool, str | None, str]:
    """Whether there is such a path; the ticket's id (None for /info/), and what is asked of it."""
    if path == "/info/":
        return True, None, ""
    if not path.startswith("/images/"):
        return False, None, ""
    ticket_id, _, rest = path.removeprefix("/images/").partition("/")
    return True, ticket_id, rest
