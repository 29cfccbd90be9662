"""A revoked ticket moves no further byte, whoever revoked it and whatever its streams wait for.

Times are generous here; `python -m tests.bench data-revocation` has the strict ones.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.data.daemons import Daemon, Ours
from tests.data.exports import QemuNbd
from tests.data.pki import Pki
from tests.data.wire import Wire

MIB, GIB = 1 << 20, 1 << 30
SIZE = 4 * GIB
LIMIT = 10.0
"""Seconds, on a machine that has much else to do; 2 is promised."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Ours(tmp_path_factory.mktemp("daemon")) as process:
        yield process


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Daemon]:
    with Ours(tmp_path_factory.mktemp("secure"), tls=pki) as process:
        yield process


def filled(path: Path) -> Path:
    with path.open("wb") as file:
        file.write(os.urandom(64 * MIB))
        file.truncate(SIZE)
    return path


@pytest.fixture(scope="module")
def image(home: Path) -> Path:
    return filled(home / "image.raw")


@pytest.fixture(scope="module")
def exported(home: Path) -> Path:
    """Another file: a stream whose client just went away may still hold its lease on `image`, and QEMU writes alone."""
    return filled(home / "exported.raw")


@pytest.fixture
def export(exported: Path) -> Iterator[QemuNbd]:
    with QemuNbd(exported) as server:
        yield server


# How it is revoked


def by_delete(daemon: Daemon, ticket: str, url: str) -> None:
    assert daemon.delete(ticket).status == 204


def by_replacement(daemon: Daemon, ticket: str, url: str) -> None:
    assert daemon.ticket(url, SIZE, "write", uuid=ticket) == ticket


def by_deleting_all(daemon: Daemon, ticket: str, url: str) -> None:
    with daemon.control() as wire:
        assert wire.ask("DELETE", "/tickets/").status == 204


def by_expiry(daemon: Daemon, ticket: str, url: str) -> None:
    with daemon.control() as wire:
        assert wire.ask_json("PATCH", f"/tickets/{ticket}", {"timeout": 0}).status == 200


WAYS = [by_delete, by_replacement, by_deleting_all, by_expiry]
Way = Callable[[Daemon, str, str], None]


# What runs meanwhile


def slow_reader(wire: Wire, ticket: str) -> None:
    wire.request("GET", f"/images/{ticket}")
    assert wire.head()[0] == 200


def slow_writer(wire: Wire, ticket: str) -> None:
    wire.send(f"PUT /images/{ticket} HTTP/1.1\r\nHost: a\r\nContent-Length: {GIB}\r\n\r\n".encode() + bytes(3 * MIB))


def checksum(wire: Wire, ticket: str) -> None:
    wire.request("GET", f"/images/{ticket}/checksum")


def flush(wire: Wire, ticket: str) -> None:
    wire.request("PATCH", f"/images/{ticket}", None, b'{"op": "flush"}')


def zero(wire: Wire, ticket: str) -> None:
    wire.request("PATCH", f"/images/{ticket}", None, b'{"op": "zero", "size": %d}' % SIZE)


def extents(wire: Wire, ticket: str) -> None:
    wire.request("GET", f"/images/{ticket}/extents")


def options(wire: Wire, ticket: str) -> None:
    wire.request("OPTIONS", f"/images/{ticket}")


@dataclass
class Ending:
    """When the connection was found to be ended."""

    seconds: float
    got: int


def ending(daemon: Daemon, wire: Wire, ticket: str, url: str, way: Way) -> Ending:
    began = time.monotonic()
    way(daemon, ticket, url)
    answered = time.monotonic() - began
    assert answered < LIMIT, f"{way.__name__} took {answered:.1f} s"
    got = wire.drained(LIMIT)
    return Ending(time.monotonic() - began, got)


