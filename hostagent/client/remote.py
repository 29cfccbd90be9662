"""One connection to an image on a data daemon: the requests of the dialect, one after the other.

Nothing is tried again here: a caller knows what a lost connection means for what it has sent. `abort` may come from
another thread, and ends whatever waits. Wire: docs of ovirt-imageio's HTTP API; ours adds ETag, sizes and partial
extents.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPResponse
from typing import Any

from hostagent.client.address import Address
from hostagent.client.dial import Dial
from hostagent.client.trouble import Lost, Retry, decoded, refused
from hostagent.errors import AgentError

ERROR_MOST = 64 << 10
"""Bytes of an error's text that are read."""
ANSWER_MOST = 1 << 20
LAST_WORD = 2.0  # seconds in which a server that broke off in the midst of a body may say why
_PROBLEMS = {"Accept": "application/problem+json, */*"}
Deliver = Callable[[memoryview], None]
_ETAG = re.compile(r'(?:W/)?"[!#-~]{1,200}"', re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Features:
    """What OPTIONS says. One that does not know it (405, 204) gets one connection, and nothing but GET and PUT."""

    extents: bool = False
    zero: bool = False
    flush: bool = False
    checksum: bool = False
    writable: bool = True
    readers: int = 1
    writers: int = 1
    size: int | None = None
    unix_socket: str = ""
    etag: str = ""


class Remote:
    """`etag`: sent as If-Match with every request, when it is known."""

    def __init__(self, dial: Dial, etag: str = "") -> None:
        self._dial = dial
        self._etag = etag
        self._connection: HTTPConnection | None = None
        self._sock: socket.socket | None = None
        self._aborted = False
        self.address: Address = dial.addresses[0]
        self.closes = False
        """The server ends connections after an answer: then only what is flushed with its request is sure."""

    def connect(self) -> None:
        if self._aborted:
            raise Lost("unreachable", "the transfer was stopped")
        if self._connection is None:
            self.address, self._connection = self._dial.connect()
            self._sock = self._connection.sock
            if self._aborted:
                self.abort()

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.sock is not None

    @property
    def same_host(self) -> bool:
        """Whether the server's address is this host's own."""
        sock = self._connection.sock if self._connection else None
        if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        return bool(sock.getsockname()[0] == sock.getpeername()[0])

    def close(self) -> None:
        connection, self._connection, self._sock = self._connection, None, None
        if connection is not None:
            connection.close()

    def abort(self) -> None:
        self._aborted = True
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):  # not SSLSocket's own, which another thread may be using
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    # Requests

    def options(self) -> Features:
        response = self._request("OPTIONS", expect=(200, 204, 405, 501))
        body = self._body(response, ANSWER_MOST)
        return _features(body, response.headers) if response.status == 200 and body else Features()

    def get(self, offset: int, length: int) -> Body:
        """These bytes. Close it."""
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}"}
        response = self._request("GET", headers=wanted, expect=(200, 206))
        try:
            self._check(response, offset, length)
        except BaseException:
            self.close()
            raise
        return Body(self, response, length)

    def put(self, offset: int, length: int, produce: Callable[[Deliver], None], *, flush: bool) -> None:
        """Send what `produce` delivers, which is `length` bytes; they are the caller's again when this returns."""
        headers = {
            "Content-Length": str(length),
            "Content-Range": f"bytes {offset}-{offset + length - 1}/*",
            "Content-Type": "application/octet-stream",
            **self._usual(),
        }
        done = False
        try:
            connection = self._connected()
            with self._losses():
                connection.putrequest("PUT", f"{self.address.path}?flush={'y' if flush else 'n'}")
                for name, value in headers.items():
                    connection.putheader(name, value)
                connection.endheaders()
            produce(self._send)
            if flush:
                connection.sock.settimeout(self._dial.patience.flush)
            self._end(self._response("PUT", (200, 201, 204)))
            self._relax()
            done = True
        finally:
            if not done:
                self.close()

    def _send(self, view: memoryview) -> None:
        try:
            self._connected().send(view)
        except (OSError, HTTPException) as error:
            raise self._last_word(error) from error

    def zero(self, offset: int, length: int, *, flush: bool, timeout: float) -> None:
        self._patch({"op": "zero", "offset": offset, "size": length, "flush": flush}, timeout)

    def flush(self, timeout: float) -> None:
        self._patch({"op": "flush"}, timeout)

    def extents(self, query: str) -> Iterator[bytes]:
        """The JSON text of an answer to GET …/extents?query, in pieces."""
        response = self._request("GET", f"{self.address.path}/extents?{query}", expect=(200,))
        done = False
        try:
            while block := self._read(response, 256 << 10):
                yield block
            if response.length:
                raise self._cut()
            self._end(response)
            done = True
        finally:
            if not done:
                self.close()

    def json(self, rest: str, timeout: float) -> Any:
        """The answer to GET …/rest."""
        response = self._request("GET", f"{self.address.path}/{rest}", expect=(200,), timeout=timeout)
        body = self._body(response, ANSWER_MOST)
        found = decoded(body)
        if found is None:
            raise self._strange("what is not JSON")
        return found

    def total(self) -> int | None:
        """The size that the answer to a request for the first byte tells; None where it tells none."""
        try:
            response = self._request("GET", headers={"Range": "bytes=0-0"}, expect=(200, 206))
        except Retry:
            raise
        except AgentError:  # no right to read, or nothing there
            return None
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range") or "")
        if response.status == 206 and match and match[3] != "*":
            self._body(response, ERROR_MOST)
            return int(match[3])
        self.close()
        return response.length if response.status == 200 else None

    # One request

    def _patch(self, message: Mapping[str, object], timeout: float) -> None:
        body = json.dumps(message).encode()
        kind = {"Content-Type": "application/json"}
        response = self._request("PATCH", headers=kind, body=body, expect=(200, 204), timeout=timeout)
        self._end(response)

    def _request(
        self,
        method: str,
        path: str = "",
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        expect: tuple[int, ...],
        timeout: float | None = None,
    ) -> HTTPResponse:
        connection = self._connected()
        if timeout is not None:
            connection.sock.settimeout(timeout)
        with self._losses():
            connection.request(method, path or self.address.path, body, {**self._usual(), **(headers or {})})
        response = self._response(method, expect)
        self._relax()
        return response

    def _relax(self) -> None:
        """Back to the usual patience."""
        if self._connection is not None and self._connection.sock is not None:
            self._connection.sock.settimeout(self._dial.patience.silence)

    def _response(self, method: str, expect: tuple[int, ...]) -> HTTPResponse:
        with self._losses():
            response = self._connected().getresponse()
            if response.status in expect:
                return response
            body = response.read(ERROR_MOST)
        if response.will_close or response.length:
            self.close()
        said = self.address.hidden(body.decode(errors="replace")).encode()
        raise refused(response.status, response.headers, said, f"{method} of the image at {self.address}")

    def _usual(self) -> dict[str, str]:
        strong = self._etag and not self._etag.startswith("W/")  # a weak one never matches (RFC 9110, 13.1.1)
        return {**_PROBLEMS, **({"If-Match": self._etag} if strong else {})}

    def _connected(self) -> HTTPConnection:
        connection = self._connection
        if connection is None or connection.sock is None:
            self.close()
            raise Lost("unreachable", f"{self.address} has ended the connection")
        return connection

    def _check(self, response: HTTPResponse, offset: int, length: int) -> None:
        """Whether the body is what was asked for: another range would be written to the wrong place."""
        if response.status == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range") or "")
            if match is None or (int(match[1]), int(match[2])) != (offset, offset + length - 1):
                raise self._strange("another range than the one that it was asked for")
        elif offset != 0:
            raise self._strange("all of the image when it was asked for a part of it")
        if response.length != length:
            raise self._strange(f"a body of {response.length} bytes when it was asked for {length}")

    def fill(self, response: HTTPResponse, view: memoryview) -> None:
        """All of `view` from the body."""
        filled = 0
        while filled < len(view):
            with self._losses():
                number = response.readinto(view[filled:])
            if not number:
                raise self._cut()
            filled += number

    def _read(self, response: HTTPResponse, most: int) -> bytes:
        with self._losses():
            return response.read1(most)

    def _body(self, response: HTTPResponse, most: int) -> bytes:
        with self._losses():
            body = response.read(most)
        if not response.isclosed() and len(body) == most:
            self.close()
            raise self._strange(f"an answer of more than {most} bytes")
        self._end(response)
        return body

    def _end(self, response: HTTPResponse) -> None:
        """All of the answer is read: the next request may follow."""
        with self._losses():
            response.read(ERROR_MOST)
        if not response.isclosed():
            self.close()
            raise self._cut()
        if response.will_close:
            self.closes = True
            self.close()

    def _last_word(self, error: Exception) -> AgentError:
        """Why the server broke off in the midst of our body, where it has said so; else that it is gone."""
        connection = self._connection
        try:
            if connection is not None and connection.sock is not None:
                connection.sock.settimeout(LAST_WORD)
                self._response("PUT", ())
        except AgentError as said:
            if not isinstance(said, Lost):
                return said
        except ValueError:  # http.client: no response can be expected yet
            pass
        return self._lost(error)

    @contextlib.contextmanager
    def _losses(self) -> Iterator[None]:
        try:
            yield
        except (OSError, HTTPException, ValueError) as error:
            self.close()
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> AgentError:
        if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
            message = f"{self.address} refuses our TLS: {error.reason}"
            return AgentError("denied", message, remedy="it may want a client certificate: --certificate FILE")
        if isinstance(error, TimeoutError):
            return Lost("timeout", f"{self.address} was silent for too long", remedy="see the server's load and log")
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        message = f"the connection to {self.address} was lost: {self.address.hidden(reason)[:200]}"
        return Lost("unreachable", message, remedy="see whether the data daemon still runs")

    def _cut(self) -> Lost:
        return Lost("unreachable", f"{self.address} ended the connection in the midst of an answer")

    def _strange(self, what: str) -> AgentError:
        return AgentError("io_error", f"{self.address} answered {what}", remedy="see whether it is a data daemon")


