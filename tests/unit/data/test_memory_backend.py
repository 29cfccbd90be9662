"""A backend that was written for CloudStack's image server, against its interface alone, works in this daemon."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path

from hostagent.data.backends.base import BackendSession, Extent, ImageBackend
from hostagent.data.backends.registry import Opening, Registry
from hostagent.data.checksum import Method, checksum
from tests.contract.backend_laws import lawful
from tests.contract.backend_suite import MIB, RangeSuite, Rig, pattern
from tests.unit.data.memory_backend import MemoryBackend, MemorySession

THEIRS = {
    BackendSession: {"size", "read", "close"},
    ImageBackend: {
        *("supports_extents", "supports_range_write", "size", "read", "write", "write_full", "flush", "zero"),
        *("get_capabilities", "get_allocation_extents", "get_dirty_extents", "open_session", "close"),
    },
}
"""All that their backends/base.py asks of a subclass."""


def own(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_nothing_more_is_asked_of_a_backend_than_there() -> None:
    for kind, names in THEIRS.items():
        assert kind.__abstractmethods__ == names  # type: ignore[attr-defined]
    assert own(MemoryBackend) == THEIRS[ImageBackend]
    assert own(MemorySession) == THEIRS[BackendSession]


def test_their_calls_are_called_as_they_are_there() -> None:
    """Names and order of the parameters, since callers may use either."""

    def parameters(name: str) -> list[str]:
        return list(inspect.signature(getattr(ImageBackend, name)).parameters)[1:]

    assert parameters("read") == ["offset", "length"]
    assert parameters("write") == ["data", "offset"]
    assert parameters("write_full") == ["stream", "content_length", "flush"]
    assert parameters("zero") == ["offset", "length"]
    assert parameters("get_dirty_extents") == ["dirty_bitmap_context"]


class TestMemoryBackend(RangeSuite):
    extents = True

    @contextlib.contextmanager
    def make(self, folder: Path) -> Iterator[Rig]:
        disk = bytearray(pattern(3 * MIB) + bytes(MIB + 5))
        registry = Registry()
        registry.register("memory", lambda opening: MemoryBackend(disk))
        yield Rig(lambda: registry.open(Opening("memory:disk", len(disk))), bytes(disk), lambda: bytes(disk))


def test_what_the_daemon_adds_is_made_of_theirs() -> None:
    backend = MemoryBackend(bytearray(pattern(2 * MIB) + bytes(MIB)))
    assert list(backend.extents(MIB, 2 * MIB)) == [
        Extent(MIB, MIB, False, False),
        Extent(2 * MIB, MIB, True, False),
    ]
    lawful(list(backend.dirty_extents(5, 77)), 5, 77)
    assert (backend.block_size, backend.max_readers, backend.max_writers) == (1, 8, 8)
    backend.fence()
    again = MemoryBackend(bytearray(backend.data))
    one, other = (checksum(lambda it=it: it, 3 * MIB, Method(), workers=n) for it, n in ((backend, 1), (again, 4)))
    assert one == other
