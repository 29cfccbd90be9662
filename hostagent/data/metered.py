"""What every byte of a transfer goes through: may it still move, when, and how many have (see streams)."""

from __future__ import annotations

import io
from collections.abc import Callable

from hostagent.data.streams import PIECE, Source
from hostagent.data.tickets import Operation, Ticket
from hostagent.data.transport import Transport
from hostagent.data.wire import Body
from hostagent.errors import AgentError

Count = Callable[[int], None]


class Download:
    """A Sink: the body of an answer."""

    def __init__(self, transport: Transport, ticket: Ticket, op: Operation, count: Count) -> None:
        self._transport = transport
        self._ticket = ticket
        self._op = op
        self._count = count

    def write(self, data: memoryview | bytes | bytearray) -> None:
        if len(data) <= PIECE:
            self._before(len(data))
            self._transport.send(data)
            self._after(len(data))
            return
        view = memoryview(data)
        for begin in range(0, len(view), PIECE):
            self.write(view[begin : begin + PIECE])

    def send_file(self, fd: int, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            number = min(PIECE, end - offset)
            self._before(number)
            self._transport.send_file(fd, offset, number)
            self._after(number)
            offset += number

    def _before(self, number: int) -> None:
        self._ticket.check()
        self._ticket.lane.take(number, self._ticket.check)

    def _after(self, number: int) -> None:
        self._op.done += number
        self._count(number)


class Upload:
    """A Source: the body of a request, of which `most` bytes have room."""

    def __init__(self, body: Body, ticket: Ticket, op: Operation, most: int, count: Count) -> None:
        self._body = body
        self._ticket = ticket
        self._op = op
        self._most = most
        self._count = count

    def read_into(self, buffer: memoryview) -> int:
        self._ticket.check()
        number = self._body.read_into(buffer[:PIECE])
        if self._op.done + number > self._most:
            raise AgentError("range", f"the body has more than the {self._most} bytes that there is room for")
        self._ticket.lane.take(number, self._ticket.check)
        self._op.done += number
        self._count(number)
        return number


class Stream(io.RawIOBase):
    """A Source as a file, for backends that take the whole image from one."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._source.read_into(memoryview(buffer))
