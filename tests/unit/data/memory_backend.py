"""A backend in memory, written against CloudStack's interface alone: nothing of what the daemon adds is here."""

from __future__ import annotations

from typing import Any, BinaryIO

from hostagent.data.backends.base import BackendSession, ImageBackend


class MemorySession(BackendSession):
    def __init__(self, data: bytearray, read: Any) -> None:
        self._data = data
        self._read = read

    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        found: bytes = self._read(offset, length)
        return found

    def close(self) -> None:
        pass


class MemoryBackend(ImageBackend):
    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.closed = False

    @property
    def supports_extents(self) -> bool:
        return True

    @property
    def supports_range_write(self) -> bool:
        return True

    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, data: bytes, offset: int) -> None:
        self.data[offset : offset + len(data)] = data

    def write_full(self, stream: BinaryIO, content_length: int, flush: bool) -> int:
        data = stream.read(content_length)
        if len(data) < content_length:
            raise OSError("short read")
        self.data[:] = data
        return len(data)

    def flush(self) -> None:
        pass

    def zero(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    def get_capabilities(self) -> dict[str, bool]:
        return {"read_only": False, "can_flush": True, "can_zero": True}

    def get_allocation_extents(self) -> list[dict[str, Any]]:
        """Data, and zeros at the end."""
        used = len(self.data.rstrip(b"\0"))
        found = [
            {"start": 0, "length": used, "zero": False},
            {"start": used, "length": len(self.data) - used, "zero": True},
        ]
        return [one for one in found if one["length"]]

    def get_dirty_extents(self, dirty_bitmap_context: str) -> list[dict[str, Any]]:
        return [{"start": 0, "length": len(self.data), "dirty": True, "zero": False}]

    def open_session(self) -> BackendSession:
        return MemorySession(self.data, self.read)

    def close(self) -> None:
        self.closed = True
