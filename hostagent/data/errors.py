"""An answer that is an error. What a backend raises becomes one by the table of codes (hostagent.errors)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from hostagent.errors import CODES, AgentError

_PLACE = re.compile(r"""'/[^']*'|"/[^"]*"|(?<![\w/])/[^\s,;'"]+""")

Headers = Sequence[tuple[str, str]]


class HttpError(Exception):
    """`close`: nothing more is read of this connection."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "",
        remedy: str | None = None,
        headers: Headers = (),
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or _code_of(status)
        self.remedy = remedy
        self.headers = headers
        self.close = close


def is_ours(status: int) -> bool:
    """Whether a failure is this side's. Of what a client asks for, 501 and 505 say that it is not spoken here."""
    return status >= 500 and status not in (501, 505)


def from_agent(error: AgentError, *, hidden: str = "") -> HttpError:
    """`hidden`: the URL of the image, for an answer to who only holds a ticket: where it is on this host, and what else
    is there, is none of a client's business."""
    code = CODES.get(error.code, CODES["internal"])
    headers: Headers = ()
    if error.code == "range" and "size" in error.details:
        headers = (("content-range", f"bytes */{error.details['size']}"),)
    message, remedy = error.message, error.remedy
    if hidden:
        message, remedy = _unplaced(message, hidden), remedy and _unplaced(remedy, hidden)
    return HttpError(code.http, message, code=error.code, remedy=remedy, headers=headers)


def _unplaced(text: str, url: str) -> str:
    for known in (url, unquote(urlsplit(url).path)):
        if len(known) > 1:
            text = text.replace(known, "the image")
    return _PLACE.sub("the image", text)


def not_allowed(why: str) -> HttpError:
    """403 as the dialect words it. The connection closes: a client that goes on would be refused again."""
    return HttpError(403, f"You are not allowed to access this resource: {why}", code="denied", close=True)


_CODES = {
    400: "invalid",
    403: "denied",
    404: "not_found",
    405: "not_supported",
    408: "timeout",
    409: "conflict",
    411: "invalid",
    412: "conflict",
    413: "too_large",
    414: "too_large",
    416: "range",
    417: "not_supported",
    429: "limit",
    431: "too_large",
    501: "not_supported",
    503: "unavailable",
    505: "not_supported",
}


def _code_of(status: int) -> str:
    return _CODES.get(status, "internal")
