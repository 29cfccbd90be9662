"""Listeners: who connects gets a thread, unless the house is full. A handshake, a header or a body is its thread's.

Full is a number of connections, in all and for one client (an address, or a user of a unix socket). A further one is
closed at once: it costs nothing, and it hinders nobody. But who has shown no ticket for longer than a request's head
may take makes room for a new one, the oldest first: whoever has many addresses does not fill the house for good.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from hostagent.data.connection import Connection, Handler, Patience
from hostagent.data.metrics import Metrics

log = logging.getLogger(__name__)

_DESCRIPTORS = 3
"""Of one connection: its own, and two of its image."""
_DESCRIPTORS_APART = 512
"""Descriptors for all else: control connections, logs, images that tickets share."""
CONTROLS = ("control", "control-tcp")
"""Services that are counted each by itself, so that nobody shuts them, or one of them the other, out."""
_ACCEPT_REST = 0.1  # seconds, when the process has no descriptor left for one more


@dataclass(frozen=True, slots=True)
class Service:
    """`name` for metrics: remote, local, control. `tls` gives the context for the next connection."""

    name: str
    listener: socket.socket
    handler: Handler
    tls: Callable[[], ssl.SSLContext] | None = None


@dataclass(frozen=True, slots=True)
class House:
    """Connections, in all and of one client. The control sockets' are counted apart, so that none can shut them out."""

    most: int
    most_of_one: int
    most_control: int = 64


def room(most: int) -> int:
    """How many connections there are descriptors for, `most` at most; the process's limit is raised as far as needed.
    So it is always a connection that is refused, and never a request on one, nor the control socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most * _DESCRIPTORS + _DESCRIPTORS_APART
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return most
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == wanted:
        return most
    fewer = max(1, (soft - _DESCRIPTORS_APART) // _DESCRIPTORS)
    remedy = f"raise the limit of open files to {wanted} (LimitNOFILE of the unit), or lower data.max_connections"
    fields = {"connections": fewer, "limit": soft, "remedy": remedy}
    log.warning("fewer connections than data.max_connections", extra={"fields": fields})
    return fewer


class Server:
    def __init__(self, services: list[Service], patience: Patience, house: House, metrics: Metrics) -> None:
        self._services = services
        self._patience = patience
        self._house = house
        self._metrics = metrics
        self._lock = threading.Lock()
        self._open: dict[Connection, tuple[str, str]] = {}
        self._of_service: Counter[str] = Counter()
        self._of_client: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        metrics.connections = self.connections

    def start(self) -> None:
        for service in self._services:
            thread = threading.Thread(target=self._accept, args=(service,), name=f"accept {service.name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def connections(self) -> dict[str, int]:
        with self._lock:
            return {service.name: self._of_service[service.name] for service in self._services}

    def stop(self, wait: float) -> None:
        """No further connection; those that are get `wait` seconds to end what they do, and are then cut."""
        self._stopping.set()
        for service in self._services:
            with contextlib.suppress(OSError):
                service.listener.shutdown(socket.SHUT_RDWR)
            service.listener.close()
        end = time.monotonic() + wait
        while self._open and time.monotonic() < end:
            time.sleep(0.05)
        with self._lock:
            left = list(self._open)
        for connection in left:
            connection.stop()

    def _accept(self, service: Service) -> None:
        while not self._stopping.is_set():
            try:
                sock, address = service.listener.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                log.warning("accept failed", extra={"fields": {"service": service.name, "error": str(error)}})
                time.sleep(_ACCEPT_REST)
                continue
            try:
                self._begin(service, sock, address)
            except Exception:
                log.exception("a connection could not begin", extra={"fields": {"service": service.name}})
                sock.close()

    def _begin(self, service: Service, sock: socket.socket, address: object) -> None:
        if sock.family == socket.AF_UNIX:
            client = f"uid {_user(sock)}"
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            client = str(address[0]) if isinstance(address, tuple) else ""
        full = self._full(service.name, client)
        if full and not (full != "control" and self._room_made(full, service.name, client)):
            self._metrics.count("data_connections_refused_total", full)
            sock.close()
            return
        connection = Connection(
            sock,
            service.handler,
            self._patience,
            tls=service.tls,
            peer=client,
            count=lambda result: self._metrics.count("data_requests_total", service.name, result),
        )
        with self._lock:
            self._open[connection] = service.name, client
            self._of_service[service.name] += 1
            self._of_client[client] += 1
        thread = threading.Thread(target=self._run, args=(connection,), name="connection", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread to be had
            self._leave(connection)
            self._metrics.count("data_connections_refused_total", "threads")
            sock.close()

    def _full(self, service: str, client: str) -> str:
        with self._lock:
            if service in CONTROLS:
                return "control" if self._of_service[service] >= self._house.most_control else ""
            if self._of_client[client] >= self._house.most_of_one:
                return "client"
            count = sum(self._of_service.values()) - sum(map(self._of_service.__getitem__, CONTROLS))
            return "all" if count >= self._house.most else ""

    def _room_made(self, full: str, service: str, client: str) -> bool:
        """A stranger who has had his time goes. For one more of the same client it is any of its own; for whoever comes
        by the host's own socket, any from the network."""
        latest = time.monotonic() - self._patience.header

        def goes(one: Connection, of: str, whose: str) -> bool:
            if full == "client":
                return whose == client
            return one.began < latest or (service == "local" and of == "remote")

        with self._lock:
            strangers = (
                one
                for one, (of, whose) in self._open.items()
                if one.stranger and of not in CONTROLS and goes(one, of, whose)
            )
            gone = next(strangers, None)  # they are in the order in which they came
            if gone is None:
                return False
            gone.stranger = False  # nobody takes it for another one's room, too
        self._metrics.count("data_connections_refused_total", "stranger")
        gone.stop()
        return True

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            self._leave(connection)

    def _leave(self, connection: Connection) -> None:
        with self._lock:
            name, client = self._open.pop(connection)
            self._of_service[name] -= 1
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]


def _user(sock: socket.socket) -> int:
    return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])
