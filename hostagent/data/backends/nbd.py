"""Images behind NBD: the exports of storage daemons, of qemu-nbd, of running guests (a backup's), or of any server.

Each backend has a connection of its own, made on first use, and again when it broke; but what was written and not
flushed when it broke may be lost with the server, and then nothing pretends that a later flush made it durable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

from hostagent.data.backends.base import BackendSession, DirtyExtent, Extent, ImageBackend, beyond
from hostagent.data.backends.nbd_url import server_of
from hostagent.data.backends.registry import Factory, Opening
from hostagent.data.streams import Sink, Source, Stopped
from hostagent.errors import AgentError
from hostagent.extents import merged
from hostagent.nbdclient.connection import DIRTY, ZERO
from hostagent.nbdclient.dial import Fence, Fenced, Server, Waits
from hostagent.nbdclient.stream import Facts, Stream


@dataclass(frozen=True, slots=True)
class NbdSettings:
    """Seconds to be connected, seconds without any progress of an answer, and seconds of a flush; connections that are
    offered to one ticket's clients where the server can have several."""

    connect_timeout: float = 10.0
    timeout: float = 30.0
    connections: int = 8
    flush_timeout: float = 600.0

    SETTINGS: ClassVar = ("data.nbd_connect_timeout", "data.nbd_timeout", "data.nbd_flush_timeout")

    @property
    def waits(self) -> Waits:
        connect, answer, flush = self.SETTINGS
        return Waits(self.connect_timeout, self.timeout, connect, answer, self.flush_timeout, flush)


def nbd_factory(settings: NbdSettings) -> Factory:
    """For the schemes of nbd_url.SCHEMES."""

    def open_backend(opening: Opening) -> ImageBackend:
        server = server_of(opening.url)
        return NbdBackend(server, settings, writable=opening.writable, sparse=opening.sparse, bitmap=opening.bitmap)

    return open_backend


