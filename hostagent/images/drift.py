"""Files of a chain that are not what they were when it was opened: cut, written, grown, deleted, replaced.

QEMU notices none of it. What lies beyond a file's end reads as zeros, so a job that reads a base which was cut copies
zeros over the loss, and ends well; one whose base was cut and grown again, or written over, has copied some of the old
and some of the new. Length and time of writing tell, compared by descriptor with what they were at the start. ctime is
no help: it moves with every change of access rights, our own among them. Of a block device the length alone tells: it
can be made smaller under a job.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import NamedTuple

from jobs.model import Chain, FileId, Layer

Descriptor = Callable[[FileId], int | None]

_ANOTHER_FILE = "see who did it; what is open is still the file that it was"


@dataclass(frozen=True, slots=True)
class Drift:
    """`lost`: the bytes that the chain had are gone, or may be. Otherwise what is open is still right; `astray` says
    that the path does not lead there any more."""

    path: str
    what: str
    remedy: str
    lost: bool = False
    astray: bool = False

    def __str__(self) -> str:
        return f"{self.path} {self.what}"


class _Written(NamedTuple):
    """A file's length, and the time at which it was last written; 0 of a device, whose node's time says nothing."""

    length: int
    mtime_ns: int


def stamped(chain: Chain, descriptor: Descriptor) -> Chain:
    """The chain with the length that each of its files has now, and the time at which it was last written. Blocks."""
    return Chain(tuple(_stamped(layer, descriptor(layer.file)) for layer in chain.layers))


def find_drift(layers: Sequence[Layer], descriptor: Descriptor, *, written: Collection[FileId]) -> list[Drift]:
    """How the layers differ from what is known of them. `written` are those that our own daemons write. Blocks."""
    found = []
    for layer in layers:
        named = _named(layer.path)
        here = named is not None and FileId(named.st_dev, named.st_ino) == layer.file
        now = _written(layer, descriptor(layer.file), named if here else None)
        if now is not None and (changed := _changed(layer, now, ours=layer.file in written)):
            found.append(changed)
        if named is None:
            what = "was deleted or renamed while it was in use"
            found.append(Drift(layer.path, what, _ANOTHER_FILE, astray=True))
        elif not here:
            what = "was replaced by another file while it was in use"
            found.append(Drift(layer.path, what, _ANOTHER_FILE, astray=True))
    return found


def _changed(layer: Layer, now: _Written, *, ours: bool) -> Drift | None:
    path = layer.path
    if now.length < layer.length:
        what = f"was cut from {layer.length} to {now.length} bytes: what lay beyond is lost, and reads as zeros"
        remedy = f"restore {path} from a copy, and what was written meanwhile: zeros may be in it"
        return Drift(path, what, remedy, lost=True)
    if ours:
        return None
    if layer.mtime_ns and now.mtime_ns not in (0, layer.mtime_ns):
        what = f"was written by somebody else while it was in use, at {_time(now)}: it may not hold what it held"
        remedy = f"see who did it; if nothing but its time was set (touch), start again, else restore {path} first"
        return Drift(path, what, remedy, lost=True)
    if layer.length and now.length > layer.length:
        what = f"grew from {layer.length} to {now.length} bytes, and is not written by us"
        return Drift(path, what, "see who did it")
    return None


def _stamped(layer: Layer, fd: int | None) -> Layer:
    now = _written(layer, fd, None)
    return layer if now is None else replace(layer, length=now.length, mtime_ns=now.mtime_ns)


def _written(layer: Layer, fd: int | None, named: os.stat_result | None) -> _Written | None:
    """None where it cannot be known: of a device only an open one says it. A descriptor may have been closed meanwhile,
    and its number be another file's."""
    if fd is not None:
        found = os.fstat(fd)
        if FileId(found.st_dev, found.st_ino) == layer.file:
            named = found
            if layer.device:
                return _Written(os.lseek(fd, 0, os.SEEK_END), 0)
    return None if named is None or layer.device else _Written(named.st_size, named.st_mtime_ns)


def _named(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _time(now: _Written) -> str:
    return datetime.fromtimestamp(now.mtime_ns // 10**9, UTC).isoformat().replace("+00:00", "Z")