class Body:
    """The body of an answer: bytes of the image, in order."""

    def __init__(self, remote: Remote, response: HTTPResponse, length: int) -> None:
        self._remote = remote
        self._response = response
        self._left = length

    def fill(self, view: memoryview) -> int:
        """Fill `view`, or as much of it as there still is; the bytes, 0 at the end."""
        part = view[: self._left]
        if part:
            self._remote.fill(self._response, part)
            self._left -= len(part)
        return len(part)

    def close(self) -> None:
        if self._left:
            self._remote.close()  # the rest is still on its way

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _features(body: bytes, headers: HTTPMessage) -> Features:
    found = decoded(body)
    if not isinstance(found, dict):
        return Features()
    names = found.get("features")
    names = names if isinstance(names, list) else []
    allow = headers.get("allow")
    size, socket_name, generation = found.get("size"), found.get("unix_socket"), found.get("generation", "")
    return Features(
        extents="extents" in names,
        zero="zero" in names,
        flush="flush" in names,
        checksum="checksum" in names,
        writable=allow is None or "PUT" in allow,
        readers=_count(found.get("max_readers")),
        writers=_count(found.get("max_writers")),
        size=size if isinstance(size, int) and size >= 0 else None,
        unix_socket=socket_name if isinstance(socket_name, str) else "",
        etag=_tag(headers.get("etag") or f'"{generation}"'),
    )


def _tag(value: object) -> str:
    """An ETag (RFC 9110) that may be sent back; "" for what is none."""
    return value if isinstance(value, str) and _ETAG.fullmatch(value) else ""


def _count(value: object) -> int:
    return max(1, value) if isinstance(value, int) else 1
