"""Another data daemon, as a backend speaks with it: one connection, kept between requests, that another thread can end.

Waits are for progress: no call may bring nothing for `timeout` seconds, however long all of them take. The path of an
image is its ticket, a secret: it stands in no error.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hostagent.data.streams import Stopped
from hostagent.errors import AgentError
from hostagent.qcow2 import is_plain

ANSWER_MOST = 64 * 1024
"""Bytes of an answer that is no image."""
TEXT_MOST = 300  # of what it says of an error, for people
_CODES = {
    400: "invalid",
    401: "denied",
    403: "denied",
    404: "not_found",
    409: "conflict",
    412: "conflict",
    413: "too_large",
    416: "range",
    429: "limit",
    501: "not_supported",
    504: "timeout",
    507: "no_space",
}
_LAST_WORD = 1.0  # seconds in which a daemon that stopped to listen may say why
_NEVER_ANSWERED = (http.client.RemoteDisconnected, ConnectionError)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image is. Shown without its path."""

    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ProxyWaits:
    """Seconds: data.proxy_connect_timeout, data.proxy_timeout."""

    connect: float = 10.0
    silence: float = 60.0


class Fence:
    """The sockets that are to be shut down when the ticket ends, now and from then on. Thread-safe."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self.closed = False

    def close(self) -> None:
        with self._turn:
            self.closed = True
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(one, socket.SHUT_RDWR)  # not SSLSocket's, which forgets its TLS

    def check(self) -> None:
        if self.closed:
            raise Stopped

    def add(self, one: socket.socket) -> None:
        with self._turn:
            self.check()
            self._sockets.add(one)

    def remove(self, one: socket.socket) -> None:
        with self._turn:
            self._sockets.discard(one)


class Answer:
    """Of which the head has come."""

    def __init__(self, response: http.client.HTTPResponse, origin: Origin) -> None:
        self._response = response
        self._origin = origin
        self.status = response.status
        self.length = response.length
        """None where it is not said."""

    def header(self, name: str) -> str:
        return self._response.getheader(name) or ""

    def read_into(self, buffer: memoryview) -> None:
        """All of `buffer`; AgentError when it ends before."""
        with self._origin.explained():
            done = 0
            while done < len(buffer):
                number = self._response.readinto(buffer[done:])
                if not number:
                    raise http.client.IncompleteRead(b"", len(buffer) - done)
                done += number

    def blocks(self, size: int) -> Iterator[bytes]:
        """What there is, in blocks of that many bytes or fewer."""
        while True:
            with self._origin.explained():
                block = self._response.read1(size)
            if not block:
                return
            yield block

    def text(self) -> bytes:
        """All of a short one, so that the connection can be kept."""
        with self._origin.explained():
            found = self._response.read(ANSWER_MOST + 1)
        if len(found) > ANSWER_MOST:
            raise self._origin.wrong("its answer is too long")
        return found

    def json(self) -> dict[str, Any]:
        try:
            found = json.loads(self.text())
        except (ValueError, RecursionError) as error:
            raise self._origin.wrong("its answer is no JSON") from error
        if not isinstance(found, dict):
            raise self._origin.wrong("its answer is no JSON object")
        return found


class Origin:
    """One connection at a time, made when it is needed. `number` is how many there were: it tells them apart."""

    def __init__(self, place: Place, waits: ProxyWaits, fence: Fence) -> None:
        self.place = place
        self.number = 0
        self._waits = waits
        self._fence = fence
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None

    def ask(
        self,
        method: str,
        *,
        below: str = "",
        headers: Mapping[str, str] | None = None,
        body: bytes | memoryview | None = None,
    ) -> Answer:
        """Of a request that may be sent twice. AgentError for a status that is no success."""
        head = dict(headers or {})
        if body is not None:
            head["Content-Length"] = str(len(body))
        for again in (False, True):
            kept = self._connection is not None
            try:
                self.begin(method, below, head)
                if body is not None:
                    self.send(memoryview(body))
                return self.answer()
            except AgentError as error:
                if again or not kept or not isinstance(error.__cause__, _NEVER_ANSWERED):
                    raise
        raise AssertionError

    def begin(self, method: str, below: str, headers: Mapping[str, str]) -> None:
        """The head of a request; a body follows by `send`."""
        with self.explained():
            connection = self._connected()
            connection.putrequest(method, self.place.path + below, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()

    def send(self, data: memoryview) -> None:
        with self.explained():
            while data:
                self._fence.check()
                try:
                    number = self._live().send(data)  # not sendall, whose timeout is for all of it
                except ConnectionError:
                    self._hear_why()
                    raise
                data = data[number:]

    def answer(self) -> Answer:
        assert self._connection is not None
        with self.explained():
            answer = Answer(self._connection.getresponse(), self)
        if not 200 <= answer.status < 300:
            raise self._refused(answer)
        return answer

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if self._socket is not None:
            self._fence.remove(self._socket)
            self._socket = None
        if connection is not None:
            connection.close()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """What the network raises, as AgentError; the connection is of no more use then."""
        try:
            self._fence.check()
            yield
        except Stopped:
            self.close()
            raise
        except ssl.SSLCertVerificationError as error:
            self.close()
            remedy = "name the file of its authority: data.proxy_ca"
            message = f"the certificate of {self.place} is not trusted: {error.verify_message}"
            raise AgentError("unavailable", message, remedy=remedy) from error
        except TimeoutError as error:
            self.close()
            waits = self._waits
            message = f"{self.place} brought nothing for {waits.silence:g} s (data.proxy_timeout)"
            raise AgentError("timeout", message, remedy="see whether it hangs") from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            self._fence.check()  # so that is why
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            message = f"no word from {self.place}: {reason[:TEXT_MOST]}"
            raise AgentError("unavailable", message, remedy="see whether that daemon runs, and its log") from error

    def wrong(self, why: str) -> AgentError:
        self.close()
        return AgentError("unavailable", f"{self.place} is not understood: {why}", remedy="see which daemon that is")

    def _connected(self) -> http.client.HTTPConnection:
        if self._connection is not None and (self._connection.sock is None or _has_word(self._connection.sock)):
            self.close()  # it has ended since the last answer
        if self._connection is None:
            made = http.client.HTTPConnection(self.place.host, self.place.port)
            made.auto_open = 0
            made.sock = self._socket = self._dialled()
            self._connection = made
            self.number += 1
        return self._connection

    def _live(self) -> socket.socket:
        assert self._connection is not None
        assert self._connection.sock is not None
        return self._connection.sock

    def _hear_why(self) -> None:
        """Raise what it said before it stopped to listen, if it said anything."""
        assert self._connection is not None
        with contextlib.suppress(OSError, http.client.HTTPException):
            self._live().settimeout(_LAST_WORD)
            answer = Answer(self._connection.getresponse(), self)
            if not 200 <= answer.status < 300:
                refused = self._refused(answer)
                self.close()
                raise refused

    def _dialled(self) -> socket.socket:
        place, failed = self.place, OSError("it has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM):
            made = socket.socket(family, kind, protocol)
            try:
                return self._open(made, address)
            except TimeoutError as error:
                failed = TimeoutError(error)
            except ssl.SSLCertVerificationError:
                raise
            except OSError as error:
                failed = error
        if isinstance(failed, TimeoutError):
            message = f"{place} let nobody in for {self._waits.connect:g} s (data.proxy_connect_timeout)"
            raise AgentError("timeout", message, remedy="see whether a firewall is between") from failed
        raise failed

    def _open(self, made: socket.socket, address: Any) -> socket.socket:
        found = made
        try:
            self._fence.add(made)
            made.settimeout(self._waits.connect)
            made.connect(address)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.place.tls is not None:
                found = self.place.tls.wrap_socket(made, server_hostname=self.place.host, do_handshake_on_connect=False)
                self._fence.add(found)
                found.do_handshake()
            found.settimeout(self._waits.silence)
            return found
        except BaseException:
            self._fence.remove(found)
            found.close()
            raise
        finally:
            if found is not made:
                self._fence.remove(made)

    def _refused(self, answer: Answer) -> AgentError:
        code = _CODES.get(answer.status, "unavailable")
        try:
            text = answer.text().decode("utf-8", "replace").strip().splitlines()
        except AgentError:
            text = []
        said = text[0] if text else ""
        said = said.replace(self.place.path, "…").replace(self.place.path.rpartition("/")[2], "…")
        said = said[:TEXT_MOST] if is_plain(said[:TEXT_MOST]) else ""
        if answer.header("connection").lower() == "close":
            self.close()
        message = f"{self.place} refuses: {said or f'status {answer.status}'}"
        return AgentError(code, message, remedy="see that daemon's log, and its ticket", status=answer.status)


def _has_word(sock: socket.socket) -> bool:
    """Whether something comes that nobody asked for: in practice, the end."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLRDHUP)
    return bool(poll.poll(0))