def refused(daemon: Daemon, ticket: str) -> bool:
    with daemon.tcp() as wire:
        return wire.ask("GET", f"/images/{ticket}", {"Range": "bytes=0-0"}).status == 403


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stream", [slow_reader, slow_writer])
@pytest.mark.parametrize("place", ["file", "nbd"])
def test_who_is_slow_is_cut_off(
    daemon: Daemon,
    request: pytest.FixtureRequest,
    image: Path,
    place: str,
    stream: Callable[[Wire, str], None],
    way: Way,
) -> None:
    url = request.getfixturevalue("export").url if place == "nbd" else f"file://{image}"
    ticket = daemon.ticket(url, SIZE, "read", "write")
    with daemon.tcp() as wire:
        stream(wire, ticket)
        time.sleep(0.2)  # it is blocked by now, with its socket full or empty
        end = ending(daemon, wire, ticket, url, way)
        assert end.got < SIZE
    assert refused(daemon, ticket) == (way is not by_replacement)


@pytest.mark.parametrize("way", [by_delete, by_expiry])
@pytest.mark.parametrize("stream", [slow_reader, slow_writer])
def test_nor_does_tls_keep_it(secure: Daemon, image: Path, stream: Callable[[Wire, str], None], way: Way) -> None:
    url = f"file://{image}"
    ticket = secure.ticket(url, SIZE, "read", "write")
    with secure.tcp() as wire:
        stream(wire, ticket)
        time.sleep(0.2)
        assert ending(secure, wire, ticket, url, way).got < SIZE
    assert refused(secure, ticket)


@pytest.mark.parametrize("way", WAYS)
def test_who_reads_quickly_is_cut_off_in_the_middle(daemon: Daemon, image: Path, way: Way) -> None:
    url = f"file://{image}"
    ticket = daemon.ticket(url, SIZE)
    with daemon.tcp() as wire:
        wire.request("GET", f"/images/{ticket}")
        wire.head()
        for _ in range(64):
            wire.some(MIB)
        way(daemon, ticket, url)
        assert wire.drained(LIMIT) < SIZE - 64 * MIB


def reader(wire: Wire, ticket: str) -> None:
    wire.request("GET", f"/images/{ticket}")


STALLED = [reader, slow_writer, checksum, flush, zero, extents]


@pytest.mark.parametrize(
    ("stream", "opened"),
    [*((stream, True) for stream in STALLED), *((stream, False) for stream in (reader, slow_writer, options))],
)
def test_a_server_that_does_not_answer_keeps_no_ticket_alive(
    daemon: Daemon, export: QemuNbd, stream: Callable[[Wire, str], None], opened: bool
) -> None:
    """And nothing of it stays: no descriptor, no thread."""
    before = held(daemon)
    ticket = daemon.ticket(export.url, SIZE, "read", "write")
    with daemon.tcp() as wire:
        if opened:
            assert wire.ask("OPTIONS", f"/images/{ticket}").status == 200
        export.stall()
        try:
            stream(wire, ticket)
            time.sleep(0.3)
            end = ending(daemon, wire, ticket, export.url, by_delete)
            assert end.got < SIZE
            assert eventually(lambda: held(daemon) <= before), (held(daemon), before)
        finally:
            export.resume()
    assert refused(daemon, ticket)
    again = daemon.ticket(export.url, SIZE)
    with daemon.tcp() as wire:
        assert wire.ask("GET", f"/images/{again}", {"Range": "bytes=0-9"}).status == 206


def held(daemon: Daemon) -> tuple[int, int]:
    """Descriptors and threads of the daemon."""
    home = Path(f"/proc/{daemon.pid}")
    return len(list((home / "fd").iterdir())), len(list((home / "task").iterdir()))