class NbdBackend(ImageBackend):
    """One export, over one connection. `bitmap` is the one that is meant; else it is the only one that there is."""

    kind = "nbd"

    def __init__(
        self,
        server: Server,
        settings: NbdSettings,
        *,
        writable: bool = False,
        sparse: bool = False,
        bitmap: str | None = None,
    ) -> None:
        self._server = server
        self._settings = settings
        self._writable = writable
        self._sparse = sparse
        self._fence = Fence()
        self._stream: Stream | None = None
        self._meant = bitmap
        self._bitmap: str | None = None
        self._unflushed = False
        self._lost = False
        self._flushing = False

    # What it is

    @property
    def supports_extents(self) -> bool:
        return True

    @property
    def supports_range_write(self) -> bool:
        return True

    @property
    def block_size(self) -> int:
        return self._facts().minimum

    @property
    def max_readers(self) -> int:
        """More than one only where the server says that they see the same bytes, and so expects them."""
        return self._settings.connections if self._facts().multi_conn else 1

    @property
    def max_writers(self) -> int:
        """More than one only where a flush of any connection covers what all have written."""
        return self._settings.connections if self._facts().multi_conn else 1

    @property
    def flush_covers_all(self) -> bool:
        """Of a server on another host an idle connection does not tell that it lost its power and is back."""
        return self._facts().multi_conn and bool(self._server.socket)

    def size(self) -> int:
        return self._facts().size

    def get_capabilities(self) -> dict[str, bool]:
        facts = self._facts()
        read_only = facts.read_only or not self._writable
        return {"read_only": read_only, "can_flush": facts.can_flush, "can_zero": not read_only}

    # Bytes

    def read(self, offset: int, length: int) -> bytes:
        with self.open_session() as session:
            return session.read(offset, length)

    def move(self, deliver: Callable[[memoryview], object], offset: int, length: int) -> None:
        """Give these bytes to `deliver`, in order, in pieces that are its own until it returns."""
        with self._using(offset, length) as stream:
            stream.read(offset, length, deliver)

    def write(self, data: bytes, offset: int) -> None:
        left = memoryview(data)

        def fill(buffer: memoryview) -> int:
            nonlocal left
            number = min(len(buffer), len(left))
            buffer[:number], left = left[:number], left[number:]
            return number

        with self._writing(offset, len(data)) as stream:
            stream.write(fill, offset, len(data))

    def write_from(self, source: Source, offset: int, length: int | None) -> int:
        with self._writing(offset, length or 0) as stream:
            return stream.write(source.read_into, offset, length)

    def write_full(self, stream: BinaryIO, content_length: int, flush: bool) -> int:
        with self._writing(0, content_length) as nbd:
            written = nbd.write(_filling(stream), 0, content_length)
        if written < content_length:
            raise AgentError("invalid", f"the image ends at byte {written}, before byte {content_length}")
        if flush:
            self.flush()
        return written

    def zero(self, offset: int, length: int) -> None:
        with self._writing(offset, length) as stream:
            if stream.facts.can_zero:
                stream.zero(offset, length, sparse=self._sparse)
            else:
                stream.write(_zeroing, offset, length)

    def flush(self) -> None:
        with self._using() as stream:
            self._refuse_lost()
            if stream.facts.can_flush:
                self._lost, self._flushing = self._unflushed, True  # a second flush would prove nothing
                try:
                    stream.flush()
                    self._lost = self._unflushed = False
                finally:
                    self._flushing = False
            elif self._unflushed:
                message = f"{self._server} cannot flush: nothing tells when what was written is on stable storage"
                raise AgentError("not_supported", message, remedy="write without flush, or to a server that can")

    # Extents

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        found = self._status(start, length, None)
        return (Extent(at, size, bool(state & ZERO), depth == 0) for at, size, state, depth, _ in found)

    def dirty_extents(self, start: int, length: int) -> Iterator[DirtyExtent]:
        context = self.dirty_context
        if context is not None:
            return self._dirty(context, start, length)
        message = f"{self._server} has no dirty bitmap, or more than one"
        raise AgentError("not_found", message, remedy="export the image with the bitmap of the last backup")

    @property
    def dirty_context(self) -> str | None:
        return self._meant or self._facts().bitmap

    def get_allocation_extents(self) -> list[dict[str, Any]]:
        return [one._asdict() for one in merged(self.extents(0, self.size()))]

    def get_dirty_extents(self, dirty_bitmap_context: str) -> list[dict[str, Any]]:
        return [one._asdict() for one in merged(self._dirty(dirty_bitmap_context, 0, self.size()))]

    # Lifetime

    def open_session(self) -> BackendSession:
        return NbdSession(self)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def intact(self) -> bool:
        return (self._flushing or not self._lost) and self._fence.connected()

    def fence(self) -> None:
        self._fence.close()

    # Parts

    def _facts(self) -> Facts:
        with self._using() as stream:
            return stream.facts

    @contextmanager
    def _using(self, offset: int = 0, length: int = 0, bitmap: str | None = None) -> Iterator[Stream]:
        """The stream, for bytes that the image has."""
        try:
            stream = self._connected(bitmap)
            if offset < 0 or length < 0 or offset + length > stream.facts.size:
                raise beyond(stream.facts.size)
            yield stream
        except Fenced as error:
            raise Stopped from error
        finally:
            if self._stream is not None and self._stream.broken:
                self._drop()

    @contextmanager
    def _writing(self, offset: int, length: int) -> Iterator[Stream]:
        with self._using(offset, length) as stream:
            if stream.facts.read_only or not self._writable:
                what = f"{self._server} is read-only" if stream.facts.read_only else "it was opened for reading"
                raise AgentError("denied", what, remedy="export it writable")
            self._refuse_lost()
            self._unflushed = True
            yield stream

    def _refuse_lost(self) -> None:
        if self._lost:
            message = f"{self._server} was closed with writes that were not flushed, which may be lost"
            raise AgentError("io_error", message, remedy="write them again, over a new connection")

    def _connected(self, bitmap: str | None) -> Stream:
        if self._fence.closed:
            raise Fenced
        if self._stream is not None and not self._stream.alive():
            self._drop()  # its server went while nobody asked it for anything
        if self._stream is not None and bitmap is not None and bitmap not in self._stream.contexts:
            if self._unflushed:
                self.flush()  # another connection's flush need not cover what this one wrote
            self.close()
            self._bitmap = bitmap
        if self._stream is None:
            self._stream = Stream(self._server, self._settings.waits, self._fence, self._bitmap)
        return self._stream

    def _drop(self) -> None:
        """What was not flushed may be lost with the connection."""
        self._stream, self._lost = None, self._lost or self._unflushed

    def _dirty(self, context: str, start: int, length: int) -> Iterator[DirtyExtent]:
        found = self._status(start, length, context)
        return (DirtyExtent(at, size, bool(dirty & DIRTY), bool(state & ZERO)) for at, size, state, _, dirty in found)

    def _status(self, start: int, length: int, bitmap: str | None) -> Iterator[tuple[int, int, int, int, int]]:
        """(start, length, allocation, depth, dirty); what is wrong with the question is said at once."""
        with self._using(start, length, bitmap) as stream:
            if bitmap is not None and bitmap not in stream.contexts:
                raise AgentError("not_found", f"{self._server} has no dirty bitmap {bitmap!r}")
        return self._told(start, length, bitmap)

    def _told(self, start: int, length: int, bitmap: str | None) -> Iterator[tuple[int, int, int, int, int]]:
        with self._using(start, length, bitmap) as stream:
            for size, state, depth, dirty in stream.status(start, length):
                yield start, size, state, depth, dirty
                start += size


def _filling(stream: BinaryIO) -> Callable[[memoryview], int]:
    """As Source.read_into, of a file that may give fewer bytes than it is asked for."""

    def fill(buffer: memoryview) -> int:
        done = 0
        while done < len(buffer) and (data := stream.read(len(buffer) - done)):
            buffer[done : done + len(data)] = data
            done += len(data)
        return done

    return fill


def _zeroing(buffer: memoryview) -> int:
    buffer[:] = bytes(len(buffer))
    return len(buffer)


class NbdSession(BackendSession):
    """The backend's own connection, which serves one operation after the other."""

    def __init__(self, backend: NbdBackend) -> None:
        self._backend = backend

    def size(self) -> int:
        return self._backend.size()

    def read(self, offset: int, length: int) -> bytes:
        found = bytearray()
        self._backend.move(found.extend, offset, length)
        return bytes(found)

    def copy_to(self, sink: Sink, offset: int, length: int) -> None:
        self._backend.move(sink.write, offset, length)

    def close(self) -> None:
        """The connection is the backend's."""
