"""A local image as a guest sees it: what it has where, and its bytes, for several workers at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from hostagent.client.extents import Extent
from hostagent.client.layers import Layers, open_layers
from hostagent.client.options import PIECE, Storage
from hostagent.client.rawimage import RawReader, held, raw_extents
from hostagent.client.storage import StorageDaemon
from hostagent.nbdclient.connection import ZERO
from hostagent.nbdclient.dial import Fence
from hostagent.nbdclient.stream import Stream


class Reader(Protocol):
    def read(self, begin: int, end: int, deliver: Callable[[memoryview], object]) -> None:
        """Give these bytes to `deliver`, in order; each view is its own until it returns."""

    def close(self) -> None: ...


class Image(Protocol):
    size: int

    def extents(self) -> Iterator[Extent]: ...

    def reader(self) -> Reader:
        """One worker's."""


class RawImage:
    def __init__(self, layers: Layers) -> None:
        self._layer = layers.top
        self.size = layers.top.size

    def extents(self) -> Iterator[Extent]:
        return raw_extents(self._layer)

    def reader(self) -> Reader:
        return RawReader(self._layer, PIECE)


class ServedImage:
    """One that a storage daemon serves."""

    def __init__(self, daemon: StorageDaemon, size: int) -> None:
        self._daemon = daemon
        self.size = size

    def extents(self) -> Iterator[Extent]:
        stream = self.stream()
        try:
            position = 0
            for length, state, _, _ in stream.status(0, self.size):
                yield Extent(position, length, bool(state & ZERO))
                position += length
        finally:
            stream.close()

    def stream(self) -> Stream:
        return Stream(self._daemon.server, self._daemon.waits, Fence())

    def reader(self) -> Reader:
        return _StreamReader(self.stream)


class _StreamReader:
    def __init__(self, connect: Callable[[], Stream]) -> None:
        self._connect = connect
        self._stream = connect()

    def read(self, begin: int, end: int, deliver: Callable[[memoryview], object]) -> None:
        if self._stream.broken:  # whom it delivered to broke off
            self._stream = self._connect()
        self._stream.read(begin, end - begin, deliver)

    def close(self) -> None:
        self._stream.close()


@contextlib.contextmanager
def open_image(path: str, format: str | None, storage: Storage) -> Iterator[tuple[Image, Layers]]:
    """The image at `path` with all that it stands on, which nobody may write meanwhile."""
    with contextlib.ExitStack() as stack:
        layers = stack.enter_context(open_layers(path, format, storage.pools, storage.layers_most))
        if layers.top.format == "raw":
            stack.enter_context(held(layers.top))
            yield RawImage(layers), layers
            return
        daemon = stack.enter_context(StorageDaemon(storage, [layer.fd for layer in layers.all]))
        daemon.open(layers)
        yield ServedImage(daemon, layers.top.size), layers
