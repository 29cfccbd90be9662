"""The data daemon's composition root: sockets, services, signals; nothing else constructs them."""

from __future__ import annotations

import contextlib
import grp
import ipaddress
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from hostagent import sdnotify
from hostagent.config import UNSET, Config
from hostagent.config_data import Data
from hostagent.data.audit import Audit
from hostagent.data.backends.registry import Registry
from hostagent.data.connection import Patience
from hostagent.data.control import Control, ControlBounds
from hostagent.data.handover import Descriptors, Handover
from hostagent.data.images import Bounds, Images
from hostagent.data.metrics import Metrics
from hostagent.data.server import BACKLOG, House, Server, Service
from hostagent.data.throttle import Lane, Rate
from hostagent.data.tickets import Ticket, Tickets
from hostagent.data.tls import Certificate, Renewing
from hostagent.errors import AgentError

log = logging.getLogger(__name__)

STACK = 256 * 1024
"""Bytes of a thread's stack: what it needs, a thousand times."""
HANDOVER = "data-handover.sock"


class Daemon:
    def __init__(self, config: Config) -> None:
        settings = config.data
        self._settings = settings
        self.metrics = Metrics()
        audit = Audit(None if settings.audit == UNSET else settings.audit)
        host = Rate(settings.rate)

        def told(what: str, ticket: Ticket) -> None:
            audit.tell(what, ticket)
            if what == "revoked":
                self.metrics.count("data_revocations_total", "done")

        self.tickets = Tickets(most=settings.tickets, lane=lambda own: Lane(Rate(own), host), told=told)
        self.metrics.tickets = self.tickets
        self.descriptors = Descriptors(settings.tickets)
        self._certificate = _certificate(settings)
        images = Images(
            self.tickets,
            registry(settings, self.descriptors, self.metrics),
            self.metrics,
            Bounds(settings.turn_timeout, settings.ticket_size, _name(settings.local_socket)),
        )
        control = Control(
            self.tickets,
            self.metrics,
            ControlBounds(settings.revoke_timeout, settings.ticket_size, settings.inactivity_timeout),
        )
        services: list[Service] = []
        tls: Callable[[], ssl.SSLContext] | None = self._certificate
        if settings.port >= 0:
            services.append(Service("remote", tcp(_address(settings), settings.port), images, tls))
        if settings.local_socket != UNSET:
            services.append(Service("local", unix(settings.local_socket, 0o666), images))
        group = config.api.socket_group if os.geteuid() == 0 else ""
        services.append(Service("control", unix(settings.control_socket, 0o660, group), control))
        if settings.control_port >= 0:
            services.append(Service("control", tcp("127.0.0.1", settings.control_port), control))
        self.handover = Handover(
            unix(settings.control_socket.with_name(HANDOVER), 0o600, kind=socket.SOCK_SEQPACKET),
            self.descriptors,
            settings.header_timeout,
        )
        patience = Patience(settings.handshake_timeout, settings.header_timeout, settings.idle_timeout)
        house = House(settings.max_connections, settings.max_client_connections)
        self.services = services
        self._server = Server(services, patience, house, self.metrics)
        self._ending = threading.Event()

    def start(self) -> None:
        self._server.start()
        self.handover.start()
        threading.Thread(target=self._expire, name="expiry", daemon=True).start()

    def reload(self) -> None:
        if self._certificate is not None:
            self._certificate.reload()

    def stop(self) -> None:
        """Running requests get `data.stop_timeout`; then all is cut."""
        self._ending.set()
        self.handover.stop()
        self._server.stop(self._settings.stop_timeout)
        with contextlib.suppress(Exception):
            self.tickets.clear(self._settings.revoke_timeout)
        for service in self.services:
            if service.listener.family == socket.AF_UNIX:
                continue
        for path in (self._settings.local_socket, self._settings.control_socket):
            if path != UNSET:
                path.unlink(missing_ok=True)
        self._settings.control_socket.with_name(HANDOVER).unlink(missing_ok=True)

    def _expire(self) -> None:
        while not self._ending.wait(self._settings.expiry_interval):
            self.tickets.stop_expired()


def run(config: Config) -> int:
    """Until SIGTERM or SIGINT; SIGHUP reads the certificate anew."""
    threading.stack_size(STACK)
    daemon = Daemon(config)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    signal.signal(signal.SIGHUP, lambda *_: daemon.reload())
    daemon.start()
    for service in daemon.services:
        where = service.listener.getsockname()
        fields = {"service": service.name, "address": where if isinstance(where, str) else f"{where[0]}:{where[1]}"}
        log.info("listening", extra={"fields": {**fields, "tls": service.tls is not None}})
    sdnotify.notify("READY=1", "STATUS=serving")
    while not ending.wait(3600):
        pass
    sdnotify.notify("STOPPING=1")
    daemon.stop()
    return 0


def registry(settings: Data, descriptors: Descriptors, metrics: Metrics) -> Registry:
    """The backends of this daemon, by their schemes."""
    found = Registry()
    return found


def tcp(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        message = f"cannot listen on {address} port {port}: {error.strerror}"
        raise AgentError("unavailable", message, field="data.port", value=port, remedy="see `ss -tlnp`") from error
    return listener


def unix(path: Path, mode: int, group: str = "", *, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A socket at `path`, in place of one that nobody listens on any more."""
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if path.is_socket():
            _refuse_served(path, kind)
            path.unlink()
        old = os.umask(0o777 & ~mode)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        path.chmod(mode)
        if group:
            with contextlib.suppress(KeyError):
                os.chown(path, -1, grp.getgrnam(group).gr_gid)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        message = f"cannot listen on {str(path)!r}: {error.strerror}"
        raise AgentError("unavailable", message, value=str(path), remedy="see data.*_socket") from error
    return listener


def _refuse_served(path: Path, kind: int) -> None:
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return
    remedy = "is another data daemon running? set data.*_socket or agent.runtime_dir"
    raise AgentError("conflict", f"somebody listens on {str(path)!r} already", value=str(path), remedy=remedy)


def _certificate(settings: Data) -> Renewing | None:
    if settings.cert == UNSET:
        if settings.client_ca != UNSET:
            raise AgentError("invalid", "data.client_ca needs data.cert", field="data.cert", remedy="set both")
        return None
    key = settings.cert if settings.key == UNSET else settings.key
    authorities = None if settings.client_ca == UNSET else settings.client_ca
    return Renewing(Certificate(settings.cert, key, authorities))


def _address(settings: Data) -> str:
    """What leaves this host goes by TLS only."""
    address = settings.listen or ("::" if settings.cert != UNSET else "127.0.0.1")
    try:
        known = ipaddress.ip_address(address)
    except ValueError as error:
        raise AgentError(
            "invalid",
            f"data.listen is no IP address: {address!r}",
            field="data.listen",
            value=address,
            remedy="write one",
        ) from error
    if settings.cert == UNSET and not known.is_loopback:
        remedy = "set data.cert and data.key, or listen on 127.0.0.1"
        raise AgentError(
            "invalid", f"{address} leaves this host, and there is no certificate", field="data.cert", remedy=remedy
        )
    return address


def _name(path: Path) -> str:
    return "" if path == UNSET else str(path)
