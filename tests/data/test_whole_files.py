"""Uploads to a file that is not there yet, through a whole daemon: it is there at once and complete, or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.daemons import Daemon, Ours

MIB = 1 << 20
SIZE = 3 * MIB + 5


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Ours(tmp_path_factory.mktemp("daemon")) as process:
        yield process


def test_it_is_made_whole(daemon: Daemon, tmp_path: Path) -> None:
    data, image = os.urandom(SIZE), tmp_path / "new.raw"
    ticket = daemon.ticket(f"file://{image}", SIZE, "read", "write")
    with daemon.tcp() as wire:
        part = wire.ask("PUT", f"/images/{ticket}", {"Content-Range": "bytes 10-13/*"}, b"part")
        assert (part.status, image.exists()) == (400, False)
    with daemon.tcp() as wire:
        assert wire.ask("GET", f"/images/{ticket}").status == 404
    with daemon.tcp() as wire:
        assert wire.ask("PUT", f"/images/{ticket}", body=data).status == 200
        assert wire.ask("GET", f"/images/{ticket}").body == data
        assert wire.ask("PUT", f"/images/{ticket}", {"Content-Range": "bytes 10-13/*"}, b"part").status == 200
    assert image.read_bytes() == data[:10] + b"part" + data[14:]
    assert [one.name for one in tmp_path.iterdir()] == [image.name]


@pytest.mark.parametrize("end", ["cut", "revoked"])
def test_what_breaks_off_leaves_nothing(end: str, daemon: Daemon, tmp_path: Path) -> None:
    ticket = daemon.ticket(f"file://{tmp_path / 'new.raw'}", SIZE, "write")
    with daemon.tcp() as wire:
        wire.send(
            f"PUT /images/{ticket} HTTP/1.1\r\nHost: x\r\nContent-Length: {SIZE}\r\n\r\n".encode() + bytes(2 * MIB)
        )
        limit = time.monotonic() + 10
        while not list(tmp_path.iterdir()):
            assert time.monotonic() < limit
            time.sleep(0.01)
        if end == "revoked":
            assert daemon.delete(ticket).status == 204
    limit = time.monotonic() + 10
    while list(tmp_path.iterdir()):
        assert time.monotonic() < limit
        time.sleep(0.01)
