"""The bitmaps of a commit's base: what they cost, what becomes of them, and how they are removed on request.

A base that is written records what is committed in those of its bitmaps that are enabled: they tell of that as well
afterwards, of whole clusters. While it is open for writing all of them are marked in use, and a storage daemon that is
killed leaves them inconsistent. So they are removed before anything is committed: then they need no space, and a commit
that is cut off leaves nothing of them behind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hostagent.drivers import bitmaps
from hostagent.images.bitmap_cost import Cost, costs
from hostagent.images.bitmaps import read_bitmaps
from hostagent.images.header import read_header
from hostagent.nbd.prepared import PreparedChain
from hostagent.records import Node
from jobs.errors import JobError
from jobs.model import Layer

T = TypeVar("T")

NAMED = 8
"""Bitmaps that a warning names."""


async def look(fd: int, base: Layer, timeout: float, *, pruned: bool) -> tuple[tuple[Cost, ...], tuple[str, ...]]:
    """The base's bitmaps with what they cost, and what somebody who relies on them should know before the commit.

    Those that cannot be read stand in the way of their removal only.
    """
    if base.format != "qcow2":
        return (), ()
    try:
        found = await _aside(costs, fd, path=base.path, timeout=timeout)
    except JobError as error:
        if pruned:
            raise
        return (), (f"the bitmaps of {base.path}: {error.message}",)
    return found, () if pruned else _warnings(base.path, found)


async def stay_behind(layers: Sequence[Layer], fds: Sequence[int], timeout: float) -> tuple[str, ...]:
    """What somebody should know who relies on bitmaps of an image that is copied: QEMU copies none."""
    names: set[str] = set()
    for layer, fd in zip(layers, fds, strict=False):
        if layer.format == "qcow2":
            with contextlib.suppress(JobError):  # whoever reads them says so
                names |= set(await _aside(_names, fd, path=layer.path, timeout=timeout))
    if not names:
        return ()
    listed = ", ".join(sorted(names)[:NAMED]) + (", …" if len(names) > NAMED else "")
    text = f"the copy has none of the image's {len(names)} bitmaps ({listed}): who relies on them begins anew with it"
    return (text,)


async def prune(chain: PreparedChain, node: Node, timeout: float) -> None:
    """Remove all bitmaps of the base, which is open for writing. Idempotent: what is gone is not there to be found."""
    if node.layer.format != "qcow2":
        return
    fd = chain.descriptor(node.layer.file)
    assert fd is not None
    daemon = await chain.serve()
    if not (names := await _aside(_names, fd, path=node.layer.path, timeout=timeout)):
        return
    for name in names:
        await chain.ask(bitmaps.remove(daemon, node, name))
    await chain.flush(node.layer.file)  # what they took is free on stable storage, too, and not leaked by a kill


def preview(found: Sequence[Cost], *, pruned: bool) -> list[dict[str, Any]]:
    """For a dry run; `bytes` is what a bitmap takes in the file."""
    return [
        {
            "name": cost.bitmap.name,
            "granularity": cost.bitmap.granularity,
            "recording": cost.bitmap.enabled,
            "state": "inconsistent" if cost.bitmap.in_use else "consistent",
            "bytes": cost.stored,
            "pruned": pruned,
        }
        for cost in found
    ]


def _warnings(path: str, found: Sequence[Cost]) -> tuple[str, ...]:
    usable = [cost.bitmap for cost in found if not cost.bitmap.in_use]
    if not usable:
        return ()
    told = [f"{path} has {len(usable)} bitmaps: they are inconsistent afterwards if the commit is cut off"]
    if disabled := [repr(bitmap.name) for bitmap in usable if not bitmap.enabled]:
        names = ", ".join(disabled[:8]) + (f" and {len(disabled) - 8} more" if len(disabled) > 8 else "")
        told.append(f"disabled bitmaps of {path} do not tell of what is committed: {names}")
    return tuple(told)


def _names(fd: int) -> list[str]:
    header = read_header(fd)
    return [bitmap.name for bitmap in read_bitmaps(fd, header.bitmaps if header else None)]


async def _aside(work: Callable[[int], T], fd: int, *, path: str, timeout: float) -> T:
    """Blocking work, bounded by exports.nbd_timeout."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(work, fd), timeout)
    except TimeoutError:
        message = f"the bitmaps of {path!r} were not read within {timeout:g} s (exports.nbd_timeout)"
        raise JobError("timeout", message, remedy="see whether its storage hangs") from None
