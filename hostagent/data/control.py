"""The control socket: tickets are added, extended, shown and revoked here, by whoever may connect to it.

ovirt-imageio's tickets API, with a list beside it; and the daemon's health and metrics, which are nobody's on the port
that clients reach.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from hostagent import __version__
from hostagent.data import answers, ticket
from hostagent.data.answers import Answer
from hostagent.data.connection import Connection
from hostagent.data.errors import HttpError
from hostagent.data.metrics import CONTENT_TYPE, Metrics
from hostagent.data.tickets import Tickets, described
from hostagent.data.wire import Request
from hostagent.errors import AgentError


@dataclass(frozen=True, slots=True)
class ControlBounds:
    """`revoke_timeout`: seconds that what a ticket runs gets to end. `body`: bytes of a ticket's JSON."""

    revoke_timeout: float
    body: int
    inactivity_timeout: int
    listed: int = 1000


class Control:
    """`usable` raises AgentError (invalid, denied) for a ticket whose image no backend serves; `mark` is told as is."""

    def __init__(
        self,
        tickets: Tickets,
        metrics: Metrics,
        bounds: ControlBounds,
        usable: Callable[[ticket.Spec], None],
        mark: str,
    ) -> None:
        self._mark = mark
        self._tickets = tickets
        self._usable = usable
        self._metrics = metrics
        self._bounds = bounds

    def headers(self, request: Request) -> list[tuple[str, str]]:
        return []

    def handle(self, request: Request, connection: Connection) -> bool:
        if request.path.startswith("/tickets/"):
            ticket_id = request.path.removeprefix("/tickets/")
            verbs = {"GET": self._show, "PUT": self._put, "PATCH": self._extend, "DELETE": self._delete}
            if request.method not in verbs:
                allow = (("allow", ",".join(sorted(verbs))),)
                raise HttpError(405, f"Method {request.method[:20]!r} not defined for '/tickets/'", headers=allow)
            return connection.reply(request, verbs[request.method](request, ticket_id, connection.peer))
        if request.method == "GET" and request.path == "/metrics":
            body = self._metrics.text()
            return connection.reply(request, Answer(200, body, (("content-type", CONTENT_TYPE),)))
        if request.method == "GET" and request.path == "/healthz":
            found = {"status": "ok", "version": __version__, "pid": os.getpid(), "tickets": self._tickets.in_use()}
            found["mark"] = self._mark
            return connection.reply(request, answers.of_json(found))
        raise HttpError(404, "No handler for this path")

    def _show(self, request: Request, ticket_id: str, by: str) -> Answer:
        if not ticket_id:
            return self._list(request)
        found = self._tickets.get(ticket_id)
        if found is None:
            raise HttpError(404, "No such ticket")
        return answers.of_json(described(found))

    def _list(self, request: Request) -> Answer:
        after = request.query.get("after", "")
        every = sorted(self._tickets.all(), key=lambda one: one.spec.uuid)
        page = [one for one in every if one.spec.uuid > after][: self._bounds.listed]
        return answers.of_json([described(one) for one in page])

    def _put(self, request: Request, ticket_id: str, by: str) -> Answer:
        body = request.body.all(self._bounds.body)
        if not ticket_id:
            raise HttpError(400, "Ticket id is required")
        spec = ticket.parse(body, ticket_id, self._bounds.inactivity_timeout)
        try:
            self._usable(spec)
        except AgentError as error:
            if error.code == "invalid":
                raise ticket.invalid("url", spec.url, error.message) from error
            if error.code == "denied":
                raise
        self._tickets.add(spec, self._bounds.revoke_timeout, by)
        return Answer(200)

    def _extend(self, request: Request, ticket_id: str, by: str) -> Answer:
        body = request.body.all(self._bounds.body)
        if not ticket_id:
            raise HttpError(400, "Ticket id is required")
        self._tickets.extend(ticket_id, ticket.timeout_of(body), by)
        return Answer(200)

    def _delete(self, request: Request, ticket_id: str, by: str) -> Answer:
        if ticket_id:
            self._tickets.remove(ticket_id, self._bounds.revoke_timeout, by)
        else:
            self._tickets.clear(self._bounds.revoke_timeout, by)
        return Answer(204)
