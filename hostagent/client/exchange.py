"""One connection to a server, and one request after the other on it.

Nothing is tried again here: a caller knows what a lost connection means for what it has sent. `abort` may come from
another thread, and ends whatever waits.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse

from hostagent.client.address import Address
from hostagent.client.dial import Dial
from hostagent.client.trouble import Lost, refused
from hostagent.errors import AgentError

ERROR_MOST = 64 << 10
"""Bytes of an error's text that are read."""
LAST_WORD = 2.0  # seconds in which a server that broke off in the midst of a body may say why
_PROBLEMS = {"Accept": "application/problem+json, */*"}


class Exchange:
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
        self.end(response)
        return body

    def end(self, response: HTTPResponse) -> None:
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
