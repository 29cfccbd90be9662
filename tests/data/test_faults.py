"""What breaks in the middle of a transfer: a clear status, nothing called durable that is not, and a way to go on.

Every case ends with the image's bytes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.daemons import Daemon, Ours
from tests.data.exports import QemuNbd
from tests.data.table import in_step
from tests.data.wire import Ended, Reply, Wire

MIB = 1 << 20
SIZE = 64 * MIB
LIMIT = 20.0
HASTY = {"nbd_timeout": 2.0, "nbd_connect_timeout": 2.0}
ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Ours(tmp_path_factory.mktemp("daemon"), settings=HASTY) as process:
        yield process


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def export(image: Path) -> Iterator[QemuNbd]:
    with QemuNbd(image) as server:
        yield server


def progress(daemon: Daemon, ticket: str) -> list[tuple[int, int]]:
    with daemon.tcp() as wire:
        said = wire.ask("GET", f"/images/{ticket}/progress").json
    return [(one["start"], one["start"] + one["length"]) for one in said["durable"]]


def put(wire: Wire, ticket: str, content: bytes, first: int, last: int, query: str = "") -> Reply:
    span = {"Content-Range": f"bytes {first}-{last - 1}/*"}
    return wire.ask("PUT", f"/images/{ticket}{query}", span, content[first:last])


def durable_bytes_are_there(image: Path, content: bytes, durable: list[tuple[int, int]]) -> None:
    """Read from the file, past whoever served it."""
    found = image.read_bytes()
    for begin, end in durable:
        assert found[begin:end] == content[begin:end], f"{begin}-{end} is called durable and is not there"


def resume(daemon: Daemon, ticket: str, content: bytes) -> None:
    """As a client does: what is not durable is sent again."""
    at = 0
    with daemon.tcp() as wire:
        for begin, end in [*progress(daemon, ticket), (SIZE, SIZE)]:
            if at < begin:
                assert put(wire, ticket, content, at, begin).status == 200
            at = end
        assert wire.ask_json("PATCH", f"/images/{ticket}", {"op": "flush"}).status == 200
    assert progress(daemon, ticket) == [(0, SIZE)]


def begin_upload(wire: Wire, ticket: str, content: bytes) -> None:
    """Half of it, and the connection stays open."""
    wire.send(f"PUT /images/{ticket} HTTP/1.1\r\nHost: a\r\nContent-Length: {SIZE}\r\n\r\n".encode())
    wire.send(content[: SIZE // 2])


def end_of(wire: Wire, rest: bytes = b"") -> int | None:
    """The status that the server ends with; None when it has just closed."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        wire.send(rest)
    try:
        return wire.reply().status
    except (Ended, ConnectionResetError):
        return None


# The NBD server


def test_a_server_killed_in_the_middle_of_a_download_leaves_a_short_body(
    daemon: Daemon, export: QemuNbd, image: Path, content: bytes
) -> None:
    image.write_bytes(content)
    ticket = daemon.ticket(export.url, SIZE)
    with daemon.tcp() as wire:
        wire.request("GET", f"/images/{ticket}")
        assert wire.head()[0] == 200
        got = wire.exactly(MIB)
        export.kill()
        with contextlib.suppress(Ended):
            while True:
                got += wire.some(MIB)
        assert len(got) < SIZE and got == content[: len(got)], "never filled up"
    with daemon.tcp() as wire:
        assert wire.ask("GET", f"/images/{ticket}").status == 503
    export.start()
    with daemon.tcp() as wire:
        assert wire.ask("GET", f"/images/{ticket}").body == content


