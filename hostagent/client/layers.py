"""The files of a local image, opened without trusting it.

An image's header is written by whoever made it, and names files of ours. So a backing file counts only where it lies in
its overlay's own folder or in a pool, is opened once, without following a final link, and from then on is that
descriptor. Its format is what the overlay's header says, never a guess. The top's is what the caller says, or the
header's magic; but a guest can write such a header into a raw disk, and name in it whatever it would like to read: one
with a backing file is taken for qcow2 only where the caller, or the file's own name, says so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hostagent import blocks
from hostagent.errors import AgentError
from hostagent.inodes import GRASP, has_no_storage, kind_name
from hostagent.qcow2 import Qcow2Header, is_plain, read_header, shown

FORMATS = ("raw", "qcow2")


@dataclass(frozen=True, slots=True)
class Layer:
    """`size` in bytes, as a guest sees it; `path` is where the descriptor truly leads."""

    path: str
    fd: int
    format: str
    size: int
    device: bool
    header: Qcow2Header | None

    @property
    def identity(self) -> tuple[int, ...]:
        """What changes when the file is another one, or is written."""
        found = os.fstat(self.fd)
        return found.st_dev, found.st_ino, self.size if self.device else found.st_size, found.st_mtime_ns


class Layers:
    """A chain from the top down, open for reading."""

    def __init__(self, layers: list[Layer]) -> None:
        self.all = layers
        self._identity = self.identity

    @property
    def top(self) -> Layer:
        return self.all[0]

    @property
    def identity(self) -> list[list[int]]:
        return [list(layer.identity) for layer in self.all]

    def refuse_change(self) -> None:
        """AgentError image_changed when a file is not what it was when it was opened."""
        for layer, before in zip(self.all, self._identity, strict=True):
            if list(layer.identity) != before:
                message = f"{layer.path} was written meanwhile: what was copied is neither the old nor the new image"
                raise AgentError("image_changed", message, remedy="stop whoever writes it, then run the same again")

    def close(self) -> None:
        for layer in self.all:
            os.close(layer.fd)
        self.all = []

    def __enter__(self) -> Layers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def format_of(path: str, fd: int, said: str | None) -> str:
    """`said`, or by the magic."""
    if said is not None:
        return said
    header = read_header(fd)
    if header is None:
        return "raw"
    if header.backing is not None and not path.endswith(".qcow2"):
        raise AgentError(
            "invalid",
            f"{path} begins like a qcow2 image with the backing file {shown(header.backing)}, which a guest can write "
            "into a raw disk, too",
            field="format",
            remedy="say --format qcow2 if it is one, or --format raw",
        )
    return "qcow2"


def open_layers(path: str, format: str | None, pools: Collection[str], most: int) -> Layers:
    """The image and all that it stands on."""
    layers: list[Layer] = []
    try:
        layers.append(_top(path, format))
        while (below := _below(layers[-1], pools)) is not None:
            layers.append(below)
            if any(os.path.samestat(os.fstat(one.fd), os.fstat(below.fd)) for one in layers[:-1]):
                raise AgentError("chain_loop", f"the chain of {path} leads back to {below.path}")
            if len(layers) > most:
                raise AgentError("chain_too_deep", f"the chain of {path} has more than {most} layers")
    except BaseException:
        for layer in layers:
            os.close(layer.fd)
        raise
    return Layers(layers)


def _top(path: str, format: str | None) -> Layer:
    fd, true_path = _opened(os.path.realpath(path), f"{path}")
    try:
        return _layer(fd, true_path, format_of(path, fd, format))
    except BaseException:
        os.close(fd)
        raise


def _below(layer: Layer, pools: Collection[str]) -> Layer | None:
    header = layer.header
    if header is None or header.backing is None:
        return None
    if header.backing_format not in FORMATS:
        said = "does not say which format" if header.backing_format is None else "says an unknown format for"
        remedy = "write the true one into it: qemu-img rebase -u -f qcow2 -F FORMAT -b BACKING IMAGE"
        raise AgentError("image_invalid", f"{layer.path} {said} its backing file has", remedy=remedy)
    name = str(Path(layer.path).parent / header.backing)
    fd, path = _opened(name, f"{shown(name)}, the backing file of {layer.path},")
    try:
        folder = Path(path).parent
        if folder != Path(layer.path).parent and not any(folder.is_relative_to(Path(p).resolve()) for p in pools):
            message = f"{path}, the backing file of {layer.path}, lies neither in that image's folder nor in a pool"
            raise AgentError("outside_pools", message, remedy="move it, or say its folder with --pool")
        return _layer(fd, path, header.backing_format)
    except BaseException:
        os.close(fd)
        raise


def _layer(fd: int, path: str, format: str) -> Layer:
    header = read_header(fd) if format == "qcow2" else None
    if format == "qcow2" and header is None:
        raise AgentError("image_invalid", f"{path} is not a qcow2 image", field="format", remedy="say --format raw")
    if header is not None and (header.encrypted or header.has_data_file or header.corrupt):
        marked = "is marked corrupt" if header.corrupt else "has a data file apart"
        what = "is encrypted" if header.encrypted else marked
        raise AgentError("not_supported", f"{path} {what}", remedy="convert it with qemu-img convert")
    device = stat.S_ISBLK(os.fstat(fd).st_mode)
    size = blocks.size_of(fd) if header is None else header.virtual_size
    return Layer(path, fd, format, size, device, header)


def _opened(path: str, what: str) -> tuple[int, str]:
    """A descriptor for reading, and where it truly leads."""
    try:
        handle = os.open(path, GRASP)
        try:
            return _judged(handle, what)
        finally:
            os.close(handle)
    except FileNotFoundError as error:
        raise AgentError("not_found", f"{what} does not exist") from error
    except PermissionError as error:
        raise AgentError("denied", f"{what} may not be read by this user") from error
    except OSError as error:
        raise AgentError("io_error", f"{what} cannot be opened: {error.strerror}") from error


def _judged(handle: int, what: str) -> tuple[int, str]:
    mode = os.fstat(handle).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) or (stat.S_ISREG(mode) and has_no_storage(handle)):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else kind_name(mode)
        raise AgentError("image_invalid", f"{what} is {kind}, not an image")
    path = str(Path(f"/proc/self/fd/{handle}").readlink())
    if not is_plain(path):
        raise AgentError("image_invalid", f"{what} lies at {shown(path)}, which is no usable path")
    return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY), path
