"""Who means harm, or is only broken: each is cut off within a bound, and nobody else notices.

The figures (what a well-behaved download keeps of its speed, memory) are in `python -m tests.bench data-attacks`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests import harness
from tests.data.daemons import Daemon, Ours
from tests.data.pki import Pki
from tests.data.table import in_step
from tests.data.wire import PATIENCE, Ended, Reply, Wire, chunked, tcp, unix

MIB = 1 << 20
SIZE = 32 * MIB
QUICK = {"handshake_timeout": 1.0, "header_timeout": 1.0, "idle_timeout": 2.0}
"""Seconds that an attacker gets here, so that the tests need not wait for the usual ones."""
LIMIT = 15.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Ours(tmp_path_factory.mktemp("daemon"), settings=QUICK) as process:
        yield process


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Daemon]:
    with Ours(tmp_path_factory.mktemp("secure"), tls=pki, settings=QUICK) as process:
        yield process


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture(scope="module")
def image(home: Path, content: bytes) -> Path:
    path = home / "image.raw"
    path.write_bytes(content)
    return path


@pytest.fixture
def ticket(daemon: Daemon, image: Path) -> str:
    return daemon.ticket(f"file://{image}", SIZE)


def rss_mib(daemon: Daemon) -> float:
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def well(daemon: Daemon, ticket: str, content: bytes) -> None:
    """A well-behaved download comes whole, at once."""
    with daemon.tcp() as wire:
        assert wire.ask("GET", f"/images/{ticket}").body == content


def reply_or_end(wire: Wire) -> Reply | None:
    """The server's last word, if it has one; then it must have closed the connection."""
    try:
        reply = wire.reply()
    except Ended as ended:
        assert not ended.got, ended.got
        return None
    assert reply.last and wire.ended(LIMIT), reply
    return reply


# Before TLS


def test_who_says_nothing_before_tls_keeps_nobody_waiting(secure: Daemon, image: Path, content: bytes) -> None:
    """Theirs shakes hands in the thread that accepts: one such client stops all others."""
    ticket = secure.ticket(f"file://{image}", SIZE)
    with contextlib.ExitStack() as open_:
        silent = [open_.enter_context(secure.raw()) for _ in range(100)]
        half = [open_.enter_context(secure.raw()) for _ in range(20)]
        for connection in half:
            connection.sendall(bytes.fromhex("16030102000100"))  # the beginning of a ClientHello of 512 bytes
        well(secure, ticket, content)
        for connection in [*silent, *half]:
            assert Wire(connection).drained(LIMIT) < 64


