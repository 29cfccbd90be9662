"""PATCH of an image: zero, flush."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.daemons import Daemon
from tests.data.exports import QemuNbd
from tests.data.table import Answer, Row, check, refused

SIZE = 1 << 20
BEFORE = b"\xaa" * SIZE
DONE = Answer(200, {"content-length": "0"}, b"")


@pytest.fixture(scope="module")
def image(home: Path) -> Path:
    return home / "image.raw"


@pytest.fixture(scope="module")
def export(image: Path) -> Iterator[QemuNbd]:
    image.write_bytes(BEFORE)
    with QemuNbd(image) as server:
        yield server


@pytest.fixture(scope="module")
def ticket(daemon: Daemon, export: QemuNbd) -> str:
    return daemon.ticket(export.url, SIZE, "write")


@pytest.fixture(autouse=True)
def before(daemon: Daemon, ticket: str) -> None:
    with daemon.tcp() as wire:
        assert wire.ask("PUT", f"/images/{ticket}", None, BEFORE).status == 200


def patch(name: str, body: Any, answer: Answer, flaw: Answer | None = None) -> Row:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Row(name, "PATCH", "", answer, flaw, {}, data)


ZEROED = [
    (patch("part", {"op": "zero", "offset": 4096, "size": 8192}, DONE), 4096, 8192),
    (patch("from-0", {"op": "zero", "size": 4096}, DONE), 0, 4096),
    (patch("all", {"op": "zero", "size": SIZE}, DONE), 0, SIZE),
    (patch("unaligned", {"op": "zero", "offset": 777, "size": 5001}, DONE), 777, 5001),
    (patch("last-byte", {"op": "zero", "offset": SIZE - 1, "size": 1}, DONE), SIZE - 1, 1),
    (patch("nothing", {"op": "zero", "size": 0}, DONE), 0, 0),
    (patch("nothing-at-the-end", {"op": "zero", "offset": SIZE, "size": 0}, DONE), 0, 0),
    (patch("and-flush", {"op": "zero", "size": 4096, "flush": True}, DONE), 0, 4096),
    (patch("no-flush", {"op": "zero", "size": 4096, "flush": False}, DONE), 0, 4096),
    (patch("unknown-key", {"op": "zero", "size": 4096, "future": [1]}, DONE), 0, 4096),
    (patch("flush", {"op": "flush"}, DONE), 0, 0),
    (patch("flush-with-more", {"op": "flush", "size": "x"}, DONE), 0, 0),
]


@pytest.mark.parametrize(("row", "offset", "size"), ZEROED, ids=[row.id for row, _, _ in ZEROED])
def test_zeros_are_made_where_they_belong_and_nowhere_else(
    daemon: Daemon, image: Path, ticket: str, row: Row, offset: int, size: int
) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, row, f"/images/{ticket}")
    assert image.read_bytes() == BEFORE[:offset] + bytes(size) + BEFORE[offset + size :]


BEYOND = Answer(416, {"content-range": f"bytes */{SIZE}"}, "")
ACCEPTED = Answer(200)
REFUSED = [
    patch("no-size", {"op": "zero"}, refused(400, "Missing required value for 'size'")),
    patch("size-is-text", {"op": "zero", "size": "1"}, refused(400, "Integer required")),
    patch("size-is-null", {"op": "zero", "size": None}, refused(400, "'size'|Integer required")),
    patch("size-is-float", {"op": "zero", "size": 4096.0}, refused(400, "Integer required")),
    patch("size-is-negative", {"op": "zero", "size": -1}, refused(400, "Invalid value -1 < 0")),
    patch("offset-is-text", {"op": "zero", "size": 1, "offset": "0"}, refused(400, "Integer required")),
    patch("offset-is-negative", {"op": "zero", "size": 1, "offset": -1}, refused(400, "Invalid value -1 < 0")),
    patch("flush-is-text", {"op": "zero", "size": 1, "flush": "y"}, refused(400, "Boolean required")),
    patch("flush-is-a-number", {"op": "zero", "size": 1, "flush": 1}, refused(400, "Boolean required")),
    patch("no-op", {"size": 1}, refused(400, "Missing required value for")),
    patch("unknown-op", {"op": "trim", "size": 1}, refused(400, "Unsupported value .*trim.*'flush', 'zero'")),
    patch("op-is-a-list", {"op": ["zero"], "size": 1}, refused(400, ".")),
    patch("a-list", [], refused(400, "."), refused(500, ".")),
    patch("a-number", 7, refused(400, "."), refused(500, ".")),
    patch("null", None, refused(400, "."), refused(500, ".")),
    patch("not-json", b"{op: zero}", refused(400, "Invalid JSON|json")),
    patch("empty", b"", refused(400, "Invalid JSON|json|Content-Length")),
    patch("not-utf-8", b'{"op": "zero", "size": "\xff\xfe"}', refused(400, ".")),
    patch("deep", b"[" * 900 + b"]" * 900, refused(400, "."), refused(500, ".")),
    patch("beyond", {"op": "zero", "offset": SIZE - 1, "size": 2}, BEYOND),
    patch("far-beyond", {"op": "zero", "offset": 2**63, "size": 2**63}, BEYOND),
    patch("enormous", {"op": "zero", "size": 10**30}, BEYOND),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.id)
def test_what_is_refused_zeroes_nothing(daemon: Daemon, image: Path, ticket: str, row: Row) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, row, f"/images/{ticket}")
    assert image.read_bytes() == BEFORE


def test_true_is_no_number_of_bytes(daemon: Daemon, image: Path, ticket: str) -> None:
    with daemon.tcp() as wire:
        row = patch("", {"op": "zero", "size": True}, refused(400, "Integer required"), Answer(200))
        check(daemon, wire, row, f"/images/{ticket}")
    assert image.read_bytes() == (BEFORE if daemon.name == "ours" else b"\0" + BEFORE[1:])


def test_what_is_wrong_in_itself_is_said_before_who_asks(daemon: Daemon) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, patch("", {"op": "zero"}, refused(400, "size")), "/images/nobody")
        check(daemon, wire, patch("", {"op": "flush"}, refused(403, "not allowed", closes=True)), "/images/nobody")


def test_a_reader_may_neither_zero_nor_flush(daemon: Daemon, export: QemuNbd, image: Path) -> None:
    reader = daemon.ticket(export.url, SIZE)
    for body in ({"op": "zero", "size": 1}, {"op": "flush"}):
        with daemon.tcp() as wire:
            check(daemon, wire, patch("", body, refused(403, "forbids write", closes=True)), f"/images/{reader}")
    assert image.read_bytes() == BEFORE


def test_zeros_of_a_sparse_ticket_free_space(daemon: Daemon, export: QemuNbd, image: Path) -> None:
    """And those of another one do not."""
    for sparse in (False, True):
        ticket = daemon.ticket(export.url, SIZE, "write", sparse=sparse)
        with daemon.tcp() as wire:
            assert wire.ask("PUT", f"/images/{ticket}", None, BEFORE).status == 200
            check(daemon, wire, patch("", {"op": "zero", "size": SIZE, "flush": True}, DONE), f"/images/{ticket}")
        assert (image.stat().st_blocks * 512 < SIZE // 2) == sparse
        assert image.read_bytes() == bytes(SIZE)
