"""Bytes and extents over NBD, with a server that does what real ones do seldom."""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hostagent.data.backends.base import DirtyExtent, Extent
from hostagent.data.backends.nbd import NbdBackend, NbdSettings
from hostagent.errors import AgentError
from hostagent.extents import merged
from hostagent.nbdclient import stream
from hostagent.nbdclient.connection import STATUS_SPAN, pairs
from hostagent.nbdclient.connection import merged as cut
from hostagent.nbdclient.dial import Server
from hostagent.nbdclient.stream import FIRST_SPAN, IN_FLIGHT, PIECE, ZERO_STEP
from tests.contract.backend_guards import refused
from tests.contract.backend_suite import Collected, Given, pattern
from tests.unit.data.nbd_fake import (
    FLUSH,
    HAS_FLAGS,
    MULTI_CONN,
    NO_HOLE,
    READ,
    READ_ONLY,
    STATUS,
    USUAL,
    WRITE,
    ZEROES,
    Behaviour,
    FakeServer,
)

MIB = 1 << 20
PATIENCE = 20.0
SURE = NbdSettings(connect_timeout=PATIENCE, timeout=PATIENCE)
QUICK = NbdSettings(connect_timeout=0.4, timeout=0.4, flush_timeout=0.5)
BASE, DEPTH, BITMAP = "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"


