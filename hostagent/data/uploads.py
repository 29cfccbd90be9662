"""What comes in: PUT of an image or a range of it, zeroing, flushing, and what is durable of it."""

from __future__ import annotations

from typing import Any, BinaryIO, cast

from hostagent.data import access, answers, asked
from hostagent.data.access import Access
from hostagent.data.answers import Answer
from hostagent.data.backends.base import ImageBackend
from hostagent.data.connection import Connection
from hostagent.data.errors import HttpError
from hostagent.data.metered import Stream, Upload
from hostagent.data.ranges import parse_content_range, unsatisfiable
from hostagent.data.ticket import read_object
from hostagent.data.tickets import Operation, Ticket
from hostagent.data.wire import Request

ZERO_PIECE = 128 << 20
"""Bytes of one step of zeroing, between which a ticket can stop it: some storage really writes them."""


class Uploads:
    """`body`: bytes of a PATCH, at most."""

    def __init__(self, access: Access, body: int) -> None:
        self._access = access
        self._body = body

    def put(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        if request.length is not None and "content-length" not in request.headers:
            raise HttpError(400, "Content-Length header is required", close=True)
        offset, length = 0, request.length
        if "content-range" in request.headers:
            offset, said = parse_content_range(request.headers["content-range"])
            if said is not None and request.length is not None and said != request.length:
                raise HttpError(400, f"Content-Range has {said} bytes, and the body {request.length}", close=True)
            length = said if request.length is None else length
        flush = asked.choice(request, "flush", ("n", "y"), "y") == "y"
        self.write(request, connection, ticket_id, offset=offset, length=length, flush=flush)
        return connection.reply(request, Answer(200, headers=answers.cors(request), keep=not asked.closes(request)))

    def write(
        self, request: Request, connection: Connection, ticket_id: str, *, offset: int, length: int | None, flush: bool
    ) -> int:
        """The body at `offset`; the bytes written. `length` is what the body has, None if nobody said."""
        ticket = self._access.tickets.use(ticket_id, "write")
        asked.refuse_other(request, ticket)
        with self._access.writable(ticket, connection) as backend:
            size = access.capacity(ticket, backend)
            if offset > size or (length is not None and length > size - offset):
                error = unsatisfiable(size, f"Requested {length} bytes at {offset}, and the image has {size}")
                error.close = True
                raise error
            room = size - offset if length is None else length
            op = Operation("write", offset, room)
            with self._access.writing(ticket, connection, backend, op):
                source = Upload(request.body, ticket, op, room, self._access.metrics.counted("upload", backend))
                if backend.supports_range_write:
                    backend.write_from(source, offset, request.length)
                    if length is not None and op.done != length:
                        raise HttpError(400, f"Content-Range has {length} bytes, and the body {op.done}", close=True)
                else:
                    _write_whole(backend, source, request, offset, flush=flush)
            if flush:
                self._flush(ticket, connection, backend)
        ticket.succeeded()
        return op.done

    def patch(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        body = read_object(request.body.all(self._body), "Invalid JSON message", 4)
        op = body.get("op")
        if op is None:
            raise HttpError(400, "Missing required value for op")
        if op == "flush":
            self.flush(request, connection, ticket_id)
        elif op == "zero":
            self._zero(request, connection, ticket_id, body)
        else:
            raise HttpError(400, f"Unsupported value {str(op)[:100]!r} for 'op', expecting one of ['flush', 'zero']")
        return connection.reply(request, Answer(200))

    def flush(self, request: Request, connection: Connection, ticket_id: str) -> None:
        ticket = self._access.tickets.use(ticket_id, "write")
        asked.refuse_other(request, ticket)
        with self._access.writable(ticket, connection) as backend:
            self._flush(ticket, connection, backend)
        ticket.succeeded()

    def progress(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        """What a client that was interrupted need not send again."""
        ticket = self._access.tickets.use(ticket_id, None)
        durable = ticket.durability.durable()
        found = {
            "size": ticket.spec.size,
            "generation": ticket.etag,
            "durable": [{"start": begin, "length": end - begin} for begin, end in durable],
        }
        return connection.reply(request, answers.of_json(found, headers=(("etag", asked.etag(ticket)),)))

    def _flush(self, ticket: Ticket, connection: Connection, backend: ImageBackend) -> None:
        with self._access.flushing(ticket, connection, backend):
            backend.flush()

    def _zero(self, request: Request, connection: Connection, ticket_id: str, body: dict[str, Any]) -> None:
        length, offset = asked.integer(body, "size"), asked.integer(body, "offset", 0)
        flush = body.get("flush", False)
        if not isinstance(flush, bool):
            raise HttpError(400, f"Boolean required {str(flush)[:100]!r}")
        ticket = self._access.tickets.use(ticket_id, "write")
        asked.refuse_other(request, ticket)
        with self._access.writable(ticket, connection) as backend:
            size = access.capacity(ticket, backend)
            if offset > size or length > size - offset:
                what = f"{length} bytes at {offset}, size {size}"
                raise unsatisfiable(size, f"Requested range out of allowed range: {what}")
            op = Operation("write", offset, length)
            with self._access.writing(ticket, connection, backend, op):
                while op.done < length:
                    ticket.check()
                    step = min(ZERO_PIECE, length - op.done)
                    backend.zero(offset + op.done, step)
                    op.done += step
            if flush:
                self._flush(ticket, connection, backend)
        ticket.succeeded()


def _write_whole(backend: ImageBackend, source: Upload, request: Request, offset: int, *, flush: bool) -> None:
    if request.length is None or offset:
        raise HttpError(400, "This image can only be written whole, with a Content-Length", close=True)
    backend.write_full(cast(BinaryIO, Stream(source)), request.length, flush)
