"""The data daemon's composition root: sockets, services, signals; nothing else constructs them."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

from hostagent import sdnotify
from hostagent.certificates import Certificate, Renewing
from hostagent.config import UNSET, Config
from hostagent.config_data import Data
from hostagent.data import cloudstack, memory
from hostagent.data.access import Access
from hostagent.data.audit import Audit
from hostagent.data.backends.file import files, handed_over
from hostagent.data.backends.holds import Holds
from hostagent.data.backends.http import PORTS, daemons
from hostagent.data.backends.mapped import mapped
from hostagent.data.backends.nbd import NbdSettings, nbd_factory
from hostagent.data.backends.nbd_url import SCHEMES
from hostagent.data.backends.origin import ProxyWaits
from hostagent.data.backends.qemu_map import MapLimits
from hostagent.data.backends.registry import Registry
from hostagent.data.connection import Handler, Patience
from hostagent.data.control import Control, ControlBounds
from hostagent.data.downloads import Downloads
from hostagent.data.errors import HttpError
from hostagent.data.front import Front
from hostagent.data.handover import HANDED, Descriptors, Handover, claim
from hostagent.data.images import Images
from hostagent.data.listeners import inherited, listen
from hostagent.data.metrics import Metrics
from hostagent.data.server import House, Server, Service, room
from hostagent.data.throttle import Lane, Rate
from hostagent.data.tickets import Ticket, Tickets
from hostagent.data.uploads import Uploads
from hostagent.errors import AgentError

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
STACK = 256 * 1024
"""Bytes of a thread's stack: what it needs, a thousand times."""


class Daemon:
    def __init__(self, config: Config, given: Mapping[str, int], mark: str) -> None:
        settings = config.data
        self._settings = settings
        self.metrics = Metrics()
        audit = Audit(None if settings.audit == UNSET else settings.audit)
        host = Rate(settings.rate)
        self._descriptors = Descriptors(settings.tickets, settings.handover_wait)

        def told(what: str, ticket: Ticket, by: str) -> None:
            audit.tell(what, ticket, by)
            if what in ("revoked", "stuck"):
                self.metrics.count("data_revocations_total", "done" if what == "revoked" else "timeout")

        self.tickets = Tickets(
            most=settings.tickets,
            lane=lambda own: Lane(Rate(own), host),
            told=told,
            given=lambda ticket: {HANDED: self._descriptors.take(ticket)},
        )
        self.metrics.tickets = self.tickets
        self._certificate = _certificate(settings)
        access = Access(self.tickets, registry(config, self.metrics), self.metrics, settings.turn_timeout)
        uploads = Uploads(access, settings.ticket_size)
        images = Images(access, Downloads(access), uploads, _name(settings.local_socket))
        control = Control(
            self.tickets,
            self.metrics,
            ControlBounds(settings.revoke_timeout, settings.ticket_size, settings.inactivity_timeout),
            access.usable,
            mark,
        )
        theirs = inherited(given)
        listeners = theirs or listen(config)
        self._own = [] if theirs else [one.getsockname() for one in listeners.values() if one.family == socket.AF_UNIX]
        handlers: dict[str, Handler] = {"remote": images, "local": images, "control": control, "control-tcp": control}
        self.services = [
            Service(name, listener, handlers[name], self._certificate if name == "remote" else None)
            for name, listener in listeners.items()
            if name in handlers
        ]
        self._fronts: list[Front] = []
        if (listener := listeners.get("handover")) is not None:
            self._fronts.append(Handover(listener, self._descriptors, settings.header_timeout))
        if (listener := listeners.get("cloudstack")) is not None:
            cloudstack.Forms(uploads).add_to(images.routes)
            self._fronts.append(cloudstack.CloudStack(listener, self.tickets, access.usable, _cloudstack(settings)))
        patience = Patience(settings.handshake_timeout, settings.header_timeout, settings.idle_timeout)
        house = House(room(settings.max_connections), settings.max_client_connections)
        self._server = Server(self.services, patience, house, self.metrics)
        self._ending = threading.Event()

    def start(self) -> None:
        self._server.start()
        for front in self._fronts:
            front.start()
        threading.Thread(target=self._expire, name="expiry", daemon=True).start()

    def reload(self) -> None:
        if self._certificate is not None:
            self._certificate.reload()

    def stop(self) -> None:
        """Running requests get `data.stop_timeout`; then all is cut."""
        self._ending.set()
        for front in self._fronts:
            front.stop()
        self._server.stop(self._settings.stop_timeout)
        with contextlib.suppress(HttpError):  # all were told to end, and the process does
            self.tickets.clear(self._settings.revoke_timeout, "the end of the daemon")
        for path in self._own:
            Path(path).unlink(missing_ok=True)

    def _expire(self) -> None:
        while not self._ending.wait(self._settings.expiry_interval):
            self.tickets.stop_expired(self._settings.keep_expired)
            self._descriptors.look()


