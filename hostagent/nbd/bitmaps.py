"""Dirty bitmaps beside an export, as NBD contexts: which ones can be served, judged before anything is started.

A bitmap tells of the writes to its own layer alone. Whoever makes an overlay for each checkpoint gives it a bitmap of
the same name, and all of them together say what changed since the lowest began: so they are served merged, from that
layer to the top. Such a bitmap may be younger than the first writes to its layer, and knows nothing of them: so all
that the layers above the lowest have allocated counts as changed.

One that would tell of less is refused, for a backup that relies on it would miss data: a layer without the bitmap above
one that has it, a bitmap that was left in use, one that does not record.

An export with bitmaps has a storage daemon for itself: in one daemon a bitmap can be in one export only, and QEMU 7.2
aborts when a job's end takes away the layer that has it. So no job writes the image meanwhile, and the lease says so.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from hostagent.drivers import bitmaps as merged
from hostagent.drivers.qsd import StorageDaemon
from hostagent.images.bitmaps import Bitmap, BitmapList, read_bitmaps
from hostagent.images.header import read_header
from hostagent.nbd.prepared import CONTROL, READER, PreparedChain
from hostagent.nbdclient import conversations
from hostagent.records import ExportRecord
from jobs.errors import JobError
from jobs.model import Layer

log = logging.getLogger(__name__)

Known = tuple[Layer, BitmapList]
"""A layer and its bitmaps."""


@dataclass(frozen=True, slots=True)
class Served:
    """A bitmap as clients see it: those of this name in the upper `depth` layers. `granularity` in bytes."""

    name: str
    depth: int
    granularity: int


async def find_served(record: ExportRecord, chain: PreparedChain, timeout: float) -> tuple[Served, ...]:
    """What the export serves. Raises a JobError that names the first bitmap that it cannot have.

    The image is leased: nobody writes it, so a bitmap that is marked in use was left so.
    """
    if not record.bitmaps:
        return ()
    try:
        known = await asyncio.wait_for(asyncio.to_thread(_bitmaps, chain), timeout)
    except TimeoutError:
        message = f"the bitmaps of {chain.path!r} were not read within {timeout:g} s (exports.nbd_timeout)"
        raise JobError("timeout", message, remedy="see whether its storage hangs") from None
    served = tuple(_served(name, known, writable=record.writable) for name in record.bitmaps)
    for one in served:
        if one.depth > 1 and record.tcp is not None:
            reason = (
                f"{one.depth} layers have it, and to merge them the agent must reach the storage daemon without TLS"
            )
            raise _refusal("not_supported", one.name, reason, "export it on a unix socket, or make a full copy")
    return served


async def add_export(
    record: ExportRecord, chain: PreparedChain, served: Sequence[Served], patience: conversations.Patience
) -> None:
    """Add the export to the chain's storage daemon, over the merged bitmaps if there are any.

    Nobody but the agent can reach the daemon yet. Raises AgentError timeout when the merging exhausts `patience`.
    """
    daemon = await chain.serve()
    several = [one for one in served if one.depth > 1]
    if not several:
        adding = daemon.add_client_export(record.id, chain.nodes[0], writable=record.writable, bitmaps=record.bitmaps)
        await chain.ask(adding)
        return
    await chain.ask(merged.add_filter(daemon, chain.nodes[0]))
    for one in several:
        await chain.ask(merged.merge(daemon, one.name, chain.nodes[: one.depth], one.granularity))
        await _complete(chain, daemon, one, patience)
    await chain.ask(daemon.add_export(record.id, merged.MERGED, bitmaps=record.bitmaps))


async def _complete(chain: PreparedChain, daemon: StorageDaemon, one: Served, patience: conversations.Patience) -> None:
    """Add what the layers above the lowest have allocated to the merged bitmap.

    An allocation is as coarse as its layer's clusters, so a bitmap of finer grains tells of more than was written. The
    filter counts as a layer, but not for what the top itself has: the layer n is at depth n + 1, and the top at 1.
    """
    socket = str(daemon.places.socket)
    await chain.ask(daemon.add_export(READER, merged.MERGED, bitmaps=[one.name]))
    found = await asyncio.to_thread(
        conversations.unrecorded, socket, READER, one.name, one.depth, one.granularity, patience
    )
    await chain.ask(daemon.remove_export(READER, hard=True))
    if not found:
        return
    await chain.ask(merged.add_notes(daemon, one.name, chain.layers[0].virtual_size, one.granularity))
    await chain.ask(daemon.add_export(CONTROL, merged.NOTES, writable=True))
    await asyncio.to_thread(conversations.write_zeroes, socket, CONTROL, found, patience)
    await chain.ask(daemon.remove_export(CONTROL, hard=True))
    await chain.ask(merged.merge_notes(daemon, one.name))
    amount = sum(end - begin for begin, end in found)
    log.info(
        "a bitmap is younger than its layer's data, which is added to it",
        extra={"fields": {"path": chain.path, "bitmap": one.name, "bytes": amount}},
    )


def _served(name: str, known: Sequence[Known], *, writable: bool) -> Served:
    depth = max((n for n, (_, bitmaps) in enumerate(known, 1) if bitmaps.find(name)), default=0)
    if not depth:
        names = sorted({repr(bitmap.name) for _, bitmaps in known for bitmap in bitmaps.items})
        reason = f"{known[0][0].path!r} has no such bitmap"
        raise _refusal("not_found", name, reason, f"it has {', '.join(names) or 'none'}")
    found = [(layer, bitmaps.find(name)) for layer, bitmaps in known[:depth]]
    lowest = found[-1][0]
    for layer, bitmap in found:
        if bitmap is None:
            reason = f"{lowest.path!r} has it, and {layer.path!r} above has not: what was written there is not in it"
            raise _refusal("conflict", name, reason, "make a full copy, and begin anew with a bitmap in the top layer")
        if bitmap.in_use:
            remedy = "remove it, and make a full copy: "
            remedy += f"qemu-img bitmap --remove {shlex.quote(layer.path)} {shlex.quote(name)}"
            reason = f"it is inconsistent: {layer.path!r} was not closed in order by whoever wrote it last"
            raise _refusal("image_corrupt", name, reason, remedy)
    if known[depth:] and known[depth][1].lost:
        below = known[depth][0]
        reason = f"{below.path!r} lost its bitmaps to a program that knows none, and may have had it"
        remedy = f"make a full copy; adding and removing a bitmap of {below.path!r} makes it forget those"
        raise _refusal("conflict", name, reason, remedy)
    bitmaps = [bitmap for _, bitmap in found if bitmap is not None]
    if depth > 1:
        _refuse_merging(name, [layer for layer, _ in found], bitmaps, writable=writable)
    return Served(name, depth, min(bitmap.granularity for bitmap in bitmaps))


def _refuse_merging(name: str, layers: Sequence[Layer], bitmaps: Sequence[Bitmap], *, writable: bool) -> None:
    """Raise what stands against the union of the bitmaps of these layers."""
    top = layers[0]
    if writable:
        reason = f"{len(layers)} layers have it, and what is written to {top.path!r} is recorded in its own alone"
        raise _refusal("invalid", name, reason, "export it read-only")
    for layer, bitmap in zip(layers, bitmaps, strict=True):
        if not bitmap.enabled:
            reason = f"that of {layer.path!r} is disabled, and may not tell of all that was written there"
            raise _refusal("conflict", name, reason, "make a full copy")
        if layer.virtual_size != top.virtual_size:
            reason = f"{layer.path!r} has it for {layer.virtual_size} bytes, and {top.path!r} for {top.virtual_size}"
            raise _refusal("not_supported", name, reason, "make a full copy: the disk's size was changed")


def _bitmaps(chain: PreparedChain) -> list[Known]:
    """Of all layers, top first. Blocking."""
    return [(layer, _of_layer(chain, layer)) for layer in chain.layers]


def _of_layer(chain: PreparedChain, layer: Layer) -> BitmapList:
    fd = chain.descriptor(layer.file)
    header = None if layer.format == "raw" or fd is None else read_header(fd)
    if header is None or fd is None:
        return BitmapList()
    return BitmapList(read_bitmaps(fd, header.bitmaps), header.bitmaps_lost)


def _refusal(code: str, name: str, reason: str, remedy: str) -> JobError:
    return JobError(code, f"bitmap {name!r} cannot be exported: {reason}", field="bitmaps", value=name, remedy=remedy)
