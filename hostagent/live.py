"""Live domains, as far as this host has them: the connection to libvirt if there is to be one, and what is known by it.

Without libvirt-python, with an empty `libvirt.uri`, and while libvirtd is away, everything else of the agent works;
what is missing is said by /readyz, /v1/host, `status` and `doctor`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

from events.model import (
    DiskErrorEvent,
    DiskJobEvent,
    DomainEvent,
    HostEvent,
    HostEventKind,
    HypervisorEvent,
    QemuJobEvent,
)
from hostagent.config import Libvirt
from hostagent.drivers import domains, hypervisor
from hostagent.drivers.domains import Domains, Use
from hostagent.drivers.hypervisor import Hypervisor, Observe, Status
from hostagent.drivers.libvirt import PACKAGE, Versions, absent
from hostagent.guests.network_disks import uri_of
from jobs.errors import JobError
from jobs.model import Drive, FileId

log = logging.getLogger(__name__)

Json = dict[str, Any]

ELSEWHERE = "its domains are told of, and as their files are not this host's nothing is done to them"
SUBJECT = "libvirt"
"""Of the host's events that tell of this connection."""


class Follower(Protocol):
    """Who looks again at what is its own; must not block."""

    def event(self, event: HypervisorEvent) -> None: ...

    def resync(self) -> None: ...


class Live:
    """`record` takes events of the host, `count` the type of each event that libvirt tells, `observe` calls."""

    def __init__(
        self,
        config: Libvirt,
        *,
        record: Callable[[HostEvent], None],
        count: Callable[[str], None],
        observe: Observe,
    ) -> None:
        self._config = config
        self._record = record
        self._count = count
        self._tasks: list[asyncio.Task[None]] = []
        self.off = "off: libvirt.uri is empty" if not config.uri else absent()
        self.elsewhere = bool(config.uri) and leads_elsewhere(config.uri)
        settings = hypervisor.Settings(
            uri=config.uri,
            connect_timeout=config.connect_timeout,
            call_timeout=config.call_timeout,
            keepalive_interval=config.keepalive_interval,
            keepalive_count=config.keepalive_count,
            reconnect_wait=config.reconnect_wait,
            reconnect_wait_max=config.reconnect_wait_max,
            workers=config.workers,
            event_queue=config.event_queue,
        )
        self.hypervisor = Hypervisor(settings, self, observe=observe)
        self._followers: list[Follower] = []
        self._losers: list[Callable[[], None]] = []
        self.domains = Domains(self.hypervisor, domains.Settings(config.xml_size, config.refresh, config.file_timeout))

    def tell(self, follower: Follower, *, lost: Callable[[], None] | None = None) -> None:
        """Let it hear of events, too; `lost` is called when the connection ends."""
        self._followers.append(follower)
        if lost is not None:
            self._losers.append(lost)

    def start(self) -> None:
        """Begin to connect; nothing waits for it."""
        if self.off is None:
            self._tasks = [
                asyncio.create_task(self.hypervisor.run(), name="libvirt"),
                asyncio.create_task(self.domains.run(), name="domains"),
            ]
        for task in self._tasks:
            task.add_done_callback(_ended)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.hypervisor.close()

    # What is said of it

    @property
    def status(self) -> Status:
        return self.hypervisor.status

    @property
    def wanted(self) -> bool:
        """Whether the settings name one."""
        return bool(self._config.uri)

    @property
    def no_jobs(self) -> tuple[str, str] | None:
        """Why no job can work on a guest's disk, and the remedy; None when it can."""
        if self.off is not None:
            return self.off, "set libvirt.uri"
        if self.elsewhere:
            return f"another host's ({self._config.uri}): {ELSEWHERE}", "ask the agent of that host"
        return None

    @property
    def version(self) -> str:
        """libvirtd's; empty while it was never connected."""
        return self.status.versions.libvirt if self.status.versions else ""

    def facts(self) -> Json:
        """For /v1/host."""
        connected = self.status.connected
        return {
            "connected": connected,
            "version": self.version or None,
            "hypervisor": self.status.versions.hypervisor or None if self.status.versions else None,
            "uri": self._config.uri or None,
            "reason": None if connected else self.off or self.status.reason,
        }

    def check(self) -> Json:
        """For /readyz. It is never what keeps the agent from being ready: images without guests can be worked on."""
        if self.off is not None:
            return {"ok": True, "detail": self.off}
        connected = f"connected to {self._config.uri}, version {self.version}"
        if self.elsewhere:
            connected += f"; it is another host's: {ELSEWHERE}"
        elif self.status.connected and self.status.deaf is not None:
            return {
                "ok": True,
                "detail": f"{connected}; QEMU's own events are not heard ({self.status.deaf}): copies and commits of "
                "guests' disks that leave the chain as it is cannot be proven, and are refused",
                "remedy": f"install {PACKAGE} with its module libvirt_qemu, and start the agent again",
            }
        if self.status.connected:
            return {"ok": True, "detail": connected}
        return {
            "ok": True,
            "detail": f"not connected: {self.status.reason}",
            "remedy": 'start libvirtd; on a host that has none, set libvirt.uri to ""',
        }

    # Rules

    async def refuse_guests(self, path: str, *, whole_chain: bool) -> None:
        """A JobError `busy` when a guest, running or defined, writes the image (`whole_chain`: or stands on it, as far
        as libvirt says). It does not replace the lease, which is what keeps two writers apart; it says early, and by
        name, what to do."""
        if self.off is not None:
            return
        file = None
        with contextlib.suppress(TimeoutError):  # dead storage: whoever opens it says so
            async with asyncio.timeout(self._config.file_timeout):
                file = await asyncio.to_thread(_identity, path)
        uses = await self.domains.users(file) if file else []
        in_use = [use for use in uses if use.writes or whole_chain]
        if in_use:
            raise _busy(path, in_use)

    def refuse_served(self, uri: str, *, besides: Drive | None = None) -> None:
        """A JobError `busy` when a disk of a guest, running or defined, is this NBD export, or is being copied into it;
        `besides` a copy of that one."""
        for ref, domain in self.domains.known():
            for disk in domain.disks:
                own = besides is not None and (ref.uuid, disk.target) == (besides.uuid, besides.target)
                mirror = [disk.mirror.layer] if disk.mirror and disk.mirror.layer and not own else []
                if uri in [uri_of(layer) for layer in (*disk.layers, *mirror)]:
                    use = Use(ref, disk.target, 0, True)
                    remedy = f"see `virsh domblklist {ref.name}`; copy somewhere else"
                    what = f"{uri!r} is used by {use}"
                    raise JobError("busy", what, field="dest", value=uri, remedy=remedy, holders=[str(use)])

    # What libvirt tells

    def libvirt_connected(self, versions: Versions) -> None:
        self._record(HostEvent(HostEventKind.CONNECTED, SUBJECT, f"{self._config.uri}, version {versions.libvirt}"))

    def libvirt_disconnected(self, reason: str) -> None:
        for lost in self._losers:
            lost()
        self._record(HostEvent(HostEventKind.DISCONNECTED, SUBJECT, reason))

    def libvirt_event(self, event: HypervisorEvent) -> None:
        self._count(_type(event))
        self.domains.event(event)
        for follower in self._followers:
            follower.event(event)

    def libvirt_resync(self) -> None:
        self.domains.resync()
        for follower in self._followers:
            follower.resync()


