"""The digest is that of its definition, whatever is zero and however extents, threads and sessions cut the image."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostagent.data import checksum as module
from hostagent.data.backends.base import Extent, ImageBackend
from hostagent.data.checksum import ALGORITHM, Method, algorithms, checksum, runs
from hostagent.data.streams import Sink, Stopped
from hostagent.errors import AgentError
from tests.contract.backend_guards import refused
from tests.unit.data.memory_backend import MemoryBackend

MIB = 1 << 20


class Told(MemoryBackend):
    """With extents, which may cut zeros out; `reads` are the bytes that were read."""

    def __init__(self, data: bytes, told: list[Extent] | None = None, readers: int = 8) -> None:
        super().__init__(bytearray(data))
        self.told = told
        self.readers = readers
        self.fenced = threading.Event()
        self.reads: list[tuple[int, int]] = []

    @property
    def supports_extents(self) -> bool:
        return self.told is not None

    @property
    def max_readers(self) -> int:
        return self.readers

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        assert (start, length) == (0, len(self.data))
        assert self.told is not None
        return iter(self.told)

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return super().read(offset, length)

    def fence(self) -> None:
        self.fenced.set()


def defined(data: bytes, block: int, algorithm: str = ALGORITHM) -> str:
    """The definition, in the fewest words."""

    def new(data: bytes) -> Any:
        size = {"digest_size": 32} if algorithm.startswith("blake2") else {}
        return hashlib.new(algorithm, data, **size)

    return str(new(b"".join(new(data[at : at + block]).digest() for at in range(0, len(data), block))).hexdigest())


def mixed(size: int) -> bytes:
    """Blocks of zeros, of data, of both."""
    data = bytearray(size)
    for at in range(MIB // 2, size, 5 * MIB):
        data[at : at + MIB + 9] = bytes((at // MIB + n) % 256 for n in range(min(MIB + 9, size - at)))
    return bytes(data)


DATA = mixed(23 * MIB + 4099)


@pytest.mark.parametrize("readers", [1, 2, 3, 8])
@pytest.mark.parametrize("block", [MIB, 4 * MIB, 16 * MIB, MIB + 4096])
def test_the_digest_is_the_defined_one(block: int, readers: int) -> None:
    found = checksum(lambda: Told(DATA, None, readers), len(DATA), Method(block_size=block), workers=4)
    assert found == defined(DATA, block)


@pytest.mark.parametrize("algorithm", algorithms())
def test_every_algorithm_that_is_offered_works(algorithm: str) -> None:
    data = DATA[: 2 * MIB + 5]
    assert checksum(lambda: Told(data), len(data), Method(algorithm, MIB)) == defined(data, MIB, algorithm)


def test_blake2b_is_cut_to_32_bytes_and_known_values_hold() -> None:
    """Known from outside: of an empty image, and of one block of zeros."""
    assert checksum(lambda: Told(b""), 0, Method()) == hashlib.blake2b(digest_size=32).hexdigest()
    inner = hashlib.blake2b(bytes(4 * MIB), digest_size=32).digest()
    expected = hashlib.blake2b(inner, digest_size=32).hexdigest()
    assert checksum(lambda: Told(bytes(4 * MIB)), 4 * MIB, Method()) == expected


def test_algorithms_have_one_length() -> None:
    assert ALGORITHM in algorithms()
    assert "sha256" in algorithms()
    assert not [name for name in algorithms() if name.startswith("shake")]
    assert list(algorithms()) == sorted(algorithms())


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"algorithm": "shake_128"}, "algorithm"),
        ({"algorithm": "nix"}, "algorithm"),
        ({"block_size": MIB - 4096}, "block_size"),
        ({"block_size": 16 * MIB + 4096}, "block_size"),
        ({"block_size": MIB + 512}, "block_size"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(AgentError) as error:
        Method(**wrong)
    assert (error.value.code, error.value.field, error.value.value) == ("invalid", field, wrong[field])
    assert error.value.remedy


@pytest.mark.parametrize("readers", [1, 8])
def test_zeros_are_not_read_where_extents_tell_of_them(readers: int) -> None:
    size = 40 * MIB + 100
    data = bytes(9 * MIB) + b"x" * 5 + bytes(size - 9 * MIB - 5)
    told = [Extent(0, 9 * MIB, True), Extent(9 * MIB, 5, False), Extent(9 * MIB + 5, size - 9 * MIB - 5, True)]
    backends: list[Told] = []

    def opened() -> Told:
        backends.append(Told(data, told, readers))
        return backends[-1]

    heard: list[int] = []
    assert checksum(opened, size, Method(), done=heard.append) == defined(data, 4 * MIB)
    assert {one for backend in backends for one in backend.reads} == {(n * MIB, MIB) for n in range(8, 12)}
    assert sum(heard) == size


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_runs_are_whole_blocks_in_order_and_zeros_only_where_all_is(draw: st.DataObject) -> None:
    block = draw.draw(st.integers(1, 9))
    lengths = draw.draw(st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=12))
    extents, position = [], 0
    for length, zero in lengths:
        extents.append(Extent(position, length, zero))
        position += length
    found = list(runs(extents, position, block))
    assert [first for first, _, _ in found] == [0, *(last for _, last, _ in found[:-1])][: len(found)]
    assert (found[-1][1] if found else 0) == position
    data = [not one.zero for one in extents for _ in range(one.length)]
    for first, last, zero in found:
        assert first % block == 0
        assert last % block == 0 or last == position
        for at in range(first, last, block):
            assert any(data[at : min(at + block, position)]) != zero


@pytest.mark.parametrize("told", [[Extent(0, 5, True)], [Extent(0, 5, True), Extent(6, 4, True)], []])
def test_bytes_that_no_extent_tells_of_are_not_taken_for_zeros(told: list[Extent]) -> None:
    with refused("internal"):
        list(runs(told, 10, 2))


# Ending early


@pytest.mark.parametrize("readers", [1, 8])
def test_it_is_stopped_between_blocks(readers: int) -> None:
    heard: list[int] = []
    backends: list[Told] = []

    def opened() -> Told:
        backends.append(Told(b"x" * 64 * MIB, None, readers))
        return backends[-1]

    def done(number: int) -> None:
        heard.append(number)
        if len(heard) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        checksum(opened, 64 * MIB, Method(), done=done)
    assert heard == [4 * MIB, 4 * MIB]
    read = sum(length for backend in backends for _, length in backend.reads)
    assert read < 64 * MIB
    assert all(backend.closed for backend in backends)


class Failing(Told):
    def read(self, offset: int, length: int) -> bytes:
        if offset >= 8 * MIB:
            raise AgentError("io_error", "bad sector")
        if offset >= 4 * MIB and self.readers > 1:
            assert self.fenced.wait(20), "nobody ends what still waits"
            raise Stopped
        return super().read(offset, length)


@pytest.mark.parametrize("readers", [1, 8])
def test_a_failure_is_told_and_ends_the_others(readers: int) -> None:
    with refused("io_error"):
        checksum(lambda: Failing(b"x" * 16 * MIB, None, readers), 16 * MIB, Method(), workers=3)


def test_a_file_that_is_sent_by_the_kernel_is_hashed_too(tmp_path: Any) -> None:
    path = tmp_path / "disk"
    path.write_bytes(DATA)

    class Sending(MemoryBackend):
        def open_session(self) -> Any:
            session = super().open_session()

            def copy_to(sink: Sink, offset: int, length: int) -> None:
                with path.open("rb") as file:
                    sink.send_file(file.fileno(), offset, length)

            session.copy_to = copy_to  # type: ignore[method-assign]
            return session

    backend: ImageBackend = Sending(bytearray(DATA))
    assert checksum(lambda: backend, len(DATA), Method()) == defined(DATA, 4 * MIB)
    path.write_bytes(DATA[:-1])
    with refused("image_changed"):
        checksum(lambda: backend, len(DATA), Method())


def test_zeros_are_seen_in_every_kind_of_buffer() -> None:
    for length in (1, 63, 64, 65, MIB, MIB + 1):
        for kind in (bytes, bytearray, lambda data: memoryview(bytearray(data))):
            assert module._is_zero(kind(bytes(length)))
            assert not module._is_zero(kind(bytes(length - 1) + b"x"))
