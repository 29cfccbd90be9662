"""What a request may cost, decided before anything parses it.

A body is read whole, under a size and a time limit, and must be JSON that means one thing only: not nested deeper than
the limit, no key twice in an object, no NaN. What passes is handed on as one message. The nesting is counted on the
bytes, because a parser that recurses is what the limit protects.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hostagent.api import problem
from hostagent.api.gate import PEER_KEY
from hostagent.api.peer import NOBODY, Peer, Places
from hostagent.errors import AgentError

_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)  # a string whole, or one bracket


MOST_DIGITS = 1000
"""Of a whole number: of fewer it is said which field they are in."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Named as in the configuration's [api] section."""

    max_body: int
    max_json_depth: int
    body_timeout: float
    max_connections: int


class Limits:
    """ASGI middleware. A request that is over a limit is answered here; the application never sees it. `told` hears of
    those that were too many at once."""

    def __init__(self, app: ASGIApp, limits: RequestLimits, told: Callable[[str], None]) -> None:
        self._app = app
        self._told = told
        self._limits = limits
        self._places = Places(limits.max_connections)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        peer: Peer = scope.get(PEER_KEY, NOBODY)
        if not self._places.take(peer):
            self._told("requests")
            await problem.answer("limit", "too many requests at once", field="api.max_connections")(
                scope, receive, send
            )
            return
        try:
            await self._run(scope, receive, send)
        finally:
            self._places.leave(peer)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value for name, value in scope["headers"]}
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        try:
            if b"content-length" in headers and b"transfer-encoding" in headers:
                message = "two lengths of one body: somebody between us may have taken another one"
                raise AgentError("invalid", message, field="content-length", remedy="leave one of them out")
            body = await self._body(receive, headers)
            if body:
                require_json_type(headers.get(b"content-type", b""))
                check_json(body, depth=self._limits.max_json_depth)
        except AgentError as error:
            # The rest of the body may never come: the connection is of no further use.
            refusal = problem.of_error(error)
            refusal.headers["connection"] = "close"
            await refusal(scope, receive, send)
            return
        except ClientGone:
            return
        await self._app(scope, replayed(body, receive), send)

    async def _body(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced[:20]) > self._limits.max_body:
            self._refuse_size()
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                return await self._collect(receive)
        except TimeoutError:
            raise AgentError(
                "timeout",
                f"the request's body did not arrive within {self._limits.body_timeout:g} s",
                field="api.body_timeout",
            ) from None

    async def _collect(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > self._limits.max_body:
                self._refuse_size()
            if not message.get("more_body", False):
                return bytes(body)

    def _refuse_size(self) -> NoReturn:
        raise AgentError(
            "too_large", f"the request's body is larger than {self._limits.max_body} bytes", field="api.max_body"
        )


class ClientGone(Exception):
    """The client left before its request was complete: nobody is there to answer."""


def replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that first gives the body that was read, then what the connection says."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again


def require_json_type(content_type: bytes) -> None:
    media_type = content_type.split(b";")[0].strip().lower()
    if media_type != b"application/json":
        shown = content_type[:100].decode("latin-1")
        raise AgentError(
            "invalid",
            f"the body's content type is {shown!r}, not application/json",
            field="content-type",
            remedy="send the header 'content-type: application/json'",
        )


def check_json(body: bytes, *, depth: int) -> None:
    """Refuse what is no JSON, is nested too deeply, or says the same key twice. Only UTF-8 counts as JSON here."""
    if nesting(body) > depth:
        raise AgentError("invalid", f"the JSON is nested deeper than {depth} levels", field="api.max_json_depth")
    try:
        json.loads(
            body.decode(), object_pairs_hook=_each_key_once, parse_constant=_no_constant, parse_int=_some_digits
        )
    except ValueError as error:
        raise AgentError("invalid", f"the body is not JSON: {error}", field="body") from None


def nesting(body: bytes) -> int:
    """How deep arrays and objects go, without parsing. Brackets inside strings do not count."""
    level = deepest = 0
    for token in _STRUCTURE.finditer(body):
        match token.group()[:1]:
            case b"[" | b"{":
                level += 1
                deepest = max(deepest, level)
            case b"]" | b"}":
                level -= 1
    return deepest


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise AgentError("invalid", f"{key[:64]!r} stands twice in one object", field=key[:64])
        found[key] = value
    return found


def _some_digits(number: str) -> int:
    """Python itself refuses very long ones, in words of its own; and takes long for long ones."""
    if len(number) > MOST_DIGITS:
        message, remedy = f"a number of {len(number)} characters is too large", f"{MOST_DIGITS} at most"
        raise AgentError("invalid", message, field="body", value=f"{number[:20]}…", remedy=remedy)
    return int(number)


def _no_constant(name: str) -> NoReturn:
    raise AgentError("invalid", f"{name} is not JSON", field="body", value=name)
