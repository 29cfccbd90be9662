"""Ranges of requests, and sets of ranges."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent.data.errors import HttpError
from hostagent.data.ranges import parse_content_range, parse_range
from hostagent.rangeset import RangeSet

SIZE = 1000


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-999", (0, 1000)),
        ("bytes=10-19", (10, 10)),
        ("bytes=999-", (999, 1)),
        ("bytes=-1", (999, 1)),
        ("bytes=-1000", (0, 1000)),
        ("bytes=-5000", (0, 1000)),
    ],
)
def test_a_range_names_bytes_of_the_image(text: str, found: tuple[int, int]) -> None:
    assert parse_range(text).within(SIZE) == found


@pytest.mark.parametrize(
    "text", ["bytes=0-1000", "bytes=1000-", "bytes=1001-", "bytes=-0", "bytes=5000-6000", f"bytes=0-{10**30}"]
)
def test_bytes_that_are_not_there_are_416_and_the_size_is_told(text: str) -> None:
    with pytest.raises(HttpError) as refused:
        parse_range(text).within(SIZE)
    assert refused.value.status == 416
    assert ("content-range", "bytes */1000") in refused.value.headers


@pytest.mark.parametrize(
    "text",
    ["", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=5-4", "bytes=0-1,5-6", "bits=0-1", "bytes=0-1x",
     "bytes=+0-1", "bytes=0 - 1", "bytes=\u0660-\u0661", "bytes=0-" + "9" * 41],
)  # fmt: skip
def test_what_is_no_single_range_is_416(text: str) -> None:
    with pytest.raises(HttpError) as refused:
        parse_range(text)
    assert refused.value.status == 416


def test_no_range_is_within_an_empty_image() -> None:
    for text in ("bytes=0-", "bytes=0-0", "bytes=-1"):
        with pytest.raises(HttpError):
            parse_range(text).within(0)


@pytest.mark.parametrize(
    ("text", "found"),
    [("bytes 0-0/1", (0, 1)), ("bytes 5-9/*", (5, 5)), ("bytes 0-999/1000", (0, 1000)), ("bytes 7-*/*", (7, None))],
)
def test_a_content_range_names_where_a_body_goes(text: str, found: tuple[int, int]) -> None:
    assert parse_content_range(text) == found


@pytest.mark.parametrize(
    "text", ["", "bytes 1-0/*", "bytes 0-9/9", "bytes */100", "bytes=0-1/2", "bytes 0-/5", "0-1/2"]
)
def test_another_content_range_is_400(text: str) -> None:
    with pytest.raises(HttpError) as refused:
        parse_content_range(text)
    assert refused.value.status == 400


pairs = st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 60)), max_size=40)


@given(pairs)
def test_a_set_of_ranges_is_a_set_of_bytes(steps: list[tuple[bool, int, int]]) -> None:
    ranges, model = RangeSet(), set[int]()
    for add, begin, end in steps:
        if add:
            ranges.add(begin, end)
            model |= set(range(begin, end))
        else:
            ranges.discard(begin, end)
            model -= set(range(begin, end))
        pairs = ranges.pairs()
        assert {byte for b, e in pairs for byte in range(b, e)} == model
        missing = list(ranges.missing(begin, end))
        assert [byte for b, e in missing for byte in range(b, e)] == [b for b in range(begin, end) if b not in model]
        assert len(ranges) == len(model)
        assert all(b < e for b, e in pairs)
        assert all(first[1] < second[0] for first, second in itertools.pairwise(pairs)), "apart, in order"


@given(st.lists(st.integers(0, 500), max_size=100))
def test_a_full_set_forgets_and_never_invents(begins: list[int]) -> None:
    ranges, model = RangeSet(most=5), set[int]()
    for begin in begins:
        ranges.add(begin * 10, begin * 10 + 3)
        model |= set(range(begin * 10, begin * 10 + 3))
        assert len(ranges.pairs()) <= 5
        assert {byte for b, e in ranges.pairs() for byte in range(b, e)} <= model


@given(pairs)
def test_a_full_set_that_must_be_whole_invents_and_never_forgets(steps: list[tuple[bool, int, int]]) -> None:
    ranges, model = RangeSet(most=3, whole=True), set[int]()
    for add, begin, end in steps:
        if add:
            ranges.add(begin, end)
            model |= set(range(begin, end))
        else:
            ranges.discard(begin, end)
            model -= set(range(begin, end))
        assert {byte for b, e in ranges.pairs() for byte in range(b, e)} >= model
