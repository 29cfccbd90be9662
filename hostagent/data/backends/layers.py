"""The files of a read-only image's chain, open, under QEMU's marks, and proven to be what the image stands on.

Two ways to them. `{"path": …, "format": …}`: the top is opened below the folders that the daemon may serve, and what it
stands on by the headers, each of which may lie there only. `{"files": NAME, "formats": […]}`: the agent has handed them
over, the top first, with the map that it made (qemu-img's JSON) as one more.

Each is marked before its header is read, so that nobody changes it from then on. Whatever is not plain (encrypted, with
an external data file, with features that nobody tried, on a file system that other hosts share) is refused here, which
means that the image is served by NBD.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostagent.blocks import size_of
from hostagent.data.backends.holds import Held, Holds
from hostagent.data.backends.lists import READ
from hostagent.data.backends.mapping import LAYERS_MOST, Map, Unmappable, made
from hostagent.data.backends.places import check_usable, open_below
from hostagent.data.backends.qemu_map import MapLimits, entries, parsed
from hostagent.errors import AgentError
from hostagent.inodes import file_system_type, is_shared
from hostagent.qcow2 import Qcow2Header, read_header

FORMATS = ("raw", "qcow2")
_CLOCK = 5  # CLOCK_REALTIME_COARSE, from which files have their times
Handed = Callable[[str], list[int]]
Stamp = tuple[int, ...]
"""What a file's change would change."""


@dataclass(frozen=True, slots=True)
class Layer:
    held: Held
    format: str
    header: Qcow2Header | None
    stamp: Stamp
    path: str | None = None


class Layers:
    """The top first. Closing gives the marks back."""

    def __init__(self, layers: Sequence[Layer], close: Callable[[], None], ready: int | None = None) -> None:
        """`ready` is a descriptor of the map that came with them."""
        self.all = tuple(layers)
        self.fds = tuple(layer.held.fd for layer in layers)
        self.close = close
        self._ready = ready
        files = not any(layer.held.device for layer in layers)
        now = time.clock_gettime_ns(_CLOCK)  # a change within its tick could leave the times as they are
        settled = all(max(layer.stamp[-2:]) < now for layer in layers)
        self.written = tuple(layer.stamp[:4] for layer in layers if not layer.held.device)
        """What only a write to them changes."""
        self.stamp = tuple(layer.stamp for layer in layers) if files and settled else None
        """Equal to that of another time only if nothing was written meanwhile; None where that cannot be told."""

    def map(self, limits: MapLimits, check: Callable[[], None]) -> Map:
        sizes = [size_of(fd) for fd in self.fds]
        if self._ready is not None:
            self._refuse_late()
            return made(parsed(_blocks(self._ready)), sizes, most=limits.extents)
        with contextlib.closing(entries(self._described, self.fds, limits, check)) as found:  # type: ignore[type-var]
            return made(found, sizes, most=limits.extents)

    def refuse_changed(self) -> None:
        """AgentError image_changed when somebody wrote a file, who heeds no marks."""
        for layer in self.all:
            if not layer.held.device and _written(layer.held.fd) != layer.stamp[2:4]:
                raise AgentError(
                    "image_changed",
                    f"{layer.held.name} was written while the image was read",
                    value=layer.held.name,
                    remedy="find who writes it, then download the image again",
                )

    def _refuse_late(self) -> None:
        """A map that came with the layers must have been made after their last change."""
        assert self._ready is not None
        made_at = os.fstat(self._ready).st_mtime_ns
        if not all(layer.held.device or layer.stamp[3] < made_at for layer in self.all):
            raise Unmappable("it was written after its map was made")

    def _described(self, handles: Sequence[int]) -> str:
        """As QEMU's options: each by its descriptor and in its known format; the last stands on nothing."""
        below: dict[str, Any] | None = None
        for layer, handle in zip(reversed(self.all), reversed(handles), strict=True):
            driver = "host_device" if layer.held.device else "file"
            node = {"driver": driver, "filename": f"/proc/self/fd/{handle}"}
            image: dict[str, Any] = {"driver": layer.format, "read-only": True, "file": node}
            below = image if layer.format == "raw" else {**image, "backing": below}
        return "json:" + json.dumps(below)


def check_image(image: Mapping[str, object]) -> None:
    """AgentError invalid for an `image` that says neither."""
    path, files = image.get("path"), image.get("files")
    if isinstance(path, str) and path.startswith("/") and image.get("format") in FORMATS:
        return
    formats = image.get("formats")
    listed = isinstance(formats, list) and 0 < len(formats) <= LAYERS_MOST and all(one in FORMATS for one in formats)
    if isinstance(files, str) and files and listed:
        return
    remedy = '{"path": PATH, "format": "qcow2"} or {"files": NAME, "formats": ["qcow2", "raw"]}'
    raise AgentError("invalid", "the ticket's image cannot be understood", field="image", remedy=remedy)


