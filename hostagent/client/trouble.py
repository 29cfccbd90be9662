"""What goes wrong with a server, as AgentError; and which of it is worth another try."""

from __future__ import annotations

import json
from http.client import HTTPMessage
from typing import Any

from hostagent.errors import CODES, AgentError
from hostagent.logs import escape

AGAIN = frozenset({408, 429, 502, 503, 504})
"""Statuses that say nothing about the next try. All others do: what was refused is refused again."""
_LONGEST = 300  # characters of a server's word


class Retry(AgentError):
    """It may well succeed the next time. `after`: seconds that the server asks to wait."""

    def __init__(self, code: str, message: str, *, remedy: str | None = None, after: float = 0.0) -> None:
        super().__init__(code, message, remedy=remedy)
        self.after = after


class Lost(Retry):
    """The connection is gone, or gave no answer. What was sent on it and not flushed may be gone, too."""


class Replaced(AgentError):
    """The server says that this is not the image that it was: nothing that was done counts."""


_CODES = {
    401: "denied", 403: "denied", 404: "not_found", 405: "not_supported", 408: "timeout", 409: "conflict",
    410: "not_found", 413: "too_large", 416: "range", 429: "limit", 501: "not_supported", 502: "unavailable",
    503: "unavailable", 504: "timeout", 507: "no_space",
}  # fmt: skip

_REMEDIES = {
    401: "the server wants to know who asks; see --certificate",
    403: "the ticket has expired, was cancelled, or does not allow this: ask for a new one, and run the same again",
    404: "see whether the URL is complete, and begins with the server's own /images/",
    405: "see whether this is the URL of an image on a data daemon",
    416: "the ticket covers fewer bytes than the image has: ask for one of the image's size",
    429: "use fewer --workers, or try again later",
    507: "make space where the server keeps the image, then run the same again: it goes on from there",
}


def refused(status: int, headers: HTTPMessage, body: bytes, what: str) -> AgentError:
    """The error that the server's answer is. `what` was asked for, in words."""
    said, code, remedy = _said(headers, body)
    if code not in CODES:
        code = _CODES.get(status, "invalid" if status < 500 else "io_error")
    message = f"{what}: the server answered {status}" + (f", {said}" if said else "")
    remedy = remedy or _REMEDIES.get(status)
    if status == 412:
        return Replaced("image_changed", message, remedy=remedy)
    if status in AGAIN:
        return Retry(code, message, remedy=remedy, after=_after(headers))
    return AgentError(code, message, remedy=remedy)


def _said(headers: HTTPMessage, body: bytes) -> tuple[str, str, str | None]:
    """The server's message, code and remedy; the last two are only in problem details (RFC 9457)."""
    kind = (headers.get("content-type") or "").partition(";")[0].strip()
    if kind in ("application/problem+json", "application/json"):
        found = decoded(body)
        if isinstance(found, dict):
            words = found.get("detail") or found.get("title") or ""
            return _text(words), str(found.get("code", "")), _text(found["remedy"]) if "remedy" in found else None
    return (_text(body.decode(errors="replace").split("\n", 1)[0]) if kind == "text/plain" else ""), "", None


def decoded(body: bytes) -> Any:
    """What the JSON says; None when it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _text(word: Any) -> str:
    return escape(str(word).strip())[:_LONGEST]


def _after(headers: HTTPMessage) -> float:
    value = headers.get("retry-after") or ""
    return float(value) if value.isascii() and value.isdigit() and len(value) < 6 else 0.0