def test_a_server_killed_in_the_middle_of_an_upload_is_told_and_the_upload_goes_on(
    daemon: Daemon, export: QemuNbd, image: Path, content: bytes
) -> None:
    ticket = daemon.ticket(export.url, SIZE, "read", "write")
    with daemon.tcp() as wire:
        assert put(wire, ticket, content, 0, 8 * MIB).status == 200
        begin = wire
        begin_upload(begin, ticket, content)
        time.sleep(0.3)
        export.kill()
        assert end_of(wire, content[SIZE // 2 :]) in (500, 503, None)
    durable = progress(daemon, ticket)
    durable_bytes_are_there(image, content, durable)
    assert durable == [], "the first part is being written anew, by a request that failed"
    with daemon.tcp() as wire:
        assert put(wire, ticket, content, 0, MIB).status == 503
        in_step(daemon.tcp())
    export.start()
    resume(daemon, ticket, content)
    assert image.read_bytes() == content


def test_what_a_killed_server_had_cached_is_not_called_durable(daemon: Daemon, export: QemuNbd, content: bytes) -> None:
    """Written, the server killed and started again, and only then flushed: that flush covers nothing of before."""
    ticket = daemon.ticket(export.url, SIZE, "read", "write")
    with daemon.tcp() as wire:
        assert put(wire, ticket, content, 0, 8 * MIB, "?flush=n").status == 200
        assert progress(daemon, ticket) == []
        export.kill()
        export.start()
        reply = wire.ask_json("PATCH", f"/images/{ticket}", {"op": "flush"})
    if reply.status == 200:
        assert progress(daemon, ticket) == [], "a new server's flush says nothing of what the old one had"
    with daemon.tcp() as wire:
        again = wire.ask_json("PATCH", f"/images/{ticket}", {"op": "flush"})
    assert again.status != 200 or progress(daemon, ticket) == []


def test_nor_by_the_flush_of_another_connection(daemon: Daemon, export: QemuNbd, image: Path, content: bytes) -> None:
    """The first one's writes went to a server that is no more; no flush succeeds before they are written again."""
    ticket = daemon.ticket(export.url, SIZE, "read", "write")
    flush = {"op": "flush"}
    with daemon.tcp() as first, daemon.tcp() as second:
        assert put(first, ticket, content, 0, 8 * MIB, "?flush=n").status == 200
        export.kill()
        export.start()
        assert put(second, ticket, content, 8 * MIB, 16 * MIB, "?flush=n").status == 200
        assert second.ask_json("PATCH", f"/images/{ticket}", flush).status == 500
        assert progress(daemon, ticket) in ([], [(8 * MIB, 16 * MIB)])
        with daemon.tcp() as third:
            assert third.ask_json("PATCH", f"/images/{ticket}", flush).status == 500
            assert progress(daemon, ticket) in ([], [(8 * MIB, 16 * MIB)])
            assert put(third, ticket, content, 0, 16 * MIB).status == 200
        assert progress(daemon, ticket) == [(0, 16 * MIB)]
    durable_bytes_are_there(image, content, [(0, 16 * MIB)])


def test_a_client_that_leaves_without_a_flush_loses_nothing(
    daemon: Daemon, export: QemuNbd, image: Path, content: bytes
) -> None:
    """What it wrote is flushed as its connection ends, while the server is the one that has it."""
    ticket = daemon.ticket(export.url, SIZE, "read", "write")
    with daemon.tcp() as first:
        assert put(first, ticket, content, 0, 8 * MIB, "?flush=n").status == 200
    assert eventually(lambda: daemon.show(ticket)["connections"] == 0)
    assert progress(daemon, ticket) == [(0, 8 * MIB)]
    export.kill()
    durable_bytes_are_there(image, content, [(0, 8 * MIB)])


@pytest.mark.parametrize("direction", ["download", "upload"])
def test_a_server_that_stalls_has_a_bound_and_goes_on_if_it_wakes_before(
    daemon: Daemon, export: QemuNbd, image: Path, content: bytes, direction: str
) -> None:
    image.write_bytes(content if direction == "download" else bytes(SIZE))
    ticket = daemon.ticket(export.url, SIZE, "read", "write")
    with daemon.tcp() as wire:
        if direction == "download":
            wire.request("GET", f"/images/{ticket}")
            assert wire.head()[0] == 200
            got = wire.exactly(MIB)
        else:
            begin_upload(wire, ticket, content)
        export.stall()
        time.sleep(1)
        export.resume()
        if direction == "download":
            assert got + wire.exactly(SIZE - MIB) == content
        else:
            wire.send(content[SIZE // 2 :])
            assert wire.reply().status == 200
            assert image.read_bytes() == content
        export.stall()
        try:
            began = time.monotonic()
            status = wire.ask("GET", f"/images/{ticket}", {"Range": "bytes=0-9"}).status
        except Ended:
            status = 0  # the head was out when the server was found to hang
        finally:
            export.resume()
        assert status in (0, 504) and time.monotonic() - began < LIMIT


# Space


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 24 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="needs root: mounts")
@pytest.mark.parametrize("place", ["file", "nbd"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_full_disk_is_507_and_room_made_lets_the_upload_go_on(
    daemon: Daemon, small_disk: Path, content: bytes, place: str, framing: str
) -> None:
    image, ballast = small_disk / "image.raw", small_disk / "ballast"
    size = 16 * MIB
    with image.open("wb") as file:
        file.truncate(size)
    ballast.write_bytes(bytes(16 * MIB))
    with contextlib.ExitStack() as open_:
        url = open_.enter_context(QemuNbd(image)).url if place == "nbd" else f"file://{image}"  # type: ignore[attr-defined]
        ticket = daemon.ticket(url, size, "read", "write")
        wire = open_.enter_context(daemon.tcp())
        if framing == "length":
            status = wire.ask("PUT", f"/images/{ticket}", None, content[:size]).status
        else:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                wire.send(f"PUT /images/{ticket} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
                for at in range(0, size, MIB):
                    wire.send(b"100000\r\n" + content[at : at + MIB] + b"\r\n")
                wire.send(b"0\r\n\r\n")
            status = wire.reply().status
        assert status == 507
        durable_bytes_are_there(image, content, progress(daemon, ticket))
        ballast.unlink()
        with daemon.tcp() as again:
            assert again.ask("PUT", f"/images/{ticket}", None, content[:size]).status == 200
        assert progress(daemon, ticket) == [(0, size)]
    assert image.read_bytes() == content[:size]


# The ticket, the client, the daemon


def test_a_ticket_deleted_in_mid_stream_writes_nothing_more(
    daemon: Daemon, export: QemuNbd, image: Path, content: bytes
) -> None:
    ticket = daemon.ticket(export.url, SIZE, "write")
    with daemon.tcp() as wire:
        begin_upload(wire, ticket, content)
        assert daemon.delete(ticket).status == 204
        assert end_of(wire, content[SIZE // 2 :]) in (403, None)
    before = image.read_bytes()
    assert before[SIZE // 2 + 4 * MIB :] == bytes(SIZE // 2 - 4 * MIB)
    again = daemon.ticket(export.url, SIZE, "read", "write", uuid=ticket)
    assert progress(daemon, again) == [], "another ticket of the same id knows nothing of the first one's"
    resume(daemon, again, content)
    assert image.read_bytes() == content


def test_a_client_that_vanishes_in_mid_body_leaves_what_was_flushed_and_no_more(
    daemon: Daemon, export: QemuNbd, image: Path, content: bytes
) -> None:
    ticket = daemon.ticket(export.url, SIZE, "read", "write")
    with daemon.tcp() as wire:
        assert put(wire, ticket, content, 0, 16 * MIB).status == 200
        assert put(wire, ticket, content, 40 * MIB, 48 * MIB).status == 200
        wire.send(f"PUT /images/{ticket} HTTP/1.1\r\nHost: a\r\nContent-Length: {32 * MIB}\r\n".encode())
        wire.send(f"Content-Range: bytes {16 * MIB}-*/*\r\n\r\n".encode() + content[16 * MIB : 20 * MIB])
    eventually(lambda: progress(daemon, ticket) == [(0, 16 * MIB)])  # it has begun, which may come after our end
    assert eventually(lambda: not daemon.show(ticket)["active"])
    durable = progress(daemon, ticket)
    assert durable == [(0, 16 * MIB)], "the second part is being written anew"
    durable_bytes_are_there(image, content, durable)
    resume(daemon, ticket, content)
    assert image.read_bytes() == content


def test_flushes_cover_what_was_written_before_them_and_nothing_else(
    daemon: Daemon, export: QemuNbd, content: bytes
) -> None:
    ticket = daemon.ticket(export.url, SIZE, "read", "write")
    with daemon.tcp() as wire, daemon.tcp() as other:
        assert put(wire, ticket, content, 0, MIB, "?flush=n").status == 200
        assert put(other, ticket, content, 2 * MIB, 3 * MIB, "?flush=n").status == 200
        assert wire.ask_json("PATCH", f"/images/{ticket}", {"op": "zero", "offset": 8 * MIB, "size": MIB}).status == 200
        assert progress(daemon, ticket) == []
        assert other.ask_json("PATCH", f"/images/{ticket}", {"op": "flush"}).status == 200
        assert progress(daemon, ticket) == [(0, MIB), (2 * MIB, 3 * MIB), (8 * MIB, 9 * MIB)]
        assert put(wire, ticket, content, MIB // 2, MIB, "?flush=n").status == 200
        assert progress(daemon, ticket) == [(0, MIB // 2), (2 * MIB, 3 * MIB), (8 * MIB, 9 * MIB)]


@pytest.mark.parametrize("place", ["file", "nbd"])
def test_a_daemon_killed_in_the_middle_of_an_upload_claims_nothing_and_the_upload_is_done_again(
    tmp_path: Path, image: Path, content: bytes, place: str
) -> None:
    with contextlib.ExitStack() as open_:
        url = open_.enter_context(QemuNbd(image)).url if place == "nbd" else f"file://{image}"  # type: ignore[attr-defined]
        daemon = open_.enter_context(Ours(tmp_path, settings=HASTY))
        ticket = daemon.ticket(url, SIZE, "read", "write")
        with daemon.tcp() as wire:
            assert put(wire, ticket, content, 0, 8 * MIB).status == 200
            begin_upload(wire, ticket, content)
            daemon.kill()
            assert end_of(wire) is None
        daemon.start()
        with daemon.tcp() as wire:
            assert wire.ask("GET", f"/images/{ticket}/progress").status == 403, "a ticket does not outlive the daemon"
        again = daemon.ticket(url, SIZE, "read", "write", uuid=ticket)
        assert progress(daemon, again) == []
        resume(daemon, again, content)
    assert image.read_bytes() == content


def test_an_image_that_shrinks_in_mid_download_leaves_a_short_body(daemon: Daemon, tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    content = os.urandom(8 * MIB) * 16
    image.write_bytes(content)
    ticket = daemon.ticket(f"file://{image}", len(content))
    with daemon.tcp() as wire:
        wire.request("GET", f"/images/{ticket}")
        assert wire.head()[0] == 200
        got = wire.exactly(MIB)
        os.truncate(image, 2 * MIB)
        with contextlib.suppress(Ended):
            while True:
                got += wire.some(MIB)
    assert len(got) < len(content) and got[: 2 * MIB] == content[: 2 * MIB]


def eventually(done: Callable[[], Any]) -> bool:
    deadline = time.monotonic() + LIMIT
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
