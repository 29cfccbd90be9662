"""Dirty bitmaps in a storage daemon: those of several layers merged into one, and those of a layer removed.

Merged ones are in the daemon's memory, on a filter over the top, where NBD finds them before those of the layers.
Nothing of it is in any file: the filter and its bitmaps end with the process, and outlive the agent with it. The daemon
serves that export alone, all of it is read-only, and no job works in it, so that the filter is in nobody's way.

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
    sources = [{"node": node.format_node, "name": name} for node in nodes]
    await daemon.execute("block-dirty-bitmap-merge", node=MERGED, target=name, bitmaps=sources)


async def remove(daemon: StorageDaemon, node: Node, name: str) -> None:
    """Remove the bitmap from the image, which is open for writing. Idempotent."""
    try:
        await daemon.execute("block-dirty-bitmap-remove", node=node.format_node, name=name)
    except Refused as error:
        if "not found" not in error.text.lower():
            raise
