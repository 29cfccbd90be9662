"""The checksum, against its definition computed the slow way."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent.client.checksum import local_checksum
from hostagent.client.extents import Extent
from hostagent.client.options import Options
from hostagent.errors import AgentError

BLOCK = 4096


class Memory:
    """An image in memory, with extents of this grain; `read` is what was asked for."""

    def __init__(self, data: bytes, grain: int) -> None:
        self.data = data
        self.size = len(data)
        self._grain = grain
        self.touched: list[int] = []

    def extents(self) -> Iterator[Extent]:
        for at in range(0, self.size, self._grain):
            part = self.data[at : at + self._grain]
            yield Extent(at, len(part), not any(part))

    def reader(self) -> Memory:
        return self

    def read(self, begin: int, end: int, deliver: Callable[[memoryview], object]) -> None:
        self.touched.append(begin)
        for at in range(begin, end, 1000):
            deliver(memoryview(self.data)[at : min(at + 1000, end)])

    def close(self) -> None:
        pass


def expected(data: bytes, algorithm: str) -> str:
    def new(part: bytes = b"") -> Any:
        keyed: dict[str, Any] = {"digest_size": 32} if algorithm.startswith("blake2") else {}
        return hashlib.new(algorithm, part, **keyed)

    outer = new()
    for at in range(0, len(data), BLOCK):
        outer.update(new(data[at : at + BLOCK]).digest())
    return str(outer.hexdigest())


parts = st.lists(st.tuples(st.integers(1, 9000), st.booleans()), max_size=8)


@given(
    parts,
    st.sampled_from([512, 5000, 1 << 20]),
    st.sampled_from(["blake2b", "sha256", "blake2s", "md5"]),
    st.integers(0, 9000),
)
def test_it_is_the_definitions(found: list[tuple[int, bool]], grain: int, algorithm: str, beyond: int) -> None:
    data = b"".join(bytes(length) if zero else b"d" * length for length, zero in found)
    image = Memory(data, grain)
    options = Options(algorithm=algorithm, block_size=BLOCK, workers=3)
    told: list[int] = []
    checksum = local_checksum(image, len(data) + beyond, options, told.append, threading.Event())
    assert checksum.checksum == expected(data + bytes(beyond), algorithm)
    assert told[-1] == len(data) + beyond


def test_zeros_are_not_read() -> None:
    image = Memory(bytes(100 * BLOCK) + b"d" * BLOCK + bytes(50 * BLOCK), BLOCK)
    options = Options(block_size=BLOCK)
    found = local_checksum(image, image.size, options, lambda _: None, threading.Event())
    assert found.checksum == expected(image.data, "blake2b")
    assert image.touched == [100 * BLOCK]


def test_it_stops_when_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(AgentError):
        local_checksum(Memory(b"d" * 9 * BLOCK, BLOCK), 9 * BLOCK, Options(block_size=BLOCK), lambda _: None, stop)