def test_what_is_no_tls_is_told_so_and_cut_off(secure: Daemon) -> None:
    for garbage in (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", os.urandom(5000), bytes(100000)):
        with Wire(secure.raw()) as wire:
            with contextlib.suppress(OSError):
                wire.send(garbage)
            assert wire.drained(LIMIT) < 64


def test_a_handshake_that_trickles_has_one_deadline(secure: Daemon) -> None:
    with Wire(secure.raw()) as wire:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in bytes.fromhex("1603010200010001fc0303") + bytes(400):
                wire.send(bytes([byte]))
                time.sleep(0.1)
                assert time.monotonic() - began < LIMIT, "each byte buys it more time"
        wire.drained(LIMIT)


# Heads


def test_a_head_that_trickles_has_one_deadline(daemon: Daemon) -> None:
    with daemon.tcp() as wire:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in b"GET /info/ HTTP/1.1\r\n" + b"X: y\r\n" * 100:
                wire.send(bytes([byte]))
                time.sleep(0.1)
                assert time.monotonic() - began < LIMIT, "each byte buys it more time"
        with contextlib.suppress(ConnectionResetError):
            reply = reply_or_end(wire)
            assert reply is None or reply.status == 408


def test_a_head_that_never_ends_is_cut_off(daemon: Daemon) -> None:
    with daemon.tcp() as wire:
        wire.send(b"GET /info/ HTTP/1.1\r\nX: ")
        reply = reply_or_end(wire)
        assert reply is None or reply.status == 408


@pytest.mark.parametrize("kind", ["plain", "tls"])
@pytest.mark.parametrize("request_line", ["GET /nothing", "PATCH /images/nobody"])
def test_a_body_that_is_no_images_and_trickles_has_one_deadline(
    daemon: Daemon, secure: Daemon, request_line: str, kind: str
) -> None:
    """A ticket makes a slow client one who moves an image."""
    with (daemon if kind == "plain" else secure).tcp() as wire:
        wire.send(f"{request_line} HTTP/1.1\r\nHost: a\r\nContent-Length: 65000\r\n\r\n".encode())
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while True:
                wire.send(b"x")
                time.sleep(0.1)
                assert time.monotonic() - began < LIMIT, "each byte buys it more time"


def test_an_empty_line_before_a_request_is_nothing(daemon: Daemon, ticket: str) -> None:
    with daemon.tcp() as wire:
        for empty in (b"", b"\r\n", b""):
            wire.send(empty + f"OPTIONS /images/{ticket} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert wire.reply().status == 200


def test_a_client_that_is_silent_is_cut_off(daemon: Daemon, ticket: str) -> None:
    with daemon.tcp() as silent, daemon.tcp() as once:
        in_step(once)
        assert silent.ended(LIMIT) and once.ended(LIMIT)


TOO_MUCH: list[tuple[str, bytes, set[int]]] = [
    ("long-line", b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", {414}),
    ("endless-line", b"GET /" + b"a" * 1000000, {414}),
    ("long-header", b"GET /info/ HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200000 + b"\r\n\r\n", {431, 400}),
    ("many-headers", b"GET /info/ HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 50000 + b"\r\n", {431, 400}),
    ("long-method", b"G" * 200000 + b" / HTTP/1.1\r\n\r\n", {414, 431, 400}),
    ("many-fields", b"GET /info/?" + b"a&" * 1500 + b" HTTP/1.1\r\nHost: a\r\n\r\n", {400, 200}),
]


@pytest.mark.parametrize(("_name", "head", "statuses"), TOO_MUCH, ids=[name for name, _, _ in TOO_MUCH])
def test_a_head_that_is_too_much_is_refused(daemon: Daemon, _name: str, head: bytes, statuses: set[int]) -> None:
    with daemon.tcp() as wire:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            wire.send(head)
        with contextlib.suppress(ConnectionResetError, Ended):  # an answer may be lost with what nobody read
            reply = wire.reply()
            assert reply.status in statuses, reply
            assert reply.status == 200 or (reply.last and wire.ended(LIMIT))


BAD_HEADS = [
    pytest.param(b"GET /info/ HTTP/1.1\r\nHost: a\r\nX: a\rY: b\r\n\r\n", id="bare-cr"),
    pytest.param(b"GET /info/ HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", id="nul"),
    pytest.param(b"GET /info/ HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n", id="space-before-colon"),
    pytest.param(b"GET /info/ HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", id="no-colon"),
    pytest.param(b"GET /info/ HTTP/1.1\r\nHost: a\r\n: y\r\n\r\n", id="no-name"),
    pytest.param(b"GET  /info/ HTTP/1.1\r\nHost: a\r\n\r\n", id="two-spaces"),
    pytest.param(b"GET /info/ HTTP/1.1 \r\nHost: a\r\n\r\n", id="space-at-the-end"),
    pytest.param(b"GET /info/ HTTP/2.0\r\nHost: a\r\n\r\n", id="another-version"),
    pytest.param(b"GET /info/ HTTPS/1.1\r\nHost: a\r\n\r\n", id="another-protocol"),
    pytest.param(b"GET /in\0fo/ HTTP/1.1\r\nHost: a\r\n\r\n", id="nul-in-the-path"),
    pytest.param(b"GET /info/\xff HTTP/1.1\r\nHost: a\r\n\r\n", id="not-ascii-in-the-path"),
    pytest.param(b"GET\r\n\r\n", id="method-alone"),
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20) + b"\r\n\r\n", id="tls-to-plain"),
    pytest.param(b"\0" * 3000 + b"\r\n\r\n", id="nuls"),
]


@pytest.mark.parametrize("head", BAD_HEADS)
def test_a_head_that_is_none_ends_the_connection(daemon: Daemon, head: bytes) -> None:
    with daemon.tcp() as wire:
        wire.send(head + b"GET /info/ HTTP/1.1\r\nHost: a\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            reply = reply_or_end(wire)
            assert reply is None or reply.status in (400, 405, 505), reply


@pytest.mark.parametrize(
    "path", ["/images/a%0d%0aX-Injected:%20yes", "/%0d%0aX-Injected:%20yes", "/images/%0a/extents"]
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "HEAD", "POST", "PUT"])
def test_no_line_break_of_a_request_reaches_a_header(daemon: Daemon, method: str, path: str) -> None:
    with daemon.tcp() as wire:
        headers = {
            "Origin": "https://a",
            "Access-Control-Request-Method": "PUT",
            "If-Match": '"x"',
            "Range": "bytes=0-1",
        }
        reply = wire.ask(method, path, headers, b"x" if method == "PUT" else None)
        assert reply.status in (400, 403, 404, 405) and reply.get("x-injected") is None


# Bodies and lengths


def test_a_body_that_is_too_large_is_refused_before_it_comes(daemon: Daemon, ticket: str) -> None:
    huge = {"Content-Length": str(10**12)}
    for wire, method, path in (
        (daemon.tcp(), "PATCH", f"/images/{ticket}"),
        (daemon.tcp(), "GET", "/info/"),
        (daemon.tcp(), "PUT", f"/images/{ticket}"),
        (daemon.control(), "PUT", "/tickets/x"),
        (daemon.control(), "PATCH", "/tickets/x"),
        (daemon.control(), "DELETE", "/tickets/x"),
    ):
        with wire:
            wire.request(method, path, huge)
            reply = reply_or_end(wire)
            assert reply and reply.status in (200, 204, 403, 413, 416), reply


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_that_is_too_large_fills_no_memory(daemon: Daemon, framing: str) -> None:
    before = rss_mib(daemon)
    for method, path, connect in (("PATCH", "/images/x", daemon.tcp), ("PUT", "/tickets/x", daemon.control)):
        with connect() as wire, contextlib.suppress(BrokenPipeError, ConnectionResetError, Ended):
            if framing == "length":
                wire.request(method, path, {"Content-Length": str(64 * MIB)})
                for _ in range(64):
                    wire.send(b"[" * MIB)
            else:
                wire.send(f"{method} {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
                for _ in range(64):
                    wire.send(b"100000\r\n" + b"[" * MIB + b"\r\n")
            assert wire.reply().status in (400, 413)
    assert rss_mib(daemon) - before < 16


def test_a_body_that_does_not_come_ends_and_is_not_durable(daemon: Daemon, tmp_path: Path) -> None:
    image = tmp_path / "target.raw"
    image.write_bytes(bytes(4 * MIB))
    ticket = daemon.ticket(f"file://{image}", 4 * MIB, "read", "write", inactivity_timeout=1)
    with daemon.tcp() as wire:
        wire.send(f"PUT /images/{ticket} HTTP/1.1\r\nHost: a\r\nContent-Length: {2 * MIB}\r\n\r\n".encode())
        wire.send(b"x" * MIB)
        wire.drained(LIMIT)
    with daemon.tcp() as wire:
        assert wire.ask("GET", f"/images/{ticket}/progress").json["durable"] == []
    assert set(image.read_bytes()[MIB:]) == {0}


def test_a_body_that_is_longer_than_it_said_is_no_request(daemon: Daemon, tmp_path: Path) -> None:
    image = tmp_path / "target.raw"
    image.write_bytes(bytes(MIB))
    ticket = daemon.ticket(f"file://{image}", MIB, "write")
    with daemon.tcp() as wire:
        wire.send(f"PUT /images/{ticket} HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n12345surplus\r\n\r\n".encode())
        assert wire.reply().status == 200
        with contextlib.suppress(ConnectionResetError):
            reply = reply_or_end(wire)
            assert reply is None or reply.status == 400
    assert image.read_bytes()[:6] == b"12345\0"


def test_pipelined_rubbish_costs_only_its_sender(daemon: Daemon, ticket: str, content: bytes) -> None:
    with daemon.tcp() as wire:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(50):
                wire.send(b"GET /info/ HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
        well(daemon, ticket, content)


def test_a_slow_but_steady_reader_is_no_attacker(daemon: Daemon, image: Path, content: bytes) -> None:
    """Judged by its progress: theirs cuts whoever needs longer than the timeout for one buffer."""
    ticket = daemon.ticket(f"file://{image}", SIZE, inactivity_timeout=1)
    with Wire(tcp(daemon.port, receive_buffer=4096)) as wire:
        wire.request("GET", f"/images/{ticket}", {"Range": f"bytes=0-{8 * MIB - 1}"})
        status, _ = wire.head()
        got, began = b"", time.monotonic()
        while time.monotonic() - began < 2.5:
            got += wire.some(4096)
            time.sleep(0.05)
        got += b"".join(wire.pieces((("content-length", str(8 * MIB - len(got))),)))
        assert (status, got == content[: 8 * MIB]) == (206, True)


def test_a_slow_but_steady_writer_is_no_attacker(daemon: Daemon, tmp_path: Path, content: bytes) -> None:
    image = tmp_path / "target.raw"
    image.write_bytes(bytes(MIB))
    ticket = daemon.ticket(f"file://{image}", MIB, "write", inactivity_timeout=1)
    with daemon.tcp() as wire:
        wire.request("PUT", f"/images/{ticket}", {"Content-Length": "10"})
        for byte in content[:10]:
            time.sleep(0.25)
            wire.send(bytes([byte]))
        assert wire.reply().status == 200
    assert image.read_bytes()[:10] == content[:10]


# Half-closed, and closed


def test_a_half_closed_connection_gets_its_answer(daemon: Daemon, secure: Daemon, image: Path, content: bytes) -> None:
    """That a client sends no more is no reason to send it nothing."""
    with daemon.tcp() as wire:
        wire.request("GET", f"/images/{daemon.ticket(f'file://{image}', SIZE)}")
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.reply().body == content
        assert wire.ended(LIMIT)


def test_many_connections_opened_and_reset_leave_nothing(daemon: Daemon, ticket: str, content: bytes) -> None:
    home = Path(f"/proc/{daemon.pid}")

    def held() -> tuple[int, int]:
        return len(list((home / "fd").iterdir())), len(list((home / "task").iterdir()))

    well(daemon, ticket, content)  # what stays of a first request is none of the others'
    before = held()
    for number in range(300):
        connection = daemon.raw()
        if number % 3:
            connection.sendall(f"GET /images/{ticket} HTTP/1.1\r\n".encode() + b"Host: a\r\n\r\n" * (number % 2))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    well(daemon, ticket, content)  # whoever came before has been let in by now
    deadline = time.monotonic() + LIMIT
    while (found := held())[0] > before[0] or found[1] > before[1]:
        assert time.monotonic() < deadline, (found, before)
        time.sleep(0.05)


# Many


def test_a_full_house_closes_the_door_and_keeps_its_guests(tmp_path: Path, image: Path, content: bytes) -> None:
    with Ours(tmp_path, settings={"max_connections": 40}) as daemon, contextlib.ExitStack() as open_:
        ticket = daemon.ticket(f"file://{image}", SIZE)
        guests = [open_.enter_context(daemon.tcp()) for _ in range(39)]
        guest = open_.enter_context(daemon.tcp())
        in_step(guest)
        for one in guests:
            in_step(one)
        with daemon.tcp() as further:
            assert further.ended(LIMIT)
        assert guest.ask("GET", f"/images/{ticket}").body == content
        assert daemon.show(ticket)["size"] == SIZE, "the control socket has room of its own"
        guests[0].close()
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            with contextlib.suppress(Ended, OSError), daemon.tcp() as again:
                in_step(again)
                return
            time.sleep(0.05)
    raise AssertionError("no room, though a guest has left")


def test_strangers_of_many_addresses_make_room_and_guests_stay(tmp_path: Path, image: Path, content: bytes) -> None:
    settings = {"max_connections": 40, "header_timeout": 0.5}
    with Ours(tmp_path, settings=settings) as daemon, contextlib.ExitStack() as open_:
        ticket = daemon.ticket(f"file://{image}", SIZE)
        guests = [open_.enter_context(daemon.tcp()) for _ in range(10)]
        for guest in guests:
            assert guest.ask("GET", f"/images/{ticket}", {"Range": "bytes=0-9"}).status == 206
        for number in range(30):
            stranger = open_.enter_context(socket.socket())
            stranger.bind((f"127.0.1.{number + 1}", 0))
            stranger.connect(("127.0.0.1", daemon.port))
        time.sleep(1)
        for _ in range(3):
            with daemon.tcp() as newcomer:
                assert newcomer.ask("GET", f"/images/{ticket}").body == content
        for guest in guests:
            assert guest.ask("GET", f"/images/{ticket}").body == content


def test_the_hosts_own_socket_does_not_wait_for_strangers_to_go(tmp_path: Path, image: Path, content: bytes) -> None:
    with Ours(tmp_path, settings={"max_connections": 20, "header_timeout": 60}) as daemon, contextlib.ExitStack() as open_:
        ticket = daemon.ticket(f"file://{image}", SIZE)
        for _ in range(19):
            open_.enter_context(tcp(daemon.port))
        in_step(open_.enter_context(daemon.tcp()))  # all before it have been let in by now
        with daemon.tcp() as further:
            assert further.ended(LIMIT)
        for _ in range(3):
            ours = open_.enter_context(Wire(unix(daemon.local_path)))
            assert ours.ask("GET", f"/images/{ticket}").body == content


def test_no_client_fills_the_house_alone(tmp_path: Path, image: Path, content: bytes) -> None:
    settings = {"max_client_connections": 10}
    with Ours(tmp_path, settings=settings) as daemon, contextlib.ExitStack() as open_:
        ticket = daemon.ticket(f"file://{image}", SIZE)
        for wire in [open_.enter_context(daemon.tcp()) for _ in range(10)]:
            assert wire.ask("GET", f"/images/{ticket}").body == content
        with daemon.tcp() as further:
            assert further.ended(LIMIT)
        other = socket.socket()
        open_.enter_context(other)
        other.bind(("127.0.0.2", 0))
        other.settimeout(PATIENCE)
        other.connect(("127.0.0.1", daemon.port))
        in_step(Wire(other))
        in_step(Wire(open_.enter_context(unix(daemon.local_path))))


def test_strangers_make_room_for_others_of_their_address(tmp_path: Path, image: Path, content: bytes) -> None:
    settings = {"max_client_connections": 10, "header_timeout": 60}
    with Ours(tmp_path, settings=settings) as daemon, contextlib.ExitStack() as open_:
        ticket = daemon.ticket(f"file://{image}", SIZE)
        guest = open_.enter_context(daemon.tcp())
        assert guest.ask("GET", f"/images/{ticket}").body == content
        for _ in range(30):
            open_.enter_context(tcp(daemon.port)).sendall(b"GET / HT")
        with daemon.tcp() as newcomer:
            assert newcomer.ask("GET", f"/images/{ticket}").body == content
        assert guest.ask("GET", f"/images/{ticket}").body == content


@pytest.mark.parametrize(("soft", "hard"), [(256, 20000), (1024, 1024)], ids=["may-be-raised", "may-not"])
def test_a_house_short_of_descriptors_serves_who_is_in_it(
    tmp_path: Path, image: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int
) -> None:
    """The process raises its limit, or takes fewer clients; neither a request nor the control socket lacks one."""
    monkeypatch.setattr(harness, "zygote", None)  # limits come from who starts it
    mine = resource.getrlimit(resource.RLIMIT_NOFILE)
    if mine[1] < hard:
        pytest.skip(f"needs a limit of {hard} open files, and may have {mine[1]}")
    daemon = Ours(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", partial(subprocess.Popen, preexec_fn=partial(limit, soft, hard)))
    with daemon, contextlib.ExitStack() as open_:
        ticket = daemon.ticket(f"file://{image}", SIZE)
        guest = open_.enter_context(daemon.tcp())
        in_step(guest)
        for _ in range(1200):
            open_.enter_context(daemon.raw())
        assert guest.ask("GET", f"/images/{ticket}").body == content
        assert daemon.show(ticket)["size"] == SIZE
        if hard > soft:
            well(daemon, ticket, content)


def limit(soft: int, hard: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ten_thousand_tickets_and_not_one_more(tmp_path: Path, image: Path, content: bytes) -> None:
    with Ours(tmp_path) as daemon, daemon.control() as wire:
        wanted = daemon.ticket(f"file://{image}", SIZE)
        before = rss_mib(daemon)
        for _ in range(100):
            ids = [str(uuid.uuid4()) for _ in range(100)]
            for one in ids:  # all at once: who waits for each answer waits for the scheduler
                ticket = {"uuid": one, "size": SIZE, "ops": ["read"], "timeout": 300, "url": f"file://{image}"}
                body = json.dumps(ticket)
                head = f"PUT /tickets/{one} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
                wire.send((head + body).encode())
            statuses = [wire.reply().status for _ in ids]
        assert statuses[:99] == [200] * 99 and statuses[99] == 429
        assert rss_mib(daemon) - before < 100
        assert len(wire.ask("GET", "/tickets/").json) <= 10000
        well(daemon, wanted, content)
        assert wire.ask("DELETE", "/tickets/").status == 204
        assert wire.ask("GET", f"/tickets/{wanted}").status == 404
        assert wire.ask("GET", "/tickets/").json == []


def test_a_crowd_does_not_keep_a_download_from_its_bytes(tmp_path: Path, image: Path, content: bytes) -> None:
    """300 idle connections, 60 slow readers, and the attackers above, all at the same time."""
    with Ours(tmp_path) as daemon, contextlib.ExitStack() as open_:
        ticket = daemon.ticket(f"file://{image}", SIZE)
        for _ in range(300):
            open_.enter_context(daemon.raw())
        for number in range(60):
            if number % 6 == 0:
                slow = daemon.ticket(f"file://{image}", SIZE)
            wire = open_.enter_context(Wire(tcp(daemon.port, receive_buffer=4096)))
            wire.request("GET", f"/images/{slow}")
        attack(daemon, open_)
        for _ in range(5):
            well(daemon, ticket, content)
        assert rss_mib(daemon) < 150


def attack(daemon: Daemon, open_: contextlib.ExitStack) -> None:
    for data in (
        b"GET /info/ HTTP/1.1\r\nX: ",
        b"GET /" + b"a" * 5000,
        b"GET /info/ HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 60000,
        b"PUT /images/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"x" * 1000),
        b"PUT /images/x HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n",
        b"PATCH /images/x HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n" + b"[" * 60000,
    ):
        connection = open_.enter_context(daemon.raw())
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
