"""Anything at all, sent to a running daemon: it answers or closes, what it answers next is what was asked next, and it
lives.

Raw bytes on raw sockets. What was once found is kept as an example. The marker after each case is a request with a
range of its own, so that no other answer can be taken for its answer.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.data.daemons import Daemon, Ours
from tests.data.wire import Ended, Reply, Wire, chunked, written

SIZE = 1 << 20
CONTENT = os.urandom(SIZE)
SEEN_BY_LIMITS = {"header_timeout": 0.5, "idle_timeout": 5.0, "turn_timeout": 1.0}
CASES = int(os.environ.get("FUZZ", "40"))
"""Of each test; `FUZZ=20000 pytest tests/data/test_fuzz.py` looks longer."""
usual = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
PATIENCE = 20.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Ours(tmp_path_factory.mktemp("daemon"), settings=SEEN_BY_LIMITS) as process:
        yield process
        assert process.process is not None and process.process.poll() is None, "it did not live through this"
        log = process.log.read_text()
        assert "Traceback" not in log, log[-3000:]


@pytest.fixture(scope="module")
def ticket(daemon: Daemon, home: Path) -> str:
    image = home / "image.raw"
    image.write_bytes(CONTENT)
    return daemon.ticket(f"file://{image}", SIZE, timeout=3600)


@pytest.fixture(scope="module")
def scratch(daemon: Daemon, home: Path) -> str:
    """A ticket for an image that may be written."""
    image = home / "scratch.raw"
    image.write_bytes(bytes(SIZE))
    return daemon.ticket(f"file://{image}", SIZE, "write", timeout=3600)


MARKER = (424242, 424299)


def marker(ticket: str) -> bytes:
    return written("GET", f"/images/{ticket}", {"Range": f"bytes={MARKER[0]}-{MARKER[1]}"})


def is_marker(reply: Reply) -> bool:
    return reply.status == 206 and reply.body == CONTENT[MARKER[0] : MARKER[1] + 1]


def answered(wire: Wire, data: bytes, ticket: str) -> list[Reply]:
    """Send it and the marker; all answers before the marker's. The connection may end instead, and says so before."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        wire.send(data + 2 * marker(ticket))  # the first one may have become a part of what was before it
    found: list[Reply] = []
    wire.socket.settimeout(PATIENCE)
    while True:
        try:
            reply = wire.reply()
        except (Ended, ConnectionResetError):
            return found
        if is_marker(reply):
            return found
        found.append(reply)
        assert len(found) <= data.count(b"\n") + 1, "more answers than lines"
        if reply.last:
            assert wire.ended(PATIENCE), "it said that it closes, and did not"
            return found


def sane(replies: list[Reply], *, statuses: set[int]) -> None:
    for reply in replies:
        assert reply.status in statuses, reply
        assert b"Traceback" not in reply.body


CLIENT_ERRORS = {400, 403, 404, 405, 408, 412, 413, 414, 416, 417, 431, 501, 505}
FINE = {200, 206}


# Heads

tokens = st.sampled_from(["GET", "PUT", "PATCH", "POST", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "G\0T", ""])
texts = st.text(st.characters(max_codepoint=255), max_size=40)
paths = st.one_of(
    st.sampled_from(["/", "/info/", "/images/", "/images/TICKET", "/images/TICKET/extents", "/images/TICKET/checksum",
                     "/images/TICKET/progress", "/images/TICKET/extents/..", "//images/TICKET", "*", "/tickets/x"]),
    texts.map(lambda text: "/images/" + text),
    texts.map(lambda text: "/images/TICKET" + text),
)  # fmt: skip
queries = st.one_of(st.just(""), texts.map(lambda text: "?" + text), st.sampled_from([
    "?close=y", "?flush=n", "?context=dirty", "?start=1&length=2", "?start=-1", "?length=99999999999999999999",
    "?" + "a=b&" * 30, "?%00", "?=", "?&&&", "?start=1&start=x"]))  # fmt: skip
