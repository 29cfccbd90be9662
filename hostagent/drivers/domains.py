"""Live disks by name, and which domain uses which file.

A target is `DOMAIN/DISK`: a name or UUID; a target (vda), one of its layers (vda[3]) or the path of its top. Who uses a
file is answered from memory, which libvirt's events and a timer keep fresh; files are compared by identity. That answer
is for people, who are told "use web1/vda" early: what really keeps two writers apart is the lease on the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from events.model import DiskJobEvent, DomainEvent, DomainEventKind, HypervisorEvent
from hostagent.drivers import domain_xml, volumes
from hostagent.drivers.domain_xml import Disk, Domain, LiveLayer
from hostagent.drivers.hypervisor import Hypervisor
from hostagent.drivers.libvirt import BlockJobInfo, DomainRef, Session
from hostagent.looks import Late, Looks
from jobs.errors import JobError
from jobs.model import FileId

log = logging.getLogger(__name__)

AFTER_OURS = 0.2
"""Seconds from an event or the end of a job of ours until its domain is read here, unless somebody asks: who follows
the job asks libvirt at once, and settles its access then, for which somebody waits."""

_LAYER = re.compile(r"(?P<target>[^\[\]/]+)\[(?P<index>\d{1,9})\]")


@dataclass(frozen=True, slots=True)
class LiveDisk:
    """One disk of a domain as libvirt describes it now, `layer` the one that was named, and the job that runs on it."""

    domain: DomainRef
    disk: Disk
    layer: LiveLayer
    job: BlockJobInfo | None

    def __str__(self) -> str:
        return f"{self.domain.name}/{self.disk.target}"


@dataclass(frozen=True, slots=True)
class Use:
    """A domain's disk has the file in its chain. `depth` 0 is the top, which a guest writes; `writes` says that it may
    write this layer."""

    domain: DomainRef
    target: str
    depth: int
    writes: bool

    def __str__(self) -> str:
        return f"{self.domain.name}/{self.target}"


@dataclass(frozen=True, slots=True)
class Settings:
    """`xml_size` in bytes, of one domain's description; `refresh` and `file_timeout` in seconds."""

    xml_size: int
    refresh: float
    file_timeout: float


def split(target: str) -> tuple[str, str]:
    """`DOMAIN/DISK` in two. A domain's name has no slash (libvirt allows none), a disk's path may have."""
    domain, slash, disk = target.partition("/")
    if not (domain and slash and disk) or domain.startswith("."):
        text = f"{target!r} names no disk of a domain"
        raise JobError("invalid", text, field="target", value=target, remedy="write DOMAIN/DISK, as web1/vda")
    return domain, disk


