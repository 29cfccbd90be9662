"""Answers of the data daemon: small ones whole, errors as the dialect words them, lists of unknown length in chunks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from hostagent.data.errors import HttpError
from hostagent.data.wire import Request, chunks, head
from hostagent.errors import CODES

Headers = Sequence[tuple[str, str]]

TEXT = ("content-type", "text/plain; charset=UTF-8")
JSON = ("content-type", "application/json")
PROBLEM = ("content-type", "application/problem+json")
_WHOLE_MOST = 256 * 1024
"""Bytes of a list that is sent with its length; a longer one is chunked."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`keep`: whether another request may follow on the connection."""

    status: int
    body: bytes = b""
    headers: Headers = ()
    keep: bool = True

    def encoded(self, *, keep: bool, bodiless: bool = False) -> bytes:
        headers = (*self.headers, ("content-length", str(len(self.body))))
        return head(self.status, headers, keep=keep and self.keep) + (b"" if bodiless else self.body)


def of_json(found: Any, status: int = 200, headers: Headers = ()) -> Answer:
    return Answer(status, json.dumps(found).encode(), (JSON, *headers))


def of_error(error: HttpError, request: Request | None, extra: Headers = ()) -> Answer:
    """Plain text as in the dialect, or problem details (RFC 9457) for who asks for them."""
    headers = [*error.headers, *extra]
    if request is not None and "application/problem+json" in request.headers.get("accept", ""):
        found: dict[str, Any] = {
            "type": f"urn:hostagent:problem:{error.code}",
            "title": CODES.get(error.code, CODES["internal"]).title,
            "status": error.status,
            "detail": error.message,
            "code": error.code,
        }
        if error.remedy:
            found["remedy"] = error.remedy
        return Answer(error.status, json.dumps(found).encode(), (PROBLEM, *headers), keep=not error.close)
    body = error.message + (f"\n{error.remedy}" if error.remedy else "") + "\n"
    return Answer(error.status, body.encode("utf-8", "replace"), (TEXT, *headers), keep=not error.close)


def json_list(pieces: Iterator[str], request: Request, *, keep: bool, headers: Headers = ()) -> Iterator[bytes]:
    """A JSON array of these objects, with its head: of known length if it is short, else chunked; to a client of
    HTTP/1.0 it ends with the connection."""
    blocks = _blocks(pieces)
    first = next(blocks)
    second = next(blocks, None)
    if second is None:
        yield head(200, (JSON, *headers, ("content-length", str(len(first)))), keep=keep) + first
        return
    body = itertools.chain((first, second), blocks)
    if request.old:
        yield head(200, (JSON, *headers), keep=False)
        yield from body
        return
    yield head(200, (JSON, *headers, ("transfer-encoding", "chunked")), keep=keep)
    yield from chunks(body)


def _blocks(pieces: Iterator[str]) -> Iterator[bytes]:
    block, size, separator = ["["], 0, ""
    for piece in pieces:
        block.append(separator + piece)
        separator = ", "
        size += len(piece) + 2
        if size >= _WHOLE_MOST:
            yield "".join(block).encode()
            block, size = [], 0
    block.append("]")
    yield "".join(block).encode()


def disposition(filename: str | None) -> str:
    """Content-Disposition (RFC 6266): a plain name for old clients, and the true one encoded (RFC 8187)."""
    if filename is None:
        return "attachment"
    filename = "".join(c if c.isprintable() else "_" for c in filename)
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\%/' else "_" for c in filename)
    if plain == filename:
        return f'attachment; filename="{plain}"'
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='', errors='replace')}"


def cors(request: Request) -> list[tuple[str, str]]:
    """What lets a page of the engine's use this daemon; `*` throughout: a ticket is the only right there is."""
    found = []
    if "origin" in request.headers:
        found.append(("access-control-allow-origin", "*"))
    if "access-control-request-headers" in request.headers:
        found.append(("access-control-allow-headers", "*"))
    if "access-control-request-method" in request.headers:
        methods = "OPTIONS,GET,PUT" if request.method == "OPTIONS" else "*"
        found.append(("access-control-allow-methods", methods))
    if found:
        found.append(("access-control-max-age", "86400"))
    return found
