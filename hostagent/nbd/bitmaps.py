"""Dirty bitmaps beside an export, as NBD contexts: which ones can be served, judged before anything is started.

QEMU serves a bitmap of the top or of a layer below it. An export with bitmaps has a storage daemon for itself: in one
daemon a bitmap can be in one export only, and QEMU 7.2 aborts when a job's end takes away the layer that has it. So no
job writes the image meanwhile, and the lease says so.
"""

from __future__ import annotations

import asyncio
import shlex

from hostagent.images.bitmaps import Bitmap, read_bitmaps
from hostagent.images.header import read_header
from hostagent.nbd.prepared import PreparedChain
from hostagent.records import ExportRecord
from jobs.errors import JobError


async def refuse_unusable(record: ExportRecord, chain: PreparedChain, timeout: float) -> None:
    """Raise a JobError that names the first bitmap that the export cannot have. The image is leased: nobody writes it,
    so a bitmap that is marked in use was left so."""
    if not record.bitmaps:
        return
    try:
        known = await asyncio.wait_for(asyncio.to_thread(_bitmaps, chain), timeout)
    except TimeoutError:
        message = f"the bitmaps of {chain.path!r} were not read within {timeout:g} s (exports.nbd_timeout)"
        raise JobError("timeout", message, remedy="see whether its storage hangs") from None
    for name in record.bitmaps:
        if name not in known:
            names = ", ".join(map(repr, sorted(known))) or "none"
            raise _refusal("not_found", name, f"{chain.path!r} has no such bitmap", f"it has {names}")
        path, bitmap = known[name]
        if bitmap.in_use:
            remedy = (
                f"remove it, and make a full copy: qemu-img bitmap --remove {shlex.quote(path)} {shlex.quote(name)}"
            )
            reason = f"it is inconsistent: {path!r} was not closed in order by whoever wrote it last"
            raise _refusal("image_corrupt", name, reason, remedy)


def _bitmaps(chain: PreparedChain) -> dict[str, tuple[str, Bitmap]]:
    """By name, with the layer that has it: what lies above hides what lies below. Blocking."""
    found: dict[str, tuple[str, Bitmap]] = {}
    for layer in chain.layers:
        fd = chain.descriptor(layer.file)
        if layer.format == "raw" or fd is None:
            continue
        header = read_header(fd)
        for bitmap in read_bitmaps(fd, header.bitmaps if header else None):
            found.setdefault(bitmap.name, (layer.path, bitmap))
    return found


def _refusal(code: str, name: str, reason: str, remedy: str) -> JobError:
    return JobError(code, f"bitmap {name!r} cannot be exported: {reason}", field="bitmaps", value=name, remedy=remedy)
