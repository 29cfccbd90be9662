"""An NBD server in this process that answers as a test wants: out of order, short, without what others have.

Fixed newstyle handshake and structured replies, as in the NBD project's doc/proto.md.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

OPTION, REQUEST, REPLY = 0x49484156454F5054, 0x25609513, 0x668E33EF
SIMPLE, OPTION_REPLY = 0x67446698, 0x3E889045565A9
ACK, SERVER, INFO, META, UNSUPPORTED, UNKNOWN = 1, 2, 3, 4, 0x80000001, 0x80000006
READ, WRITE, DISCONNECT, FLUSH, ZEROES, STATUS = 0, 1, 2, 3, 6, 7
HAS_FLAGS, READ_ONLY, CAN_FLUSH, CAN_ZERO, MULTI_CONN = 1, 2, 4, 64, 256
USUAL = HAS_FLAGS | CAN_FLUSH | CAN_ZERO | MULTI_CONN
NO_HOLE = 2


class Endless(Protocol):
    def from_byte(self, offset: int, length: int) -> Iterator[tuple[int, int]]: ...


Extents = list[tuple[int, int]] | Endless


@dataclass(slots=True)
class Behaviour:
    """`contexts` have (length, flags) from byte 0 on. `most`: extents of one answer, which may be longer than asked.

    `reverse`: that many requests are taken before they are answered, the last one first. `silent` ones get no answer;
    `size` is claimed, of `data` or not; `untold` is a context that answers leave out. `errors` are error numbers by request type; `drop` closes at the first request of that type.
    """

    flags: int = USUAL
    structured: bool = True
    contexts: dict[str, Extents] = field(default_factory=dict)
    most: int = 1 << 30
    reverse: int = 1
    silent: bool = False
    mute: bool = False
    errors: dict[int, int] = field(default_factory=dict)
    drop: int | None = None
    size: int | None = None
    untold: str = ""


class FakeServer:
    """`data` is the disk; `requests` what was asked, as (type, flags, offset, length)."""

    def __init__(self, path: Path, data: bytes, behaviour: Behaviour) -> None:
        self.data = bytearray(data)
        self.how = behaviour
        self.requests: list[tuple[int, int, int, int]] = []
        self.connections = 0
        self.size = len(data) if behaviour.size is None else behaviour.size
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                self.connections += 1
                threading.Thread(target=_Client(self, client).run, daemon=True).start()


@dataclass(slots=True)
class _Client:
    server: FakeServer
    socket: socket.socket
    contexts: dict[str, int] = field(default_factory=dict)
    structured: bool = False

    def run(self) -> None:
        with contextlib.suppress(OSError, EOFError), self.socket:
            if not self.server.how.mute:
                self._handshake()
                self._serve()
            self._take(1)

    def _take(self, number: int) -> bytes:
        data = b""
        while len(data) < number:
            more = self.socket.recv(number - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    # Handshake

    def _handshake(self) -> None:
        self.socket.sendall(b"NBDMAGIC" + struct.pack(">QH", OPTION, 3))
        self._take(4)
        while True:
            _, option, length = struct.unpack(">QII", self._take(16))
            data = self._take(length)
            if option in (7, 6):  # GO, INFO
                self._option(option, INFO, struct.pack(">HQH", 0, self.server.size, self.server.how.flags))
                self._option(option, ACK)
                if option == 7:
                    return
            elif option == 8 and self.server.how.structured:
                self.structured = True
                self._option(option, ACK)
            elif option in (9, 10) and self.server.how.structured:  # LIST_META_CONTEXT, SET_META_CONTEXT
                self._contexts(option, data)
            else:
                self._option(option, UNSUPPORTED)

    def _contexts(self, option: int, data: bytes) -> None:
        (name,) = struct.unpack(">I", data[:4])
        queries, data = [], data[4 + name + 4 :]
        while data:
            (length,) = struct.unpack(">I", data[:4])
            queries.append(data[4 : 4 + length].decode())
            data = data[4 + length :]
        for number, context in enumerate(self.server.how.contexts, 1):
            exact = context in queries
            if exact or (option == 9 and any(context.startswith(query) for query in queries)):
                self._option(option, META, struct.pack(">I", number) + context.encode())
                if option == 10:
                    self.contexts[context] = number
        self._option(option, ACK)

    def _option(self, option: int, kind: int, data: bytes = b"") -> None:
        self.socket.sendall(struct.pack(">QIII", OPTION_REPLY, option, kind, len(data)) + data)

    # Requests

    def _serve(self) -> None:
        held: list[bytes] = []
        while True:
            _, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", self._take(28))
            payload = self._take(length) if kind == WRITE else b""
            self.server.requests.append((kind, flags, offset, length))
            if kind in (DISCONNECT, self.server.how.drop):
                raise EOFError
            if self.server.how.silent:
                continue
            held.append(self._answer(kind, cookie, offset, length, payload))
            if len(held) >= self.server.how.reverse or offset + length == self.server.size:
                for answer in reversed(held):
                    self.socket.sendall(answer)
                held.clear()

    def _answer(self, kind: int, cookie: int, offset: int, length: int, payload: bytes) -> bytes:
        data, error = self.server.data, self.server.how.errors.get(kind, 0)
        if kind == WRITE and not error:
            data[offset : offset + length] = payload
        if kind == ZEROES and not error:
            data[offset : offset + length] = bytes(min(length, max(0, len(data) - offset)))
        if error and self.structured:
            return self._chunk(1, 1 << 15 | 1, cookie, struct.pack(">IH", error, 0))
        if kind == STATUS:
            return self._status(cookie, offset, length)
        read = bytes(data[offset : offset + length]) if kind == READ and not error else b""
        if self.structured and kind == READ:
            return self._chunk(1, 1, cookie, struct.pack(">Q", offset) + read)
        return struct.pack(">IIQ", SIMPLE, error, cookie) + read

    def _status(self, cookie: int, offset: int, length: int) -> bytes:
        chunks = b""
        told_of = [one for one in self.contexts.items() if one[0] != self.server.how.untold]
        for number, (context, identity) in enumerate(told_of, 1):
            told = itertools.islice(_from(self.server.how.contexts[context], offset, length), self.server.how.most)
            body = struct.pack(">I", identity) + b"".join(struct.pack(">II", *one) for one in told)
            chunks += self._chunk(number == len(told_of), 5, cookie, body)
        return chunks

    def _chunk(self, last: int, kind: int, cookie: int, data: bytes) -> bytes:
        return struct.pack(">IHHQI", REPLY, int(last), kind, cookie, len(data)) + data


def _from(extents: Extents, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Those that touch the range; the last one may go beyond it, as the protocol allows."""
    if not isinstance(extents, list):
        yield from extents.from_byte(offset, length)
        return
    position = 0
    for size, flags in extents:
        begin, end = max(position, offset), position + size
        if end > offset and begin < offset + length:
            yield end - begin, flags
        position = end
