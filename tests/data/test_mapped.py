"""Tickets that name the image behind their export, through a whole daemon: what a client gets, and when files are free."""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.daemons import Daemon, Ours
from tests.data.exports import Qsd
from tests.data.pki import Pki
from tests.harness import overlay

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture(scope="module", params=["plain", "tls"])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Daemon]:
    tls = pki if request.param == "tls" else None
    with Ours(tmp_path_factory.mktemp("daemon"), tls=tls, settings={"map_hold": 600}) as process:
        yield process


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three layers, with data, zeros, small pieces and compressed clusters."""
    folder = tmp_path_factory.mktemp("chain")
    base = folder / "base.raw"
    with base.open("wb") as file:
        file.write(os.urandom(16 * MIB))
        file.truncate(SIZE)
    middle = overlay(folder / "middle.qcow2", base)
    small = [f"write -P {at} {at * 128}k 4k" for at in range(1, 60)]
    qemu_io(middle, "write -z 8M 2M", "write -c -P 9 20M 64k", *small)
    top = overlay(folder / "top.qcow2", middle, "qcow2")
    qemu_io(top, "write -P 7 40M 5M", "discard 42M 1M", "write -P 8 63M 1M")
    return top


@pytest.fixture(scope="module")
def content(top: Path) -> bytes:
    raw = top.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(top), str(raw)], check=True)
    return raw.read_bytes()


@pytest.fixture(scope="module")
def export(top: Path) -> Iterator[Qsd]:
    with Qsd(top, "qcow2", read_only=True) as server:
        yield server


def qemu_io(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(image)], check=True, capture_output=True)


def ticket(daemon: Daemon, export: Qsd, top: Path, **more: Any) -> str:
    return daemon.ticket(export.url, SIZE, image={"path": str(top), "format": "qcow2"}, **more)


def moved(daemon: Daemon, backend: str) -> int:
    with daemon.control() as wire:
        lines = wire.ask("GET", "/metrics").body.decode().splitlines()
    name = f'hostagent_transfer_bytes_total{{backend="{backend}",direction="download"}}'
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name))


def base_is_free(top: Path) -> bool:
    """The raw base: of the others the export itself keeps writers away."""
    words = ["qemu-io", "-f", "raw", "-c", "read 0 512", str(top.with_name("base.raw"))]
    return subprocess.run(words, capture_output=True).returncode == 0


def until(true: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_gets_what_qemu_reads(daemon: Daemon, export: Qsd, top: Path, content: bytes) -> None:
    before = moved(daemon, "mapped")
    one = ticket(daemon, export, top)
    with daemon.tcp() as wire:
        assert wire.ask("GET", f"/images/{one}").body == content
        for first, last in [(0, 0), (5, 9 * MIB), (20 * MIB - 7, 20 * MIB + 70000), (SIZE - 1, SIZE - 1)]:
            reply = wire.ask("GET", f"/images/{one}", headers={"Range": f"bytes={first}-{last}"})
            assert reply.body == content[first : last + 1]
    until(lambda: moved(daemon, "mapped") - before > SIZE)
    assert base_is_free(top)


def test_its_extents_and_checksum_are_those_of_the_export(
    daemon: Daemon, export: Qsd, top: Path, content: bytes
) -> None:
    one, plain = ticket(daemon, export, top), daemon.ticket(export.url, SIZE)
    with daemon.tcp() as wire:
        mine = json.loads(wire.ask("GET", f"/images/{one}/extents").body)
        theirs = json.loads(wire.ask("GET", f"/images/{plain}/extents").body)
        assert mine == theirs
        part = json.loads(wire.ask("GET", f"/images/{one}/extents?start={8 * MIB + 5}&length=100").body)
        assert part == [{"start": 8 * MIB + 5, "length": 100, "zero": True, "hole": False}]
        sums = [json.loads(wire.ask("GET", f"/images/{ticket}/checksum").body) for ticket in (one, plain)]
        assert sums[0] == sums[1]


def test_the_files_are_locked_until_the_ticket_is_revoked_and_no_longer(
    daemon: Daemon, export: Qsd, top: Path, content: bytes
) -> None:
    one = ticket(daemon, export, top)
    with daemon.tcp() as wire:
        wire.request("GET", f"/images/{one}")
        wire.head()  # who looks before that has the file open himself, and it is not mapped
        until(lambda: not base_is_free(top))
        assert daemon.delete(one).status == 204
        assert base_is_free(top)


def test_a_ticket_whose_image_makes_no_sense_is_refused(daemon: Daemon, export: Qsd) -> None:
    body = {"uuid": str(uuid.uuid4()), "url": export.url, "size": SIZE, "ops": ["read"], "timeout": 300}
    reply = daemon.put(body | {"image": {"path": "relative", "format": "qcow2"}})
    assert reply.status == 400
    assert b"image" in reply.body


def test_a_writable_ticket_goes_by_its_export(daemon: Daemon, top: Path, tmp_path: Path) -> None:
    mine = overlay(tmp_path / "mine.qcow2", top, "qcow2")
    with Qsd(mine, "qcow2") as server, daemon.tcp() as wire:
        image = {"path": str(mine), "format": "qcow2"}
        one = daemon.ticket(server.url, SIZE, "read", "write", image=image)
        before = moved(daemon, "nbd")
        assert wire.ask("PUT", f"/images/{one}", body=b"x" * 512).status == 200
        assert wire.ask("GET", f"/images/{one}", headers={"Range": "bytes=0-511"}).body == b"x" * 512
        until(lambda: moved(daemon, "nbd") == before + 512)  # counted when the answer is gone
