"""The requests of clients: /images/{ticket}, its extents, checksum and progress, and /info/.

The order is always the same: what the request itself has wrong, the ticket, the image, what the request has wrong for
this image; then the operation, which the ticket can stop at any moment. Nothing of an answer is sent before all that
can be refused was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from hostagent import __version__
from hostagent.data import answers, checksum
from hostagent.data.answers import Answer
from hostagent.data.backends.base import DirtyExtent, Extent, ImageBackend, merged
from hostagent.data.backends.registry import Opening, Registry
from hostagent.data.connection import Connection
from hostagent.data.errors import HttpError, not_allowed
from hostagent.data.metered import Download, Stream, Upload
from hostagent.data.metrics import Metrics
from hostagent.data.ranges import parse_content_range, parse_range
from hostagent.data.ticket import Spec, read_object
from hostagent.data.tickets import Operation, Ticket, Tickets
from hostagent.data.wire import Request, head

ZERO_PIECE = 128 << 20
"""Bytes of one step of zeroing, between which a ticket can stop it: some storage really writes them."""
_METHODS = ("OPTIONS", "GET", "HEAD", "PUT", "PATCH", "POST", "DELETE")


@dataclass(frozen=True, slots=True)
class Bounds:
    """`turn_timeout`: seconds that a further reader or writer waits for its turn; `body` bytes of a PATCH."""

    turn_timeout: float
    body: int
    unix_socket: str = ""


class Images:
    """`forms`: further answers below /images/{id}/, by method and name (the CloudStack dialect has some)."""

    def __init__(self, tickets: Tickets, registry: Registry, metrics: Metrics, bounds: Bounds) -> None:
        self._tickets = tickets
        self._registry = registry
        self._metrics = metrics
        self._bounds = bounds
        self._routes: dict[str, dict[str, Callable[[Request, Connection, str], bool]]] = {
            "": {
                "OPTIONS": self._options,
                "GET": self._get,
                "HEAD": self._get,
                "PUT": self._put,
                "PATCH": self._patch,
            },
            "extents": {"GET": self._extents},
            "checksum": {"GET": self._checksum},
            "checksum/algorithms": {"GET": self._algorithms},
            "progress": {"GET": self._progress},
        }

    def headers(self, request: Request) -> list[tuple[str, str]]:
        _, ticket_id, rest = _split(request.path)
        return answers.cors(request) if ticket_id is None or rest == "" else []

    def handle(self, request: Request, connection: Connection) -> bool:
        if request.method not in _METHODS:
            raise HttpError(405, f"Invalid method {request.method[:20]!r}")
        known, ticket_id, rest = _split(request.path)
        if not known:
            raise HttpError(404, "No handler for this path")
        if ticket_id is None:
            return self._info(request, connection)
        routes = self._routes.get(rest)
        if routes is None:
            raise HttpError(404, "No handler for this path")
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

    # What can be done

    def _options(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        found: dict[str, Any] = {}
        if self._bounds.unix_socket:
            found["unix_socket"] = self._bounds.unix_socket
        if ticket_id == "*":
            found["features"] = ["checksum", "extents", "flush", "zero"]
            return self._allowed(request, connection, "OPTIONS,GET,PUT,PATCH", found)
        ticket = self._tickets.use(ticket_id, None)
        with self._opened(ticket, connection) as backend:
            writable = ticket.spec.writable and not backend.get_capabilities()["read_only"]
            found["features"] = ["checksum", "extents", *(["flush", "zero"] if writable else [])]
            found |= {"max_readers": backend.max_readers, "max_writers": backend.max_writers}
            found |= {"size": _size(ticket, backend), "block_size": backend.block_size, "generation": ticket.etag}
        ticket.succeeded()
        return self._allowed(request, connection, "OPTIONS,GET,PUT,PATCH" if writable else "OPTIONS,GET", found)

    def _allowed(self, request: Request, connection: Connection, allow: str, found: dict[str, Any]) -> bool:
        headers = (("allow", allow), *answers.cors(request))
        return connection.reply(request, answers.of_json(found, headers=headers))

    # Out

    def _get(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        asked = parse_range(request.headers["range"]) if "range" in request.headers else None
        ticket = self._tickets.use(ticket_id, "read")
        _refuse_other(request, ticket)
        if not _same_generation(request.headers.get("if-range"), ticket, default=True):
            asked = None
        keep = request.keep and not _closes(request)
        with self._opened(ticket, connection) as backend:
            size = _size(ticket, backend)
            offset, length = asked.within(size) if asked else (0, size)
            headers = [
                ("content-type", "application/octet-stream"),
                ("content-disposition", answers.disposition(ticket.spec.filename)),
                ("content-length", str(length)),
                ("accept-ranges", "bytes"),
                ("etag", _etag(ticket)),
                *answers.cors(request),
            ]
            if asked:
                headers.append(("content-range", f"bytes {offset}-{offset + length - 1}/{size}"))
            operation = Operation("read", offset, length)
            turn = connection.operation(ticket, operation, backend.max_readers, self._bounds.turn_timeout)
            with turn, backend.open_session() as session:
                keep = keep and request.body.drain()
                connection.answered = True
                connection.transport.send(head(206 if asked else 200, headers, keep=keep))
                if request.method == "GET" and length:
                    count = self._metrics.counted("download", backend)
                    session.copy_to(Download(connection.transport, ticket, operation, count), offset, length)
        ticket.succeeded()
        return keep

    def _extents(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        context = _choice(request, "context", ("dirty", "zero"), "zero")
        start, length = _number(request, "start"), _number(request, "length")
        ticket = self._tickets.use(ticket_id, "read")
        if context == "dirty" and not ticket.spec.dirty:
            raise HttpError(404, "Ticket does not support dirty extents")
        with self._opened(ticket, connection) as backend:
            size = _size(ticket, backend)
            start = start or 0
            if start > size or (length is not None and length > size - start):
                raise HttpError(416, f"Requested extents beyond the end of the image, which has {size} bytes")
            length = size - start if length is None else length
            found: Iterator[str]
            if context == "dirty":
                found = (_dirty_text(one) for one in merged(backend.dirty_extents(start, length)))
            elif backend.supports_extents:
                found = (_zero_text(one) for one in merged(backend.extents(start, length)))
            else:
                found = iter([_zero_text(Extent(start, length, False))] if length else [])
            with connection.operation(ticket, Operation("look"), _ANY, 0):
                keep = request.keep and request.body.drain()
                if request.method == "GET":
                    chunked = answers.json_list(_stoppable(found, ticket), request, keep=keep)
                    for block in chunked:
                        connection.answered = True
                        connection.transport.send(block)
        ticket.succeeded()
        return keep

    def _checksum(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        algorithm = request.query.get("algorithm", checksum.ALGORITHM)
        block_size = request.query.get("block_size", str(checksum.BLOCK_SIZE))
        asked = checksum.asked(algorithm, block_size)
        ticket = self._tickets.use(ticket_id, "read")
        with self._opened(ticket, connection) as backend:
            size = _size(ticket, backend)
            with connection.operation(ticket, Operation("look"), _ANY, 0):
                further = backend.max_readers > 1
                found = asked.of(backend, size, ticket.check, (lambda: self._open(ticket)) if further else None)
        ticket.succeeded()
        return connection.reply(request, answers.of_json(found))

    def _algorithms(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        return connection.reply(request, answers.of_json({"algorithms": list(checksum.ALGORITHMS)}))

    def _progress(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        """What a client that was interrupted need not send again."""
        ticket = self._tickets.use(ticket_id, None)
        with ticket.lock:
            durable = ticket.durable.pairs()
        found = {
            "size": ticket.spec.size,
            "generation": ticket.etag,
            "durable": [{"start": begin, "length": end - begin} for begin, end in durable],
        }
        return connection.reply(request, answers.of_json(found, headers=(("etag", _etag(ticket)),)))

    # In

    def _put(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        if request.length is not None and "content-length" not in request.headers:
            raise HttpError(400, "Content-Length header is required", close=True)
        offset, said = 0, None
        if "content-range" in request.headers:
            offset, said = parse_content_range(request.headers["content-range"])
        if said is not None and request.length is not None and said != request.length:
            raise HttpError(400, f"Content-Range has {said} bytes, and the body {request.length}", close=True)
        flush = _choice(request, "flush", ("n", "y"), "y") == "y"
        ticket = self._tickets.use(ticket_id, "write")
        _refuse_other(request, ticket)
        with self._writable(ticket, connection) as backend:
            size = _capacity(ticket, backend)
            length = said if request.length is None else request.length
            if offset > size or (length is not None and length > size - offset):
                message = f"Requested {length} bytes at {offset}, and the image has {size}"
                raise HttpError(416, message, headers=(("content-range", f"bytes */{size}"),), close=True)
            room = size - offset if length is None else length
            operation = Operation("write", offset, room)
            with connection.operation(ticket, operation, backend.max_writers, self._bounds.turn_timeout):
                source = Upload(request.body, ticket, operation, room, self._metrics.counted("upload", backend))
                ticket.writing(offset, offset + room)
                if backend.supports_range_write:
                    backend.write_from(source, offset, request.length)
                    ticket.wrote(offset, offset + operation.done)
                else:
                    self._whole(source, backend, request, operation, flush)
                if flush:
                    with ticket.flushing():
                        backend.flush()
        ticket.succeeded()
        headers = answers.cors(request)
        return connection.reply(request, Answer(200, headers=headers, keep=not _closes(request)))

    def _whole(
        self, source: Upload, backend: ImageBackend, request: Request, operation: Operation, flush: bool
    ) -> None:
        if request.length is None or operation.offset:
            raise HttpError(400, "This image can only be written whole, with a Content-Length", close=True)
        backend.write_full(cast(BinaryIO, Stream(source)), request.length, flush)

    def _patch(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        body = read_object(request.body.all(self._bounds.body), "Invalid JSON message", 4)
        op = body.get("op")
        if op is None:
            raise HttpError(400, "Missing required value for op")
        if op == "flush":
            return self._flush(request, connection, ticket_id)
        if op == "zero":
            return self._zero(request, connection, ticket_id, body)
        raise HttpError(400, f"Unsupported value {str(op)[:100]!r} for 'op', expecting one of ['flush', 'zero']")

    def _flush(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        ticket = self._tickets.use(ticket_id, "write")
        _refuse_other(request, ticket)
        with self._writable(ticket, connection) as backend:
            turn = connection.operation(ticket, Operation("look"), _ANY, 0)
            with turn, ticket.flushing():
                backend.flush()
        ticket.succeeded()
        return connection.reply(request, Answer(200))

    def _zero(self, request: Request, connection: Connection, ticket_id: str, body: dict[str, Any]) -> bool:
        length, offset = _integer(body, "size"), _integer(body, "offset", 0)
        flush = body.get("flush", False)
        if not isinstance(flush, bool):
            raise HttpError(400, f"Boolean required {str(flush)[:100]!r}")
        ticket = self._tickets.use(ticket_id, "write")
        _refuse_other(request, ticket)
        with self._writable(ticket, connection) as backend:
            size = _capacity(ticket, backend)
            if offset > size or length > size - offset:
                message = f"Requested range out of allowed range: {length} bytes at {offset}, size {size}"
                raise HttpError(416, message, headers=(("content-range", f"bytes */{size}"),))
            operation = Operation("write", offset, length)
            with connection.operation(ticket, operation, backend.max_writers, self._bounds.turn_timeout):
                ticket.writing(offset, offset + length)
                while operation.done < length:
                    ticket.check()
                    step = min(ZERO_PIECE, length - operation.done)
                    backend.zero(offset + operation.done, step)
                    operation.done += step
                ticket.wrote(offset, offset + length)
                if flush:
                    with ticket.flushing():
                        backend.flush()
        ticket.succeeded()
        return connection.reply(request, Answer(200))

    # The image behind a ticket

    def usable(self, spec: Spec) -> None:
        """AgentError where there is no backend for it; nothing is opened."""
        self._registry.open(_opening(spec, {})).close()

    def _open(self, ticket: Ticket) -> ImageBackend:
        return self._registry.open(_opening(ticket.spec, ticket.shared))

    def _opened(self, ticket: Ticket, connection: Connection) -> Any:
        return connection.backend(ticket, lambda: self._open(ticket))

    def _writable(self, ticket: Ticket, connection: Connection) -> Any:
        return _Writable(self._opened(ticket, connection), ticket)


class _Writable:
    """The backend of a ticket that may write, if its image can be written."""

    def __init__(self, opened: Any, ticket: Ticket) -> None:
        self._opened = opened
        self._ticket = ticket

    def __enter__(self) -> ImageBackend:
        backend: ImageBackend = self._opened.__enter__()
        if backend.get_capabilities()["read_only"]:
            error = not_allowed(f"Transfer={self._ticket.spec.name} has a read-only image")
            self._opened.__exit__(type(error), error, None)
            raise error
        return backend

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)


_ANY = 1 << 30


def _opening(spec: Spec, shared: dict[str, Any]) -> Opening:
    return Opening(
        spec.url,
        spec.size,
        writable=spec.writable,
        sparse=spec.sparse,
        dirty=spec.dirty,
        image=spec.image,
        shared=shared,
    )


def _split(path: str) -> tuple[bool, str | None, str]:
    """Whether there is such a path; the ticket's id (None for /info/), and what is asked of it."""
    if path == "/info/":
        return True, None, ""
    if not path.startswith("/images/"):
        return False, None, ""
    ticket_id, _, rest = path.removeprefix("/images/").partition("/")
    return True, ticket_id, rest


