"""qemu-img map: which bytes of an image are data, which read as zeros, and which file of the chain has them.

The whole chain is described to it by inherited descriptors, so that no name of a header is followed; it runs as the
unprivileged user and under limits (hostagent.images.tool). QEMU's locks stay on: the tables of an image that somebody
writes are not told.
"""

from __future__ import annotations

import json
import operator
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hostagent.images.chain import OpenChain
from hostagent.images.header import shown
from hostagent.images.tool import Finished, RunAs, Tool, ToolLimits, grasped, reason
from jobs.errors import JobError
from jobs.model import Chain, Layer

_ALL = "leave --length out for all that follows"


@dataclass(frozen=True, slots=True)
class Extent:
    """`start` and `length` in bytes of the virtual disk; `depth` counts layers from the top, which is 0. `zero`: it
    reads as zeros; `data`: it is stored. `path` is the file that says so, None where no file of the chain does."""

    start: int
    length: int
    depth: int
    zero: bool
    data: bool
    path: str | None


class Map:
    def __init__(self, *, user: RunAs | None, limits: ToolLimits, binary: str, output: int) -> None:
        """`output`: bytes of JSON that are taken at most (images.map_output)."""
        self._limits = replace(limits, output=output)
        self._tool = Tool(user=user, limits=self._limits, binary=binary)

    async def extents(self, opened: OpenChain, *, start: int = 0, length: int | None = None) -> list[Extent]:
        """The extents from `start` on, `length` bytes of them or all; `invalid` where the disk does not have that."""
        _check_range(opened.chain.top, start, length)
        words = ["map", "--output=json", f"--start-offset={start}"]
        words += [] if length is None else [f"--max-length={length}"]
        path = opened.chain.top.path
        with grasped(*opened.fds) as handles:
            try:
                finished = await self._tool.read([*words, "--", described(opened.chain.layers, handles)], handles)
            except TimeoutError:
                message = f"the map of {path} took longer than images.check_timeout ({self._limits.timeout:g} s)"
                remedy = "raise images.check_timeout, or ask for less: --start, --length"
                raise JobError("timeout", message, remedy=remedy, value=path) from None
        if finished.status:
            raise _failed(opened.chain.paths(), finished)
        if len(finished.stdout) >= self._limits.output:
            message = f"the map of {path} has more than images.map_output ({self._limits.output} bytes)"
            raise JobError("limit", message, remedy="ask for less: --start, --length", value=path)
        try:
            return [_extent(entry, opened.chain) for entry in json.loads(finished.stdout)]
        except (ValueError, LookupError, TypeError) as error:
            remedy = "is images.qemu_img QEMU's own? `hostagent doctor` says which program it is"
            message = f"the map of {path} cannot be understood: {type(error).__name__}: {shown(str(error))}"
            raise JobError("unavailable", message, remedy=remedy, value=path) from error


def _check_range(top: Layer, start: int, length: int | None) -> None:
    size = top.virtual_size
    if start and start >= size:
        message = f"byte {start} is beyond the end of {top.path}, which has {size}"
        raise JobError("invalid", message, field="start", value=start, remedy="start below that")
    if length == 0:
        raise JobError("invalid", "a length of 0 is nothing to map", field="length", value=0, remedy=_ALL)
    if length is not None and start + length > size:
        message = f"{top.path} has {size - start} bytes from byte {start} on, not {length}"
        raise JobError("invalid", message, field="length", value=length, remedy=_ALL)


def described(layers: Sequence[Layer], handles: Sequence[int]) -> str:
    """Layers that stand on each other as QEMU's options, each by its descriptor and in its known format, top first. The
    last one stands on nothing."""
    below: dict[str, Any] | None = None
    for layer, handle in zip(reversed(layers), reversed(handles), strict=True):
        file = {"driver": "host_device" if layer.device else "file", "filename": f"/proc/self/fd/{handle}"}
        node = {"driver": layer.format, "read-only": True, "file": file}
        below = node if layer.format == "raw" else {**node, "backing": below}
    return "json:" + json.dumps(below)


def _extent(entry: dict[str, Any], chain: Chain) -> Extent:
    """Of types and within bounds: what is no extent is a ValueError, LookupError or TypeError."""
    start, length, depth = (operator.index(entry[name]) for name in ("start", "length", "depth"))
    if start < 0 or length < 0 or depth < 0:
        raise ValueError("a number below 0")
    path = chain.layers[depth].path if entry.get("present", True) else None
    return Extent(start, length, depth, bool(entry["zero"]), bool(entry["data"]), path)


def _failed(paths: Sequence[str], finished: Finished) -> JobError:
    path = paths[0]
    if finished.status < 0:
        why = f"was ended by {signal.Signals(-finished.status).name}: it needs more than its limits, or it crashed"
        remedy = "raise images.tool_cpu or images.tool_memory"
        return JobError("limit", f"the map of {path} {why}", remedy=remedy, value=path)
    last = finished.said.splitlines()[-1][-500:] if finished.said else "qemu-img gave no reason"
    code, remedy = reason(finished, *paths) or ("image_invalid", "see `hostagent image check`")
    return JobError(code, f"{path} cannot be mapped: {last}", remedy=remedy, value=path)
