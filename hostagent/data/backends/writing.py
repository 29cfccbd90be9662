"""From a Source into a file: past the page cache in what is aligned, where the file system can do that, and through it
in the ragged ends. So no block is written in both ways, whoever writes its other bytes at the same time."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

from hostagent.data.backends.base import beyond
from hostagent.data.backends.faults import fault
from hostagent.data.backends.holds import Held
from hostagent.data.streams import PIECE, PeerGone, Source


class Writer:
    """For one thread; its buffer is taken on first use."""

    def __init__(self) -> None:
        self._buffer: mmap.mmap | None = None

    def copy(
        self, source: Source, held: Held, offset: int, length: int | None, *, end: int, check: Callable[[], None]
    ) -> int:
        """`length` bytes of the source, or all of it, to `offset`; never at or beyond `end`. The bytes written. `check`
        raises when it may not go on."""
        if offset > end or (length or 0) > end - offset:
            raise beyond(end)
        begun = offset
        while length is None or offset - begun < length:
            check()
            skip = offset % held.step  # so they lie in memory as they will in the file
            wanted = PIECE - skip if length is None else min(PIECE - skip, length - (offset - begun))
            piece = memoryview(self._memory())[skip : skip + wanted]
            number = source.read_into(piece)
            if number > end - offset:
                raise beyond(end)
            put(held, piece[:number], offset)
            offset += number
            if number < wanted:
                break
        if length is not None and offset - begun < length:
            raise PeerGone(f"the body ended after {offset - begun} of {length} bytes")
        return offset - begun

    def _memory(self) -> mmap.mmap:
        if self._buffer is None:
            self._buffer = mmap.mmap(-1, PIECE)
        return self._buffer


def put(held: Held, data: memoryview, offset: int) -> None:
    first = min(-offset % held.step, len(data))
    last = max(first, len(data) - (offset + len(data)) % held.step)
    try:
        with held.writing(offset, offset + len(data)):
            write_all(held.fd, data[:first], offset)
            done = _write_directly(held, data[first:last], offset + first)
            write_all(held.fd, data[first + done :], offset + first + done)
    except OSError as error:
        raise fault(error, held.name, "written") from error


def write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        number = os.pwrite(fd, data, offset)
        data, offset = data[number:], offset + number


def _write_directly(held: Held, data: memoryview, offset: int) -> int:
    """The bytes that were written so, in whole blocks: less where that cannot be done here."""
    done = 0
    while done < len(data) and (fd := held.direct()) is not None:
        try:
            number = os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            held.only_buffered()
            break
        done += number // held.step * held.step
        if number % held.step:  # cut short, as by a full disk: the page cache's way says why
            break
    return done
