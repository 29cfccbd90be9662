"""One client's connection: a thread, the requests one after the other, and the backend of the ticket that they use."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from hostagent.data import answers
from hostagent.data.backends.base import ImageBackend
from hostagent.data.errors import HttpError, from_agent, is_ours
from hostagent.data.streams import PeerGone, Stopped
from hostagent.data.tickets import Operation, Ticket
from hostagent.data.transport import Plain, Tls, Transport
from hostagent.data.wire import Request, Wire
from hostagent.errors import AgentError

log = logging.getLogger(__name__)

_LINGER = 5.0  # seconds in which a client that is answered and cut may read the answer
_LINGER_MOST = 16 << 20
_FAULT = "Server failed to perform the request, check logs"


class Handler(Protocol):
    """Answers requests. What it raises becomes an error's answer, as long as nothing was sent."""

    def handle(self, request: Request, connection: Connection) -> bool:
        """Answer it; whether the connection may be kept."""

    def headers(self, request: Request) -> list[tuple[str, str]]:
        """Headers that errors, too, have."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: for the TLS handshake, a request's head, a silent client that no ticket speaks for."""

    handshake: float
    header: float
    idle: float


@dataclass(slots=True)
class Summary:
    """What a connection did, for its last line in the log."""

    transfer: str = ""
    requests: int = 0
    errors: int = 0
    moved: dict[str, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)


