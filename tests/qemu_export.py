"""A read-only NBD export by qemu-nbd, as a backend just good enough for tests of what stands before it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import nbd

from hostagent.data.backends.base import BackendSession, ImageBackend
from hostagent.data.backends.registry import Factory, Opening
from hostagent.data.streams import PIECE
from hostagent.qcow2 import read_header


class Export(ImageBackend):
    """`read_bytes`: how much went by it. qemu-nbd is started on first use."""

    kind = "nbd"

    def __init__(self, image: Path, format: str) -> None:
        self._image = image
        self._format = format
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="ha-nbd-"))
        self.read_bytes = 0
        self.sessions = 0
        self.fenced = False

    @property
    def supports_extents(self) -> bool:
        return True

    @property
    def supports_range_write(self) -> bool:
        return False

    def connected(self) -> Any:
        socket = self._folder / "s"
        if self._process is None:
            words = ["qemu-nbd", "-r", "-t", "-e", "16", "-A", "-f", self._format, "-k", str(socket), str(self._image)]
            self._process = subprocess.Popen(words, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 20
        while True:
            handle = nbd.NBD()
            handle.add_meta_context("base:allocation")
            handle.add_meta_context("qemu:allocation-depth")
            try:
                handle.connect_unix(str(socket))
                return handle
            except nbd.Error:
                assert time.monotonic() < deadline and self._process.poll() is None, self._process
                time.sleep(0.005)

    def size(self) -> int:
        """Without starting it: a running one has marks on the files."""
        with self._image.open("rb") as file:
            header = read_header(file.fileno()) if self._format == "qcow2" else None
            size = os.fstat(file.fileno()).st_size if header is None else header.virtual_size
        return -(-size // 512) * 512

    def depths(self) -> list[tuple[int, int, int]]:
        """Start, length, depth, of all."""
        handle, found = self.connected(), []
        at, size = 0, handle.get_size()

        def tell(name: str, offset: int, entries: list[int], _: Any) -> int:
            if name == "qemu:allocation-depth":
                for length, depth in zip(entries[::2], entries[1::2], strict=True):
                    found.append((offset, length, depth))
                    offset += length
            return 0

        while at < size:
            handle.block_status(min(size - at, 1 << 30), at, tell)
            at = found[-1][0] + found[-1][1]
        handle.shutdown()
        return found

    def read(self, offset: int, length: int) -> bytes:
        with self.open_session() as session:
            return session.read(offset, length)

    def open_session(self) -> BackendSession:
        self.sessions += 1
        return _Session(self)

    def write(self, data: bytes, offset: int) -> None:
        raise AssertionError

    def write_full(self, stream: BinaryIO, content_length: int, flush: bool) -> int:
        raise AssertionError

    def flush(self) -> None:
        raise AssertionError

    def zero(self, offset: int, length: int) -> None:
        raise AssertionError

    def get_capabilities(self) -> dict[str, bool]:
        return {"read_only": True, "can_flush": False, "can_zero": False}

    def get_allocation_extents(self) -> list[dict[str, Any]]:
        return [{"start": 0, "length": self.size(), "zero": False}]

    def get_dirty_extents(self, dirty_bitmap_context: str) -> list[dict[str, Any]]:
        raise AssertionError

    def close(self) -> None:
        pass

    def fence(self) -> None:
        self.fenced = True

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            assert self._process.stderr is not None
            self._process.stderr.close()
            self._process = None
        (self._folder / "s").unlink(missing_ok=True)
        self._folder.rmdir()

    def factory(self) -> Factory:
        def open_(opening: Opening) -> ImageBackend:
            return self

        return open_


class _Session(BackendSession):
    def __init__(self, export: Export) -> None:
        self._export = export
        self._handle = export.connected()

    def size(self) -> int:
        return int(self._handle.get_size())

    def read(self, offset: int, length: int) -> bytes:
        self._export.read_bytes += length
        return b"".join(
            bytes(self._handle.pread(min(PIECE, offset + length - at), at))
            for at in range(offset, offset + length, PIECE)
        )

    def close(self) -> None:
        self._handle.shutdown()
