"""A client that is not the bottleneck: it throws away what it gets, and sends the same random bytes again and again.

From TCP the kernel throws bytes away by itself (recv with MSG_TRUNC), and through TLS they go undecrypted: the
handshake, the request and the answer's head are real, the rest is counted. Each case is read once before with all of
it decrypted and hashed, so what is measured is known to be the right thing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PIECE = 1 << 20
WAIT = 120.0
_BUFFER = os.urandom(4 << 20)


@dataclass(frozen=True, slots=True)
class Where:
    """An address as socket.connect takes it, and the context of TLS."""

    address: str | tuple[str, int]
    tls: ssl.SSLContext | None = None


class _Peer(Protocol):
    """Either a socket or TLS on one; `raw` is what is counted."""

    raw: socket.socket

    def send(self, data: bytes | memoryview) -> None: ...

    def receive(self) -> bytes: ...


class _Plain:
    def __init__(self, where: Where) -> None:
        family = socket.AF_UNIX if isinstance(where.address, str) else socket.AF_INET
        self.raw = socket.socket(family, socket.SOCK_STREAM)
        self.raw.connect(where.address)

    def send(self, data: bytes | memoryview) -> None:
        self.raw.sendall(data)

    def receive(self) -> bytes:
        return self.raw.recv(65536)


class _Tls(_Plain):
    def __init__(self, where: Where) -> None:
        super().__init__(where)
        assert where.tls is not None
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = where.tls.wrap_bio(self._in, self._out, server_hostname="127.0.0.1")
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._push()
                self._in.write(self.raw.recv(65536))
        self._push()

    def send(self, data: bytes | memoryview) -> None:
        self._tls.write(data)
        self._push()

    def receive(self) -> bytes:
        while True:
            try:
                return self._tls.read(65536)
            except ssl.SSLWantReadError:
                data = self.raw.recv(65536)
                if not data:
                    return b""
                self._in.write(data)

    def _push(self) -> None:
        self.raw.sendall(self._out.read())


def _connected(where: Where) -> _Peer:
    return _Tls(where) if where.tls else _Plain(where)


def _head(peer: _Peer) -> tuple[int, int, bytes]:
    """Status, length, and what came of the body with the head."""
    got = b""
    while b"\r\n\r\n" not in got:
        data = peer.receive()
        if not data:
            raise AssertionError(f"no answer: {got!r}")
        got += data
    head, _, body = got.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), int(fields.get(b"content-length", b"0")), body


def download(where: Where, target: str, size: int, connections: int) -> float:
    """Seconds until all of it has come, in as many parts at a time as there are connections."""
    return _together([_part(where, target, first, last) for first, last in _parts(size, connections)])


def _parts(size: int, number: int) -> list[tuple[int, int]]:
    step = size // number
    return [(part * step, size - 1 if part == number - 1 else (part + 1) * step - 1) for part in range(number)]


def _request(target: str, first: int, last: int, *, close: bool) -> bytes:
    joint = "&" if "?" in target else "?"
    head = f"GET {target}{joint + 'close=y' if close else ''} HTTP/1.1\r\nHost: bench\r\nRange: bytes={first}-{last}\r\n\r\n"
    return head.encode()


def _part(where: Where, target: str, first: int, last: int) -> Callable[[], None]:
    def run() -> None:
        peer = _connected(where)
        with peer.raw:
            peer.send(_request(target, first, last, close=True))
            status, length, body = _head(peer)
            if (status, length) != (206, last - first + 1):
                raise AssertionError(f"{status}, {length} bytes: {body[:200]!r}")
            left = length - len(body)
            if where.tls:
                # Ciphertext is longer than what it hides; it ends with the connection.
                if _thrown_away(peer.raw, None) < left - PIECE:
                    raise AssertionError("the answer is too short")
            elif _thrown_away(peer.raw, left) != left:
                raise AssertionError("the answer is too short")

    return run


def _thrown_away(connection: socket.socket, most: int | None) -> int:
    """Bytes, until there were `most` or the connection ends."""
    return int(
        _library().discard(connection.fileno(), -1 if most is None else most, connection.family == socket.AF_INET)
    )


@functools.cache
def _library() -> ctypes.CDLL:
    """discard.c, built for this process: a loop in Python would be the bottleneck."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "discard.so"
        source = Path(__file__).with_name("discard.c")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(built), str(source)], check=True)
        library = ctypes.CDLL(str(built))
    library.discard.argtypes = (ctypes.c_int, ctypes.c_longlong, ctypes.c_int)
    library.discard.restype = ctypes.c_longlong
    return library


def upload(where: Where, target: str, size: int, connections: int) -> float:
    """Seconds until all of it is answered; each connection's part is flushed."""

    def part(first: int, last: int) -> Callable[[], None]:
        def run() -> None:
            peer = _connected(where)
            with peer.raw:
                length = last - first + 1
                head = f"PUT {target} HTTP/1.1\r\nHost: bench\r\nContent-Length: {length}\r\n"
                peer.send(f"{head}Content-Range: bytes {first}-{last}/*\r\n\r\n".encode())
                left = length
                while left:
                    left -= _sent(peer, min(left, len(_BUFFER)))
                status, _, body = _head(peer)
                if status != 200:
                    raise AssertionError(f"{status}: {body[:200]!r}")

        return run

    return _together([part(first, last) for first, last in _parts(size, connections)])


def _sent(peer: _Peer, number: int) -> int:
    peer.send(memoryview(_BUFFER)[:number])
    return number


def requests(where: Where, request: bytes, number: int) -> float:
    """Seconds for that many answers on one connection, one after the other."""
    peer = _connected(where)
    with peer.raw:
        began = time.perf_counter()
        for _ in range(number):
            peer.send(request)
            status, length, body = _head(peer)
            while len(body) < length:
                body += peer.receive()
            if status != 200:
                raise AssertionError(f"{status}: {body[:200]!r}")
        return time.perf_counter() - began


def digest(where: Where, target: str, size: int) -> str:
    """SHA-256 of all of it, decrypted."""
    peer, found = _connected(where), hashlib.sha256()
    with peer.raw:
        peer.send(_request(target, 0, size - 1, close=False))
        _, length, body = _head(peer)
        found.update(body)
        left = length - len(body)
        while left > 0:
            data = peer.receive()
            if not data:
                raise AssertionError("the answer is too short")
            found.update(data)
            left -= len(data)
    return found.hexdigest()


def _together(parts: list[Callable[[], None]]) -> float:
    errors: list[BaseException] = []

    def guarded(part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(part,)) for part in parts]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    seconds = time.perf_counter() - began
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in threads):
        raise AssertionError(f"not all came within {WAIT:.0f} s")
    return seconds
