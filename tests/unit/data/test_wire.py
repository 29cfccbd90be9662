"""Requests as they come, whole, in pieces, one behind the other, or wrong; over a socket pair, without an image."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostagent.data.errors import HttpError
from hostagent.data.streams import PeerGone
from hostagent.data.transport import Plain
from hostagent.data.wire import Request, Wire, chunks, head


@contextlib.contextmanager
def sent(data: bytes, *, end: bool = True) -> Iterator[Wire]:
    ours, theirs = socket.socketpair()

    def feed() -> None:
        with contextlib.suppress(OSError):
            theirs.sendall(data)
            if end:
                theirs.shutdown(socket.SHUT_WR)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        yield Wire(Plain(ours), header_timeout=2)
    finally:
        ours.close()
        theirs.close()
        feeder.join(5)


def read(request: Request) -> bytes:
    found = bytearray()
    buffer = memoryview(bytearray(7))
    while number := request.body.read_into(buffer):
        found += buffer[:number]
    return bytes(found)


GET = b"GET /images/a%2fb?close=y&x=&x=2 HTTP/1.1\r\nHost: h\r\nRange: bytes=0-1\r\n\r\n"
PUT = b"PUT /images/t HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"PUT /images/t HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n6;x=y\r\nlo all\r\n0\r\nT: 1\r\n\r\n"


def test_requests_one_behind_the_other_are_told_apart() -> None:
    with sent(GET + PUT + CHUNKED + GET) as wire:
        first = wire.request(1)
        assert first is not None
        assert (first.method, first.path, first.query) == ("GET", "/images/a/b", {"close": "y", "x": "2"})
        assert (first.length, first.keep, first.body.ended) == (0, True, True)
        second = wire.request(1)
        assert second is not None
        assert (second.length, read(second)) == (5, b"hello")
        third = wire.request(1)
        assert third is not None
        assert third.length is None
        assert read(third) == b"hello all"
        fourth = wire.request(1)
        assert fourth is not None
        assert fourth.path == "/images/a/b"
        assert wire.request(1) is None


def test_a_body_that_nobody_read_is_read_away_and_never_a_request() -> None:
    inner = b"GET /info/ HTTP/1.1\r\nHost: h\r\n\r\n"
    data = b"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(inner), inner)
    with sent(data + GET) as wire:
        first = wire.request(1)
        assert first is not None
        assert first.body.drain()
        second = wire.request(1)
        assert second is not None
        assert second.path == "/images/a/b"


@pytest.mark.parametrize("length", [b"70000", b"99999999999"])
def test_a_long_body_that_nobody_read_ends_the_connection(length: bytes) -> None:
    with sent(b"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: " + length + b"\r\n\r\n", end=False) as wire:
        request = wire.request(1)
        assert request is not None
        assert not request.body.drain()


def test_chunks_that_nobody_read_end_the_connection() -> None:
    with sent(CHUNKED) as wire:
        request = wire.request(1)
        assert request is not None
        assert not request.body.drain()


def test_a_body_that_ends_early_is_a_broken_connection() -> None:
    for data in (PUT[:-1], CHUNKED[:-9]):
        with sent(data) as wire:
            request = wire.request(1)
            assert request is not None
            with pytest.raises(PeerGone):
                read(request)


def test_100_continue_is_said_when_the_body_is_wanted_and_not_before() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(PUT.replace(b"\r\n\r\nhello", b"\r\nExpect: 100-continue\r\n\r\n"))
        theirs.settimeout(0.1)
        request = Wire(Plain(ours), header_timeout=2).request(1)
        assert request is not None
        with pytest.raises(TimeoutError):
            theirs.recv(100)
        assert not request.body.drain(), "it has not been sent, and never will be"
        theirs.sendall(b"hello")
        assert request.body.all(10) == b"hello"
        assert theirs.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
        (b"x" * 10000, 414),
        (b"GET / HTTP/1.1\r\nHost: h\r\nA: " + b"x" * 20000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"A: bcdefgh\r\n" * 4000 + b"\r\n", 431),
        (b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"PUT / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nA b: c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nA: b\x00c\r\n\r\n", 400),
        (b"GET /?" + b"a=1&" * 30 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    ],
)
def test_what_cannot_be_understood_is_refused_and_the_connection_ends(data: bytes, status: int) -> None:
    with sent(data) as wire, pytest.raises(HttpError) as refused:
        wire.request(1)
    assert refused.value.status == status
    assert refused.value.close


def test_a_head_that_comes_slowly_is_408() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"GET / HTTP/1.1\r\n")
        wire = Wire(Plain(ours), header_timeout=0.2)
        with pytest.raises(HttpError) as refused:
            wire.request(1)
        assert refused.value.status == 408


def test_a_bad_chunk_ends_the_connection() -> None:
    with sent(CHUNKED.replace(b"6;x=y", b"zz")) as wire:
        request = wire.request(1)
        assert request is not None
        with pytest.raises(HttpError) as refused:
            read(request)
        assert refused.value.close


@pytest.mark.parametrize(
    ("tail", "keep"), [(b"", True), (b"Connection: close\r\n", False), (b"Connection: a, CLOSE\r\n", False)]
)
def test_a_connection_is_kept_unless_its_client_says_no(tail: bytes, keep: bool) -> None:
    with sent(b"GET / HTTP/1.1\r\nHost: h\r\n" + tail + b"\r\n") as wire:
        request = wire.request(1)
        assert request is not None
        assert request.keep is keep
    with sent(b"GET / HTTP/1.0\r\n\r\n") as wire:
        request = wire.request(1)
        assert request is not None
        assert not request.keep


def test_no_header_can_end_another() -> None:
    for value in ("a\r\nb", "a\nb", "a\0b"):
        with pytest.raises(ValueError, match="control character"):
            head(200, [("x", value)], keep=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(min_size=1, max_size=50), max_size=5), st.data())
def test_a_request_behind_any_body_is_answered_as_itself(pieces: list[bytes], data: st.DataObject) -> None:
    """Chunked by our own writer, read in buffers of any size, and cut anywhere on the way."""
    body = b"".join(chunks(iter(pieces)))
    request = b"PUT /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + body + GET
    with sent(request) as wire:
        first = wire.request(1)
        assert first is not None
        buffer, found = memoryview(bytearray(data.draw(st.integers(1, 64)))), bytearray()
        while number := first.body.read_into(buffer):
            found += buffer[:number]
        assert bytes(found) == b"".join(pieces)
        second = wire.request(1)
        assert second is not None
        assert second.path == "/images/a/b"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_requests_or_refused(data: bytes) -> None:
    with sent(data) as wire, contextlib.suppress(HttpError, PeerGone):
        while (request := wire.request(0.5)) is not None:
            if not request.body.drain():
                break


def test_h11_reads_what_head_writes() -> None:
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
    client.send(h11.EndOfMessage())
    client.receive_data(head(206, [("content-length", "0"), ("content-range", "bytes 0-1/5")], keep=False))
    answer = client.next_event()
    assert isinstance(answer, h11.Response)
    assert answer.status_code == 206
    assert (b"connection", b"close") in answer.headers
