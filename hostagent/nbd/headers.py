"""What the headers of images say that are on stable storage: the proof of a job that rewrites one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hostagent.images.header import read_backing
from hostagent.looks import Looks
from hostagent.nbd.prepared import PreparedChain
from jobs.errors import JobError
from jobs.model import FileId, Layer


class Headers:
    """`timeout` in seconds."""

    def __init__(self, timeout: float) -> None:
        self._looks = Looks(timeout)

    async def backing(self, layer: Layer, chain: PreparedChain | None = None) -> tuple[str | None, str | None]:
        """The backing file that the layer's header names, and where that leads to. `chain` has the file open, perhaps.

        JobError image_changed where it is another file, OSError; TimeoutError also while an earlier look hangs.
        """
        fd = chain.descriptor(layer.file) if chain else None
        own = [] if fd is None else [os.dup(fd)]  # the chain's is closed when its storage daemon dies
        try:
            return await self._looks.look(layer.file, lambda: _backing(layer, own), place=layer.file.dev)
        finally:
            with contextlib.suppress(IndexError):  # the look was not begun
                os.close(own.pop())


def _backing(layer: Layer, handles: list[int]) -> tuple[str | None, str | None]:
    """The handle that is taken from `handles` is closed here."""
    try:
        handle = handles.pop()
    except IndexError:
        handle = os.open(layer.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if FileId(found.st_dev, found.st_ino) != layer.file:
            raise JobError("image_changed", f"{layer.path!r} is another file now", remedy="see who replaced it")
        own = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(handle)
    try:
        os.fdatasync(own)
        name = read_backing(own)
    finally:
        os.close(own)
    return name, None if name is None else os.path.realpath(Path(layer.path).parent / name)
