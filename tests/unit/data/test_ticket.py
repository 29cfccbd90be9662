"""The JSON of a ticket: what is taken, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent.data import ticket
from hostagent.data.errors import HttpError

GOOD: dict[str, Any] = {"uuid": "a-b", "size": 10, "ops": ["read"], "timeout": 300, "url": "nbd:unix:/s"}


def parsed(**changes: Any) -> ticket.Spec:
    found = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    return ticket.parse(json.dumps(found).encode(), "a-b", 60)


def test_a_ticket_has_the_defaults_of_the_dialect() -> None:
    spec = parsed(unknown="passed over")
    assert (spec.size, spec.ops, spec.timeout, spec.inactivity_timeout) == (10, ("read",), 300, 60)
    assert (spec.sparse, spec.dirty, spec.filename, spec.transfer_id) == (False, False, None, None)
    assert spec.readable
    assert not spec.writable


def test_the_right_to_write_is_one_to_read() -> None:
    spec = parsed(ops=["write"])
    assert spec.readable
    assert spec.writable


@pytest.mark.parametrize("name", ["uuid", "size", "ops", "timeout", "url"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(HttpError, match=f"Required ticket parameter is missing: {name}") as refused:
        parsed(**{name: ...})
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", "1"), ("size", -1), ("size", True), ("size", 1.5), ("size", 2**63), ("size", None),
        ("timeout", -1), ("timeout", "300"), ("timeout", True), ("timeout", 10**12),
        ("ops", "read"), ("ops", ["erase"]), ("ops", [1]), ("ops", None),
        ("url", ""), ("url", 5), ("url", "x" * 5000),
        ("uuid", "a/b"), ("uuid", ""), ("uuid", "a\r\nb"), ("uuid", "x" * 200), ("uuid", 5),
        ("sparse", 1), ("dirty", "yes"), ("filename", 5), ("transfer_id", []), ("image", []), ("rate", -1),
        ("inactivity_timeout", -5),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(name: str, value: Any) -> None:
    with pytest.raises(HttpError, match=f"Invalid value for '{name}'") as refused:
        parsed(**{name: value})
    assert refused.value.status == 400


def test_the_ticket_of_another_url_is_refused() -> None:
    with pytest.raises(HttpError, match="not the one in the URL"):
        ticket.parse(json.dumps(GOOD).encode(), "other", 60)


def test_no_secret_is_in_an_error_or_a_repr() -> None:
    with pytest.raises(HttpError) as refused:
        parsed(uuid="s3cret/id")
    assert "s3cret" not in str(refused.value)
    assert "a-b" not in repr(parsed())


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b"\xff", b"{", b"[" * 100000, b'{"a":' * 50 + b"1" + b"}" * 50])
def test_what_is_no_ticket_is_400(body: bytes) -> None:
    with pytest.raises(HttpError) as refused:
        ticket.parse(body, "a-b", 60)
    assert refused.value.status == 400


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*GOOD, "sparse", "dirty", "filename", "image", "rate"]), values), st.booleans())
def test_any_json_is_a_ticket_or_400(changes: dict[str, Any], complete: bool) -> None:
    found = GOOD | changes if complete else changes
    try:
        spec = ticket.parse(json.dumps(found).encode(), "a-b", 60)
    except HttpError as refused:
        assert refused.status == 400
    else:
        assert spec.size >= 0
        assert set(spec.ops) <= {"read", "write"}


@given(st.binary(max_size=200))
def test_any_bytes_are_a_ticket_or_400(body: bytes) -> None:
    with pytest.raises(HttpError) as refused:
        ticket.parse(body, "a-b", 60)
    assert refused.value.status == 400
