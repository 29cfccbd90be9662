"""Raw files and block devices: below the folders that the daemon may serve (`file:///path`), or handed over open
(`fd:NAME`).

Downloads go by sendfile(2). Uploads go past the page cache in what is aligned to pages, where the file system can do
that, and through it in the ragged ends; so no page is written in both ways, whoever writes its other bytes. While a
file is used it bears QEMU's marks (holds.py): an upload's from its first write until its connection ends, so that
nothing comes between its requests; a download's for the time of each.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

from hostagent import blocks
from hostagent.data.backends import whole
from hostagent.data.backends.base import BackendSession, Extent, ImageBackend, beyond
from hostagent.data.backends.faults import fault
from hostagent.data.backends.holds import Held, Holds
from hostagent.data.backends.places import check_usable, open_below, path_of
from hostagent.data.backends.registry import Claim, Factory, Opening
from hostagent.data.backends.same import Same
from hostagent.data.backends.writing import Writer, write_all
from hostagent.data.streams import PIECE, Sink, Source, Stopped
from hostagent.errors import AgentError
from hostagent.extents import merged

FIRST = "first"
"""Its name in Opening.shared."""


def files(folders: Sequence[str], holds: Holds) -> Factory:
    """For `file:` URLs; `folders` is data.allow_paths."""

    def open_(opening: Opening) -> ImageBackend:
        path = path_of(opening.url)

        def grasp() -> Held:
            fd, true = open_below(path, folders, writable=opening.writable)
            return holds.join(fd, true, writable=opening.writable, ours=True)

        return FileBackend(opening, grasp, holds, partial(whole.replace, path, folders, holds))

    return open_


def handed_over(claim: Claim, holds: Holds) -> Factory:
    """For `fd:` URLs. By that name comes the image's descriptor and, if it is to be written past the page cache, a
    second one of it with O_DIRECT: only who may open the file can make that."""

    def open_(opening: Opening) -> ImageBackend:
        name = opening.url.partition(":")[2]

        def grasp() -> Held:
            fds = claim(opening.shared, name)
            try:
                _check_handed(fds, opening)
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise
            direct = fds[1] if len(fds) == 2 else None
            return holds.join(fds[0], opening.url, writable=opening.writable, ours=False, direct=direct)

        return FileBackend(opening, grasp, holds)

    return open_


def _check_handed(fds: Sequence[int], opening: Opening) -> None:
    if len(fds) not in (1, 2):
        raise _unfit(f"{opening.url} is {len(fds)} descriptors", "hand over one, and perhaps the same for O_DIRECT")
    found = check_usable(fds[0], opening.url)
    flags = fcntl.fcntl(fds[0], fcntl.F_GETFL)
    access = flags & os.O_ACCMODE
    if access == os.O_WRONLY or (opening.writable and access != os.O_RDWR) or flags & os.O_DIRECT:
        need = "reading and writing" if opening.writable else "reading"
        raise _unfit(f"{opening.url} is not open for {need} by the page cache", "hand it over open for that")
    if len(fds) == 2:
        direct = fcntl.fcntl(fds[1], fcntl.F_GETFL)
        same = os.path.samestat(found, os.fstat(fds[1]))
        if not same or not direct & os.O_DIRECT or direct & os.O_ACCMODE == os.O_RDONLY:
            raise _unfit(f"{opening.url} has a second descriptor that does not write it by O_DIRECT", "hand over one")


def _unfit(message: str, remedy: str) -> AgentError:
    return AgentError("invalid", message, field="url", remedy=remedy)


class FileBackend(ImageBackend):
    kind = "file"

    def __init__(
        self,
        opening: Opening,
        grasp: Callable[[], Held],
        holds: Holds,
        replace: Callable[[BinaryIO, int, Callable[[], None]], int] | None = None,
    ) -> None:
        """`grasp` opens it, on first use; `replace` puts a whole new file in its place."""
        self._opening = opening
        self._grasp = grasp
        self._holds = holds
        self._replace = replace
        self._held: Held | None = None
        self._writing = False
        self._fenced = False
        self._writer = Writer()

    @property
    def supports_extents(self) -> bool:
        return True

    @property
    def supports_range_write(self) -> bool:
        """Not of a file that is not there yet: it is made whole, or not at all."""
        return self._opening.writable and not self._missing()

    @property
    def block_size(self) -> int:
        return self.held().step

    @property
    def dirty_context(self) -> str | None:
        return None

    def get_capabilities(self) -> dict[str, bool]:
        writable = self._opening.writable
        return {"read_only": not writable, "can_flush": writable, "can_zero": writable}

    def size(self) -> int:
        return blocks.size_of(self.held().fd)

    def capacity(self) -> int:
        if self._missing():
            return self._opening.size
        held = self.held()
        size = blocks.size_of(held.fd)
        return max(size, self._opening.size) if self._opening.writable and not held.device else size

    def read(self, offset: int, length: int) -> bytes:
        with self.open_session() as session:
            return session.read(offset, length)

    def open_session(self) -> BackendSession:
        return _Session(self, self._holds, self.held())

    def write(self, data: bytes, offset: int) -> None:
        self.write_from(_Bytes(data), offset, len(data))

    def write_from(self, source: Source, offset: int, length: int | None) -> int:
        held = self._to_write()
        return self._writer.copy(source, held, offset, length, end=self.capacity(), check=self.check)

    def write_full(self, stream: BinaryIO, content_length: int, flush: bool) -> int:
        """A file below our folders is replaced at once, and durable, when all is there. What was handed over, or is a
        device, is written in place."""
        if not self._opening.writable:
            raise read_only()
        if content_length > self._opening.size:
            raise beyond(self._opening.size)
        if self._replace is not None and (self._missing() or not self.held().device):
            self.close()
            return self._replace(stream, content_length, self.check)
        if content_length < self.size():
            message = f"{self.held().name} has {self.size()} bytes, which {content_length} do not replace"
            raise AgentError("invalid", message, field="Content-Length", remedy="send all, or write a range")
        written = self.write_from(whole.Body(stream), 0, content_length)
        if flush:
            self.flush()
        return written

    def zero(self, offset: int, length: int) -> None:
        held = self._to_write()
        end = offset + length
        if end > self.capacity():
            raise beyond(self.capacity())
        step = held.step if held.device else 1
        first = min(-(-offset // step) * step, end)
        last = max(end // step * step, first)
        try:
            with held.writing(offset, end):
                write_all(held.fd, memoryview(bytes(first - offset)), offset)
                for _ in blocks.zero_steps(held.fd, first, last - first, sparse=self._opening.sparse):
                    self.check()
                write_all(held.fd, memoryview(bytes(end - last)), last)
                if length and blocks.size_of(held.fd) < end:  # its last byte is ours to write, not the file's length
                    os.pwrite(held.fd, b"\0", end - 1)
        except OSError as error:
            raise fault(error, held.name, "written") from error

    def flush(self) -> None:
        self.check()
        if not self._opening.writable:
            raise read_only()
        self.held().sync()

    def get_allocation_extents(self) -> list[dict[str, Any]]:
        return [one._asdict() for one in merged(self.extents(0, self.size()))]

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        held = self.held()
        with self._holds.used(held):
            try:
                self.refuse_changed(held)
                for one in blocks.data_and_holes(held.fd, start, length):
                    self.check()
                    yield Extent(one.start, one.length, one.zero)
            except OSError as error:
                raise fault(error, held.name, "read") from error

    def get_dirty_extents(self, dirty_bitmap_context: str) -> list[dict[str, Any]]:
        raise AgentError("not_found", f"{self.held().name} is a raw image, which has no bitmaps")

    def close(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            if self._writing:
                held.unmark()
                self._writing = False
            self._holds.leave(held)
        self._writer = Writer()

    def fence(self) -> None:
        self._fenced = True

    def check(self) -> None:
        if self._fenced:
            raise Stopped

    def refuse_changed(self, held: Held) -> None:
        """AgentError image_changed when a ticket that only reads has read another image before: they have one ETag."""
        if self._opening.writable or held.device:
            return
        found = os.fstat(held.fd)
        first = self._opening.shared.setdefault(FIRST, Same())
        first.refuse_other(held.name, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))

    def held(self) -> Held:
        self.check()
        if self._held is not None and self._held.retired and not self._writing:
            self.close()
        if self._held is None:
            self._held = self._grasp()
        return self._held

    def _to_write(self) -> Held:
        if not self._opening.writable:
            raise read_only()
        held = self.held()
        if not self._writing:
            held.mark()
            self._writing = True
        return held

    def _missing(self) -> bool:
        """Whether there is no such file, and it may be made."""
        if self._held is not None or not self._opening.writable or self._replace is None:
            return False
        try:
            self.held()
        except AgentError as error:
            if error.code == "not_found":
                return True
            raise
        return False


def read_only() -> AgentError:
    return AgentError("denied", "the ticket does not allow writing", remedy="get one that does")


class _Session(BackendSession):
    """Holds the file's marks."""

    def __init__(self, backend: FileBackend, holds: Holds, held: Held) -> None:
        self._backend = backend
        self._held = held
        with contextlib.ExitStack() as use:
            use.enter_context(holds.used(held))
            backend.refuse_changed(held)
            self._use = use.pop_all()
        with contextlib.suppress(OSError):
            os.posix_fadvise(held.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def size(self) -> int:
        return blocks.size_of(self._held.fd)

    def read(self, offset: int, length: int) -> bytes:
        self._refuse_beyond(offset, length)
        found = bytearray()
        try:
            while len(found) < length:
                self._backend.check()
                data = os.pread(self._held.fd, min(PIECE, length - len(found)), offset + len(found))
                if not data:
                    raise AgentError("image_changed", f"{self._held.name} was cut while it was read")
                found += data
        except OSError as error:
            raise fault(error, self._held.name, "read") from error
        return bytes(found)

    def copy_to(self, sink: Sink, offset: int, length: int) -> None:
        self._refuse_beyond(offset, length)
        end = offset + length
        while offset < end:
            self._backend.check()
            number = min(PIECE, end - offset)
            if offset + number == end:  # who gets less than was announced knows that it is wrong
                self._backend.refuse_changed(self._held)
            sink.send_file(self._held.fd, offset, number)
            offset += number

    def close(self) -> None:
        self._use.close()

    def _refuse_beyond(self, offset: int, length: int) -> None:
        self._backend.check()
        if offset + length > self.size():
            raise beyond(self.size())


class _Bytes:
    """A Source of what is in memory."""

    def __init__(self, data: bytes) -> None:
        self._left = memoryview(data)

    def read_into(self, buffer: memoryview) -> int:
        number = min(len(buffer), len(self._left))
        buffer[:number] = self._left[:number]
        self._left = self._left[number:]
        return number
