"""Files of a chain that are not what they were when it was opened: cut, grown, deleted, replaced.

QEMU notices none of it. What lies beyond a file's end reads as zeros, so a job that reads a base which was cut copies
zeros over the loss, and ends well. Only the length tells: it is compared by descriptor with what it was at the start.
That of a block device, too, which can be made smaller under a job.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from jobs.model import FileId, Layer


@dataclass(frozen=True, slots=True)
class Drift:
    """`lost`: bytes are missing that the chain had. Otherwise what is open is still right; `astray` says that the path
    does not lead there any more."""

    path: str
    what: str
    lost: bool = False
    astray: bool = False

    @property
    def remedy(self) -> str:
        if self.lost:
            return f"restore {self.path} from a copy, and what was written meanwhile: zeros may be in it"
        return "see who did it; what is open is still the file that it was"

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


def find_drift(
    layers: Sequence[Layer], descriptor: Callable[[FileId], int | None], *, written: Collection[FileId]
) -> list[Drift]:
    """How the layers differ from what is known of them. `written` are those that grow by right. Blocks."""
    found = []
    for layer in layers:
        fd = descriptor(layer.file)
        named = _named(layer.path)
        here = named is not None and FileId(named.st_dev, named.st_ino) == layer.file
        length = _length(layer, fd, named if here else None)
        if length is not None and length < layer.length:
            cut = f"was cut from {layer.length} to {length} bytes: what lay beyond is lost, and reads as zeros"
            found.append(Drift(layer.path, cut, lost=True))
        elif length is not None and layer.length and length > layer.length and layer.file not in written:
            found.append(Drift(layer.path, f"grew from {layer.length} to {length} bytes, and is not written by us"))
        if named is None:
            found.append(Drift(layer.path, "was deleted or renamed while it was in use", astray=True))
        elif not here:
            found.append(Drift(layer.path, "was replaced by another file while it was in use", astray=True))
    return found


def _length(layer: Layer, fd: int | None, named: os.stat_result | None) -> int | None:
    """None where it cannot be known: of a device only an open one says it. A descriptor may have been closed meanwhile,
    and its number be another file's."""
    if fd is not None:
        found = os.fstat(fd)
        if FileId(found.st_dev, found.st_ino) == layer.file:
            return os.lseek(fd, 0, os.SEEK_END) if layer.device else found.st_size
    return None if named is None or layer.device else named.st_size


def _named(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