def _size(ticket: Ticket, backend: ImageBackend) -> int:
    return min(ticket.spec.size, backend.size())


def _capacity(ticket: Ticket, backend: ImageBackend) -> int:
    return min(ticket.spec.size, backend.capacity())


def _closes(request: Request) -> bool:
    return request.query.get("close", "").lower() == "y"


def _etag(ticket: Ticket) -> str:
    """Of the ticket's generation: another ticket of the same id has another one. Weak where its image can change."""
    return f'W/"{ticket.etag}"' if ticket.spec.writable else f'"{ticket.etag}"'


def _refuse_other(request: Request, ticket: Ticket) -> None:
    if not _same_generation(request.headers.get("if-match"), ticket, default=True):
        raise HttpError(412, "The ticket is not the one that If-Match names", close=True)


def _same_generation(value: str | None, ticket: Ticket, *, default: bool) -> bool:
    if value is None:
        return default
    tags = {tag.strip().removeprefix("W/").strip('"') for tag in value.split(",")}
    return "*" in tags or ticket.etag in tags


def _choice(request: Request, name: str, choices: tuple[str, ...], default: str) -> str:
    value = request.query.get(name, default)
    if value not in choices:
        message = f"Unsupported value {value[:100]!r} for {name!r}, expecting one of {list(choices)}"
        raise HttpError(400, message, close=request.length != 0)
    return value


def _number(request: Request, name: str) -> int | None:
    value = request.query.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 40):
        raise HttpError(400, f"Invalid value {value[:100]!r} for {name!r}, expecting a number of bytes")
    return int(value)


def _integer(body: dict[str, Any], name: str, default: int | None = None) -> int:
    value = body.get(name, default)
    if value is None:
        raise HttpError(400, f"Missing required value for {name!r}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise HttpError(400, f"Integer required {str(value)[:100]!r}")
    if value < 0:
        raise HttpError(400, f"Invalid value {value} < 0")
    return value


def _stoppable(pieces: Iterator[str], ticket: Ticket) -> Iterator[str]:
    for number, piece in enumerate(pieces):
        if number % 1024 == 0:
            ticket.check()
        yield piece


def _zero_text(one: Extent) -> str:
    return (
        f'{{"start": {one.start}, "length": {one.length}, '
        f'"zero": {json.dumps(one.zero)}, "hole": {json.dumps(one.hole)}}}'
    )


def _dirty_text(one: DirtyExtent) -> str:
    return (
        f'{{"start": {one.start}, "length": {one.length}, '
        f'"dirty": {json.dumps(one.dirty)}, "zero": {json.dumps(one.zero)}}}'
    )
