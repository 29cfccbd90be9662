"""The map of an image in memory: what QEMU says becomes it, ranges of it, what is sent together."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostagent.data.backends.base import Extent
from hostagent.data.backends.mapping import Map, Piece, Unmappable, Where, batched, made
from hostagent.data.backends.qemu_map import parsed
from hostagent.extents import merged

SIZES = [1 << 40, 1 << 40]
Entry = dict[str, Any]


def entry(start: int, length: int, kind: str, *, depth: int = 0, offset: int = 0) -> Entry:
    found: Entry = {"start": start, "length": length, "depth": depth, "present": kind != "hole"}
    found |= {"zero": kind in ("zero", "hole"), "data": kind in ("data", "compressed")}
    return found | ({"offset": offset} if kind == "data" else {})


@st.composite
def images(draw: st.DrawFn) -> list[Entry]:
    found, at = [], 0
    for length, kind, depth, offset in draw(
        st.lists(
            st.tuples(
                st.integers(1, 50),
                st.sampled_from(["data", "zero", "hole", "compressed"]),
                st.integers(0, 1),
                st.integers(0, 100),
            ),
            max_size=12,
        )
    ):
        found.append(entry(at, length, kind, depth=depth, offset=offset))
        at += length
    return found


def byte_by_byte(entries: list[Entry]) -> list[tuple[object, ...]]:
    """Where each byte is."""
    found: list[tuple[object, ...]] = []
    for one in entries:
        for at in range(one["length"]):
            if one["zero"]:
                found.append((Where.ZEROS, not one["present"]))
            elif "offset" in one:
                found.append((Where.FILE, one["depth"], one["offset"] + at))
            else:
                found.append((Where.ELSEWHERE,))
    return found


def of_pieces(pieces: Iterator[Piece], start: int) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for piece in pieces:
        assert piece.start == start + len(found)
        assert piece.length > 0
        for at in range(piece.length):
            told = (piece.layer, piece.offset + at) if piece.where is Where.FILE else ()
            found.append((piece.where, *told))
    return found


@settings(deadline=None)
@given(images(), st.integers(0, 700), st.integers(0, 700))
def test_any_range_is_where_qemu_says_that_it_is(entries: list[Entry], start: int, length: int) -> None:
    known = made(entries, SIZES, most=1000)
    model = byte_by_byte(entries)
    assert known.size == len(model)
    places = [(one[0],) if one[0] is Where.ZEROS else one for one in model]
    assert of_pieces(known.pieces(start, length), start) == places[start : start + length]
    extents = [(one.zero, one.hole) for one in known.extents(start, length) for _ in range(one.length)]
    told = [(one[0] is Where.ZEROS, one[0] is Where.ZEROS and bool(one[1])) for one in model]
    assert extents == told[start : start + length]


@settings(deadline=None)
@given(images())
def test_neighbours_that_follow_one_another_are_one(entries: list[Entry]) -> None:
    known, again = made(entries, SIZES, most=1000), made(split(entries), SIZES, most=1000)
    assert len(again) == len(known) <= len(entries)
    assert list(again.pieces(0, 1000)) == list(known.pieces(0, 1000))


def split(entries: list[Entry]) -> Iterator[Entry]:
    """The same, byte by byte."""
    for one in entries:
        for at in range(one["length"]):
            offset = {"offset": one["offset"] + at} if "offset" in one else {}
            yield one | {"start": one["start"] + at, "length": 1} | offset


@settings(deadline=None)
@given(images(), st.integers(1, 60), st.integers(1, 100), st.integers(0, 400), st.integers(0, 400))
def test_what_is_sent_together_is_all_in_order(
    entries: list[Entry], small: int, most: int, start: int, length: int
) -> None:
    known = made(entries, SIZES, most=1000)
    pieces = list(known.pieces(start, length))
    left = list(pieces)
    at = start
    for batch in batched(iter(pieces), small=small, most=max(small, most)):
        assert batch.start == at
        at += batch.length
        took = []
        while left and left[0].start < at:
            took.append(left.pop(0))
        assert sum(one.length for one in took) == batch.length
        if batch.pieces:
            assert batch.pieces == took
            assert all(one.where is not Where.ELSEWHERE for one in took)
            assert len(took) == 1 or batch.length <= max(small, most)
        else:
            assert any(one.where is Where.ELSEWHERE for one in took)
            assert all(one.where is Where.ELSEWHERE or one.length < small for one in took)
    assert not left


@settings(deadline=None)
@given(images(), st.integers(1, 40))
def test_a_list_is_read_in_blocks_of_any_size(entries: list[Entry], size: int) -> None:
    text = ("[" + ",\n".join(json.dumps(one) for one in entries) + "]\n").encode()
    blocks = [text[at : at + size] for at in range(0, len(text), size)]
    assert list(parsed(iter(blocks))) == entries


@pytest.mark.parametrize(
    "text", ["{", "nonsense", '[{"start": 0}', "[{}x{}]", '[{"a": {"b": 1}}', "]" * 5000 + "x", "", "[", "]"]
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(Unmappable):
        made(parsed(iter([text.encode()])), SIZES, most=10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": 1},
        {"depth": 2},
        {"depth": -1},
        {"length": -5},
        {"start": "x"},
        {"length": None},
    ],
)
def test_what_is_no_extent_is_refused(wrong: Entry) -> None:
    with pytest.raises(Unmappable):
        made([entry(0, 10, "data") | wrong], SIZES, most=10)


def test_what_lies_beyond_its_file_is_elsewhere() -> None:
    known = made([entry(0, 10, "data", offset=91), entry(10, 10, "data", offset=90)], [100], most=10)
    assert [one.where for one in known.pieces(0, 20)] == [Where.ELSEWHERE, Where.FILE]
    known = made([entry(0, 10, "data", offset=-1)], [100], most=10)
    assert [one.where for one in known.pieces(0, 10)] == [Where.ELSEWHERE]


def test_a_newer_qemu_says_that_it_is_compressed() -> None:
    known = made([entry(0, 10, "data") | {"compressed": True}], [100], most=10)
    assert [one.where for one in known.pieces(0, 10)] == [Where.ELSEWHERE]


def test_more_extents_than_allowed_are_refused() -> None:
    entries = [entry(at, 1, "data", offset=2 * at) for at in range(11)]
    assert len(made(entries[:10], SIZES, most=10)) == 10
    with pytest.raises(Unmappable, match="map_extents"):
        made(entries, SIZES, most=10)


CLUSTER, COUNT = 1 << 20, 1 << 20


@pytest.fixture(scope="module")
def fragmented() -> Map:
    """1 TiB, in a million extents."""
    entries = (
        entry(at * CLUSTER, CLUSTER, "data" if at % 3 else "zero", offset=(at * 7919 % COUNT) * CLUSTER)
        for at in range(COUNT)
    )
    return made(entries, [1 << 40], most=COUNT)


def test_a_million_extents_are_small(fragmented: Map) -> None:
    assert len(fragmented) == COUNT
    tracemalloc.start()
    try:
        first = next(merged(fragmented.extents(0, 1 << 40)))
        assert first == Extent(0, CLUSTER, True, False)
        for number, _ in enumerate(fragmented.extents(0, 1 << 40)):
            if number > 100_000:
                break
        assert tracemalloc.get_traced_memory()[1] < 100_000, "they are all in memory at once"
    finally:
        tracemalloc.stop()


def test_a_part_of_a_million_extents_is_found_at_once(fragmented: Map) -> None:
    began = time.monotonic()
    for number in range(1000):
        start = number * (COUNT // 1000) * CLUSTER + 5
        assert sum(one.length for one in fragmented.extents(start, CLUSTER)) == CLUSTER
        assert sum(one.length for one in fragmented.pieces(start, CLUSTER)) == CLUSTER
    assert time.monotonic() - began < 20, "going through all of them takes minutes"
