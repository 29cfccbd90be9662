"""The API over TCP: listeners with TLS, and who comes through them.

uvicorn keeps one TLS context for its life and tells an application nothing of a client's certificate. So connections
are accepted here, each with the context that is in force, and its certificate goes to the gate (gate.py) once OpenSSL
has verified it, which is before the first byte of HTTP is read.

Connections are bounded in all and for each address. Where there is no room, in the house or among those of an address,
who has shown no identity yet makes it, the oldest first: nobody fills either by waiting. Handshakes are bounded in time
and in number for each second: they cost the loop a millisecond or two each, which guests' jobs shall not miss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from hostagent import listening
from hostagent.addresses import network_of
from hostagent.api.bounded import BoundedProtocol, Known
from hostagent.api.identities import Identities, Identity, Shown
from hostagent.api.peer import NOBODY, Peer
from hostagent.certificates import Renewing
from hostagent.config import Api
from hostagent.tokens import Scope, Tokens

log = logging.getLogger(__name__)

_REST = 0.1  # seconds, when the process has no descriptor left for one more
_GRACE = 1.0  # seconds in which one who has just come is not cut for another
_GOODBYE = 0.5  # seconds for the client's end of TLS, which says nothing; then the connection is cut


@dataclass(frozen=True, slots=True)
class Bounds:
    """Named as in [api]: tcp_connections, tcp_client_connections, handshake_timeout, handshake_rate,
    identity_interval; `stall` is body_timeout."""

    connections: int
    of_one: int
    handshake: float
    rate: int
    look: float
    stall: float

    @classmethod
    def of(cls, api: Api) -> Bounds:
        return cls(
            connections=api.tcp_connections,
            of_one=api.tcp_client_connections,
            handshake=api.handshake_timeout,
            rate=api.handshake_rate,
            look=api.identity_interval,
            stall=api.body_timeout,
        )


@dataclass(eq=False, slots=True)
class Visitor:
    """A connection, from its first moment. `client` is what is counted as one."""

    sock: socket.socket
    client: str
    since: float = field(default_factory=time.monotonic)
    protocol: RemoteProtocol | None = None

    @property
    def stranger(self) -> bool:
        return self.protocol is None or not self.protocol.known

    def cut(self) -> None:
        if self.protocol is not None:
            self.protocol.transport.abort()
        else:  # in its handshake, which then fails
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


class RemoteProtocol(BoundedProtocol):
    """One connection; its own `Connection` for the gate."""

    surface = "tcp"
    who = NOBODY.who

    def __init__(self, doors: Doors, config: Config, state: ServerState, visitor: Visitor, authorities: str) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self.stall_timeout = doors.bounds.stall
        self._doors = doors
        self._visitor = visitor
        self._authorities = authorities
        self._shown: Shown | None = None
        self._identity: Identity | None = None
        self.origin = ""

    @property
    def known(self) -> bool:
        """Whether who is there has shown an identity that was good."""
        return self._identity is not None and bool(self._identity.peer.scope)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._visitor.protocol = self
        self.origin = "{}:{}".format(*self.client) if self.client else ""
        if (tls := transport.get_extra_info("ssl_object")) is not None:
            self._shown = Shown.of(tls.getpeercert(), self._authorities)
        self.app = Known(self.app, self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._doors.leave(self._visitor)

    async def identify(self, headers: Sequence[tuple[bytes, bytes]], needed: Scope) -> Peer:
        self._identity = None
        self._identity = await self._doors.identities.of(headers, self._shown, self.origin, needed)
        return self._identity.peer

    def look(self) -> bool:
        """End the connection if it is used by somebody whose identity is not in force any more."""
        if self._identity is None or self._identity.stands():
            return False
        self.transport.close()
        return True


class Doors:
    """The listeners, and all who came through them. `told` hears why somebody was turned away."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        certificate: Renewing | None,
        identities: Identities,
        bounds: Bounds,
        told: Callable[[str], None],
    ) -> None:
        self.listeners = listeners
        self.identities = identities
        self.bounds = bounds
        self._certificate = certificate
        self._told = told
        self._inside: dict[Visitor, None] = {}
        self._of: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._next = 0.0

    def __len__(self) -> int:
        return len(self._inside)

    def open(self, config: Config, state: ServerState) -> None:
        """Take connections from now on."""
        for listener in self.listeners:
            self._start(self._accept(listener, config, state))
            address = listener.getsockname()
            fields = {"address": f"{address[0]}:{address[1]}", "tls": self._certificate is not None}
            log.info("listening", extra={"fields": fields})
        self._start(self._look_at_files())
        self._start(self._look_at_visitors())

    async def close(self) -> None:
        """Take no more; those that are there are the server's to end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listener in self.listeners:
            listener.close()

    def reload(self) -> None:
        """Read certificate and tokens anew. May block."""
        if self._certificate is not None:
            self._certificate.reload()
        self.identities.tokens.look()

    def leave(self, visitor: Visitor) -> None:
        if visitor in self._inside:
            del self._inside[visitor]
            self._of[visitor.client] -= 1
            if not self._of[visitor.client]:
                del self._of[visitor.client]

    async def _accept(self, listener: socket.socket, config: Config, state: ServerState) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("accept failed", extra={"fields": {"error": str(error)}})
                await asyncio.sleep(_REST)
                continue
            visitor = Visitor(sock, network_of(str(address[0])))
            if not self._admit(visitor):
                sock.close()
                await asyncio.sleep(0)
                continue
            await self._pace()
            self._start(self._welcome(visitor, config, state))

    def _admit(self, visitor: Visitor) -> bool:
        if self._of[visitor.client] >= self.bounds.of_one and not self._room_made(visitor.client):
            self._told("client_connections")
            return False
        if len(self._inside) >= self.bounds.connections and not self._room_made():
            self._told("connections")
            return False
        self._inside[visitor] = None
        self._of[visitor.client] += 1
        return True

    def _room_made(self, client: str = "") -> bool:
        """By a stranger of this address, or of any."""
        latest = time.monotonic() - _GRACE
        might = (one for one in self._inside if client in ("", one.client) and one.since < latest)
        oldest = next((one for one in might if one.stranger), None)
        if oldest is None:
            return False
        self._told("stranger")
        self.leave(oldest)
        oldest.cut()
        return True

    async def _pace(self) -> None:
        """So many handshakes begin in a second; who comes faster waits in the kernel's queue."""
        now = time.monotonic()
        self._next = max(self._next + 1 / self.bounds.rate, now - 1.0)  # after a pause, a second's worth at once
        if self._next > now:
            await asyncio.sleep(self._next - now)

    async def _welcome(self, visitor: Visitor, config: Config, state: ServerState) -> None:
        loop, sock = asyncio.get_running_loop(), visitor.sock
        context, authorities = self._certificate.in_force if self._certificate else (None, "")
        waits = {"ssl_handshake_timeout": self.bounds.handshake, "ssl_shutdown_timeout": _GOODBYE} if context else {}
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await loop.connect_accepted_socket(
                lambda: RemoteProtocol(self, config, state, visitor, authorities), sock, ssl=context, **waits
            )
        except OSError as error:  # of TLS, too
            self._told("handshake")
            log.debug("no handshake", extra={"fields": {"client": visitor.client, "error": str(error)}})
        finally:
            if visitor.protocol is None:
                self.leave(visitor)
                sock.close()

    async def _look_at_files(self) -> None:
        """Whether they have changed. On a disk that hangs this waits, and nothing else."""
        while True:
            await asyncio.sleep(self.bounds.look)
            try:
                await asyncio.to_thread(self._read_anew)
            except Exception:  # what was read before stays in force, and is looked at again
                log.exception("a fault in reading certificates and tokens")

    async def _look_at_visitors(self) -> None:
        """Whether who is there may still be."""
        while True:
            await asyncio.sleep(self.bounds.look)
            for visitor in list(self._inside):
                if visitor.protocol is not None and visitor.protocol.look():
                    self._told("identity_ended")

    def _read_anew(self) -> None:
        if self._certificate is not None:
            self._certificate.look()
        self.identities.tokens.look()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a fault at a door", exc_info=error)


def doors(api: Api, told: Callable[[str], None]) -> Doors | None:
    """What the settings ask for, bound and not open yet; None where they ask for nothing. AgentError: they are wrong,
    or an address is taken. `told` hears why somebody was turned away."""
    tokens = Tokens(api.tokens_file, api.tokens)
    certificate = Renewing(found) if (found := listening.certificate_of(api)) is not None else None
    known = Identities(
        tokens,
        api.certificate_scopes,
        failures=api.auth_failures,
        patience=api.identity_interval,
        told=told,
        authorities=lambda: certificate.in_force.authorities if certificate else "",
    )
    if not api.listen:
        return None
    tokens.look()
    if not len(tokens) and not api.certificate_scopes:
        remedy = "make a token: `hostagent token add NAME --scope read`; or set api.certificate_scopes"
        log.warning("nobody may use the API by TCP yet", extra={"fields": {"remedy": remedy}})
    return Doors(listening.listen(api), certificate, known, Bounds.of(api), told)
