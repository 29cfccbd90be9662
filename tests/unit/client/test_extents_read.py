"""What a server says of an image: read as it comes, judged, and cut into pieces of work."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent.client.dial import dial
from hostagent.client.extents import Extent, Kind, Piece, cut
from hostagent.client.features import Features
from hostagent.client.options import Options
from hostagent.client.remote import Remote
from hostagent.client.server import Server, read_extents
from hostagent.errors import AgentError
from hostagent.extents import clipped
from hostagent.rangeset import RangeSet

DIAL = dial("http://127.0.0.1:1/images/x", Options())


class Scripted(Remote):
    """Gives this text, in blocks of this size."""

    def __init__(self, text: bytes, block: int) -> None:
        super().__init__(DIAL)
        self._text, self._block = text, block

    def extents(self, query: str) -> Iterator[bytes]:
        for at in range(0, len(self._text), self._block):
            yield self._text[at : at + self._block]


def read(text: bytes, block: int = 7, *, dirty: bool = False, most: int = 1000) -> list[Extent]:
    server = Server(DIAL, Features(extents=True), Options(extents_most=most))
    return list(read_extents(Scripted(text, block), server, dirty=dirty))


lengths = st.lists(st.tuples(st.integers(1, 1 << 40), st.booleans(), st.booleans()), max_size=30)


def listed(found: list[tuple[int, bool, bool]], name: str = "hole") -> list[dict[str, Any]]:
    start, result = 0, []
    for length, zero, other in found:
        result.append({"start": start, "length": length, "zero": zero, name: other})
        start += length
    return result


@given(lengths, st.integers(1, 200), st.sampled_from([None, 1]))
def test_however_it_comes_it_is_the_same(found: list[tuple[int, bool, bool]], block: int, indent: int | None) -> None:
    objects = listed(found)
    extents = read(json.dumps(objects, indent=indent).encode(), block)
    flat = [(one.start, one.start + one.length, one.zero, one.hole) for one in extents]
    assert sum(end - begin for begin, end, _, _ in flat) == sum(length for length, _, _ in found)
    for one in objects:
        holding = [f for f in flat if f[0] <= one["start"] and one["start"] + one["length"] <= f[1]]
        assert [(f[2], f[3]) for f in holding] == [(one["zero"], one["hole"])]
    assert all(a[2:] != b[2:] for a, b in itertools.pairwise(flat)), "neighbours that say the same are one"


def test_dirty_extents_say_so() -> None:
    text = json.dumps(listed([(10, False, True), (10, True, True), (5, False, False)], "dirty")).encode()
    assert [(one.dirty, one.zero) for one in read(text, dirty=True)] == [(True, False), (True, True), (False, False)]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[",
        b'[{"start": 0, "length": 5, "zero": false}',
        b'[{"start": 0, "length": 5, "zero": false}, {"start": 6, "length": 5, "zero": false}]',
        b'[{"start": 0, "length": 5, "zero": false}, {"start": 3, "length": 5, "zero": false}]',
        b'[{"start": 3, "length": 5, "zero": false}]',
        b'[{"start": 0, "length": -5, "zero": false}]',
        b'[{"start": 0, "length": true, "zero": false}]',
        b'[{"start": 0, "length": 5, "zero": 1}]',
        b'[{"start": 0, "zero": false}]',
        b"[[0, 5]]",
        b'["}"]',
        b"[" + b"x" * 9000 + b"]",
        b"<html>}</html>",
        b'[{"start": 0, "length": 9999999999999999999999, "zero": true}]',
        b"[" * 3000 + b"}",
    ],
)
def test_what_is_no_list_of_extents_is_refused(text: bytes) -> None:
    with pytest.raises(AgentError) as refused:
        read(text)
    assert refused.value.code == "io_error"


@given(st.binary(max_size=200))
def test_no_bytes_break_it(text: bytes) -> None:
    try:
        read(b"[" + text)
    except AgentError as refused:
        assert refused.code in ("io_error", "too_large")


def test_more_extents_than_allowed_are_refused() -> None:
    text = json.dumps(listed([(1, bool(n % 2), False) for n in range(50)])).encode()
    with pytest.raises(AgentError) as refused:
        read(text, most=49)
    assert refused.value.code == "too_large"
    assert len(read(text, most=50)) == 50


runs = st.lists(st.tuples(st.integers(1, 50), st.sampled_from(list(Kind))), max_size=12)
holes = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 40)), max_size=8)


@given(runs, holes, st.integers(1, 20), st.integers(1, 60))
def test_the_work_is_what_is_left_once_each(
    found: list[tuple[int, Kind]], done: list[tuple[int, int]], data: int, zero: int
) -> None:
    pieces, position = [], 0
    for length, kind in found:
        pieces.append(Piece(position, position + length, kind))
        position += length
    durable = RangeSet()
    for begin, length in done:
        durable.add(begin, begin + length)
    kinds = {byte: kind for begin, end, kind in pieces for byte in range(begin, end)}
    old = {byte for begin, end in durable.pairs() for byte in range(begin, end)}
    work = list(cut(pieces, durable, data, zero))
    covered = [byte for begin, end, kind in work for byte in range(begin, end)]
    assert covered == sorted(set(kinds) - old), "in order, and nothing twice"
    assert all(kinds[byte] is kind for begin, end, kind in work for byte in range(begin, end))
    assert all(end - begin <= data for begin, end, kind in work if kind is Kind.DATA)
    assert all(end - begin <= zero for begin, end, kind in work if kind is Kind.ZERO)


def test_a_part_is_cut_out() -> None:
    whole = [Extent(0, 10, False), Extent(10, 10, True)]
    assert list(clipped(whole, 5, 12)) == [Extent(5, 5, False), Extent(10, 2, True)]
