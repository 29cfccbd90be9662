"""HTTP/1.1 on one connection: requests by h11, which is strict; answers by hand, so that bodies can come by sendfile.

Each request has a parser of its own, which only reads: what is left behind one is the beginning of the next. Who cannot
be understood, or left part of a body that is too long to read away, is answered and the connection closed, so that no
byte of a body is ever taken for a request.
"""

from __future__ import annotations

import contextlib
import email.utils
import http
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

import h11

from hostagent import __version__
from hostagent.data.errors import HttpError
from hostagent.data.streams import PeerGone
from hostagent.data.transport import Transport

HEAD, BODY = 4096, 64 * 1024
"""Bytes of one read. Who only waits for a request has no more memory than that."""
LINE_MOST = 4096
"""Bytes of a request line; more is 414, as in the dialect."""
HEADERS_MOST = 16 * 1024
"""Bytes of all headers; more is 431."""
DRAIN_MOST = 64 * 1024
"""Bytes of a body that nobody wants that are read away to keep the connection."""
_FIELDS_MOST = 20
_REASONS = {status.value: status.phrase for status in http.HTTPStatus}


@dataclass(slots=True)
class Request:
    method: str
    path: str
    """Unquoted."""
    query: dict[str, str]
    headers: dict[str, str]
    """Lower-case names; of several of one name all, with commas."""
    length: int | None
    """Bytes of the body, 0 for none; None: chunked."""
    keep: bool
    old: bool
    """HTTP/1.0, which knows no chunks and no second request."""
    body: Body = field(repr=False)