def leads_elsewhere(uri: str) -> bool:
    """Whether a connection's URI names another host, or may do so: an alias of libvirt.conf can be anything
    (https://libvirt.org/uri.html)."""
    found = urlsplit(uri)
    return bool(found.netloc) or not found.scheme or found.scheme.partition("+")[2] not in ("", "unix")


def _ended(task: asyncio.Task[None]) -> None:
    """They end only when they are cancelled."""
    if not task.cancelled():
        log.error("no longer looking after live domains", exc_info=task.exception())


def _type(event: HypervisorEvent) -> str:
    match event:
        case DiskJobEvent():
            return f"disk_job.{event.kind}"
        case QemuJobEvent():
            return "qemu_job"
        case DomainEvent():
            return f"domain.{event.kind}"
        case DiskErrorEvent():
            return "disk_error"
        case _:
            return "threshold"


def _identity(path: str) -> FileId | None:
    try:
        info = os.stat(path)  # noqa: PTH116 - as libvirt: a link leads to the file
    except (OSError, ValueError):
        return None  # whoever opens it says what is wrong
    return FileId(info.st_dev, info.st_ino)


def _busy(path: str, uses: list[Use]) -> JobError:
    names = [str(use) for use in uses[:8]]
    writes = any(use.writes for use in uses)
    running = any(use.domain.active for use in uses)
    if running:
        what = f"is {'written' if writes else 'read'} by a running guest"
        remedy = f"use {names[0]}" if writes else "undefine the guest"
    else:
        what = "is the disk of a guest that does not run"
        start = f"virsh start --paused {shlex.quote(uses[0].domain.name)}"
        remedy = f"start the guest ({start} is enough) and use {names[0]}, or undefine it"
    return JobError(
        "busy",
        f"{path!r} {what}: {', '.join(names)}",
        field="path",
        value=path,
        remedy=remedy,
        holders=[f"domain:{use.domain.name}" for use in uses[:8]],
    )