class Domains:
    """`run` is a task for as long as the agent lives; `event` and `resync` are what a hypervisor's sink hears.

    `told` is called when a domain was read anew: with what it was before in the same run, and what it is.
    """

    def __init__(self, hypervisor: Hypervisor, settings: Settings) -> None:
        self._hypervisor = hypervisor
        self._settings = settings
        self._uses: dict[str, list[tuple[FileId, Use]]] = {}
        self._described: dict[str, tuple[DomainRef, Domain]] = {}
        self.told: Callable[[DomainRef, Domain, Domain], None] = lambda domain, before, now: None
        self._stale: set[str] = set()
        self._all_stale = True
        self._looks = Looks(settings.file_timeout)
        self._wake = asyncio.Event()
        self._fresh = asyncio.Event()

    # One disk

    async def disk(self, target: str) -> LiveDisk:
        """What `DOMAIN/DISK` is now. A JobError `not_found` names what there is."""
        name, wanted = split(target)
        try:
            domain = await self._hypervisor.call("find", lambda session: session.find(name))
        except JobError as error:
            error.field, error.value = "target", target
            raise
        described = await self.describe(domain)
        disk, layer = _named(described, wanted, target)
        job = None
        if domain.active:
            job = await self._hypervisor.call(
                "block_job", lambda s: s.block_job(domain.uuid, disk.target), domain=domain
            )
        return LiveDisk(domain, disk, layer, job)

    async def describe(self, domain: DomainRef) -> Domain:
        """All disks of it; the live chains while it runs."""
        return await self._hypervisor.call("describe", self.describing(domain), domain=domain)

    async def describe_aside(self, domain: DomainRef) -> Domain:
        """The same beside a call for this domain that waits for its QEMU."""
        describe, timeout = self.describing(domain), self._settings.file_timeout
        return await self._hypervisor.call("describe_aside", describe, timeout=timeout)

    def describing(self, domain: DomainRef) -> Callable[[Session], Domain]:
        """The same, for a call that asks more."""

        def describe(session: Session) -> Domain:
            found = domain_xml.parse(session.describe(domain.uuid), size=self._settings.xml_size)
            return volumes.resolve(session, found)

        return describe

    def known(self) -> list[tuple[DomainRef, Domain]]:
        """All domains, as they were when they were last read."""
        return list(self._described.values())

    def running(self) -> list[tuple[DomainRef, Domain]]:
        """Those of them that run."""
        return [(ref, described) for ref, described in self.known() if ref.active]

    def forget(self, uuid: str) -> None:
        """What the domain was says nothing of what it is now: read it anew."""
        self._described.pop(uuid, None)
        self._note_later(uuid)

    # Who uses a file

    async def users(self, file: FileId) -> list[Use]:
        """The disks whose chain has the file, running domains first. Empty also when nothing is known: without libvirt,
        and of the layers below the top of a domain that does not run (libvirt does not say them)."""
        if self._hypervisor.status.connected and not self._fresh.is_set():
            self._wake.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.file_timeout):
                    await self._fresh.wait()
        found = [use for uses in self._uses.values() for one, use in uses if one == file]
        return sorted(found, key=lambda use: (not use.domain.active, use.depth, str(use)))

    def event(self, event: HypervisorEvent) -> None:
        if isinstance(event, DomainEvent) and event.kind in (DomainEventKind.STARTED, DomainEventKind.STOPPED):
            self.forget(event.domain)
        if isinstance(event, DiskJobEvent) and self._hypervisor.claims.holder(event.domain) is not None:
            self._note_later(event.domain)
        elif isinstance(event, DiskJobEvent | DomainEvent):
            self._note(event.domain)

    def _note(self, domain: str) -> None:
        self._stale.add(domain)
        self._awake()

    def _note_later(self, domain: str) -> None:
        self._stale.add(domain)
        self._fresh.clear()
        asyncio.get_running_loop().call_later(AFTER_OURS, self._awake)

    def resync(self) -> None:
        self._described.clear()
        self._all_stale = True
        self._awake()

    async def run(self) -> None:
        """Read what events made stale, and everything now and then: no event tells of a file that was replaced."""
        while True:
            try:
                async with asyncio.timeout(self._settings.refresh):
                    await self._wake.wait()
            except TimeoutError:
                self._all_stale = True
            self._wake.clear()
            try:
                await self._refresh()
            except JobError as error:  # gone again, or it hangs: what was known stays, and is read anew after that
                log.info("domains could not be read", extra={"fields": {"error": error.message}})
                self._all_stale = True
            if not self._wake.is_set() and not self._stale:
                self._fresh.set()

    def _awake(self) -> None:
        self._fresh.clear()
        self._wake.set()

    async def _refresh(self) -> None:
        if not self._hypervisor.status.connected:
            return
        everything, self._all_stale = self._all_stale, False
        stale, self._stale = self._stale, set()
        domains = await self._hypervisor.call("domains", lambda session: session.domains())
        there = {domain.uuid for domain in domains}
        self._uses = {uuid: uses for uuid, uses in self._uses.items() if uuid in there}
        self._described = {uuid: found for uuid, found in self._described.items() if uuid in there}
        for domain in domains:
            if everything or domain.uuid in stale or domain.uuid not in self._uses:
                await self._refresh_one(domain)

    async def _refresh_one(self, domain: DomainRef) -> None:
        """One that cannot be read, or whose storage hangs, keeps what was known of it, and holds up no other."""
        try:
            described = await self.describe(domain)
            before = self._described.get(domain.uuid)
            self._described[domain.uuid] = domain, described
            if before is not None and before[0].active and domain.active:
                self.told(domain, before[1], described)
            self._uses[domain.uuid] = await self._look(domain, described)
        except JobError as error:
            if error.code != "not_found":  # undefined meanwhile
                fields = {"domain": domain.name, "error": error.message}
                log.warning("a domain could not be read", extra={"fields": fields})

    async def _look(self, domain: DomainRef, described: Domain) -> list[tuple[FileId, Use]]:
        try:
            return await self._looks.look(domain.uuid, lambda: _uses(domain, described))
        except Late as late:
            raise JobError("unresponsive", f"its files do not answer: {late}") from None


def _uses(domain: DomainRef, described: Domain) -> list[tuple[FileId, Use]]:
    """Blocking: it looks at the files."""
    found = []
    for disk in described.disks:
        mirror = disk.mirror.layer if disk.mirror else None
        for depth, layer in enumerate((*disk.layers, *([mirror] if mirror else []))):
            writes = layer is mirror or (depth == 0 and not disk.read_only)
            if layer.local and (file := _identity(str(layer.path))) is not None:
                found.append((file, Use(domain, disk.target, 0 if layer is mirror else depth, writes)))
    return found


def _identity(path: str) -> FileId | None:
    try:
        info = os.stat(path)  # noqa: PTH116 - as libvirt: a link leads to the file
    except (OSError, ValueError):
        return None
    return FileId(info.st_dev, info.st_ino)


def _named(domain: Domain, wanted: str, target: str) -> tuple[Disk, LiveLayer]:
    indexed = _LAYER.fullmatch(wanted)
    for disk in domain.disks:
        if disk.top is None:
            continue
        if indexed and disk.target == indexed["target"]:
            for layer in disk.layers:
                if layer.index == int(indexed["index"]):
                    return disk, layer
        elif wanted == disk.target or (wanted.startswith("/") and wanted == disk.top.path):
            return disk, disk.top
    known = ", ".join(disk.target for disk in domain.disks) or "none"
    raise JobError(
        "not_found",
        f"domain {domain.name!r} has no disk {wanted!r} with an image",
        field="target",
        value=target,
        remedy=f"its disks: {known[:500]}; layers are vda[INDEX] as in `virsh dumpxml {domain.name}`",
    )