def eventually(done: Callable[[], Any]) -> bool:
    deadline = time.monotonic() + LIMIT
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_an_idle_connection_gives_its_image_back(daemon: Daemon, export: QemuNbd) -> None:
    """So that the export can be taken down; the client's next request is refused."""
    ticket = daemon.ticket(export.url, SIZE)
    with daemon.tcp() as wire:
        assert wire.ask("OPTIONS", "/images/*").status == 200  # it has its thread now
        before = held(daemon)
        assert wire.ask("GET", f"/images/{ticket}", {"Range": "bytes=0-9"}).status == 206
        assert daemon.show(ticket)["connections"] == 1
        assert daemon.delete(ticket).status == 204
        assert eventually(lambda: held(daemon) <= before)
        reply = wire.ask("GET", f"/images/{ticket}")
        assert (reply.status, reply.last) == (403, True)


def test_a_ticket_that_ends_ends_all_of_its_streams_and_no_others(daemon: Daemon, image: Path) -> None:
    url = f"file://{image}"
    mine, other = daemon.ticket(url, SIZE), daemon.ticket(url, SIZE)
    with contextlib.ExitStack() as open_:
        wires = [open_.enter_context(daemon.tcp()) for _ in range(6)]
        stranger = open_.enter_context(daemon.tcp())
        for wire in wires:
            slow_reader(wire, mine)
        slow_reader(stranger, other)
        assert daemon.delete(mine).status == 204
        for wire in wires:
            wire.drained(LIMIT)
        for _ in range(32):
            assert stranger.some(MIB)


def test_the_old_generation_writes_nothing_into_the_new_ones_image(daemon: Daemon, tmp_path: Path) -> None:
    old, new = tmp_path / "old.raw", tmp_path / "new.raw"
    for path in (old, new):
        path.write_bytes(bytes(8 * MIB))
    ticket = daemon.ticket(f"file://{old}", 8 * MIB, "write")
    with daemon.tcp() as wire:
        head = f"PUT /images/{ticket} HTTP/1.1\r\nHost: a\r\nContent-Length: {8 * MIB}\r\n\r\n"
        wire.send(head.encode() + b"x" * MIB)
        time.sleep(0.2)
        daemon.ticket(f"file://{new}", 8 * MIB, "write", uuid=ticket)
        with contextlib.suppress(OSError):
            wire.send(b"x" * 7 * MIB)
        wire.drained(LIMIT)
    assert set(new.read_bytes()) == {0}
    assert set(old.read_bytes()[4 * MIB :]) == {0}


def test_natural_expiry_ends_a_running_stream(daemon: Daemon, image: Path) -> None:
    ticket = daemon.ticket(f"file://{image}", SIZE, timeout=1)
    with daemon.tcp() as wire:
        slow_reader(wire, ticket)
        assert wire.drained(LIMIT) < SIZE
    assert refused(daemon, ticket)


def test_sigterm_ends_the_daemon_though_its_streams_do_not(tmp_path: Path, export: QemuNbd) -> None:
    file = tmp_path / "file.raw"
    with file.open("wb") as image:
        image.truncate(SIZE)
    with Ours(tmp_path, settings={"stop_timeout": 0.5}) as daemon:
        ticket, stalled = daemon.ticket(f"file://{file}", SIZE), daemon.ticket(export.url, SIZE)
        with daemon.tcp() as wire, daemon.tcp() as other:
            slow_reader(wire, ticket)
            assert other.ask("OPTIONS", f"/images/{stalled}").status == 200
            export.stall()
            other.request("GET", f"/images/{stalled}")
            try:
                assert daemon.stop() == 0
            finally:
                export.resume()
            assert wire.drained(LIMIT) < SIZE


def test_a_client_that_goes_away_frees_what_it_used(daemon: Daemon, export: QemuNbd) -> None:
    before = held(daemon)
    ticket = daemon.ticket(export.url, SIZE)
    for how in (lambda wire: wire.close(), lambda wire: wire.socket.shutdown(socket.SHUT_RDWR)):
        wire = daemon.tcp()
        slow_reader(wire, ticket)
        how(wire)
        wire.close()
    assert eventually(lambda: held(daemon) <= before), (held(daemon), before)
