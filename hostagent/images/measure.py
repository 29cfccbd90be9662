"""qemu-img measure: the bytes that the content of a chain takes in a new image, found without reading the content.

The layers are described to it by inherited descriptors, so that no name of a header is followed; it runs as the
unprivileged user and under limits (hostagent.images.tool). Without QEMU's locks (-U): a look at what a job would take
stops nobody who begins one. Of what somebody writes meanwhile it is an estimate, and the job's own lease refuses that.

For a raw target qemu-img says the whole size, holes and all. The data alone is what a sparse one takes, and that is in
its answer for qcow2: there the image that is allocated whole has the same metadata as the one that is not.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from hostagent.images.extents import described
from hostagent.images.tool import Finished, RunAs, Tool, ToolLimits, grasped, reason
from jobs.errors import JobError
from jobs.model import Layer

RUNS = 4
"""Measures at a time; others wait, within their timeout."""
CLUSTER = 65536
"""Bytes of a cluster in the images that storage daemons make, and of the pieces that they copy."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes: `data` in whole clusters, `metadata` of a qcow2 image of that size."""

    data: int
    metadata: int

    def within(self, format: str) -> int:
        """What a new image of that format takes; a raw one is sparse."""
        return self.data if format == "raw" else self.data + self.metadata


class Measure:
    def __init__(self, *, user: RunAs | None, limits: ToolLimits, binary: str) -> None:
        """`limits.timeout` is images.measure_timeout of the configuration."""
        self._limits = limits
        self._tool = Tool(user=user, limits=limits, binary=binary)
        self._gate = asyncio.Semaphore(RUNS)

    async def measure(self, layers: Sequence[Layer], fds: Sequence[int], *, cluster: int = CLUSTER) -> Measured:
        """What these layers hold, without what lies below them; `fds` are their descriptors, top first."""
        words = ["measure", "-U", "-O", "qcow2", "-o", f"cluster_size={cluster}", "--output=json"]
        path = layers[0].path
        try:
            async with asyncio.timeout(self._limits.timeout), self._gate:
                with grasped(*fds) as handles:
                    finished = await self._tool.read([*words, described(layers, handles)], handles)
        except TimeoutError:
            message = f"{path} was not measured within images.measure_timeout ({self._limits.timeout:g} s)"
            raise JobError("timeout", message, remedy="raise images.measure_timeout", value=path) from None
        if finished.status:
            raise _failed([layer.path for layer in layers], finished)
        return _measured(finished.stdout, -(-layers[0].virtual_size // cluster) * cluster)


def _measured(stdout: bytes, size: int) -> Measured:
    """`size` is the disk's, in whole clusters: what the data of an image takes that is allocated whole."""
    found = json.loads(stdout)
    metadata = int(found["fully-allocated"]) - size
    return Measured(int(found["required"]) - metadata, metadata)


def _failed(paths: Sequence[str], finished: Finished) -> JobError:
    path = paths[0]
    if finished.status < 0:
        why = f"was ended by {signal.Signals(-finished.status).name}: it needs more than its limits, or it crashed"
        remedy = "raise images.tool_cpu or images.tool_memory"
        return JobError("limit", f"the measure of {path} {why}", remedy=remedy, value=path)
    last = finished.said.splitlines()[-1][-500:] if finished.said else "qemu-img gave no reason"
    code, remedy = reason(finished, *paths) or ("image_invalid", "see `hostagent image check`")
    return JobError(code, f"{path} cannot be measured: {last}", remedy=remedy, value=path)