def run(config: Config, given: Mapping[str, int], mark: str = "") -> int:
    """Until SIGTERM or SIGINT; SIGHUP reads the certificate anew. `given` listeners are used instead of own ones;
    `mark` is what whoever started this knows it by."""
    threading.stack_size(STACK)
    _keep_to_ourselves()
    memory.keep_pieces()
    daemon = Daemon(config, given, mark)
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
    while not ending.wait(1.0):  # a signal that comes to another thread is seen when this one wakes
        pass
    sdnotify.notify("STOPPING=1")
    daemon.stop()
    return 0


def _keep_to_ourselves() -> None:
    """No program that is started here gains rights, and no other process of this user looks into this one, which has
    tickets in memory (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, value, 0, 0, 0):
            log.warning("prctl failed", extra={"fields": {"option": option, "error": os.strerror(ctypes.get_errno())}})


def registry(config: Config, metrics: Metrics) -> Registry:
    """The backends of this daemon, by their schemes."""
    settings, found, holds = config.data, Registry(), Holds()
    found.register("file", files(settings.allow_paths, holds))
    found.register("fd", handed_over(claim, holds))
    waits = NbdSettings(
        settings.nbd_connect_timeout, settings.nbd_timeout, settings.nbd_connections, settings.nbd_flush_timeout
    )
    nbd = nbd_factory(waits)
    direct = mapped(
        nbd,
        settings.allow_paths,
        claim,
        holds,
        _map_limits(config),
        told=lambda _: metrics.count("data_unmapped_total"),
    )
    for scheme in SCHEMES:
        found.register(scheme, direct)
    authorities = None if settings.proxy_ca == UNSET else settings.proxy_ca
    proxied = daemons(settings.proxy, authorities, ProxyWaits(settings.proxy_connect_timeout, settings.proxy_timeout))
    for scheme in PORTS:
        found.register(scheme, proxied)
    return found


def _map_limits(config: Config) -> MapLimits:
    settings, images = config.data, config.images
    return MapLimits(
        timeout=settings.map_timeout,
        extents=settings.map_extents,
        hold=settings.map_hold,
        cpu=images.tool_cpu,
        memory=images.tool_memory,
        qemu_img=images.qemu_img,
    )


def _certificate(settings: Data) -> Renewing | None:
    if settings.cert == UNSET:
        if settings.client_ca != UNSET:
            raise AgentError("invalid", "data.client_ca needs data.cert", field="data.cert", remedy="set both")
        return None
    key = settings.cert if settings.key == UNSET else settings.key
    authorities = None if settings.client_ca == UNSET else settings.client_ca
    return Renewing(Certificate(settings.cert, key, authorities))


def _cloudstack(settings: Data) -> cloudstack.Settings:
    return cloudstack.Settings(
        line=settings.header_timeout,
        drain=settings.cloudstack_drain,
        revoke=settings.revoke_timeout,
        inactivity=settings.inactivity_timeout,
    )


def _name(path: Path) -> str:
    return "" if path == UNSET else str(path)
