"""Dirty bitmaps in a storage daemon: those of several layers merged into one, and those of a layer removed.

Merged ones are in the daemon's memory, on a filter over the top, where NBD finds them before those of the layers.
Nothing of it is in any file: the filter and its bitmaps end with the process, and outlive the agent with it. The daemon
serves that export alone, all of it is read-only, and no job works in it, so that the filter is in nobody's way.

A bitmap can be told of what no write recorded: an enabled one on a node that throws away what is written to it, in
memory like the rest, notes the ranges that somebody writes there, and is merged into the one that is served.

QEMU facts: block-dirty-bitmap-merge in qapi/block-core.json takes bitmaps of other nodes, of any granularity, for disks
of one size.
"""

from __future__ import annotations

from collections.abc import Sequence

from hostagent.drivers.qmp import Refused
from hostagent.drivers.qsd import StorageDaemon
from hostagent.records import Node

MERGED = "merged"
"""The filter's node, and its throttle group, which throttles nothing."""

NOTES = "notes"
"""The node that only notes where it is written."""


async def add_filter(daemon: StorageDaemon, top: Node) -> None:
    """The node that merged bitmaps are on; it reads as `top` does."""
    await daemon.execute("object-add", qom_type="throttle-group", id=MERGED)
    await daemon.execute(
        "blockdev-add",
        driver="throttle",
        node_name=MERGED,
        throttle_group=MERGED,
        file=top.format_node,
        read_only=True,
    )


async def merge(daemon: StorageDaemon, name: str, nodes: Sequence[Node], granularity: int) -> None:
    """The union of the bitmaps `name` of `nodes`, on the filter; `granularity` in bytes."""
    await daemon.execute(
        "block-dirty-bitmap-add", node=MERGED, name=name, granularity=granularity, persistent=False, disabled=True
    )
    await _merge(daemon, name, [node.format_node for node in nodes])


async def add_notes(daemon: StorageDaemon, name: str, size: int, granularity: int) -> None:
    """The node NOTES of `size` bytes, with an empty bitmap `name` that records; `granularity` in bytes."""
    await daemon.execute("blockdev-add", driver="null-co", node_name=NOTES, size=size)
    await daemon.execute("block-dirty-bitmap-add", node=NOTES, name=name, granularity=granularity, persistent=False)


async def merge_notes(daemon: StorageDaemon, name: str) -> None:
    """What NOTES recorded comes into the bitmap on the filter; NOTES is removed."""
    await _merge(daemon, name, [NOTES])
    await daemon.execute("blockdev-del", node_name=NOTES)


async def _merge(daemon: StorageDaemon, name: str, nodes: Sequence[str]) -> None:
    sources = [{"node": node, "name": name} for node in nodes]
    await daemon.execute("block-dirty-bitmap-merge", node=MERGED, target=name, bitmaps=sources)


async def remove(daemon: StorageDaemon, node: Node, name: str) -> None:
    """Remove the bitmap from the image, which is open for writing. Idempotent."""
    try:
        await daemon.execute("block-dirty-bitmap-remove", node=node.format_node, name=name)
    except Refused as error:
        if "not found" not in error.text.lower():
            raise
