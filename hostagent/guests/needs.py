"""Which files the disks of one domain need: what libvirt says, and below that what the images' headers say.

Of a domain that runs libvirt says the whole chain; of its definition, and of one that is off, mostly the top alone. The
rest is read by the bounded reader, by the rules for any chain, but for links, which are followed as libvirt does. What
a header names elsewhere is not opened, and then it is not known what the disk needs. Unless it is raw: as that stands
on nothing, it is known which file it is, though no access is given to it. All of this blocks.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hostagent.drivers.domain_xml import Disk, Domain, LiveLayer
from hostagent.guests.labels import Labels
from hostagent.images.header import read_header
from hostagent.images.member import ChainLimits, Wanted, open_member
from hostagent.inodes import DEVICES
from hostagent.records import Label, Use
from jobs.errors import JobError
from jobs.model import FileId, Layer, Need

CHAINED = ("qcow2", "qcow", "qed", "vmdk")
"""Formats of images that can stand on others, for QEMU."""


@dataclass(frozen=True, slots=True)
class DiskNeeds:
    """What is known of it. `missing` says that a file is not there, and what that stands on is not seen; `unknown` why
    the chain cannot be read to its end. `names` are files that only a header names, where nothing is given."""

    target: str
    uses: tuple[Use, ...]
    missing: bool = False
    unknown: JobError | None = None
    names: frozenset[FileId] = frozenset()


def read_needs(descriptions: Sequence[Domain], labels: Labels, limits: ChainLimits) -> tuple[DiskNeeds, ...]:
    """`descriptions` are the live one, if the domain runs, and its definition, if it has one, in this order."""
    found: dict[str, DiskNeeds] = {}
    for domain in descriptions:
        for disk in domain.disks:
            if disk.layers:
                before = found.get(disk.target, DiskNeeds(disk.target, ()))
                found[disk.target] = _read(before, domain, disk, labels, limits)
    return tuple(found.values())


def _read(before: DiskNeeds, domain: Domain, disk: Disk, labels: Labels, limits: ChainLimits) -> DiskNeeds:
    reader = _Reader({use.need.layer.file: use for use in before.uses}, domain, disk, labels, limits)
    missing, unknown = before.missing, before.unknown
    try:
        reader.read()
    except (FileNotFoundError, NotADirectoryError):
        missing = True
    except (OSError, ValueError) as error:
        what = f"the files of {domain.name}/{disk.target} cannot be looked at: {error}"
        unknown = JobError("io_error", what, remedy="see their storage")
    except JobError as error:
        missing, unknown = (True, unknown) if error.code == "not_found" else (missing, error)
    return DiskNeeds(disk.target, tuple(reader.uses.values()), missing, unknown, before.names | reader.names)


class _Reader:
    def __init__(
        self, uses: dict[FileId, Use], domain: Domain, disk: Disk, labels: Labels, limits: ChainLimits
    ) -> None:
        self.uses = uses
        self.names: set[FileId] = set()
        self._domain = domain
        self._disk = disk
        self._labels = labels
        self._limits = limits

    def read(self) -> None:
        disk = self._disk
        label = self._labels.of(self._domain, disk, disk.layers[0])  # of what no XML names, too
        known = set(self.uses)  # by the live chain, which says what stands below
        last = None
        for depth, live in enumerate(disk.layers):
            last = self._named(live, writes=depth == 0 and not disk.read_only)
        if disk.mirror is not None and disk.mirror.layer is not None:
            target = self._named(disk.mirror.layer, writes=True)
            if target is not None:
                self._follow(Wanted(target.path, disk.mirror.layer.format), label)
        if not disk.whole and last is not None and last.file not in known:
            self._follow(Wanted(last.path, disk.layers[-1].format), label)

    def _named(self, live: LiveLayer, *, writes: bool) -> Layer | None:
        """A layer that libvirt names. Network images are their servers' to give."""
        if live.gone:
            raise FileNotFoundError(str(live.volume))
        if live.trouble is not None:
            what = f"what {self._domain.name}/{self._disk.target} is cannot be said: {live.trouble}"
            raise JobError("unavailable", what, remedy="start the storage pool, or undefine the domain")
        if not live.local or live.path is None:
            return None
        path = os.path.realpath(live.path)
        found = os.stat(path)  # noqa: PTH116
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
            return None
        label = self._labels.of(self._domain, self._disk, live)
        format = live.format or "raw"
        if live.size is not None and not (writes and format == "raw"):
            format = ""  # of a part only, which nobody else could read by its format
        return self._add(path, found, label, "rw" if writes else "r", format)

    def _add(self, path: str, found: os.stat_result, label: Label | None, mode: str, format: str) -> Layer:
        layer = Layer(path, format, FileId(found.st_dev, found.st_ino), 0, 0, device=stat.S_ISBLK(found.st_mode))
        before = self.uses.get(layer.file)
        if before is None or before.need.mode < mode:
            reason = f"disk {self._disk.target} of domain {self._domain.name}"
            self.uses[layer.file] = Use(Need(layer, mode, reason), label)
        return layer

    def _follow(self, top: Wanted, label: Label | None) -> None:
        """What an image's header names, and what those name. Without a format libvirt takes an image for raw."""
        if top.format not in CHAINED:
            return
        chain: set[FileId] = set()
        wanted: Wanted | None = top
        while wanted is not None and len(chain) < self._limits.max_depth:
            wanted = self._step(wanted, chain, label)
        if wanted is not None:
            message = f"the chain of {top.path} has more layers than images.max_depth"
            raise JobError("chain_too_deep", message, remedy="shorten it with a commit")

    def _step(self, wanted: Wanted, chain: set[FileId], label: Label | None) -> Wanted | None:
        if wanted.format in CHAINED and wanted.format != "qcow2":
            message = f"what {wanted.path} ({wanted.format}) stands on cannot be read"
            raise JobError("not_supported", message, remedy="convert it into qcow2")
        try:
            fd, path = open_member(replace(wanted, path=_without_links(wanted.path)), self._limits)
        except JobError:
            if wanted.format != "raw":
                raise
            self._name(wanted)
            return None
        try:
            found = os.fstat(fd)
            header = read_header(fd) if wanted.format == "qcow2" else None
        finally:
            os.close(fd)
        layer = self._add(path, found, label, "r", wanted.format or "raw")
        if layer.file in chain or header is None:  # a loop, or no qcow2: no QEMU will open it
            return None
        chain.add(layer.file)
        if header.has_data_file:
            raise JobError("not_supported", f"{path} has its data in another file", remedy="convert it with qemu-img")
        if header.backing is None:
            return None
        if header.backing_format is None:
            message = f"{path} does not say which format its backing file {header.backing} has"
            raise JobError("image_invalid", message, remedy=f"qemu-img rebase -u -F FORMAT -b {header.backing} {path}")
        return Wanted(str(Path(path).parent / header.backing), header.backing_format, layer)

    def _name(self, wanted: Wanted) -> None:
        found = os.stat(wanted.path)  # noqa: PTH116
        if stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode):
            self.names.add(FileId(found.st_dev, found.st_ino))


def _without_links(path: str) -> str:
    """As libvirt, which follows them. A device goes by its link where pools are concerned."""
    real = os.path.realpath(path)
    return path if real.startswith(f"{DEVICES}/") else real
