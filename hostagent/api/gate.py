"""Who asks, and whether they may: decided for each request before any of its body is looked at.

A request has an id, its own (`X-Request-ID`) or one that is made here. It stands in the answer, in problems, and in the
lines of the log and the audit that are written for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from hostagent import calls
from hostagent.api import problem, scopes
from hostagent.api.audited import Tell
from hostagent.api.peer import Peer
from hostagent.errors import AgentError
from hostagent.tokens import Scope

CONNECTION_KEY = "hostagent.connection"
PEER_KEY = "hostagent.peer"
ROUTE_KEY = "hostagent.route"
"""In the ASGI scope: the route that the caller was judged by."""

_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
REALM = "hostagent"
PASSING = 2.0
"""Seconds that the body of a refused request may take."""
WINDOW = 60.0
"""Seconds in which failed authentications are counted, and after which it makes sense to come back."""


class Connection(Protocol):
    """What the gate knows of a connection. `surface` is unix or tcp, `origin` where it comes from, `who` is there as
    long as nobody has shown an identity."""

    surface: str
    origin: str
    who: str

    async def identify(self, headers: Sequence[tuple[bytes, bytes]], needed: Scope) -> Peer:
        """Who sends a request with these headers, for what takes the scope `needed`. AgentError: one who may not even
        ask."""


class RequestIds:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        call = calls.Call(_id_of(scope.get("headers", ())))

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", call.id.encode())]
            await send(message)

        with calls.serving(call):
            await self._app(scope, receive, named)


class Gate:
    """ASGI middleware. `told` hears why somebody was turned away, `audit` what they were kept from changing. Bodies
    have at most `max_body` bytes."""

    def __init__(self, app: ASGIApp, told: Callable[[str], None], audit: Tell, max_body: int) -> None:
        self._app = app
        self._told = told
        self._audit = audit
        self._max_body = max_body

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        try:
            await self._admit(scope)
        except AgentError as error:
            refusal = problem.of_error(error)
            refusal.headers["connection"] = "close"
            if challenge := _challenge(error):
                refusal.headers["www-authenticate"] = challenge
            if error.code == "limit":
                refusal.headers["retry-after"] = f"{WINDOW:.0f}"
            await self._let_pass(scope, receive)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _let_pass(self, scope: AsgiScope, receive: Receive) -> None:
        """Wait, not for long, for the end of a body that is on its way. Whose connection is closed while he sends sees
        a broken pipe, and not why he was refused."""
        headers = dict(scope["headers"])
        if b"expect" in headers or not (b"content-length" in headers or b"transfer-encoding" in headers):
            return
        left = self._max_body
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PASSING):
                while left > 0:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return
                    left -= len(message.get("body", b""))

    async def _admit(self, scope: AsgiScope) -> None:
        connection: Connection = scope[CONNECTION_KEY]
        found = scopes.find(scope["method"], scope["path"])
        call = calls.present()
        assert call is not None
        call.surface, call.origin, call.who = connection.surface, connection.origin, connection.who
        try:
            peer = await connection.identify(scope["headers"], found.rule.scope)
            call.who = peer.who
            if peer.scope < found.rule.scope:
                raise self._refused(peer, found.rule.scope)
        except AgentError as error:
            if found.rule.changes:
                self._audit(f"{scope['method']} {found.path}", error.code)
            raise
        scope[PEER_KEY] = peer
        scope[ROUTE_KEY] = found.path

    def _refused(self, peer: Peer, needed: Scope) -> AgentError:
        if peer.remote is None:
            message = "only root and the agent's own user may do that"
            return AgentError("denied", message, remedy="ask as root", scope=needed.word)
        self._told("scope")
        has = f"has the scope {peer.scope.word}" if peer.scope else "has no scope"
        remedy = f"ask with an identity that has {needed.word}"
        if peer.remote.name.startswith("certificate"):
            remedy += f", or add {peer.remote.name.partition(' ')[2]}={needed.word} to api.certificate_scopes"
        message = f"{peer.remote.name} {has}; that needs {needed.word}"
        return AgentError("denied", message, field="scope", value=peer.scope.word, remedy=remedy, scope=needed.word)


def _challenge(error: AgentError) -> str | None:
    """WWW-Authenticate (RFC 6750, 3): without an error where nothing was shown."""
    if error.field == "scope":
        return f'Bearer realm="{REALM}", error="insufficient_scope", scope="{error.details["scope"]}"'
    if error.code != "unauthenticated":
        return None
    return f'Bearer realm="{REALM}"' + ("" if error.details.get("nothing_shown") else ', error="invalid_token"')


def _id_of(headers: Sequence[tuple[bytes, bytes]]) -> str:
    given = [value for name, value in headers if name == b"x-request-id"]
    if len(given) == 1 and _ID.fullmatch(given[0]):
        return given[0].decode()
    return uuid.uuid4().hex
