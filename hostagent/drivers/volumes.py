"""Disks that are volumes of libvirt's storage pools: which file, device or network image each of them is.

A domain's XML, the live one too, names the pool and the volume and no path. libvirt knows the path while the pool runs.
In a pool that is a folder a volume is the file of its name, also when the pool does not run, or has not seen the file
yet; what other pools will have is known when they run, and not before. Blocking: it belongs into the call that reads
the domain.
"""

from __future__ import annotations

from dataclasses import replace

from hostagent.drivers import domain_xml
from hostagent.drivers.domain_xml import Disk, Domain, LiveLayer, SourceType, Volume
from hostagent.drivers.libvirt import Lost, Session
from jobs.errors import JobError

POOL_SIZE = 1 << 20
"""Bytes of a pool's description; one takes 1 KiB."""
REMOTE = ("rbd", "gluster", "sheepdog")
"""Types of pools whose volumes are no files of this host."""


def resolve(session: Session, domain: Domain) -> Domain:
    """The domain with the paths of its volumes; `trouble` of a layer says why one has none."""
    if not any(layer.volume for disk in domain.disks for layer in _layers(disk)):
        return domain
    return replace(domain, disks=tuple(_disk(session, disk) for disk in domain.disks))


def _layers(disk: Disk) -> tuple[LiveLayer, ...]:
    target = disk.mirror.layer if disk.mirror else None
    return (*disk.layers, *([target] if target else []))


def _disk(session: Session, disk: Disk) -> Disk:
    layers = tuple(_layer(session, layer) for layer in disk.layers)
    mirror = disk.mirror
    if mirror is not None and mirror.layer is not None:
        mirror = replace(mirror, layer=_layer(session, mirror.layer))
    return replace(disk, layers=layers, mirror=mirror)


def _layer(session: Session, layer: LiveLayer) -> LiveLayer:
    if layer.volume is None:
        return layer
    try:
        path = session.volume_path(*layer.volume)
    except Lost:
        raise
    except JobError as error:
        return _by_its_pool(session, layer, layer.volume, error)
    return replace(layer, type=SourceType.FILE if path.startswith("/") else SourceType.NETWORK, path=path)


def _by_its_pool(session: Session, layer: LiveLayer, volume: Volume, error: JobError) -> LiveLayer:
    """What can be said of a volume that libvirt does not know. Of a guest that runs nothing is gone: QEMU has it."""
    try:
        pool = session.pool(volume.pool)
        kind, folder = domain_xml.pool(pool.xml, size=POOL_SIZE)
    except Lost:
        raise
    except JobError:
        return replace(layer, trouble=error.message)
    if kind in REMOTE:
        return replace(layer, type=SourceType.NETWORK)
    if path := _in_folder(volume, kind, folder, active=pool.active):
        return replace(layer, type=SourceType.FILE, path=path)
    gone = layer.index is None and pool.active and error.code == "not_found"
    return replace(layer, gone=gone, trouble=None if gone else error.message)


def _in_folder(volume: Volume, kind: str, folder: str, *, active: bool) -> str | None:
    """Where the volume is, or will be, in a pool that is a folder; one that is mounted is that only while it runs."""
    there = kind == "dir" or (kind in ("fs", "netfs") and active)
    plain = volume.name not in ("", ".", "..") and "/" not in volume.name
    return f"{folder}/{volume.name}" if there and plain and folder.startswith("/") else None
