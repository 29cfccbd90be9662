"""Whether an image has, on its files, what the layers hold that it no longer stands on.

A header that names no backing file says nothing of the tables above the data: QEMU writes it before them. qemu-img
reads the tables as they are on the file, also while a QEMU has it open (-U), by inherited descriptors, as the
unprivileged user and under limits (hostagent.images.tool). Where nothing is left below, what is lost reads as zeros, so
what the layers have as zeros counts for nothing. Over a base that stays it reads as that, so there zeros count as data
does; QEMU's stream writes them down as such. What a guest has discarded since is still mentioned in the image's tables
(of version 3).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from hostagent.images.extents import described
from hostagent.images.tool import Finished, Tool, reason
from jobs.errors import JobError
from jobs.model import Layer

Range = tuple[int, int]
"""Begin and end, in bytes of the virtual disk."""


async def held(tool: Tool, layers: Sequence[Layer], handles: Sequence[int], *, bare: bool) -> list[Range]:
    """What these layers (the first of them on top) hold that whoever stood on them must have; `bare`: nothing is left
    below, so zeros need not be held. `handles` lead to their files. A JobError when that cannot be found out."""
    return await _map(tool, layers, handles, "data" if bare else "present")


async def lacking(tool: Tool, needs: Sequence[Range], above: Sequence[Layer], handles: Sequence[int]) -> int:
    """Bytes of these ranges that `above`, mostly an image alone, do not have. `handles` as above. A JobError, too."""
    has = await _map(tool, above, handles, "present")
    return sum(end - begin for begin, end in _without(needs, has, above[0].virtual_size))


async def same(tool: Tool, upper: Sequence[Layer], rest: Sequence[Layer], handles: Sequence[int]) -> bool:
    """Whether `rest`, read alone, is what it is with `upper` on top of it: then these add nothing. `handles` as above.
    A JobError when that cannot be found out."""
    layers, path = (*upper, *rest), upper[0].path
    names = [described(layers, handles), described(rest, handles[len(upper) :])]
    finished = await _read(tool, ["compare", "-U", "--", *names], handles, path)
    if finished.status not in (0, 1):
        raise _failed(finished, layers, "compared")
    return finished.status == 0


async def _read(tool: Tool, arguments: Sequence[str], handles: Sequence[int], path: str) -> Finished:
    try:
        return await tool.read(arguments, handles)
    except TimeoutError:
        what = f"qemu-img {arguments[0]} of {path} took longer than images.check_timeout ({tool.limits.timeout:g} s)"
        raise JobError("timeout", what, remedy="raise images.check_timeout") from None


def _failed(finished: Finished, layers: Sequence[Layer], what: str) -> JobError:
    unknown = ("limit", "raise images.map_output, images.tool_cpu or tool_memory")
    code, remedy = reason(finished, *(layer.path for layer in layers)) or unknown
    said = finished.said[-500:] or "it is too long"
    return JobError(code, f"{layers[0].path} cannot be {what}: {said}", remedy=remedy)


async def _map(tool: Tool, layers: Sequence[Layer], handles: Sequence[int], key: str) -> list[Range]:
    path = layers[0].path
    finished = await _read(tool, ["map", "-U", "--output=json", "--", described(layers, handles)], handles, path)
    if finished.status or len(finished.stdout) >= tool.limits.output:
        raise _failed(finished, layers, "mapped")
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
