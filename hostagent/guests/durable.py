"""Whether what was pulled has reached the image's file.

At the end of a stream QEMU rewrites the header before it writes the tables that it relies on, and no call of libvirt's
makes it write them: the guest's next flush does, or QEMU's orderly end. A QEMU that is killed before that loses what
was pulled, and the image is clean and names no base (docs/qemu.md). So a pull is done when the tables on the file have
all that the dropped layers hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Sequence

from hostagent.images.covered import missing
from hostagent.images.tool import Tool
from hostagent.nbd.offline_bitmaps import KIND, Access
from jobs.errors import JobError
from jobs.model import FileId, Holder, Job, Layer, Need


class Durable:
    """`file_timeout`: seconds for opening the files."""

    def __init__(self, tool: Tool, access: Access, file_timeout: float) -> None:
        self._tool = tool
        self._access = access
        self._file_timeout = file_timeout

    async def missing(self, job: Job, *, running: bool) -> int:
        """Bytes that are lost if QEMU is killed now, or were when it was. While the guest runs, QEMU's user has the
        files anyway; later it gets them for the moment."""
        return await self.missing_from([job.before.top, *job.dropped], running=running) if job.dropped else 0

    async def missing_from(self, layers: Sequence[Layer], *, running: bool) -> int:
        """Bytes that the first of these does not have on its file, and the others have."""
        async with self._handles(layers) as handles:
            if running:
                return await missing(self._tool, layers[0], layers[1:], handles)
            async with self._readable(layers):
                return await missing(self._tool, layers[0], layers[1:], handles)

    @contextlib.asynccontextmanager
    async def _handles(self, layers: Sequence[Layer]) -> AsyncIterator[list[int]]:
        found: list[int] = []
        try:
            for layer in layers:
                found.append(await asyncio.wait_for(asyncio.to_thread(grasp, layer), self._file_timeout))
            yield found
        except (OSError, TimeoutError) as error:
            raise JobError("io_error", f"the files of {layers[0].path} cannot be opened: {error}") from error
        finally:
            for handle in found:
                os.close(handle)

    @contextlib.asynccontextmanager
    async def _readable(self, layers: Sequence[Layer]) -> AsyncIterator[None]:
        holder = Holder(KIND, str(uuid.uuid4()))
        await self._access.acquire(holder, [Need(layer, "r", "qemu-img map, for a pull's end") for layer in layers])
        try:
            yield
        finally:
            await self._access.release(holder, trigger="map")


def grasp(layer: Layer) -> int:
    """A descriptor of the layer's very file, which opens nothing. Blocking."""
    handle = os.open(layer.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(handle)
    if FileId(found.st_dev, found.st_ino) != layer.file:
        os.close(handle)
        raise JobError("image_changed", f"{layer.path!r} is another file now", remedy="see who replaced it")
    return handle
