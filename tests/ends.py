"""The two ends of a transfer in memory: a Sink and a Source (hostagent.data.streams) for tests of backends."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

from hostagent.data.streams import PeerGone
from hostagent.errors import AgentError


class Collected:
    """A Sink. `before` is called before each piece."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.data = bytearray()
        self.from_files = 0
        self.pieces = 0
        self._before = before

    def write(self, data: memoryview | bytes | bytearray) -> None:
        self._before()
        self.pieces += 1
        self.data += data

    def send_file(self, fd: int, offset: int, length: int) -> None:
        self._before()
        self.pieces += 1
        end = offset + length
        while offset < end:
            data = os.pread(fd, end - offset, offset)
            if not data:
                raise AgentError("image_changed", f"the file ends at byte {offset}")
            self.data += data
            self.from_files += len(data)
            offset += len(data)


class Given:
    """A Source of `data`; one that says that there are `length` bytes breaks off where there are fewer."""

    def __init__(self, data: bytes, length: int | None = None) -> None:
        self._data = data
        self._length = length
        self._at = 0

    def read_into(self, buffer: memoryview) -> int:
        found = self._data[self._at : self._at + len(buffer)]
        self._at += len(found)
        if self._length is not None and len(found) < len(buffer) and self._at < self._length:
            raise PeerGone("the body ends early")
        buffer[: len(found)] = found
        return len(found)


def noise(length: int, seed: int = 1) -> bytes:
    """A shorter one is the beginning of a longer one."""
    source = random.Random(seed)
    return b"".join(source.randbytes(4096) for _ in range(0, length, 4096))[:length]
