"""What an image stands on now, by its headers, and what it stood on before, in the order in which that stood.

Of what a chain has lost the headers still say what it stood on itself. So it falls into strands, each of layers that
stand on each other; and where a strand stands on a layer that is still in the chain, the layers above that are those
which must hold what it held. Files that libvirt had opened for the guest are known by identity, and opened wherever
they lie; what only a header names is judged by its place, as any member of a chain. All of this blocks.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hostagent.guests.durable import grasp
from hostagent.images.header import Qcow2Header, read_header
from hostagent.images.member import ChainLimits, Wanted, open_member
from hostagent.records import AccessRow
from jobs.errors import JobError
from jobs.model import FileId, Layer

FORMATS = ("raw", "qcow2")


@dataclass(frozen=True, slots=True)
class Strand:
    """`layers`, top first, that a chain has lost. The first `above` layers of the chain must hold what they held; `on`
    is which of its layers the strand stands on, None for none of them. One that stood on the top (0) was above it."""

    layers: tuple[Layer, ...]
    above: int
    on: int | None


def layer_of(row: AccessRow) -> Layer:
    return Layer(row.path, row.format, row.file, 0, 0)


def chain_of(path: str, format: str | None, known: Sequence[Layer], limits: ChainLimits) -> tuple[Layer, ...]:
    """The image and what it stands on, top first. Without a format it must be qcow2. A JobError where its end cannot be
    seen: `not_found` for a file that is not there."""
    files = {layer.file: layer for layer in known}
    found: list[Layer] = []
    wanted: Wanted | None = Wanted(path, format)
    with _io_errors(path):
        while wanted is not None:
            layer, header = _member(wanted, files, limits)
            if any(layer.file == one.file for one in found) or len(found) >= limits.max_depth:
                message = f"the chain of {path} has no end, or more layers than images.max_depth"
                raise JobError("chain_too_deep", message, remedy="see `qemu-img info`")
            found.append(layer)
            wanted = _below(layer, header, files)
    return tuple(found)


def strands(chain: Sequence[Layer], lost: Sequence[Layer]) -> tuple[Strand, ...]:
    """A JobError when it cannot be said of one of `lost` what it stood on, or what it is: its format is not probed."""
    for layer in lost:
        if layer.format not in FORMATS:
            message = f"{layer.path} has the format {layer.format or 'that nobody noted'}"
            raise JobError("not_supported", message, remedy="see what it holds yourself")
    with _io_errors(lost[0].path):
        layers = {layer.file: _read(layer)[0] for layer in lost}
        on = {file: _stands_on(layer) for file, layer in layers.items()}
    tops = [file for file in layers if file not in on.values()]
    found = [_strand([layers[file] for file in _down(top, on, layers)], on, chain) for top in tops]
    if len({layer.file for strand in found for layer in strand.layers}) < len(layers):  # a loop
        raise JobError("image_invalid", f"{lost[0].path} stands on itself", remedy="see `qemu-img info`")
    return tuple(found)


def is_deleted(layer: Layer) -> bool:
    """Whether the file, or its folder, too, is not there, on a file system that is: one that is away says nothing."""
    try:
        return not os.path.lexists(layer.path) and _nearest(layer.path).st_dev == layer.file.dev
    except OSError:
        return False


def _nearest(path: str) -> os.stat_result:
    """The folder of the path, or what is left above it."""
    for folder in Path(path).parents:
        with contextlib.suppress(FileNotFoundError):
            return folder.stat()
    raise FileNotFoundError(path)


UNKNOWN = FileId(-1, 0)
"""What a header names that is not there."""


def _strand(layers: Sequence[Layer], on: dict[FileId, FileId | None], chain: Sequence[Layer]) -> Strand:
    last = on[layers[-1].file]
    place = next((number for number, layer in enumerate(chain) if layer.file == last), None)
    if last is None:  # all that the chain has, has come since, or was above
        return Strand(tuple(layers), len(chain), None)
    # Where what it stood on cannot be seen, the top must hold all.
    return Strand(tuple(layers), place or 1, place)


def _down(top: FileId, on: dict[FileId, FileId | None], layers: Collection[FileId]) -> list[FileId]:
    found, file = [top], on[top]
    while file is not None and file in layers:
        found.append(file)
        file = on[file]
    return found


def _stands_on(layer: Layer) -> FileId | None:
    """None for nothing."""
    _, header = _read(layer)
    if header is None or header.backing is None:
        return None
    try:
        found = os.stat(Path(layer.path).parent / header.backing)  # noqa: PTH116
    except OSError:
        return UNKNOWN
    return FileId(found.st_dev, found.st_ino)


def _member(wanted: Wanted, known: dict[FileId, Layer], limits: ChainLimits) -> tuple[Layer, Qcow2Header | None]:
    path = os.path.realpath(wanted.path)  # as libvirt, which follows links
    found = os.stat(path)  # noqa: PTH116
    file = FileId(found.st_dev, found.st_ino)
    layer = Layer(path, wanted.format or "", file, 0, 0)
    if file in known:
        return _read(layer)
    fd, path = open_member(wanted, limits)
    os.close(fd)
    return _read(replace(layer, path=path))


def _below(layer: Layer, header: Qcow2Header | None, known: dict[FileId, Layer]) -> Wanted | None:
    if header is None or header.backing is None:
        return None
    path, format = str(Path(layer.path).parent / header.backing), header.backing_format
    if format is None:
        format = next((one.format for one in known.values() if one.path == os.path.realpath(path)), None)
    if format not in FORMATS:
        message = f"{layer.path} does not say which format {header.backing} has, or says {format}"
        remedy = f"qemu-img rebase -u -F FORMAT -b {header.backing} {layer.path}"
        raise JobError("not_supported", message, remedy=remedy)
    return Wanted(path, format, layer)


@contextlib.contextmanager
def _io_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise JobError("not_found", f"{error.filename or path} is not there", remedy="see who removed it") from error
    except OSError as error:
        message = f"the files of {path} cannot be looked at: {error}"
        raise JobError("io_error", message, remedy="see their storage") from error


def _read(layer: Layer) -> tuple[Layer, Qcow2Header | None]:
    """The very file, and its header if it has one. Of any format but raw it must be qcow2."""
    handle = grasp(layer)
    try:
        fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(handle)
    try:
        found = os.fstat(fd)
        header = None if layer.format == "raw" else read_header(fd)
        length = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    if layer.format != "raw" and header is None:
        raise JobError("image_invalid", f"{layer.path} is no qcow2 image", remedy="see `qemu-img info`")
    if header is not None and header.has_data_file:
        raise JobError("not_supported", f"{layer.path} has its data in another file", remedy="convert it with qemu-img")
    size = length if header is None else header.virtual_size
    format = "raw" if header is None else "qcow2"
    device = stat.S_ISBLK(found.st_mode)
    return replace(layer, format=format, virtual_size=size, device=device, length=length), header
