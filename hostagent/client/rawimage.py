"""Raw files and block devices: read as they are, with QEMU kept from writing them; written sparse."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator

from hostagent import blocks, qemu_locks
from hostagent.client.extents import Extent
from hostagent.client.layers import Layer
from hostagent.errors import AgentError

GRAIN = 64 << 10
"""Bytes that are looked at for being zeros, and then are not written."""
_ZEROS = bytes(GRAIN)
_NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


class RawReader:
    """One worker's. The buffer is its own; the descriptor may be everybody's."""

    def __init__(self, layer: Layer, step: int) -> None:
        self._layer = layer
        self._view = memoryview(bytearray(step))

    def read(self, begin: int, end: int, deliver: Callable[[memoryview], object]) -> None:
        while begin < end:
            try:
                number = os.preadv(self._layer.fd, [self._view[: end - begin]], begin)
            except OSError as error:
                raise failed(error, self._layer.path, "read") from error
            if not number:
                message = f"{self._layer.path} ends at byte {begin}: it was cut meanwhile"
                raise AgentError("image_changed", message, remedy="see who changes it, then run the same again")
            deliver(self._view[:number])
            begin += number

    def close(self) -> None:
        """The descriptor is the layers'."""


def raw_extents(layer: Layer) -> Iterator[Extent]:
    try:
        for run in blocks.data_and_holes(layer.fd, 0, layer.size):
            yield Extent(run.start, run.length, run.zero)
    except OSError as error:
        raise failed(error, layer.path, "read") from error


@contextlib.contextmanager
def held(layer: Layer) -> Iterator[None]:
    """QEMU may not write the file meanwhile, nor be writing it: AgentError busy. They are marks on the descriptor."""
    try:
        marked = all(qemu_locks.take(layer.fd, fcntl.F_RDLCK, byte) for byte in qemu_locks.READING)
        taken = None if not marked else qemu_locks.first_taken(layer.fd, qemu_locks.WRITERS)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise failed(error, layer.path, "locked") from error
        marked, taken = True, None
    try:
        if not marked or taken is not None:
            message = f"{layer.path} is being written, by a guest or another program of QEMU's"
            raise AgentError("busy", message, remedy="shut the guest down, or copy a snapshot's base")
        yield
    finally:
        with contextlib.suppress(OSError):
            for byte in qemu_locks.READING:
                qemu_locks.take(layer.fd, fcntl.F_UNLCK, byte)


class RawWriter:
    """`fresh`: all that was not written yet reads as zeros, so zeros need not be written. Threads may share it."""

    def __init__(self, fd: int, path: str, *, fresh: bool, sparse: bool = True) -> None:
        self._fd = fd
        self._path = path
        self._fresh = fresh
        self._sparse = sparse

    def write(self, view: memoryview, offset: int) -> None:
        try:
            for first, last in _runs(view) if self._fresh else [(0, len(view))]:
                while first < last:
                    first += os.pwrite(self._fd, view[first:last], offset + first)
        except OSError as error:
            raise failed(error, self._path, "written") from error

    def zero(self, begin: int, end: int) -> None:
        if self._fresh:
            return
        try:
            for _ in blocks.zero_steps(self._fd, begin, end - begin, sparse=self._sparse):
                pass
        except OSError as error:
            raise failed(error, self._path, "written") from error

    def flush(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise failed(error, self._path, "made durable") from error


def _runs(view: memoryview) -> Iterator[tuple[int, int]]:
    """What of it is to be written, where zeros are there already: whole grains of zeros are left out."""
    begin = None
    for at in range(0, len(view), GRAIN):
        part = view[at : at + GRAIN]
        zero = not part[0] and not part[-1] and part.tobytes() == _ZEROS[: len(part)]
        if not zero and begin is None:
            begin = at
        elif zero and begin is not None:
            yield begin, at
            begin = None
    if begin is not None:
        yield begin, len(view)


def failed(error: OSError, path: str, what: str) -> AgentError:
    """The local file's errors, in the table's words."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return AgentError("no_space", f"no space left for {path}", remedy="make space, then run the same again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AgentError("denied", f"{path} may not be {what}: {reason}")
    if error.errno == errno.EFBIG:
        return AgentError("no_space", f"{path} cannot be that large on its file system")
    return AgentError("io_error", f"{path} cannot be {what}: {reason}", remedy="look at the storage below it")
