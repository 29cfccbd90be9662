"""What a guest sees of a read-only image, by sendfile(2) from the files of its layers.

For images behind a read-only NBD export of which the ticket also says what they are made of. Reads go straight to the
files, under locks that keep them as they are; what has no place in a file (compressed clusters), and whatever may not
be read so, goes by the export, as everything else does.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from hostagent.data.backends.base import BackendSession, DirtyExtent, Extent, ImageBackend, beyond
from hostagent.data.backends.faults import fault
from hostagent.data.backends.file import read_only
from hostagent.data.backends.holds import Holds
from hostagent.data.backends.layers import check_image, open_layers
from hostagent.data.backends.mapping import Batch, Piece, Unmappable, Where, batched
from hostagent.data.backends.qemu_map import MapLimits
from hostagent.data.backends.registry import Claim, Factory, Opening
from hostagent.data.backends.shared_map import SharedMap, Use
from hostagent.data.streams import PIECE, Sink, Source, Stopped
from hostagent.extents import merged

log = logging.getLogger(__name__)

SMALL = 32 << 10
"""Bytes below which a piece is not worth a system call of its own to send it, nor a change between files and export."""
GATHERED = 256 << 10
"""Bytes of small pieces that are sent together."""
SHARED = "map"
"""Its name in Opening.shared."""


def mapped(
    nbd: Factory,
    folders: Sequence[str],
    claim: Claim,
    holds: Holds,
    limits: MapLimits,
    told: Callable[[str], None] = lambda why: None,
) -> Factory:
    """Wraps the factory of NBD exports. `folders` is data.allow_paths; `told` hears why an image is not mapped."""

    def open_(opening: Opening) -> ImageBackend:
        image = opening.image
        export = nbd(opening)
        if image is None or opening.writable:
            return export
        check_image(image)
        known = opening.shared.get(SHARED)
        if known is None:
            theirs = functools.partial(claim, opening.shared)
            made = SharedMap(lambda: open_layers(image, folders, theirs, holds), limits)
            known = opening.shared.setdefault(SHARED, made)
        return MappedBackend(export, known, told)

    return open_


class MappedBackend(ImageBackend):
    kind = "mapped"

    def __init__(self, export: ImageBackend, shared: SharedMap, told: Callable[[str], None]) -> None:
        self._export = export
        self._shared = shared
        self._told = told
        self._fenced = False

    @property
    def supports_extents(self) -> bool:
        return True

    @property
    def supports_range_write(self) -> bool:
        return False

    @property
    def block_size(self) -> int:
        return self._export.block_size

    @property
    def max_readers(self) -> int:
        return self._export.max_readers

    @property
    def dirty_context(self) -> str | None:
        return self._export.dirty_context

    def get_capabilities(self) -> dict[str, bool]:
        return {"read_only": True, "can_flush": False, "can_zero": False}

    def size(self) -> int:
        return self._export.size()

    def read(self, offset: int, length: int) -> bytes:
        with self.open_session() as session:
            return session.read(offset, length)

    def open_session(self) -> BackendSession:
        self.check()
        stack = contextlib.ExitStack()
        try:
            use = stack.enter_context(self._shared.use(self.size, self.check))
        except Unmappable as error:
            self._fall_back(error)
            return self._export.open_session()
        return _Session(self, use, stack)

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        self.check()
        try:
            with self._shared.use(self.size, self.check) as use:
                for one in use.map.extents(start, length):
                    self.check()
                    yield one
                return
        except Unmappable as error:
            self._fall_back(error)
        yield from self._export.extents(start, length)

    def get_allocation_extents(self) -> list[dict[str, Any]]:
        return [one._asdict() for one in merged(self.extents(0, self.size()))]

    def dirty_extents(self, start: int, length: int) -> Iterator[DirtyExtent]:
        return self._export.dirty_extents(start, length)

    def get_dirty_extents(self, dirty_bitmap_context: str) -> list[dict[str, Any]]:
        return self._export.get_dirty_extents(dirty_bitmap_context)

    def write(self, data: bytes, offset: int) -> None:
        raise read_only()

    def write_from(self, source: Source, offset: int, length: int | None) -> int:
        raise read_only()

    def write_full(self, stream: BinaryIO, content_length: int, flush: bool) -> int:
        raise read_only()

    def zero(self, offset: int, length: int) -> None:
        raise read_only()

    def flush(self) -> None:
        raise read_only()

    def close(self) -> None:
        self._export.close()

    def fence(self) -> None:
        self._fenced = True
        self._export.fence()

    def check(self) -> None:
        if self._fenced:
            raise Stopped

    def export_session(self) -> BackendSession:
        return self._export.open_session()

    def _fall_back(self, error: Unmappable) -> None:
        self.kind = self._export.kind
        self._told(str(error))
        if self._shared.refused(str(error)):
            log.info("an image goes by its export", extra={"fields": {"why": str(error)}})


class _Session(BackendSession):
    """Holds the layers' marks for as long as it may. Then, and for what is in no file, there is the export."""

    def __init__(self, backend: MappedBackend, use: Use, held: contextlib.ExitStack) -> None:
        self._backend = backend
        self._use = use
        self._held = held
        self._direct = True
        self._buffer = bytearray()
        self._elsewhere: BackendSession | None = None

    def size(self) -> int:
        return self._use.map.size

    def copy_to(self, sink: Sink, offset: int, length: int) -> None:
        self._refuse_beyond(offset, length)
        end = offset + length
        for batch in batched(self._use.map.pieces(offset, length), small=SMALL, most=GATHERED):
            done = self._send(sink, batch, end)
            if done < batch.length:
                at = batch.start + done
                self._export().copy_to(sink, at, end - at)
                return

    def read(self, offset: int, length: int) -> bytes:
        self._refuse_beyond(offset, length)
        if not self._may():
            return self._export().read(offset, length)
        found = bytearray(length)
        for piece in self._use.map.pieces(offset, length):
            self._backend.check()
            begin = piece.start - offset
            self._read(piece, memoryview(found)[begin : begin + piece.length])
        self._use.layers.refuse_changed()
        return bytes(found)

    def close(self) -> None:
        if self._elsewhere is not None:
            self._elsewhere.close()
        self._held.close()

    def _refuse_beyond(self, offset: int, length: int) -> None:
        self._backend.check()
        if offset + length > self.size():
            raise beyond(self.size())

    def _may(self) -> bool:
        """Whether the files may still be read. What was read by then was the image."""
        if self._direct and time.monotonic() > self._use.until:
            self._direct = False
            try:
                self._use.layers.refuse_changed()
            finally:
                self._held.close()
        return self._direct

    def _refuse_before(self, at: int, end: int) -> None:
        """Who gets less than was announced knows that it is wrong."""
        if at == end:
            self._use.layers.refuse_changed()

    def _watch(self, start: int, end: int) -> Callable[[int], None]:
        """To be called before each of the pieces that come by the export from `start` on."""
        at = start

        def before(number: int) -> None:
            nonlocal at
            at += number
            if self._may():
                self._refuse_before(at, end)

        return before

    def _send(self, sink: Sink, batch: Batch, end: int) -> int:
        """The bytes of it that were sent: less when the time is over for which its files may be read."""
        done = 0
        while done < batch.length:
            self._backend.check()
            if not self._may():
                return done
            if not batch.pieces:
                self._export().copy_to(_Watched(sink, self._watch(batch.start, end)), batch.start, batch.length)
                return batch.length
            if len(batch.pieces) > 1:
                gathered = self._gathered(batch)
                self._refuse_before(batch.start + batch.length, end)
                sink.write(gathered)
                return batch.length
            number = min(PIECE, batch.length - done)
            self._refuse_before(batch.start + done + number, end)
            piece = batch.pieces[0]
            if piece.where is Where.ZEROS:
                sink.send_file(_zeros(), 0, number)
            else:
                sink.send_file(self._use.layers.fds[piece.layer], piece.offset + done, number)
            done += number
        return done

    def _gathered(self, batch: Batch) -> memoryview:
        if not self._buffer:
            self._buffer = bytearray(GATHERED)
        view = memoryview(self._buffer)
        for piece in batch.pieces:
            begin = piece.start - batch.start
            self._read(piece, view[begin : begin + piece.length])
        return view[: batch.length]

    def _read(self, piece: Piece, buffer: memoryview) -> None:
        if piece.where is not Where.FILE:
            elsewhere = piece.where is Where.ELSEWHERE
            buffer[:] = self._export().read(piece.start, piece.length) if elsewhere else bytes(piece.length)
            return
        held, done = self._use.layers.all[piece.layer].held, 0
        try:
            while done < len(buffer):
                number = os.preadv(held.fd, [buffer[done:]], piece.offset + done)
                if not number:
                    self._use.layers.refuse_changed()
                    raise fault(OSError(5, ""), held.name, "read")
                done += number
        except OSError as error:
            raise fault(error, held.name, "read") from error

    def _export(self) -> BackendSession:
        if self._elsewhere is None:
            self._elsewhere = self._backend.export_session()
        return self._elsewhere


class _Watched:
    """A Sink; `before` hears of each piece."""

    def __init__(self, sink: Sink, before: Callable[[int], None]) -> None:
        self._sink = sink
        self._before = before

    def write(self, data: memoryview | bytes | bytearray) -> None:
        self._before(len(data))
        self._sink.write(data)

    def send_file(self, fd: int, offset: int, length: int) -> None:
        self._before(length)
        self._sink.send_file(fd, offset, length)


_made = threading.Lock()
_fd = -1


def _zeros() -> int:
    """A file without data, PIECE long, for all: reading it costs no storage, and sending it no copy."""
    global _fd
    with _made:
        if _fd < 0:
            _fd = os.memfd_create("zeros", os.MFD_CLOEXEC)
            os.ftruncate(_fd, PIECE)
    return _fd
