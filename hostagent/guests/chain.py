"""The chain of a guest's disk as jobs know chains: what libvirt says of it, and the files that it means.

libvirt opened these files for the guest, and follows links to them; so paths are shown without links, and files are
compared by identity. The top is opened here by the same rules as any image that a person names; and for who may name
images in pools only so is the rest, by the rules for what a header names. All calls block.
"""

from __future__ import annotations

import itertools
import os
import re
import stat

from hostagent.drivers.domain_xml import Disk, LiveLayer
from hostagent.images.header import read_header
from hostagent.images.member import ChainLimits, Wanted, open_member
from hostagent.inodes import real_path
from jobs import pull
from jobs.errors import JobError
from jobs.model import Chain, FileId, Job, Layer

_INDEXED = re.compile(r"(?P<target>[^\[\]/]+)\[(?P<index>\d{1,9})\]")


def read_chain(disk: Disk, limits: ChainLimits) -> Chain:
    """The chain, top first. `virtual_size` is the disk's in each layer; `backing` is not read. A JobError for what is
    no file or device of this host, or is gone."""
    layers = [_layer(layer) for layer in disk.layers]
    size = _virtual_size(layers[0], disk.layers[0].size, limits)
    if not limits.top_anywhere:
        for above, below in itertools.pairwise(layers):
            os.close(_opened(Wanted(below.path, below.format, above), below, limits))
    return Chain(tuple(_sized(layer, size) for layer in layers))


def files_of(disk: Disk) -> list[FileId | None]:
    """Which files libvirt's chain consists of now; None for one that is none, or is gone."""
    found: list[FileId | None] = []
    for layer in disk.layers:
        try:
            found.append(_layer(layer).file)
        except JobError:
            found.append(None)
    return found


def has_become(disk: Disk, job: Job) -> bool:
    """Whether the disk of a guest that runs stands on the chain that the job makes, and on nothing that it takes away:
    as its top, or below the overlay of a snapshot that came after it."""
    found, wanted = files_of(disk), [layer.file for layer in job.after.layers]
    return found[-len(wanted) :] == wanted and {layer.file for layer in job.dropped}.isdisjoint(found)


def resolve_base(disk: Disk, chain: Chain, base: str | None) -> Layer | None:
    """The layer that stays, named by its path or as `vda[3]`; None for a whole pull."""
    indexed = _INDEXED.fullmatch(base or "")
    if indexed is None or indexed["target"] != disk.target:
        return pull.resolve_base(chain, base if base is None or not base.startswith("/") else real_path(base))
    for live, layer in zip(disk.layers[1:], chain.layers[1:], strict=True):
        if live.index == int(indexed["index"]):
            return layer
    known = ", ".join(f"{disk.target}[{live.index}]" for live in disk.layers[1:]) or "none: it has no backing file"
    message = f"{base} is not below the top of {disk.target}"
    raise JobError("invalid", message, field="base", value=base, remedy=f"name one of its layers ({known})")


def name_of(disk: Disk, layer: Layer) -> str:
    """What libvirt calls the layer now: `vda[3]`."""
    for live, file in zip(disk.layers, files_of(disk), strict=True):
        if file == layer.file and live.index is not None:
            return f"{disk.target}[{live.index}]"
    raise JobError("image_changed", f"{layer.path!r} is not in the guest's chain any more", remedy="look at it again")


def _layer(live: LiveLayer) -> Layer:
    if live.path is None or not live.local:
        where = f"{live.protocol or live.type} {live.path or ''}".strip()
        remedy = "network images come later; `virsh blockpull` can do it"
        raise JobError("not_supported", f"a layer of the disk is no file of this host: {where}", remedy=remedy)
    if live.format not in ("raw", "qcow2"):
        message = f"{live.path} has the format {live.format}; raw and qcow2 are supported"
        raise JobError("not_supported", message, value=live.format)
    try:
        path = os.path.realpath(live.path)
        found = os.stat(path)  # noqa: PTH116
    except OSError as error:
        message = f"{live.path}, a layer of the disk, cannot be looked at: {error.strerror}"
        raise JobError("image_changed", message, remedy="see who removed it", value=live.path) from error
    device = stat.S_ISBLK(found.st_mode)
    if not device and not stat.S_ISREG(found.st_mode):
        raise JobError("image_invalid", f"{path} is neither a file nor a block device", value=path)
    length = 0 if device else found.st_size
    return Layer(
        path=path,
        format=live.format,
        file=FileId(found.st_dev, found.st_ino),
        virtual_size=0,
        allocated=0 if device else found.st_blocks * 512,
        device=device,
        length=length,
    )


def _virtual_size(top: Layer, part: int | None, limits: ChainLimits) -> int:
    """`part` are the bytes of a raw one that the guest sees, if not all."""
    fd = _opened(Wanted(top.path, top.format), top, limits)
    try:
        header = read_header(fd) if top.format == "qcow2" else None
        return (part or os.lseek(fd, 0, os.SEEK_END)) if header is None else header.virtual_size
    finally:
        os.close(fd)


def _opened(wanted: Wanted, layer: Layer, limits: ChainLimits) -> int:
    """A descriptor of the layer's very file, if it lies where it may."""
    fd, _ = open_member(wanted, limits)
    found = os.fstat(fd)
    if FileId(found.st_dev, found.st_ino) != layer.file:
        os.close(fd)
        raise JobError("image_changed", f"{layer.path} was replaced while it was looked at", remedy="try again")
    return fd


def _sized(layer: Layer, size: int) -> Layer:
    return Layer(layer.path, layer.format, layer.file, size, layer.allocated, None, layer.device, layer.length)