def open_layers(image: Mapping[str, object], folders: Sequence[str], claim: Handed, holds: Holds) -> Layers:
    """Unmappable when they may not be read directly, or not now."""
    with contextlib.ExitStack() as stack:
        try:
            if "path" in image:
                found = list(_walk(str(image["path"]), str(image["format"]), folders, holds, stack))
                _refuse_moved(found)
                ready = None
            else:
                formats = image["formats"]
                assert isinstance(formats, list)
                found, ready = _handed(str(image["files"]), formats, claim, holds, stack)
        except AgentError as error:
            raise Unmappable(error.message, lasting=error.code not in ("busy", "limit", "io_error")) from error
        except OSError as error:
            raise Unmappable(str(error), lasting=False) from error
        return Layers(found, stack.pop_all().close, ready)


def _walk(path: str, format: str, folders: Sequence[str], holds: Holds, stack: contextlib.ExitStack) -> Iterator[Layer]:
    seen: set[Stamp] = set()
    for _ in range(LAYERS_MOST):
        fd, true = open_below(path, folders, writable=False)
        layer = _joined(fd, format, holds, stack, name=true, path=true)
        if layer.stamp[:2] in seen:
            raise Unmappable("its chain leads back to itself")
        seen.add(layer.stamp[:2])
        yield layer
        if layer.header is None or layer.header.backing is None:
            return
        path = str(Path(true).parent / layer.header.backing)
        format = layer.header.backing_format or ""
    raise Unmappable(f"its chain has more than {LAYERS_MOST} layers")


def _handed(
    name: str, formats: list[str], claim: Handed, holds: Holds, stack: contextlib.ExitStack
) -> tuple[list[Layer], int | None]:
    fds = claim(name)
    found: list[Layer] = []
    try:
        if len(fds) - len(formats) not in (0, 1):
            raise Unmappable(f"{len(fds)} files were handed over for {len(formats)} layers")
        ready = fds.pop() if len(fds) > len(formats) else None
        if ready is not None:
            stack.callback(os.close, ready)
        for number, format in enumerate(formats):
            fd = fds.pop(0)
            try:
                check_usable(fd, name)
            except BaseException:
                os.close(fd)
                raise
            layer = _joined(fd, format, holds, stack, name=f"layer {number} of {name}")
            stands = layer.header is not None and layer.header.backing is not None
            if stands != (number < len(formats) - 1):
                raise Unmappable("its headers tell of another chain than was handed over")
            found.append(layer)
        return found, ready
    finally:
        for fd in fds:
            os.close(fd)


def _joined(
    fd: int, format: str, holds: Holds, stack: contextlib.ExitStack, *, name: str, path: str | None = None
) -> Layer:
    """Takes `fd` over. Marked, then judged."""
    held = holds.join(fd, name, writable=False, ours=path is not None)
    stack.callback(holds.leave, held)
    held.mark()
    stack.callback(held.unmark)
    kind = file_system_type(held.fd)
    if is_shared(kind) and not held.device:
        raise Unmappable(f"{name} lies on {kind}, which other hosts may share")
    found = os.fstat(held.fd)
    stamp = (found.st_dev, found.st_ino, *_written(held.fd), found.st_ctime_ns)
    return Layer(held, format, _header(held.fd, format, name), stamp, path)


def _header(fd: int, format: str, name: str) -> Qcow2Header | None:
    if format == "raw":
        return None
    if format != "qcow2":
        raise Unmappable(f"the format of {name} is {format[:16] or 'not said'}")
    header = read_header(fd)
    if header is None:
        raise Unmappable(f"{name} is no qcow2 image")
    strange = {
        "encryption": header.encrypted,
        "an external data file": header.has_data_file or header.data_file is not None,
        "extended L2 entries": header.extended_l2,
        "a mark that it is corrupt": header.corrupt,
        "a mark that it was not closed": header.dirty,
    }
    if any(strange.values()):
        raise Unmappable(f"{name} has {', '.join(what for what, so in strange.items() if so)}")
    return header


def _refuse_moved(layers: Sequence[Layer]) -> None:
    """What the names lead to now must be what was opened."""
    for layer in layers:
        assert layer.path is not None
        found = Path(layer.path).lstat()
        if (found.st_dev, found.st_ino) != layer.stamp[:2]:
            raise Unmappable(f"{layer.path} was replaced", lasting=False)


def _written(fd: int) -> tuple[int, int]:
    """Size and time of the last write."""
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns


def _blocks(fd: int) -> Iterator[bytes]:
    offset = 0
    while block := os.pread(fd, READ, offset):
        offset += len(block)
        yield block
