"""An empty qcow2 image on a block device, for a guest's disk to be copied into: libvirt makes images in files only.

qemu-img makes it, as the hypervisor user, for whom a row of the ledger opens the device meanwhile; what it has made is
read back. Whoever calls has the device for himself.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from dataclasses import dataclass

from hostagent.images.header import is_empty, read_header
from hostagent.images.tool import Finished, Tool, grasped, reason
from hostagent.nbd.offline_bitmaps import KIND, Access
from jobs.errors import JobError
from jobs.model import Holder, Layer, Need


@dataclass(frozen=True, slots=True)
class Backing:
    """As the header is to name it; it is not opened."""

    name: str
    format: str


class Blank:
    """`timeout` in seconds. A qemu-img that takes longer is killed: nothing on the device is worth anything yet."""

    def __init__(self, tool: Tool, access: Access, timeout: float) -> None:
        self._tool = tool
        self._access = access
        self._timeout = timeout

    async def make(self, device: Layer, fd: int, backing: Backing | None) -> None:
        """`fd` is the device's, which is written over; `device.virtual_size` the image's."""
        holder = Holder(KIND, str(uuid.uuid4()))
        await self._access.acquire(holder, [Need(device, "rw", "qemu-img create, for a copy")])
        try:
            async with asyncio.timeout(self._timeout):
                finished = await self._create(device, fd, backing)
                if finished.status == 0 and await asyncio.to_thread(_is_there, device, fd, backing):
                    return
        except TimeoutError:
            message = f"no image was made on {device.path} within {self._timeout:g} s (libvirt.file_timeout)"
            raise JobError("timeout", message, field="dest", remedy="see whether its storage hangs") from None
        finally:
            await self._access.release(holder, trigger="create")
        raise _failed(device, finished)

    async def _create(self, device: Layer, fd: int, backing: Backing | None) -> Finished:
        below = [] if backing is None else ["-u", "-b", backing.name, "-F", backing.format]
        with grasped(fd) as handles:
            words = ["create", "-q", "-f", "qcow2", *below, f"/proc/self/fd/{handles[0]}", str(device.virtual_size)]
            return await self._tool.read(words, handles)


def _is_there(device: Layer, fd: int, backing: Backing | None) -> bool:
    os.fdatasync(fd)
    header = read_header(fd)
    if header is None or header.virtual_size != device.virtual_size:
        return False
    return header.backing == (None if backing is None else backing.name) and is_empty(fd)


def _failed(device: Layer, finished: Finished) -> JobError:
    last = finished.said.splitlines()[-1][-500:] if finished.said else f"qemu-img gave no reason ({finished.status})"
    code, remedy = reason(finished, device.path, access="rw") or ("io_error", "see the storage below it (dmesg)")
    message = f"no image could be made on {device.path}: {last}"
    return JobError(code, message, field="dest", value=device.path, remedy=remedy)
