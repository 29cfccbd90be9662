"""A domain's XML as disks and their chains. Pure, and bounded: names in it come from whoever defines domains.

libvirt's document type has none, so anything that declares one, and with it entities, is refused before it is read.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, NoReturn
from xml.parsers import expat

from jobs.errors import JobError

MOST_ELEMENTS = 200_000
"""A disk with a chain of 200 has some 1,000."""
MOST_DEPTH = 1000
"""Chains nest: libvirt's longest, 200, goes some 210 deep."""


class SourceType(StrEnum):
    """How libvirt reaches a layer. A VOLUME is named by its storage pool alone; volumes.py finds what it is. OTHER is
    no image of this host: nvme, vhostuser, a folder that is shown as a file system (dir), …"""

    FILE = "file"
    BLOCK = "block"
    NETWORK = "network"
    VOLUME = "volume"
    OTHER = "other"


class Volume(NamedTuple):
    """A volume of a storage pool of libvirt's."""

    pool: str
    name: str


@dataclass(frozen=True, slots=True)
class DacLabel:
    """<seclabel model='dac'>: whether libvirt makes files QEMU's own, and whose (USER:GROUP, +UID:+GID); None where
    that is not said."""

    relabel: bool
    label: str | None


@dataclass(frozen=True, slots=True)
class LiveLayer:
    """One layer. `index` is QEMU's number for it (vda[3]), None while the domain does not run. `path` is a file or a
    device; of a network image its name, and `protocol` and `hosts` (host:port, or a socket's path) say where. `dac` is
    what is said of this layer alone, `size` the bytes of it that are the disk's, if not all. `volume` is what a pool
    calls it; `trouble` why it cannot be said what that is, `gone` that its pool runs, and has none such."""

    type: SourceType
    path: str | None
    format: str | None
    index: int | None = None
    protocol: str | None = None
    hosts: tuple[str, ...] = ()
    dac: DacLabel | None = None
    size: int | None = None
    volume: Volume | None = None
    trouble: str | None = None
    gone: bool = False

    @property
    def local(self) -> bool:
        return self.type in (SourceType.FILE, SourceType.BLOCK) and self.path is not None


@dataclass(frozen=True, slots=True)
class Mirror:
    """The target of a copy, or of a commit of the top layer. Only `ready` says that the guest may go over to it."""

    job: str
    ready: bool
    layer: LiveLayer | None


@dataclass(frozen=True, slots=True)
class Disk:
    """`layers`: top first, none for an empty drive. `whole` says that the last of them stands on nothing: of a domain
    that does not run, libvirt knows the top alone, unless its definition names more."""

    target: str
    device: str
    layers: tuple[LiveLayer, ...]
    whole: bool
    read_only: bool
    mirror: Mirror | None = None

    @property
    def top(self) -> LiveLayer | None:
        return self.layers[0] if self.layers else None


@dataclass(frozen=True, slots=True)
class Domain:
    """`dac` is None where libvirt has chosen no label yet: the domain does not run, and its definition says none."""

    uuid: str
    name: str
    disks: tuple[Disk, ...]
    dac: DacLabel | None = None


def parse(text: str, *, size: int) -> Domain:
    """The domain. A JobError `invalid` for what is longer than `size` bytes, is no XML or no domain's."""
    root = _tree(text.encode("utf-8", "surrogatepass"), size)
    uuid, name = root.findtext("uuid"), root.findtext("name")
    if root.tag != "domain" or not uuid or not name:
        _refuse("is not that of a domain with a name and a UUID")
    disks = tuple(_disk(element) for element in root.iterfind("./devices/disk"))
    return Domain(uuid, name, disks, _dac(root))


def base_label(text: str, *, size: int) -> str | None:
    """From libvirt's capabilities: the label that a domain gets which says none; None where libvirt has no such model,
    and changes no file's owner. A JobError as `parse`."""
    for model in _tree(text.encode("utf-8", "surrogatepass"), size).iterfind("./host/secmodel"):
        if model.findtext("model") == "dac":
            return model.findtext("baselabel")
    return None


