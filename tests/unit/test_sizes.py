from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent.errors import AgentError
from hostagent.sizes import format_duration, format_rate, format_size, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("1048576", 1 << 20), ("64M", 64 << 20), ("1GiB", 1 << 30), ("512k", 512 << 10), ("512K", 512 << 10),
        ("10MB", 10_000_000), ("1kB", 1000), ("2T", 2 << 40), ("1PiB", 1 << 50), ("100B", 100), ("1.5 GiB", 3 << 29),
        (" 7 ", 7), ("0.5K", 512),
    ],
)  # fmt: skip
def test_a_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "M",
        "1X",
        "1 M B",
        "1.M",
        "0x10",
        "1e9",
        "1,5G",
        "0.3",
        "1.0001K",
        "9P9",
        "٣M",
        "99999999P",
        "1" * 5000,
        "1EiB",
    ],
    ids=lambda text: text[:10] or "empty",
)
def test_what_is_no_size_is_refused_by_its_field_and_value(text: str) -> None:
    with pytest.raises(AgentError) as refused:
        parse_size(text, field="increment")
    assert refused.value.code == "invalid"
    assert refused.value.field == "increment"
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("50MiB/s", 50 << 20),
        ("50M/s", 50 << 20),
        ("1GB/s", 10**9),
        ("0", 0),
        ("unlimited", 0),
        ("8MiB", 8 << 20),
        ("9B/s", 9),
    ],
)
def test_a_rate_is_read_with_its_unit(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["50", "1048576", "50/s", "2.5"])
def test_a_rate_without_a_unit_is_refused_because_virsh_means_mib(text: str) -> None:
    with pytest.raises(AgentError) as refused:
        parse_rate(text)
    assert refused.value.remedy is not None
    assert f"virsh's means MiB/s; write {text.removesuffix('/s')}MiB/s" in refused.value.remedy


@pytest.mark.parametrize("text", ["50Mbit/s", "fast", "/s", "", "-1M/s", "50MiB/h"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(AgentError):
        parse_rate(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (64 << 20, "64 MiB"), (10 << 30, "10 GiB"),
     ((1 << 30) - 1, "1 GiB"), (1 << 62, "4 EiB"), (-2048, "-2 KiB")],
)  # fmt: skip
def test_a_size_is_shown_short(size: int, text: str) -> None:
    assert format_size(size) == text


def test_a_rate_is_shown_per_second() -> None:
    assert format_rate(50 << 20) == "50 MiB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.44, "0.4 s"), (12.3, "12 s"), (59.9, "1 min 00 s"), (185, "3 min 05 s"), (8040, "2 h 14 min"),
     (273600, "3 d 4 h"), (-5, "-5 s")],
)  # fmt: skip
def test_a_duration_is_shown_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.text(max_size=60))
def test_no_text_breaks_the_parsers(text: str) -> None:
    for parse in (parse_size, parse_rate):
        try:
            assert 0 <= parse(text) < 2**63
        except AgentError as refused:
            assert refused.code == "invalid"


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_what_is_shown_is_within_a_percent_when_read_again(size: int) -> None:
    shown = format_size(size)
    if shown.endswith("EiB") or "." in shown:
        return  # beyond the parser's units, or no whole number of bytes
    assert parse_size(shown) == pytest.approx(size, rel=0.01)