class Body:
    """The body of one request, read once; a Source for backends that is not yet metered (see metered.py)."""

    def __init__(self, wire: Wire, parser: h11.Connection, length: int | None, *, expects: bool) -> None:
        self._wire = wire
        self._parser = parser
        self._left = length
        self._pending: memoryview = memoryview(b"")
        self._expects = expects
        self.ended = length == 0

    def read_into(self, buffer: memoryview) -> int:
        if self.ended:
            return 0
        if self._expects:
            self._expects = False
            self._wire.transport.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        filled = 0
        while filled < len(buffer) and not self.ended:
            filled += self._some(buffer[filled:])
        return filled

    def _some(self, buffer: memoryview) -> int:
        if self._left is None:
            return self._chunked(buffer)
        wanted = min(self._left, len(buffer))
        number = self._wire.take(buffer[:wanted])
        if number == 0:
            raise PeerGone(f"the body ends {self._left} bytes early")
        self._left -= number
        self.ended = self._left == 0
        return number

    def _chunked(self, buffer: memoryview) -> int:
        while not self._pending:
            event = self._wire.event(self._parser, BODY)
            if isinstance(event, h11.Data):
                self._pending = memoryview(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self.ended = True
                self._wire.leftover(self._parser)
                return 0
        number = min(len(buffer), len(self._pending))
        buffer[:number] = self._pending[:number]
        self._pending = self._pending[number:]
        return number

    def drain(self) -> bool:
        """Read away what nobody wants, if it is short; whether the next request can follow."""
        if self.ended:
            return True
        if self._expects or self._left is None or self._left > DRAIN_MOST:
            return False
        rest = memoryview(bytearray(self._left))
        try:
            with self._wire.hurry("body"):
                return self.read_into(rest) == len(rest)
        except HttpError:
            return False

    def all(self, most: int) -> bytes:
        """The whole body; HttpError 413 of one with more than `most` bytes, 408 of one that comes too slowly."""
        if self._left is not None and self._left > most:
            raise HttpError(413, f"The body has {self._left} bytes, and may have {most}", close=True)
        buffer = memoryview(bytearray(most + 1))
        with self._wire.hurry("body"):
            number = self.read_into(buffer)
        if number > most:
            raise HttpError(413, f"The body has more than {most} bytes", close=True)
        return bytes(buffer[:number])


class Wire:
    """`header_timeout`: seconds that a request's head may take from its first byte, and a body that is no image's."""

    def __init__(self, transport: Transport, *, header_timeout: float) -> None:
        self.transport = transport
        self._header_timeout = header_timeout
        self._received = bytearray()
        self._deadline: float | None = None
        self._part = "head"

    def request(self, idle: float) -> Request | None:
        """The next one; None when the peer ends, or is silent for `idle` seconds, before its first byte."""
        if not self._received:
            self.transport.patience(idle)
            if not self._fill():
                return None
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADERS_MOST)
        with self.hurry("head"):
            if self._received.startswith(b"\r\n"):  # what some send behind a body (RFC 9112, 2.2)
                del self._received[:2]
            while b"\n" not in self._received[: LINE_MOST + 2]:
                if len(self._received) > LINE_MOST:
                    raise HttpError(414, "The request line is too long", close=True)
                if not self._fill():
                    raise PeerGone("the request ends early")
            parser.receive_data(bytes(self._received))
            self._received.clear()
            event = self.event(parser)
        if not isinstance(event, h11.Request):
            raise PeerGone("the request ends early")
        if sum(len(name) + len(value) for name, value in event.headers) > HEADERS_MOST:
            raise HttpError(431, "The request's headers are too long", close=True)  # and yet came in one piece
        return self._understood(event, parser)

    @contextlib.contextmanager
    def hurry(self, part: str) -> Iterator[None]:
        """For what is received here there is one time in all; HttpError 408 after it. Who moves an image's bytes is
        judged by his progress, but only a ticket makes him one who does."""
        self._deadline, self._part = time.monotonic() + self._header_timeout, part
        try:
            yield
        finally:
            self._deadline = None

    def event(self, parser: h11.Connection, piece: int = HEAD) -> h11.Event | type[h11.PAUSED]:
        """The next one of this parser, from the peer as needed, `piece` bytes at a time."""
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError as error:
                what = str(error).partition(":")[0][:100]  # behind it are the bytes, which may name a ticket
                raise HttpError(error.error_status_hint, what, close=True) from error
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]
            if not self._fill(piece):
                raise PeerGone("the request ends early")
            parser.receive_data(bytes(self._received))
            self._received.clear()

    def take(self, buffer: memoryview) -> int:
        """Some bytes of a body, of what was received already or from the peer."""
        if self._received:
            number = min(len(buffer), len(self._received))
            buffer[:number] = self._received[:number]
            del self._received[:number]
            return number
        if self._deadline is not None:
            return self._receive(buffer)
        return self.transport.receive(buffer, whole=True)

    def leftover(self, parser: h11.Connection) -> None:
        """What follows the message belongs to the next one."""
        self._received += parser.trailing_data[0]

    def _fill(self, piece: int = HEAD) -> int:
        buffer = bytearray(piece)
        number = self._receive(memoryview(buffer))
        self._received += memoryview(buffer)[:number]
        return number

    def _receive(self, buffer: memoryview) -> int:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise self._late()
            self.transport.patience(left)
        try:
            return self.transport.receive(buffer)
        except PeerGone:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise self._late() from None
            raise

    def _late(self) -> HttpError:
        return HttpError(408, f"The request's {self._part} did not come in time", close=True)

    def _understood(self, event: h11.Request, parser: h11.Connection) -> Request:
        headers: dict[str, str] = {}
        for raw, value in event.headers:
            name, text = raw.decode("ascii"), value.decode("latin-1")
            headers[name] = f"{headers[name]}, {text}" if name in headers else text
        target = event.target.decode("ascii", "replace")
        if len(target) > LINE_MOST:
            raise HttpError(414, "The request line is too long", close=True)
        if event.http_version not in (b"1.0", b"1.1"):
            raise HttpError(505, "HTTP/1.1 is spoken here", close=True)
        path, _, query = target.partition("?")
        chunked = "transfer-encoding" in headers
        if chunked and "content-length" in headers:  # whom of the two another one on the way believed nobody knows
            raise HttpError(400, "Content-Length beside Transfer-Encoding", close=True)
        if chunked and event.http_version < b"1.1":
            raise HttpError(400, "Transfer-Encoding needs HTTP/1.1", close=True)
        length = None if chunked else int(headers.get("content-length", 0))
        tokens = {token.strip().lower() for token in headers.get("connection", "").split(",")}
        expects = bool(parser.they_are_waiting_for_100_continue)
        body = Body(self, parser, length, expects=expects)
        if not chunked:
            self.leftover(parser)
        return Request(
            method=event.method.decode("ascii"),
            path=unquote(path),
            query=_query(query) if query else {},
            headers=headers,
            length=length,
            keep=event.http_version >= b"1.1" and "close" not in tokens,
            old=event.http_version < b"1.1",
            body=body,
        )


def _query(text: str) -> dict[str, str]:
    """Of several values of one name the last."""
    try:
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=_FIELDS_MOST))
    except ValueError as error:
        raise HttpError(400, f"The query has more than {_FIELDS_MOST} fields", close=True) from error


_SERVER = f"server: hostagent/{__version__}\r\ndate: ".encode()
_date: tuple[int, bytes] = (0, b"")


def head(status: int, headers: Sequence[tuple[str, str]], *, keep: bool) -> bytes:
    """Status line and headers. Values are checked: what could end a header never does."""
    global _date
    now = int(time.time())
    if _date[0] != now:  # made once a second; two threads that make the same one do no harm
        _date = now, email.utils.formatdate(now, usegmt=True).encode() + b"\r\n"
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}\r\n".encode(), _SERVER, _date[1]]
    for name, value in headers:
        if "\r" in value or "\n" in value or "\0" in value:
            raise ValueError(f"a control character in {name}")
        lines.append(f"{name}: {value}\r\n".encode("latin-1", "replace"))
    lines.append(b"\r\n" if keep else b"connection: close\r\n\r\n")
    return b"".join(lines)


def chunks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """A body of unknown length, chunked."""
    for piece in pieces:
        if piece:
            yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"
