"""What one domain needs, read from libvirt and from the images' headers, each within its bound."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hostagent.drivers import domain_xml, volumes
from hostagent.drivers.domain_xml import Domain
from hostagent.drivers.hypervisor import Hypervisor
from hostagent.drivers.libvirt import DomainRef, Session
from hostagent.guests import labels
from hostagent.guests.labels import Labels
from hostagent.guests.needs import DiskNeeds, read_needs
from hostagent.guests.strands import chain_of, is_deleted, layer_of
from hostagent.images.member import ChainLimits
from hostagent.looks import Late, Looks
from hostagent.records import AccessRow, Label
from jobs.errors import JobError
from jobs.model import Drive, FileId

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """`xml_size` in bytes; `refresh` and `file_timeout` in seconds; `limits` for chains that headers name; `uid` is the
    hypervisor user's; `qemu_conf` says whether libvirt changes owners."""

    xml_size: int
    refresh: float
    file_timeout: float
    limits: ChainLimits
    uid: int
    qemu_conf: Path


class Reading:
    def __init__(self, hypervisor: Hypervisor, settings: Settings) -> None:
        self._hypervisor = hypervisor
        self._settings = settings
        self._labels: Labels | None = None
        self._looks = Looks(settings.file_timeout)

    def anew(self) -> None:
        """With a new connection: libvirt may choose other labels now."""
        self._labels = None

    async def needs(self, domain: DomainRef) -> tuple[DomainRef, tuple[DiskNeeds, ...]]:
        """The domain as it is now, and what its disks need. A JobError where that cannot be said at all, `not_found` of
        a domain that is there no more; of a single disk it says so itself."""
        now, descriptions = await self._describe(domain)
        chosen = await self._label()
        return now, await self._look(now.uuid, now.name, lambda: read_needs(descriptions, chosen, self._limits))

    async def stands_on(self, drive: Drive, top: AccessRow, known: Sequence[AccessRow]) -> set[FileId] | None:
        """The files of an image's chain, itself included; None for an image that was deleted. A JobError when the
        chain's end cannot be seen."""
        layers = [layer_of(row) for row in known]

        def look() -> set[FileId] | None:
            if is_deleted(layer_of(top)):
                return None
            return {layer.file for layer in chain_of(top.path, top.format or None, layers, self._limits)}

        return await self._look(drive.uuid, drive.name, look)

    @property
    def _limits(self) -> ChainLimits:
        return self._settings.limits

    # libvirt

    async def _describe(self, domain: DomainRef) -> tuple[DomainRef, list[Domain]]:
        """The live description while it runs, and the definition."""

        def describe(session: Session) -> tuple[DomainRef, list[Domain]]:
            now, texts = session.descriptions(domain.uuid)
            parsed = (domain_xml.parse(text, size=self._settings.xml_size) for text in texts)
            return now, [volumes.resolve(session, one) for one in parsed]

        return await self._hypervisor.call("describe", describe, domain=domain)

    async def _label(self) -> Labels:
        """What libvirt chooses for domains that say nothing; asked once for each connection."""
        if self._labels is None:
            text = await self._hypervisor.call("capabilities", lambda session: session.capabilities())
            said = domain_xml.base_label(text, size=self._settings.xml_size)
            default: Label | None = labels.parse(said) if said else None
            self._labels = Labels(default, self._settings.uid, relabels=await self._relabels())
        return self._labels

    async def _relabels(self) -> bool:
        path, timeout = self._settings.qemu_conf, self._settings.file_timeout
        try:
            return await asyncio.wait_for(asyncio.to_thread(labels.relabels, path), timeout)
        except (OSError, TimeoutError) as error:
            message = f"{path} cannot be read: {error or 'no answer'}"
            raise JobError("io_error", message, remedy="let the agent read it, or set libvirt.qemu_conf") from error

    # Files

    async def _look(self, key: str, name: str, look: Callable[[], T]) -> T:
        """A domain has one that hangs."""
        try:
            return await self._looks.look(key, look)
        except Late:
            timeout = f"{self._settings.file_timeout:g} s (libvirt.file_timeout)"
            message = f"the files of domain {name} do not answer within {timeout}"
            raise JobError("unresponsive", message, remedy="see whether their storage hangs") from None