names = st.one_of(
    st.sampled_from(["Host", "Range", "Content-Length", "Transfer-Encoding", "Connection", "Expect", "If-Match", "If-Range",
                     "Content-Range", "Accept", "Origin", "Content-Length ", "content-LENGTH", "Upgrade", ""]),
    texts,
)  # fmt: skip
values = st.one_of(
    st.sampled_from(["0", "5", "-1", "99999999999999999999", "bytes=0-9", "bytes=-5", "bytes=5-", "bytes=9-1", "chunked",
                     "identity", "close", "keep-alive", "100-continue", "*", '"x"', "bytes 0-4/*", "bytes */5", "gzip, chunked"]),
    texts,
)  # fmt: skip
heads = st.tuples(
    tokens, paths, queries, st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/1.9", "HTTP/2", "http/1.1", ""])
)
bodies = st.one_of(
    st.just(b""),
    st.binary(max_size=60),
    st.lists(st.binary(min_size=1, max_size=9), max_size=4).map(lambda p: chunked(*p)),
)
ends = st.sampled_from(["\r\n", "\n", "\r", "\r\n\r\n", " \r\n"])


@usual
@given(head=heads, headers=st.lists(st.tuples(names, values), max_size=4), end=ends, body=bodies)
@example(
    head=("GET", "/images/TICKET", "", "HTTP/1.1"),
    headers=[("Content-Length", "5"), ("Transfer-Encoding", "chunked")],
    end="\r\n",
    body=chunked(b"x"),
)
@example(
    head=("PUT", "/images/TICKET", "", "HTTP/1.0"),
    headers=[("Transfer-Encoding", "chunked")],
    end="\r\n",
    body=chunked(b"x"),
)
def test_any_head_and_body(
    daemon: Daemon, ticket: str, head: tuple[str, str, str, str], headers: list[tuple[str, str]], end: str, body: bytes
) -> None:
    method, path, query, version = head
    lines = [
        f"{method} {path.replace('TICKET', ticket)}{query} {version}",
        "Host: a",
        *(f"{n}: {v}" for n, v in headers),
    ]
    data = (end.join(lines) + end + end).encode("latin-1") + body
    with daemon.tcp() as wire:
        sane(answered(wire, data, ticket), statuses=FINE | CLIENT_ERRORS)


@usual
@given(data=st.binary(max_size=300))
@example(data=b"\r\n" * 50)
@example(data=b"GET / HTTP/1.1\r\n")
@example(data=b"\x16\x03\x01\x00\xff")
@example(data=b"GET http://[::1/ HTTP/1.1\r\nHost: a\r\n\r\n")
def test_any_bytes(daemon: Daemon, ticket: str, data: bytes) -> None:
    with daemon.tcp() as wire:
        sane(answered(wire, data, ticket), statuses=FINE | CLIENT_ERRORS)


@usual
@given(
    requests=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 5000)), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 2000), max_size=6),
)
def test_requests_cut_anywhere_are_answered_in_turn(
    daemon: Daemon, ticket: str, requests: list[tuple[int, int]], cuts: list[int]
) -> None:
    spans = [(first, min(SIZE - 1, first + more)) for first, more in requests]
    data = b"".join(written("GET", f"/images/{ticket}", {"Range": f"bytes={a}-{b}"}) for a, b in spans)
    with daemon.tcp() as wire:
        at = 0
        for cut in sorted(cuts):
            if at < cut < len(data):
                wire.send(data[at:cut])
                at = cut
        wire.send(data[at:])
        for first, last in spans:
            assert wire.reply().body == CONTENT[first : last + 1]


# Ranges


@usual
@given(value=st.one_of(
    st.tuples(st.integers(-5, SIZE + 5), st.integers(-5, SIZE + 5)).map(lambda p: f"bytes={p[0]}-{p[1]}"),
    st.integers(0, SIZE + 5).map(lambda n: f"bytes={n}-"), st.integers(0, SIZE + 5).map(lambda n: f"bytes=-{n}"),
    texts.map(lambda t: "bytes=" + t), texts))  # fmt: skip
@example(value="bytes=0-0")
@example(value=f"bytes={SIZE - 1}-")
@example(value=f"bytes=-{SIZE + 1}")
@example(value="bytes=--1")
@example(value="bytes=\xb21-5")
def test_any_range(daemon: Daemon, ticket: str, value: str) -> None:
    """What is answered with 206 is what its Content-Range says, of what was asked."""
    with daemon.tcp() as wire:
        replies = answered(wire, written("GET", f"/images/{ticket}", {"Range": value}), ticket)
    sane(replies, statuses={200, 206, 400, 416})
    for reply in replies:
        if reply.status == 206:
            span, _, total = (reply.get("content-range") or "").removeprefix("bytes ").partition("/")
            first, last = (int(number) for number in span.split("-"))
            assert (total, reply.body) == (str(SIZE), CONTENT[first : last + 1])
            asked = value.strip().removeprefix("bytes=")
            assert asked in (f"{first}-{last}", f"{first}-", f"-{last - first + 1}") or first == 0


