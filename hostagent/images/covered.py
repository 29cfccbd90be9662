"""Whether an image has, on its file, what the layers hold that it no longer stands on.

A header that names no backing file says nothing of the tables above the data: QEMU writes it before them. qemu-img
reads the tables as they are on the file, also while a QEMU has it open (-U), by inherited descriptors, as the
unprivileged user and under limits (hostagent.images.tool). What is lost reads as zeros, so what the layers have as
zeros counts for nothing; and what a guest has discarded since is still mentioned in the image's tables (of version 3).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from hostagent.images.extents import described
from hostagent.images.tool import Tool, reason
from jobs.errors import JobError
from jobs.model import Layer

Range = tuple[int, int]
"""Begin and end, in bytes of the virtual disk."""


async def missing(tool: Tool, top: Layer, below: Sequence[Layer], handles: Sequence[int]) -> int:
    """Bytes that `below` (the first of them on top) have as data, and `top` has not. `handles` lead to the files of all
    of them. A JobError when that cannot be found out."""
    has = await _map(tool, [top], handles[:1], "present")
    needs = await _map(tool, below, handles[1:], "data")
    return sum(end - begin for begin, end in _without(needs, has, top.virtual_size))


async def _map(tool: Tool, layers: Sequence[Layer], handles: Sequence[int], key: str) -> list[Range]:
    path = layers[0].path
    try:
        finished = await tool.read(["map", "-U", "--output=json", "--", described(layers, handles)], handles)
    except TimeoutError:
        message = f"the map of {path} took longer than images.check_timeout ({tool.limits.timeout:g} s)"
        raise JobError("timeout", message, remedy="raise images.check_timeout") from None
    if finished.status or len(finished.stdout) >= tool.limits.output:
        unknown = ("limit", "raise images.map_output, images.tool_cpu or tool_memory")
        code, remedy = reason(finished, *(layer.path for layer in layers)) or unknown
        raise JobError(code, f"{path} cannot be mapped: {finished.said[-500:] or 'it is too long'}", remedy=remedy)
    try:
        found = json.loads(finished.stdout)
        return [(int(one["start"]), int(one["start"]) + int(one["length"])) for one in found if _counts(one, key)]
    except (ValueError, LookupError, TypeError) as error:
        raise JobError("unavailable", f"the map of {path} cannot be understood: {error!r}") from error


def _counts(entry: dict[str, object], key: str) -> bool:
    return bool(entry["present"]) if key == "present" else bool(entry["data"]) and not entry["zero"]


def _without(needs: Sequence[Range], has: Sequence[Range], size: int) -> Iterator[Range]:
    """The parts of `needs`, up to `size`, that are not in `has`; both are sorted, as qemu-img's maps are."""
    place = 0
    for begin, end in needs:
        end = min(end, size)
        while begin < end:
            while place < len(has) and has[place][1] <= begin:
                place += 1
            if place == len(has) or has[place][0] >= end:
                yield begin, end
                break
            if has[place][0] > begin:
                yield begin, has[place][0]
            begin = has[place][1]
