"""What the data daemon asks of a place where images are.

ImageBackend and BackendSession are those of CloudStack's image server (its backends/base.py, Apache-2.0): the same
names, methods and meanings, so that a backend written for one works in the other. What streams is added with a default
in terms of the rest; a backend that can do it better overrides it.

A backend object belongs to one connection and one thread at a time, and opens what it needs on first use; only `fence`
comes from another thread. Offsets and lengths are bytes of the virtual disk, checked against the size before.
Errors are AgentError with a code of hostagent.errors (no_space, io_error, unavailable, timeout, not_supported, denied,
not_found, image_changed).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from hostagent.data.streams import PIECE, Sink, Source
from hostagent.errors import AgentError
from hostagent.extents import clipped


class Extent(NamedTuple):
    """`zero`: reads as zeros. `hole`: no layer of the image has it allocated, where the backend sees layers."""

    start: int
    length: int
    zero: bool
    hole: bool = False


class DirtyExtent(NamedTuple):
    """`dirty`: written since the bitmap was made."""

    start: int
    length: int
    dirty: bool
    zero: bool


class BackendSession(ABC):
    """An open connection or file for the time of one operation, such as a whole download."""

    @abstractmethod
    def size(self) -> int:
        """Bytes of the image."""

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; a file may give fewer at its end."""

    @abstractmethod
    def close(self) -> None:
        """Give up the connection or file."""

    def copy_to(self, sink: Sink, offset: int, length: int) -> None:
        """Send `length` bytes from `offset` on."""
        end = offset + length
        while offset < end:
            data = self.read(offset, min(PIECE, end - offset))
            if not data:
                raise AgentError("image_changed", f"the image ends at byte {offset}, before byte {end}")
            sink.write(data)
            offset += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ImageBackend(ABC):
    """One image, wherever it is."""

    kind: str = "other"
    """For metrics."""

    @property
    @abstractmethod
    def supports_extents(self) -> bool:
        """Whether it can tell what is allocated, and what is dirty."""

    @property
    @abstractmethod
    def supports_range_write(self) -> bool:
        """Whether it can be written at any offset; otherwise only whole (`write_full`)."""

    @abstractmethod
    def size(self) -> int:
        """Bytes of the image."""

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""

    @abstractmethod
    def write(self, data: bytes, offset: int) -> None:
        """All of `data` at `offset`."""

    @abstractmethod
    def write_full(self, stream: BinaryIO, content_length: int, flush: bool) -> int:
        """The whole image from `stream`; the bytes written. Raises when the stream ends before."""

    @abstractmethod
    def flush(self) -> None:
        """What was written is on stable storage when this returns."""

    @abstractmethod
    def zero(self, offset: int, length: int) -> None:
        """Make these bytes zeros."""

    @abstractmethod
    def get_capabilities(self) -> dict[str, bool]:
        """`read_only`, `can_flush`, `can_zero`."""

    @abstractmethod
    def get_allocation_extents(self) -> list[dict[str, Any]]:
        """Of the whole image: `start`, `length`, `zero`, and `hole` where it is known."""

    @abstractmethod
    def get_dirty_extents(self, dirty_bitmap_context: str) -> list[dict[str, Any]]:
        """Of the whole image: `start`, `length`, `dirty`, `zero`. AgentError not_found without that bitmap."""

    @abstractmethod
    def open_session(self) -> BackendSession:
        """For one operation that reads."""

    @abstractmethod
    def close(self) -> None:
        """Give up what it holds."""

    # What the daemon adds, in terms of the above

    def capacity(self) -> int:
        """Bytes that it may be written to have: more than `size` for a file that may grow."""
        return self.size()

    @property
    def block_size(self) -> int:
        """Bytes; reads and writes that are no multiples of it may be slow."""
        return 1

    @property
    def max_readers(self) -> int:
        """Connections that may read at the same time."""
        return 8

    @property
    def max_writers(self) -> int:
        """Connections that may write at the same time."""
        return 8 if self.supports_range_write else 1

    @property
    def dirty_context(self) -> str | None:
        """The dirty bitmap that `context=dirty` means; None where there is none, or more than one."""
        return ""

    def write_from(self, source: Source, offset: int, length: int | None) -> int:
        """`length` bytes of the source, or all of it, at `offset`; the bytes written. Not flushed.

        AgentError `range` when a source of unknown length has more than the image."""
        end = self.capacity()
        buffer, written = bytearray(PIECE), 0
        while length is None or written < length:
            wanted = PIECE if length is None else min(PIECE, length - written)
            number = source.read_into(memoryview(buffer)[:wanted])
            if number == 0:
                break
            if offset + written + number > end:
                raise beyond(end)
            self.write(bytes(memoryview(buffer)[:number]), offset + written)
            written += number
        return written

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """In order, without gaps, of exactly these bytes; neighbours may be alike (see hostagent.extents)."""
        return clipped(
            (
                Extent(one["start"], one["length"], one["zero"], one.get("hole", False))
                for one in self.get_allocation_extents()
            ),
            start,
            start + length,
        )

    def dirty_extents(self, start: int, length: int) -> Iterator[DirtyExtent]:
        """As `extents`, of the bitmap `dirty_context`."""
        context = self.dirty_context
        if context is None:
            raise AgentError("not_found", "the image has no dirty bitmap, or more than one")
        found = self.get_dirty_extents(context)
        return clipped(
            (DirtyExtent(one["start"], one["length"], one["dirty"], one["zero"]) for one in found),
            start,
            start + length,
        )

    @property
    def flush_covers_all(self) -> bool:
        """Whether a flush covers what was written over other connections, too, as long as they are `intact`."""
        return self.max_writers > 1

    def intact(self) -> bool:
        """From another thread: whether what it has written is still with who took it (a server that is connected)."""
        return True

    def fence(self) -> None:  # noqa: B027 - what cannot be ended from outside is bounded by its pieces
        """From another thread: what is under way, and all that is asked from now on, fails soon. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def beyond(size: int) -> AgentError:
    return AgentError("range", f"the request goes beyond the end of the image, which has {size} bytes", size=size)
