"""HTTP/1.1 as bytes on a socket: what is sent is exactly what a test wrote, and answers are read strictly.

A lenient client hides a server's faults. This one takes nothing for granted: an answer has a status line, headers and
exactly the body that it announces, and whatever follows belongs to the next answer.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PATIENCE = 30.0
"""Seconds until a test gives up an answer that should have come at once."""
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [\t -~]*")
HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\r\n\0]*?)[ \t]*")
"""RFC 9110: a name is a token, a value has no line breaks."""


class NotHttp(AssertionError):
    """What came is no answer: the server has lost the thread, or has answered something that was not asked."""


class Ended(Exception):
    """The server closed the connection; `got` is what had come of an answer before."""

    def __init__(self, got: bytes) -> None:
        super().__init__(f"the connection ended after {len(got)} bytes")
        self.got = got


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def get(self, name: str) -> str | None:
        """A header that there is once at most."""
        found = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(found) < 2, (name, found)
        return found[0] if found else None

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        assert (self.get("content-type") or "").split(";")[0].endswith("json"), self.headers
        return json.loads(self.body)

    @property
    def last(self) -> bool:
        """Whether the server says that it closes the connection now."""
        return (self.get("connection") or "").lower() == "close"

    def __repr__(self) -> str:
        return f"<{self.status} {dict(self.headers)} {self.body[:200]!r}>"


class Wire:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(PATIENCE)
        self._left = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    # Sending

    def send(self, data: bytes | memoryview) -> None:
        self.socket.sendall(data)

    def request(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> None:
        self.send(written(method, target, headers, body))

    def ask(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Reply:
        """One request and its answer. A server may answer, and close, before it has read all of a body."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.request(method, target, headers, body)
        return self.reply(head=method == "HEAD")

    def ask_json(self, method: str, target: str, value: Any, headers: Mapping[str, str] | None = None) -> Reply:
        return self.ask(method, target, headers, json.dumps(value).encode())

    # Receiving

    def reply(self, *, head: bool = False, informational: bool = False) -> Reply:
        """The next final answer (or the next of any kind). Raises Ended, NotHttp."""
        while True:
            status, headers = self.head()
            if status >= 200 or informational:
                break
        body = b"" if head or status in (204, 304) or status < 200 else b"".join(self.pieces(headers))
        return Reply(status, headers, body)

    def head(self) -> tuple[int, tuple[tuple[str, str], ...]]:
        lines = self._until(b"\r\n\r\n").split(b"\r\n")[:-2]
        found = STATUS_LINE.fullmatch(lines[0])
        if not found:
            raise NotHttp(f"no status line: {lines[0][:200]!r}")
        headers = []
        for line in lines[1:]:
            header = HEADER.fullmatch(line)
            if not header:
                raise NotHttp(f"no header: {line[:200]!r}")
            headers.append((header[1].decode(), header[2].decode("latin-1")))
        return int(found[1]), tuple(headers)

    def pieces(self, headers: tuple[tuple[str, str], ...]) -> Iterator[bytes]:
        """The body, as it comes."""
        said = {name.lower(): value for name, value in headers}
        if "transfer-encoding" in said:
            if said["transfer-encoding"].lower() != "chunked" or "content-length" in said:
                raise NotHttp(f"the length is unclear: {headers}")
            yield from self._chunks()
            return
        if "content-length" not in said:
            raise NotHttp(f"the length is unclear: {headers}")
        left = int(said["content-length"])
        while left:
            data = self.some(min(left, 1 << 20))
            left -= len(data)
            yield data

    def exactly(self, size: int) -> bytes:
        got = bytearray()
        while len(got) < size:
            try:
                got += self.some(size - len(got))
            except Ended as ended:
                raise Ended(bytes(got) + ended.got) from None
        return bytes(got)

    def some(self, most: int = 1 << 16) -> bytes:
        """What is there, at least one byte. Raises Ended."""
        if not self._left:
            self._left = self._receive(max(most, 1 << 16))
        data, self._left = self._left[:most], self._left[most:]
        return data

    def ended(self, within: float = PATIENCE) -> bool:
        """Whether the server closes the connection in that time, with nothing more to say."""
        if self._left:
            return False
        self.socket.settimeout(within)
        try:
            return self.socket.recv(1) == b""
        except TimeoutError:
            return False
        except (ConnectionResetError, ssl.SSLError):
            return True
        finally:
            self.socket.settimeout(PATIENCE)

    def drained(self, within: float = PATIENCE) -> int:
        """Read and forget until the server ends the connection; how many bytes came. Fails when it goes on."""
        deadline, got = time.monotonic() + within, len(self._left)
        self._left = b""
        while time.monotonic() < deadline:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self.socket.recv(1 << 20)
            except TimeoutError:
                break
            except (ConnectionResetError, ssl.SSLError):
                return got
            if not data:
                return got
            got += len(data)
        raise AssertionError(f"the connection is still open after {within:.1f} s and {got} bytes")

    def quiet(self, seconds: float = 0.3) -> bool:
        """Whether nothing comes for a while."""
        return not self._left and not select.select([self.socket], [], [], seconds)[0]

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._left:
            if len(self._left) > 1 << 18:
                raise NotHttp(f"headers without an end: {self._left[:200]!r}")
            self._left += self._receive(1 << 16)
        data, _, self._left = self._left.partition(mark)
        return data + mark

    def _receive(self, most: int) -> bytes:
        try:
            data = self.socket.recv(most)
        except (ConnectionResetError, ssl.SSLEOFError):
            data = b""
        if not data:
            raise Ended(self._left)
        return data

    def _chunks(self) -> Iterator[bytes]:
        while True:
            line = self._until(b"\r\n")
            size = int(re.fullmatch(rb"([0-9A-Fa-f]+)(;[^\r\n]*)?\r\n", line)[1], 16)  # type: ignore[index]
            if size:
                yield self.exactly(size)
            if self.exactly(2) != b"\r\n":
                raise NotHttp("a chunk without an end")
            if not size:
                return


def written(
    method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes | None = None, host: str = "test"
) -> bytes:
    """A request as bytes, with Host, and with Content-Length where there is a body."""
    fields = {"Host": host, **(headers or {})}
    if body is not None and not {"content-length", "transfer-encoding"} & {name.lower() for name in fields}:
        fields["Content-Length"] = str(len(body))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chunked(*pieces: bytes) -> bytes:
    """A body of those chunks."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def tcp(port: int, *, receive_buffer: int = 0) -> socket.socket:
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(PATIENCE)
    connection.connect(("127.0.0.1", port))
    return connection


def unix(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE)
    connection.connect(path)
    return connection
