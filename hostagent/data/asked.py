"""What a request for an image asks, and whether it makes sense; HttpError where it does not."""

from __future__ import annotations

from typing import Any

from hostagent.data.errors import HttpError
from hostagent.data.tickets import Ticket
from hostagent.data.wire import Request

_DIGITS_MOST = 40


def choice(request: Request, name: str, choices: tuple[str, ...], default: str) -> str:
    value = request.query.get(name, default)
    if value not in choices:
        message = f"Unsupported value {value[:100]!r} for {name!r}, expecting one of {list(choices)}"
        raise HttpError(400, message, close=request.length != 0)
    return value


def number(request: Request, name: str) -> int | None:
    value = request.query.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= _DIGITS_MOST):
        raise HttpError(400, f"Invalid value {value[:100]!r} for {name!r}, expecting a number of bytes")
    return int(value)


def block_size(request: Request, default: int) -> int:
    value = request.query.get("block_size", str(default))
    if not (value.isascii() and value.isdigit() and len(value) <= _DIGITS_MOST):
        raise HttpError(400, f"Invalid block size: {value[:100]!r}")
    return int(value)


def integer(body: dict[str, Any], name: str, default: int | None = None) -> int:
    value = body.get(name, default)
    if value is None:
        raise HttpError(400, f"Missing required value for {name!r}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise HttpError(400, f"Integer required {str(value)[:100]!r}")
    if value < 0:
        raise HttpError(400, f"Invalid value {value} < 0")
    return value


def closes(request: Request) -> bool:
    return request.query.get("close", "").lower() == "y"


def etag(ticket: Ticket) -> str:
    """Of the ticket and its image. Weak where that can change."""
    return f'W/"{ticket.etag}"' if ticket.spec.writable else f'"{ticket.etag}"'


def refuse_other(request: Request, ticket: Ticket) -> None:
    """412 for a ticket of another generation than If-Match names."""
    if not same_generation(request.headers.get("if-match"), ticket):
        raise HttpError(412, "The ticket is not the one that If-Match names", close=True)


def same_generation(value: str | None, ticket: Ticket) -> bool:
    """Whether an If-Match or If-Range, if there is one, names this ticket's generation."""
    if value is None:
        return True
    tags = {tag.strip().removeprefix("W/").strip('"') for tag in value.split(",")}
    return "*" in tags or ticket.etag in tags