def pool(text: str, *, size: int) -> tuple[str, str]:
    """Of a storage pool: its type, and the folder that its volumes lie in; empty where there is none. A JobError as
    `parse`."""
    root = _tree(text.encode("utf-8", "surrogatepass"), size)
    return root.get("type", ""), root.findtext("./target/path") or ""


# Elements


def _disk(element: ElementTree.Element) -> Disk:
    target = element.find("target")
    if target is None or not target.get("dev"):
        _refuse("has a disk without a target")
    layers: list[LiveLayer] = []
    above: ElementTree.Element | None = element
    while above is not None:
        if (layer := _layer(above)) is not None:
            layers.append(layer)
        below = above.find("backingStore")
        # An element without a source is the end: <backingStore/>.
        if below is None or below.find("source") is None:
            break
        above = below
    mirror = element.find("mirror")
    return Disk(
        target=str(target.get("dev")),
        device=element.get("device", "disk"),
        layers=tuple(layers),
        whole=bool(layers) and below is not None,
        read_only=element.find("readonly") is not None,
        mirror=None if mirror is None else _mirror(mirror),
    )


def _mirror(element: ElementTree.Element) -> Mirror:
    return Mirror(element.get("job", "copy"), element.get("ready") == "yes", _layer(element))


def _layer(element: ElementTree.Element) -> LiveLayer | None:
    source = element.find("source")
    if source is None:
        return None
    kind = element.get("type", "file")
    type = SourceType(kind) if kind in ("file", "block", "network", "volume") else SourceType.OTHER
    path = source.get({"file": "file", "block": "dev", "network": "name"}.get(kind, ""))
    volume = Volume(source.get("pool", ""), source.get("volume", "")) if kind == "volume" else None
    index = source.get("index") or element.get("index")  # of the top in its source, of those below in themselves
    return LiveLayer(
        type=type,
        path=path,
        format=_format(element),
        index=int(index) if index is not None and index.isdecimal() and len(index) < 10 else None,
        protocol=source.get("protocol"),
        hosts=tuple(_host(host) for host in source.iterfind("host")),
        dac=_dac(source),
        size=_part(source),
        volume=volume,
    )


def _part(source: ElementTree.Element) -> int | None:
    """The bytes of <slice type='storage'>."""
    part = source.find("slices/slice[@type='storage']")
    size = part.get("size", "") if part is not None else ""
    return int(size) if size.isdecimal() and len(size) < 20 else None


def _dac(element: ElementTree.Element) -> DacLabel | None:
    """Of a domain, or of one source. `imagelabel` is what a running domain's files get; a static label leaves them
    alone unless it says otherwise."""
    for label in element.iterfind("seclabel"):
        if label.get("model") == "dac":
            kind = label.get("type", "dynamic")
            relabel = kind != "none" and label.get("relabel", "no" if kind == "static" else "yes") == "yes"
            return DacLabel(relabel, label.findtext("imagelabel") or label.findtext("label"))
    return None


def _format(element: ElementTree.Element) -> str | None:
    """A backing layer has <format>, the top of a disk <driver>."""
    for name in ("format", "driver"):
        if (found := element.find(name)) is not None and found.get("type"):
            return found.get("type")
    return None


def _host(element: ElementTree.Element) -> str:
    if element.get("socket"):
        return str(element.get("socket"))
    name, port = element.get("name", ""), element.get("port")
    name = f"[{name}]" if ":" in name else name
    return f"{name}:{port}" if port else name


# Text


def _tree(data: bytes, size: int) -> ElementTree.Element:
    if len(data) > size:
        _refuse(f"has {len(data)} bytes, more than libvirt.xml_size ({size})")
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate("UTF-8")
    depth = elements = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, elements
        depth, elements = depth + 1, elements + 1
        if depth > MOST_DEPTH or elements > MOST_ELEMENTS:
            _refuse("is too deep, or has too many elements")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def declares(*_: object) -> None:
        _refuse("declares a document type")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = declares
    parser.EntityDeclHandler = declares
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        _refuse(f"is not well-formed: {error}")
    return builder.close()


def _refuse(what: str) -> NoReturn:
    raise JobError("invalid", f"the domain's XML {what}", remedy="see `virsh dumpxml DOMAIN`")
