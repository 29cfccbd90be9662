"""From a ticket to its image: the one way by which requests come to a backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hostagent.data.backends.base import ImageBackend
from hostagent.data.backends.registry import Opening, Registry
from hostagent.data.connection import Connection
from hostagent.data.errors import not_allowed
from hostagent.data.metrics import Metrics
from hostagent.data.ticket import Spec
from hostagent.data.tickets import Operation, Ticket, Tickets

_ANY = 1 << 30


@dataclass(frozen=True, slots=True)
class Access:
    """`turn_timeout`: seconds that a further reader or writer waits for its turn."""

    tickets: Tickets
    registry: Registry
    metrics: Metrics
    turn_timeout: float

    def usable(self, spec: Spec) -> None:
        """AgentError where there is no backend for it; nothing is opened."""
        self.registry.open(_opening(spec, {})).close()

    def another(self, ticket: Ticket) -> ImageBackend:
        """One more backend of the ticket's image, which is the caller's."""
        return self.registry.open(_opening(ticket.spec, ticket.shared))

    def opened(self, ticket: Ticket, connection: Connection) -> contextlib.AbstractContextManager[ImageBackend]:
        return connection.backend(ticket, lambda: self.another(ticket))

    @contextlib.contextmanager
    def writable(self, ticket: Ticket, connection: Connection) -> Iterator[ImageBackend]:
        """HttpError 403 where the ticket may write, and its image cannot be written."""
        with self.opened(ticket, connection) as backend:
            if backend.get_capabilities()["read_only"]:
                raise not_allowed(f"Transfer={ticket.spec.name} has a read-only image")
            yield backend

    @contextlib.contextmanager
    def reading(self, ticket: Ticket, connection: Connection, backend: ImageBackend, op: Operation) -> Iterator[None]:
        with connection.operation(ticket, op, backend.max_readers, self.turn_timeout):
            yield

    @contextlib.contextmanager
    def writing(self, ticket: Ticket, connection: Connection, backend: ImageBackend, op: Operation) -> Iterator[None]:
        """What is written here is not durable any more, and waits for a flush when this ends well."""
        turn = connection.operation(ticket, op, backend.max_writers, self.turn_timeout)
        with turn, ticket.durability.writing(connection, op, op.offset, op.offset + op.length, lambda: op.done):
            yield

    @contextlib.contextmanager
    def flushing(self, ticket: Ticket, connection: Connection, backend: ImageBackend) -> Iterator[None]:
        shared = backend.flush_covers_all
        with self.looking(ticket, connection), ticket.durability.flushing(connection, shared=shared, intact=_intact):
            yield

    @contextlib.contextmanager
    def looking(self, ticket: Ticket, connection: Connection) -> Iterator[None]:
        """For what moves no bytes of the image, and can be stopped all the same."""
        with connection.operation(ticket, Operation("look"), _ANY, 0):
            yield


def _intact(writer: object) -> bool:
    return isinstance(writer, Connection) and writer.intact()


def size(ticket: Ticket, backend: ImageBackend) -> int:
    """Bytes that the ticket may read."""
    return min(ticket.spec.size, backend.size())


def capacity(ticket: Ticket, backend: ImageBackend) -> int:
    """Bytes that the ticket may write."""
    return min(ticket.spec.size, backend.capacity())


def _opening(spec: Spec, shared: dict[str, Any]) -> Opening:
    return Opening(
        spec.url,
        spec.size,
        writable=spec.writable,
        sparse=spec.sparse,
        dirty=spec.dirty,
        bitmap=spec.bitmap,
        image=spec.image,
        shared=shared,
    )
