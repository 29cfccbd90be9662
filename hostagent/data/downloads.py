"""What goes out: GET of an image, its extents, its checksum."""

from __future__ import annotations

import json
from collections.abc import Iterator

from hostagent.data import access, answers, asked, checksum
from hostagent.data.access import Access
from hostagent.data.backends.base import DirtyExtent, Extent, ImageBackend
from hostagent.data.connection import Connection
from hostagent.data.errors import HttpError
from hostagent.data.metered import Download
from hostagent.data.ranges import parse_range
from hostagent.data.tickets import Operation, Ticket
from hostagent.data.wire import Request, head
from hostagent.extents import merged

_LOOK_EVERY = 1024  # extents between two looks at whether the ticket still holds
_WARNING = ("warning", '199 hostagent "no dirty bitmap: everything is called dirty"')


class Downloads:
    def __init__(self, access: Access) -> None:
        self._access = access

    def get(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        wanted = parse_range(request.headers["range"]) if "range" in request.headers else None
        ticket = self._access.tickets.use(ticket_id, "read")
        asked.refuse_other(request, ticket)
        if not asked.same_generation(request.headers.get("if-range"), ticket):
            wanted = None
        keep = request.keep and not asked.closes(request)
        with self._access.opened(ticket, connection) as backend:
            size = access.size(ticket, backend)
            offset, length = wanted.within(size) if wanted else (0, size)
            headers = [
                ("content-type", "application/octet-stream"),
                ("content-disposition", answers.disposition(ticket.spec.filename)),
                ("content-length", str(length)),
                ("accept-ranges", "bytes"),
                ("etag", asked.etag(ticket)),
                *answers.cors(request),
            ]
            if wanted:
                headers.append(("content-range", f"bytes {offset}-{offset + length - 1}/{size}"))
            op = Operation("read", offset, length)
            turn = self._access.reading(ticket, connection, backend, op)
            with turn, backend.open_session() as session, connection.transport.corked():
                keep = keep and request.body.drain()
                connection.answered = True
                connection.transport.send(head(206 if wanted else 200, headers, keep=keep))
                if request.method == "GET" and length:
                    count = self._access.metrics.counted("download", backend)
                    session.copy_to(Download(connection.transport, ticket, op, count), offset, length)
        ticket.succeeded()
        return keep

    def extents(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        context = asked.choice(request, "context", ("dirty", "zero"), "zero")
        start, length = asked.number(request, "start") or 0, asked.number(request, "length")
        ticket = self._access.tickets.use(ticket_id, "read")
        if context == "dirty" and not ticket.spec.dirty:
            raise HttpError(404, "Ticket does not support dirty extents")
        with self._access.opened(ticket, connection) as backend, self._access.looking(ticket, connection):
            size = access.size(ticket, backend)
            if start > size or (length is not None and length > size - start):
                raise HttpError(416, f"Requested extents beyond the end of the image, which has {size} bytes")
            length = size - start if length is None else length
            extra = []
            if context == "zero":
                found = map(_zero_text, merged(_allocated(backend, start, length)))
            elif ticket.spec.dirty_fallback and backend.dirty_context is None:
                extra.append(_WARNING)
                self._access.metrics.count("data_dirty_fallbacks_total")
                found = map(_dirty_text, merged(_all_dirty(backend, start, length)))
            else:
                found = map(_dirty_text, merged(backend.dirty_extents(start, length)))
            keep = request.keep and request.body.drain()
            for block in answers.json_list(_stoppable(found, ticket), request, keep=keep, headers=extra):
                connection.answered = True
                connection.transport.send(block)
        ticket.succeeded()
        return keep

    def checksum(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        method = checksum.Method(
            request.query.get("algorithm", checksum.ALGORITHM), asked.block_size(request, checksum.BLOCK)
        )
        ticket = self._access.tickets.use(ticket_id, "read")
        with self._access.opened(ticket, connection) as backend:
            size = access.size(ticket, backend)
            with self._access.looking(ticket, connection), connection.further() as keep:
                digest = checksum.checksum(
                    lambda: keep(self._access.another(ticket)),
                    size,
                    method,
                    done=lambda _: ticket.check(),
                    pace=lambda number: ticket.lane.take(number, ticket.check),
                )
        ticket.succeeded()
        found = {"algorithm": method.algorithm, "block_size": method.block_size, "checksum": digest}
        return connection.reply(request, answers.of_json(found))

    def algorithms(self, request: Request, connection: Connection, ticket_id: str) -> bool:
        return connection.reply(request, answers.of_json({"algorithms": list(checksum.algorithms())}))


def _allocated(backend: ImageBackend, start: int, length: int) -> Iterator[Extent]:
    if backend.supports_extents:
        yield from backend.extents(start, length)
    elif length:
        yield Extent(start, length, False)


def _all_dirty(backend: ImageBackend, start: int, length: int) -> Iterator[DirtyExtent]:
    for one in _allocated(backend, start, length):
        yield DirtyExtent(one.start, one.length, True, one.zero)


def _stoppable(pieces: Iterator[str], ticket: Ticket) -> Iterator[str]:
    for number, piece in enumerate(pieces):
        if number % _LOOK_EVERY == 0:
            ticket.check()
        yield piece


def _zero_text(one: Extent) -> str:
    zero, hole = json.dumps(one.zero), json.dumps(one.hole)
    return f'{{"start": {one.start}, "length": {one.length}, "zero": {zero}, "hole": {hole}}}'


def _dirty_text(one: DirtyExtent) -> str:
    dirty, zero = json.dumps(one.dirty), json.dumps(one.zero)
    return f'{{"start": {one.start}, "length": {one.length}, "dirty": {dirty}, "zero": {zero}}}'