class Stripes:
    """Data and zeros in turns, as many as anybody asks for."""

    def __init__(self, grain: int) -> None:
        self._grain = grain

    def from_byte(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for number in range(offset // self._grain, -(-(offset + length) // self._grain)):
            yield (number + 1) * self._grain - max(offset, number * self._grain), number % 2 * 3


class Host:
    """Servers and the backends on them, which end with the test."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "s"
        self._open: list[Any] = []

    def serve(self, data: bytes = b"", **how: Any) -> FakeServer:
        self._path.unlink(missing_ok=True)
        server = FakeServer(self._path, data, Behaviour(**how))
        self._open.append(server)
        return server

    def backend(self, settings: NbdSettings = SURE, **opening: Any) -> NbdBackend:
        backend = NbdBackend(Server("", str(self._path)), settings, writable=True, **opening)
        self._open.append(backend)
        return backend

    def close(self) -> None:
        for one in reversed(self._open):
            one.close()


@pytest.fixture
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        host = Host(Path(folder))
        yield host
        host.close()


def told(backend: NbdBackend, start: int, length: int) -> list[Extent]:
    return list(merged(backend.extents(start, length)))


# Bytes


def test_answers_in_any_order_are_delivered_in_theirs(host: Host) -> None:
    data = os.urandom(9 * MIB + 17)
    server = host.serve(data, reverse=IN_FLIGHT)
    sink = Collected()
    host.backend().move(sink.write, 3, len(data) - 3)
    assert sink.data == data[3:]
    assert [length for kind, _, _, length in server.requests if kind == READ] == [PIECE] * 9 + [14]


def test_writes_that_are_done_in_any_order_are_all_done(host: Host) -> None:
    server = host.serve(bytes(9 * MIB + 17), reverse=IN_FLIGHT)
    data = os.urandom(9 * MIB + 17)
    assert host.backend().write_from(Given(data), 0, len(data)) == len(data)
    assert server.data == data


def test_clients_that_leave_cost_no_memory(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """libnbd keeps every buffer for good, so there are no more of them than were in use at a time."""
    data = os.urandom(6 * MIB)
    host.serve(data)
    made = 0

    class Counted(stream._Slot):
        def __init__(self) -> None:
            nonlocal made
            made += 1
            super().__init__()

    def leave(_: memoryview) -> int:
        raise ConnectionResetError

    monkeypatch.setattr(stream, "_Slot", Counted)
    monkeypatch.setattr(stream, "_spare", deque[stream._Slot]())
    backend = host.backend()
    for _ in range(24):
        with pytest.raises(ConnectionResetError):
            backend.move(leave, 0, len(data))
        with pytest.raises(ConnectionResetError), NbdBackend(backend._server, SURE, writable=True) as writer:
            writer.write_from(Broken(), 0, len(data))
    assert made <= IN_FLIGHT + 1
    sink = Collected()
    backend.move(sink.write, 0, len(data))
    assert sink.data == data


class Broken:
    """A client that leaves before its first byte."""

    def read_into(self, buffer: memoryview) -> int:
        raise ConnectionResetError


def test_a_server_without_structured_replies_has_one_extent_and_no_bitmap(host: Host) -> None:
    host.serve(pattern(MIB), structured=False)
    backend = host.backend()
    assert told(backend, 5, 100) == [Extent(5, 100, False, False)]
    assert backend.dirty_context is None
    assert backend.read(7, 7) == pattern(MIB)[7:14]


def test_what_fails_in_the_middle_leaves_nothing_in_flight(host: Host) -> None:
    server = host.serve(bytes(8 * MIB), errors={WRITE: 28})
    backend = host.backend()
    with refused("no_space"):
        backend.write_from(Given(pattern(8 * MIB)), 0, 8 * MIB)
    begun = [one for one in server.requests if one[0] == WRITE]
    assert 1 <= len(begun) <= IN_FLIGHT + 1
    server.how.errors.clear()
    backend.write(b"abc", 1)
    assert server.connections == 1
    assert server.data[:5] == b"\0abc\0"


@pytest.mark.parametrize(("number", "code"), [(5, "io_error"), (28, "no_space"), (1, "denied"), (22, "io_error")])
def test_errors_are_told_apart(host: Host, number: int, code: str) -> None:
    host.serve(bytes(MIB), errors={READ: number, WRITE: number, ZEROES: number})
    backend = host.backend()
    for call in (
        lambda: backend.read(0, 1),
        lambda: backend.write(b"a", 0),
        lambda: backend.zero(0, 1),
    ):
        with refused(code):
            call()


def test_zeroing_goes_in_steps_and_keeps_the_space_unless_sparse(host: Host) -> None:
    server = host.serve(size=ZERO_STEP * 2 + 5)
    host.backend().zero(1, ZERO_STEP + 3)
    host.backend(sparse=True).zero(2, 2)
    zeroing = [one[1:] for one in server.requests if one[0] == ZEROES]
    assert zeroing == [(NO_HOLE, 1, ZERO_STEP), (NO_HOLE, 1 + ZERO_STEP, 3), (0, 2, 2)]


def test_where_zeroes_cannot_be_asked_for_they_are_written(host: Host) -> None:
    server = host.serve(pattern(2 * MIB), flags=HAS_FLAGS)
    backend = host.backend()
    backend.write(pattern(2 * MIB, 5), 0)
    backend.zero(3, MIB + 7)
    assert server.data == pattern(2 * MIB, 5)[:3] + bytes(MIB + 7) + pattern(2 * MIB, 5)[MIB + 10 :]
    assert not [one for one in server.requests if one[0] == ZEROES]


# Durability


def test_a_server_that_cannot_flush_makes_nothing_durable(host: Host) -> None:
    host.serve(bytes(MIB), flags=HAS_FLAGS)
    backend = host.backend()
    assert not backend.get_capabilities()["can_flush"]
    backend.flush()  # nothing was written
    backend.write(b"a", 0)
    for _ in range(2):
        with refused("not_supported"):
            backend.flush()


def test_a_flush_after_a_lost_connection_proves_nothing(host: Host) -> None:
    server = host.serve(bytes(MIB))
    backend = host.backend()
    backend.write(b"a", 0)
    server.close()
    again = host.serve(bytes(MIB))
    with refused("io_error"):
        backend.flush()
    with refused("io_error"):
        backend.write(b"a", 0)
    with refused("io_error"):
        backend.flush()
    assert backend.read(0, 1) == b"\0"
    assert not [one for one in again.requests if one[0] in (FLUSH, WRITE)]


def test_a_flush_that_failed_is_not_mended_by_another(host: Host) -> None:
    server = host.serve(bytes(MIB), errors={FLUSH: 5})
    backend = host.backend()
    backend.write(b"a", 0)
    with refused("io_error"):
        backend.flush()
    server.how.errors.clear()
    with refused("io_error"):
        backend.flush()


def test_what_was_flushed_is_not_lost_with_the_connection(host: Host) -> None:
    server = host.serve(bytes(MIB))
    backend = host.backend()
    backend.write(b"a", 0)
    backend.flush()
    server.close()
    again = host.serve(bytes(MIB))
    assert backend.read(0, 1) == b"\0"
    backend.write(b"b", 0)
    backend.flush()
    assert again.data[:1] == b"b"


# Time


@pytest.mark.parametrize(
    "call",
    [
        lambda backend: backend.read(0, MIB),
        lambda backend: backend.write(b"a", 0),
        lambda backend: backend.zero(0, MIB),
        lambda backend: list(backend.extents(0, MIB)),
    ],
    ids=["read", "write", "zero", "extents"],
)
def test_no_answer_is_a_timeout_that_names_the_setting(host: Host, call: Any) -> None:
    host.serve(bytes(MIB), silent=True, contexts={BASE: [(MIB, 0)]})
    with pytest.raises(AgentError, match=r"did not answer within 0\.4 s \(data\.nbd_timeout\)") as error:
        call(host.backend(QUICK))
    assert error.value.code == "timeout"


def test_a_flush_may_take_longer_and_has_a_setting_of_its_own(host: Host) -> None:
    host.serve(bytes(MIB), silent=True)
    with pytest.raises(AgentError, match=r"did not answer within 0\.5 s \(data\.nbd_flush_timeout\)") as error:
        host.backend(QUICK).flush()
    assert error.value.code == "timeout"


def test_no_handshake_is_a_timeout_that_names_the_setting(host: Host) -> None:
    host.serve(bytes(MIB), mute=True)
    with pytest.raises(AgentError, match=r"within 0\.4 s \(data\.nbd_connect_timeout\)") as error:
        host.backend(QUICK).size()
    assert error.value.code == "timeout"


@pytest.mark.parametrize("kind", [READ, WRITE, ZEROES, FLUSH, STATUS])
def test_a_server_that_goes_is_unavailable(host: Host, kind: int) -> None:
    host.serve(bytes(8 * MIB), drop=kind, contexts={BASE: [(8 * MIB, 0)]})
    backend = host.backend()
    calls = {
        READ: lambda: backend.read(0, 8 * MIB),
        WRITE: lambda: backend.write_from(Given(bytes(8 * MIB)), 0, 8 * MIB),
        ZEROES: lambda: backend.zero(0, MIB),
        FLUSH: backend.flush,
        STATUS: lambda: list(backend.extents(0, MIB)),
    }
    with refused("unavailable"):
        calls[kind]()


# How many


@pytest.mark.parametrize(("flags", "many"), [(USUAL, 8), (USUAL & ~MULTI_CONN, 1), (USUAL | READ_ONLY, 8)])
def test_several_connections_are_offered_where_the_server_can_have_them(host: Host, flags: int, many: int) -> None:
    host.serve(bytes(MIB), flags=flags)
    backend = host.backend()
    assert (backend.max_readers, backend.max_writers) == (many, many)
    assert backend.get_capabilities()["read_only"] == bool(flags & READ_ONLY)


@pytest.mark.parametrize(("flags", "all_"), [(USUAL, True), (USUAL & ~MULTI_CONN, False)])
def test_a_flush_covers_others_where_the_server_says_so_and_is_on_this_host(host: Host, flags: int, all_: bool) -> None:
    host.serve(bytes(MIB), flags=flags)
    backend = host.backend()
    assert backend.flush_covers_all is all_
    backend._server = Server("", host="elsewhere")
    assert not backend.flush_covers_all


# Extents

LAYERS = {
    BASE: [(100, 0), (200, 3), (300, 0), (424, 2)],
    DEPTH: [(150, 1), (350, 0), (524, 2)],
    BITMAP: [(50, 0), (300, 1), (674, 0)],
}


@pytest.mark.parametrize("most", [1, 2, 100])
def test_contexts_are_cut_at_each_others_borders_however_short_answers_are(host: Host, most: int) -> None:
    host.serve(bytes(1024), contexts=LAYERS, most=most)
    backend = host.backend()
    assert told(backend, 0, 1024) == [
        Extent(0, 100, False, False),
        Extent(100, 50, True, False),
        Extent(150, 150, True, True),
        Extent(300, 200, False, True),
        Extent(500, 100, False, False),
        Extent(600, 424, True, False),
    ]
    assert told(backend, 120, 60) == [Extent(120, 30, True, False), Extent(150, 30, True, True)]
    assert list(merged(backend.dirty_extents(40, 984))) == [
        DirtyExtent(40, 10, False, False),
        DirtyExtent(50, 50, True, False),
        DirtyExtent(100, 200, True, True),
        DirtyExtent(300, 50, True, False),
        DirtyExtent(350, 250, False, False),
        DirtyExtent(600, 424, False, True),
    ]


def test_a_part_is_asked_for_alone(host: Host) -> None:
    server = host.serve(bytes(1 << 20), contexts={BASE: [(1 << 20, 0)]})
    told(host.backend(), 5000, 100)
    assert [one[2:] for one in server.requests if one[0] == STATUS] == [(5000, 100)]


def test_an_answer_that_leaves_a_context_out_is_an_error(host: Host) -> None:
    host.serve(bytes(1024), contexts=LAYERS, untold=DEPTH)
    with refused("io_error"):
        told(host.backend(), 0, 1024)


def test_an_answer_against_the_protocol_ends_the_connection(host: Host) -> None:
    host.serve(bytes(1024), contexts=LAYERS, most=0)
    with pytest.raises(AgentError, match="invalid length") as error:
        told(host.backend(), 0, 1024)
    assert error.value.code == "unavailable"


@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_dirty_needs_exactly_one_bitmap(host: Host, names: list[str]) -> None:
    contexts = {BASE: [(MIB, 0)]} | {f"qemu:dirty-bitmap:{name}": [(MIB, 1)] for name in names}
    host.serve(bytes(MIB), contexts=contexts)
    backend = host.backend()
    assert backend.dirty_context is None
    with refused("not_found"):
        backend.dirty_extents(0, MIB)
    if names:
        assert backend.get_dirty_extents("qemu:dirty-bitmap:b") == [
            {"start": 0, "length": MIB, "dirty": True, "zero": False}
        ]
    with refused("not_found"):
        backend.get_dirty_extents("qemu:dirty-bitmap:absent")


def test_a_clean_disk_is_not_taken_for_one_without_a_bitmap(host: Host) -> None:
    host.serve(bytes(MIB), contexts={BASE: [(MIB, 0)], BITMAP: [(MIB, 0)]})
    assert list(host.backend().dirty_extents(0, MIB)) == [DirtyExtent(0, MIB, False, False)]


def test_other_bitmaps_are_looked_at_without_losing_writes(host: Host) -> None:
    server = host.serve(bytes(MIB), contexts={BASE: [(MIB, 0)], BITMAP: [(MIB, 0)], BITMAP + "1": [(MIB, 1)]})
    backend = host.backend()
    backend.write(b"a", 0)
    assert backend.get_dirty_extents(BITMAP + "1")[0]["dirty"]
    assert not backend.get_dirty_extents(BITMAP)[0]["dirty"]
    assert [one[0] for one in server.requests if one[0] in (WRITE, FLUSH)] == [WRITE, FLUSH]
    backend.flush()


def test_both_forms_of_an_answer_say_the_same() -> None:
    assert list(pairs([196608, 0, 851968, 3])) == [(196608, 0), (851968, 3)]
    assert list(pairs([(196608, 0), (851968, 3)])) == [(196608, 0), (851968, 3)]
    assert list(pairs([])) == []
    assert cut([pairs([3, 0, 5, 1]), pairs([(4, 7), (9, 8)])]) == [(3, 0, 7), (1, 1, 7), (4, 1, 8)]
    assert cut([]) == []


class Newer:
    """libnbd from 1.18 on: extents as tuples, of 64 bits."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def aio_block_status_64(self, length: int, offset: int, extent: Any) -> Any:
        def flat(context: str, at: int, entries: list[int], error: Any) -> int:
            done: int = extent(context, at, list(zip(entries[::2], entries[1::2], strict=True)), error)
            return done

        return self._handle.aio_block_status(length, offset, flat)


def test_a_newer_libnbd_tells_extents_as_tuples(host: Host) -> None:
    host.serve(bytes(1024), contexts=LAYERS)
    older = told(host.backend(), 0, 1024)
    backend = host.backend()
    backend.size()
    assert backend._stream is not None
    connection = backend._stream._connection
    connection.handle = Newer(connection.handle)
    assert told(backend, 0, 1024) == older


def test_a_huge_image_is_told_of_in_spans_and_nothing_is_kept(host: Host) -> None:
    grain, most = 1 << 16, 1 << 12
    server = host.serve(size=1 << 40, contexts={BASE: Stripes(grain)}, most=most)

    def asked() -> list[tuple[int, int]]:
        return [one[2:] for one in server.requests if one[0] == STATUS]

    found = host.backend().extents(0, 1 << 40)
    assert next(found) == Extent(0, grain, False, False)
    assert asked() == [(0, FIRST_SPAN)]
    tracemalloc.start()
    for _ in range(6 * most):
        next(found)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MIB
    for (offset, length), (after, _) in pairwise(asked()):
        assert after == offset + min(length, grain * most)
    assert max(length for _, length in asked()) == STATUS_SPAN
    server.requests.clear()
    part = host.backend().extents(700 << 30, grain + 1)
    assert list(part) == [Extent(700 << 30, grain, False, False), Extent((700 << 30) + grain, 1, True, False)]
    assert asked() == [(700 << 30, grain + 1)]