# Bodies


@usual
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=500), max_size=8), offset=st.integers(0, SIZE), junk=st.booleans()
)
def test_any_chunked_body(
    daemon: Daemon, ticket: str, scratch: str, home: Path, pieces: list[bytes], offset: int, junk: bool
) -> None:
    body = b"".join(pieces)
    head = f"PUT /images/{scratch}?flush=n HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes {offset}-*/*\r\n"
    data = head.encode() + b"\r\n" + chunked(*pieces)
    if junk:
        data = data[:-3]
    with daemon.tcp() as wire:
        replies = answered(wire, data, ticket)
    if not junk:
        fits = offset + len(body) <= SIZE
        assert [reply.status for reply in replies] == ([200] if fits else [416])
        if fits:
            assert (home / "scratch.raw").read_bytes()[offset : offset + len(body)] == body
    sane(replies, statuses={200, 400, 416})


values_of_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
documents = st.one_of(values_of_json.map(lambda value: json.dumps(value).encode()), st.binary(max_size=100))


@usual
@given(body=st.one_of(
    documents,
    st.fixed_dictionaries({}, optional={"op": st.sampled_from(["zero", "flush", "x"]) | values_of_json,
                                        "size": st.integers(-2, SIZE + 2) | values_of_json,
                                        "offset": st.integers(-2, SIZE + 2) | values_of_json,
                                        "flush": values_of_json}).map(lambda value: json.dumps(value).encode())))  # fmt: skip
@example(body=b"[" * 2000)
@example(body=b'{"op": "zero", "size": 1e400}')
@example(body=b'{"op": "zero", "size": NaN}')
@example(body=b'{"op": "flush", "op": "zero", "size": 1}')
@example(body=b'{"op": "zero", "size": 0, "offset": 1048576}')
@example(body=b'{"op": "\\ud800"}')
def test_any_patch(daemon: Daemon, ticket: str, scratch: str, body: bytes) -> None:
    with daemon.tcp() as wire:
        sane(answered(wire, written("PATCH", f"/images/{scratch}", {}, body), ticket), statuses={200, 400, 413, 416})


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "uuid": st.just("fuzzed") | values_of_json,
    "size": st.integers(-1, 2**64) | values_of_json,
    "ops": st.lists(st.sampled_from(["read", "write", "x"]), max_size=3) | values_of_json,
    "timeout": st.integers(-1, 2**40) | values_of_json,
    "url": st.sampled_from(
        ["file:///x", "nbd:unix:/x", "nbd://h/x", "http://a/b", "file://", "nbd:", "x", "file:///%00", "//[", "fd:x"]
    )
    | texts,
}
MORE: dict[str, st.SearchStrategy[Any]] = {
    name: values_of_json
    for name in (
        "filename",
        "transfer_id",
        "sparse",
        "dirty",
        "inactivity_timeout",
        "image",
        "rate",
        "bitmap",
        "future",
    )
}


@usual
@given(
    body=st.one_of(
        documents, st.fixed_dictionaries(FIELDS, optional=MORE).map(lambda value: json.dumps(value).encode())
    )
)
@example(
    body=b'{"uuid": "fuzzed", "size": 1, "ops": ["read"], "timeout": 1, "url": "file:///x", "filename": "\\ud800"}'
)
@example(body=b'{"uuid": "fuzzed", "size": 1, "ops": ["read"], "timeout": 1, "url": "//["}')
@example(body=b'{"uuid": "fuzzed", "size": 1, "ops": ["read"], "timeout": 1, "url": "nbd://[::1"}')
@example(
    body=b'{"uuid": "fuzzed", "size": 1, "ops": ["read"], "timeout": 1, "url": "file:///x", "transfer_id": "a\\r\\nb"}'
)
def test_any_ticket(daemon: Daemon, body: bytes) -> None:
    """What was taken can be shown, used and deleted."""
    with daemon.control() as wire:
        reply = wire.ask("PUT", "/tickets/fuzzed", None, body)
        assert reply.status in (200, 400, 403), reply
        shown = wire.ask("GET", "/tickets/fuzzed")
        assert shown.status == (200 if reply.status == 200 else 404)
        if reply.status == 200:
            asked = json.loads(body)
            assert shown.json["size"] == asked["size"] and shown.json["url"] == asked["url"]
            with daemon.tcp() as client:
                assert client.ask("GET", "/images/fuzzed").status in {200, 400, 403, 404, 501, 503, 504}
            assert wire.ask("DELETE", "/tickets/fuzzed").status == 204