class Connection:
    def __init__(
        self,
        sock: socket.socket,
        handler: Handler,
        patience: Patience,
        *,
        tls: Callable[[], ssl.SSLContext] | None,
        peer: str,
        count: Callable[[str], None],
    ) -> None:
        """`count` hears how each request went: ok, refused or failed."""
        self.peer = peer
        self._count = count
        self.summary = Summary()
        self.transport: Transport = Plain(sock)
        self.answered = False
        self.began = time.monotonic()
        self.stranger = True
        """Has shown no ticket yet."""
        self._sock = sock
        self._tls = tls
        self._handler = handler
        self._patience = patience
        self._idle = patience.idle
        self._backend: ImageBackend | None = None
        self._further: list[ImageBackend] = []
        self._ticket: Ticket | None = None
        self._using = threading.Lock()
        self._stopped = False

    def run(self) -> None:
        try:
            self._serve()
        except (PeerGone, Stopped, ssl.SSLError) as end:
            log.debug("connection ended", extra={"fields": {"peer": self.peer, "why": str(end)}})
        except Exception:
            log.exception("a fault of the data daemon", extra={"fields": {"peer": self.peer}})
        finally:
            self._close()

    def _serve(self) -> None:
        if self._tls is not None:
            transport = Tls(self._sock, self._tls())
            transport.handshake(self._patience.handshake)
            self.transport = transport
        wire = Wire(self.transport, header_timeout=self._patience.header)
        while not self._stopped:
            request = None
            self.answered = False
            try:
                request = wire.request(self._idle)
                if request is None:
                    return
                self.summary.requests += 1
                keep = self._handler.handle(request, self) and request.keep
                self._count("ok")
                if not request.body.drain():
                    keep = False
            except HttpError as error:
                keep = self._refuse(error, request)
            except AgentError as error:
                keep = self._refuse(from_agent(error), request)
            except (PeerGone, Stopped, ssl.SSLError):
                raise
            except Exception:
                log.exception("a fault of the data daemon", extra={"fields": {"peer": self.peer}})
                keep = self._refuse(HttpError(500, _FAULT, close=True), request)
            if not keep:
                self._linger()
                return

    def _refuse(self, error: HttpError, request: Request | None) -> bool:
        """Answer with the error; where an answer has begun there is no way to say it but to end the connection."""
        self.summary.errors += 1
        ours = is_ours(error.status)
        self._count("failed" if ours else "refused")
        fields = {"transfer": self.summary.transfer, "peer": self.peer, "status": error.status, "error": error.message}
        log.log(logging.WARNING if ours else logging.DEBUG, "refused", extra={"fields": fields})
        if self.answered:
            return False
        with contextlib.suppress(PeerGone):
            keep = request is not None and request.keep and not error.close and request.body.drain()
            extra = self._handler.headers(request) if request else ()
            answer = answers.of_error(error, request, extra)
            bodiless = request is not None and request.method == "HEAD"
            self.transport.send(answer.encoded(keep=keep, bodiless=bodiless))
            return keep
        return False

    def reply(self, request: Request, answer: answers.Answer) -> bool:
        keep = request.keep and answer.keep and request.body.drain()
        self.answered = True
        self.transport.send(answer.encoded(keep=keep, bodiless=request.method == "HEAD"))
        return keep

    @contextlib.contextmanager
    def backend(self, ticket: Ticket, opened: Callable[[], ImageBackend]) -> Iterator[ImageBackend]:
        """The ticket's backend, opened on first use and kept for the next request. One that failed is not kept."""
        with self._using:
            self.summary.transfer = ticket.spec.name
            if self._ticket is not ticket:
                self._give_back()
            if self._backend is None:
                ticket.join(self)
                self._ticket, self.stranger = ticket, False
                self._backend = opened()
                if self._stopped:
                    self._backend.fence()
                self._idle = float(ticket.spec.inactivity_timeout) or self._patience.idle
                self.transport.patience(self._idle)
            try:
                yield self._backend
            except HttpError:
                raise
            except AgentError as error:
                self._give_back()
                fields = {"transfer": ticket.spec.name, "code": error.code, "error": error.message}
                log.warning("an image cannot be used", extra={"fields": fields})
                raise from_agent(error, hidden=ticket.spec.url) from error
            except BaseException:
                self._give_back()
                raise
        if ticket.canceled or ticket.over:  # whoever revoked it may have come while it was in use
            self.let_go()

    @contextlib.contextmanager
    def operation(self, ticket: Ticket, op: Operation, most: int, wait: float) -> Iterator[Operation]:
        with ticket.operation(op, self, most=most, wait=wait):
            self.transport.patience(self._idle)
            try:
                yield op
            finally:
                moved = self.summary.moved
                moved[op.kind] = moved.get(op.kind, 0) + op.done

    @contextlib.contextmanager
    def further(self) -> Iterator[Callable[[ImageBackend], ImageBackend]]:
        """For an operation that has more than one backend: what is given here ends with the rest when it is stopped."""

        def keep(backend: ImageBackend) -> ImageBackend:
            self._further = [*self._further, backend]
            if self._stopped:
                backend.fence()
            return backend

        try:
            yield keep
        finally:
            self._further = []

    # The ticket's side (tickets.Holder)

    def stop(self) -> None:
        self._stopped = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        for backend in (self._backend, *self._further):
            if backend is not None:
                backend.fence()

    def let_go(self) -> None:
        if not self._using.acquire(blocking=False):
            self.stop()  # in use before or after its operation, such as to connect to a server that does not answer
            return
        try:
            if self._ticket is not None and (self._ticket.canceled or self._ticket.over):
                self._give_back()
        finally:
            self._using.release()

    def intact(self) -> bool:
        """From another thread: whether what it has written is still with the server that took it."""
        backend = self._backend
        return backend is not None and backend.intact()

    def _give_back(self) -> None:
        backend, ticket = self._backend, self._ticket
        try:
            if backend is not None:
                self._close_backend(backend, ticket)
        finally:
            self._backend = self._ticket = None
            if ticket is not None:
                ticket.left(self)

    def _close_backend(self, backend: ImageBackend, ticket: Ticket | None) -> None:
        """What it wrote and nobody has flushed is flushed first, or known to be lost."""
        try:
            if ticket is not None and ticket.durability.pending(self):
                try:
                    if ticket.canceled or ticket.over:  # who revokes it waits for this, and not for a slow disk
                        raise Stopped("the ticket does not hold any more")
                    with ticket.durability.flushing(self, shared=False, intact=lambda _: True):
                        backend.flush()
                finally:
                    ticket.durability.left(self)
        except (AgentError, OSError, Stopped) as error:
            fields = {"transfer": ticket.spec.name if ticket else "", "error": str(error)}
            log.warning("writes that were not flushed may be lost", extra={"fields": fields})
        try:
            backend.close()
        except (AgentError, OSError) as error:
            log.warning("an image was not closed well", extra={"fields": {"error": str(error)}})

    def _linger(self) -> None:
        """A close with bytes unread would reset the connection, and the answer could be lost."""
        with contextlib.suppress(PeerGone, ssl.SSLError, OSError):
            self.transport.finish()
            end, buffer, left = time.monotonic() + _LINGER, memoryview(bytearray(65536)), _LINGER_MOST
            while left > 0 and (rest := end - time.monotonic()) > 0:
                self.transport.patience(rest)
                number = self.transport.receive(buffer)
                if not number:
                    return
                left -= number

    def _close(self) -> None:
        with self._using:
            self._give_back()
        with contextlib.suppress(OSError):
            self._sock.close()
        summary = self.summary
        if summary.transfer:
            fields = {
                "transfer": summary.transfer,
                "peer": self.peer,
                "requests": summary.requests,
                "errors": summary.errors,
                "seconds": round(time.monotonic() - summary.began, 3),
                **summary.moved,
            }
            log.info("connection closed", extra={"fields": fields})
