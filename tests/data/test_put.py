"""PUT of an image, whole or in parts. Every answer is proven by the image's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.both import only_ours
from tests.data.daemons import Daemon
from tests.data.exports import QemuNbd
from tests.data.table import Answer, Row, check, in_step, refused
from tests.data.wire import chunked

SIZE = 1 << 20
BEFORE = b"\xaa" * SIZE
DATA = bytes(range(256)) * 16
EMPTY = Answer(200, {"content-length": "0"}, b"")
BEYOND = {"content-range": f"bytes */{SIZE}"}


@pytest.fixture(scope="module")
def image(home: Path) -> Path:
    return home / "image.raw"


@pytest.fixture(scope="module")
def export(image: Path) -> object:
    image.write_bytes(BEFORE)
    with QemuNbd(image) as server:
        yield server


@pytest.fixture(scope="module")
def ticket(daemon: Daemon, export: QemuNbd) -> str:
    return daemon.ticket(export.url, SIZE, "read", "write")


@pytest.fixture(autouse=True)
def before(daemon: Daemon, ticket: str) -> None:
    with daemon.tcp() as wire:
        assert wire.ask("PUT", f"/images/{ticket}", None, BEFORE).status == 200


def put(name: str, content_range: str | None, body: bytes, answer: Answer, flaw: Answer | None = None) -> Row:
    headers = {} if content_range is None else {"Content-Range": content_range}
    return Row(name, "PUT", "", answer, flaw, headers, body)


WRITTEN = [
    (put("no-range", None, DATA, EMPTY), 0),
    (put("range-and-size", f"bytes 8192-12287/{SIZE}", DATA, EMPTY), 8192),
    (put("unknown-size", "bytes 8192-12287/*", DATA, EMPTY), 8192),
    (put("unknown-end", "bytes 8192-*/*", DATA, EMPTY), 8192),
    (put("unaligned", "bytes 777-*/*", DATA[:1000], EMPTY), 777),
    (put("one-byte", "bytes 12345-12345/*", b"\x01", EMPTY), 12345),
    (put("at-the-end", f"bytes {SIZE - 4096}-*/*", DATA, EMPTY), SIZE - 4096),
]


@pytest.mark.parametrize(("row", "offset"), WRITTEN, ids=[row.id for row, _ in WRITTEN])
@pytest.mark.parametrize("query", ["", "?flush=y", "?flush=n"])
def test_a_body_is_written_where_it_belongs_and_nowhere_else(
    daemon: Daemon, image: Path, ticket: str, row: Row, offset: int, query: str
) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, row, f"/images/{ticket}{query}")
    assert row.body is not None
    assert image.read_bytes() == BEFORE[:offset] + row.body + BEFORE[offset + len(row.body) :]


BAD_RANGE = refused(400, "Invalid Content-Range|Content-Range")
REFUSED = [
    put("begins-at-the-end", f"bytes {SIZE}-*/*", b"x", Answer(416, BEYOND, "", closes=True)),
    put("ends-beyond", f"bytes {SIZE - 4095}-*/*", DATA, Answer(416, BEYOND, "", closes=True)),
    put("too-long", None, BEFORE + b"x", Answer(416, BEYOND, "", closes=True)),
    put("enormous", f"bytes {10**30}-*/*", b"x", Answer(416, BEYOND, "", closes=True)),
    put("no-first", "bytes */100", b"x", BAD_RANGE),
    put("another-unit", "sectors 0-1/*", b"xx", BAD_RANGE),
    put("like-a-range-header", "bytes=0-1", b"xx", BAD_RANGE),
    put("no-size", "bytes 0-1", b"xx", BAD_RANGE),
    put("letters", "bytes a-b/c", b"xx", BAD_RANGE),
    put("negative", "bytes -5-0/*", b"xx", BAD_RANGE),
    put("junk", "junk", b"xx", BAD_RANGE),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.id)
def test_what_is_refused_writes_nothing(daemon: Daemon, image: Path, ticket: str, row: Row) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, row, f"/images/{ticket}")
    assert image.read_bytes() == BEFORE


@pytest.mark.parametrize("value", ["x", "", "true", "Y"])
def test_flush_is_y_or_n(daemon: Daemon, image: Path, ticket: str, value: str) -> None:
    row = Row("", "PUT", "", refused(400, "Unsupported value .* for 'flush'.*'n', 'y'"), body=b"xx")
    with daemon.tcp() as wire:
        check(daemon, wire, row, f"/images/{ticket}?flush={value}")
    assert image.read_bytes() == BEFORE


def test_the_last_of_several_equal_parameters_counts(daemon: Daemon, ticket: str) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, put("", None, DATA, EMPTY), f"/images/{ticket}?flush=x&flush=y")


def test_nothing_at_all_may_be_written(daemon: Daemon, image: Path, ticket: str) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, put("", None, b"", EMPTY), f"/images/{ticket}")
        check(daemon, wire, put("", f"bytes {SIZE}-*/*", b"", EMPTY), f"/images/{ticket}")
    assert image.read_bytes() == BEFORE


def test_close_is_granted_on_request(daemon: Daemon, ticket: str) -> None:
    with daemon.tcp() as wire:
        answer = Answer(200, {"content-length": "0"}, b"", closes=True)
        check(daemon, wire, put("", None, DATA, answer), f"/images/{ticket}?close=y")


# Lengths

LENGTHS = [
    pytest.param("x", id="letters"),
    pytest.param("-1", id="negative"),
    pytest.param("1_0", id="underscore"),
    pytest.param("+5", id="sign"),
    pytest.param("0x10", id="hexadecimal"),
    pytest.param("5 5", id="two"),
    pytest.param("5, 6", id="list"),
]


@only_ours
@pytest.mark.parametrize("value", LENGTHS)
def test_a_length_that_is_none_ends_the_connection(daemon: Daemon, image: Path, ticket: str, value: str) -> None:
    """Where the next request begins would be a guess."""
    with daemon.tcp() as wire:
        row = Row("", "PUT", "", refused(400, ".", closes=True), headers={"Content-Length": value}, body=b"xxxxx")
        check(daemon, wire, row, f"/images/{ticket}")
    assert image.read_bytes() == BEFORE


def test_a_body_needs_a_length(daemon: Daemon, image: Path, ticket: str) -> None:
    with daemon.tcp() as wire:
        row = Row("", "PUT", "", refused(400, "Content-Length"))
        check(daemon, wire, row, f"/images/{ticket}")
    assert image.read_bytes() == BEFORE


def test_a_client_that_ends_early_is_told_nothing_wrong(daemon: Daemon, image: Path, ticket: str) -> None:
    """Half of the body, then the end: what came may be there or not, and the rest of the image is untouched."""
    import socket

    with daemon.tcp() as wire:
        head = f"PUT /images/{ticket} HTTP/1.1\r\nHost: a\r\nContent-Length: {2 * len(DATA)}\r\n\r\n"
        wire.send(head.encode() + DATA)
        wire.socket.shutdown(socket.SHUT_WR)
        got = b""
        while data := wire.socket.recv(65536):
            got += data
        assert not got or got.startswith(b"HTTP/1.1 4"), got
    found = image.read_bytes()
    assert found[len(DATA) :] == BEFORE[len(DATA) :]
    with daemon.tcp() as wire:
        in_step(wire)


def test_100_continue_is_sent_to_who_waits_for_it(daemon: Daemon, image: Path, ticket: str) -> None:
    with daemon.tcp() as wire:
        wire.request("PUT", f"/images/{ticket}", {"Expect": "100-continue", "Content-Length": str(len(DATA))})
        assert wire.reply(informational=True).status == 100
        wire.send(DATA)
        assert wire.reply().status == 200
        in_step(wire)
    assert image.read_bytes() == DATA + BEFORE[len(DATA) :]


@only_ours
def test_who_may_not_write_is_told_so_before_sending_the_body(daemon: Daemon, export: QemuNbd) -> None:
    reader = daemon.ticket(export.url, SIZE)
    for target in (f"/images/{reader}", "/images/nobody"):
        with daemon.tcp() as wire:
            wire.request("PUT", target, {"Expect": "100-continue", "Content-Length": "1000000000"})
            reply = wire.reply(informational=True)
            assert (reply.status, reply.last, wire.ended()) == (403, True, True), reply


# Chunked bodies

CHUNKS = [DATA[:1], DATA[1:700], DATA[700:]]


@only_ours
def test_a_chunked_body_is_written_like_any_other(daemon: Daemon, image: Path, ticket: str) -> None:
    with daemon.tcp() as wire:
        headers = {"Transfer-Encoding": "chunked", "Content-Range": "bytes 4096-*/*"}
        check(daemon, wire, Row("", "PUT", "", EMPTY, None, headers, chunked(*CHUNKS)), f"/images/{ticket}")
    assert image.read_bytes() == BEFORE[:4096] + DATA + BEFORE[8192:]


@only_ours
@pytest.mark.parametrize("size", [11, 4096, 1 << 20])
def test_a_chunked_body_ends_where_the_image_ends(daemon: Daemon, image: Path, ticket: str, size: int) -> None:
    headers = {"Transfer-Encoding": "chunked", "Content-Range": f"bytes {SIZE - 10}-*/*"}
    row = Row("", "PUT", "", refused(416, ""), None, headers, chunked(*[b"x" * size] * 3))
    with daemon.tcp() as wire:
        check(daemon, wire, row, f"/images/{ticket}")
    assert image.read_bytes()[: SIZE - 10] == BEFORE[: SIZE - 10]


@only_ours
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"zz\r\nab\r\n0\r\n\r\n", id="no-size"),
        pytest.param(b"-1\r\nab\r\n0\r\n\r\n", id="negative"),
        pytest.param(b"2\r\nabXX0\r\n\r\n", id="no-end-of-chunk"),
        pytest.param(b"fffffffffffffffffffff\r\nab", id="enormous"),
        pytest.param(b"2" + b";x=y" * 100000 + b"\r\nab\r\n0\r\n\r\n", id="endless-extension"),
        pytest.param(b"0\r\n" + b"X: y\r\n" * 100000 + b"\r\n", id="endless-trailer"),
    ],
)
def test_a_chunked_body_that_is_none_ends_the_connection(daemon: Daemon, ticket: str, body: bytes) -> None:
    with daemon.tcp() as wire:
        reply = wire.ask("PUT", f"/images/{ticket}", {"Transfer-Encoding": "chunked"}, body)
        assert (reply.status in (400, 431), reply.last, wire.ended()) == (True, True, True), reply


SMUGGLED = b"GET /info/ HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param("Transfer-Encoding: chunked", id="chunked-that-is-not"),
        pytest.param("Transfer-Encoding: chunked\r\nContent-Length: 5", id="both-lengths"),
        pytest.param("Transfer-Encoding: identity", id="identity"),
        pytest.param("Transfer-Encoding: gzip, chunked", id="two-codings"),
        pytest.param("Transfer-Encoding: xchunked", id="unknown-coding"),
        pytest.param("Content-Length: 5\r\nContent-Length: 6", id="two-lengths"),
        pytest.param("Transfer-Encoding : chunked", id="space-before-colon"),
    ],
)
@only_ours
def test_a_body_never_becomes_a_request(daemon: Daemon, ticket: str, headers: str) -> None:
    with daemon.tcp() as wire:
        wire.send(f"PUT /images/{ticket} HTTP/1.1\r\nHost: a\r\n{headers}\r\n\r\n".encode() + SMUGGLED)
        reply = wire.reply()
        assert (reply.status in (400, 411, 501), reply.last, wire.ended()) == (True, True, True), reply
