"""GET of an image's extents."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.both import only_ours
from tests.data.daemons import Daemon
from tests.data.exports import NbdServer, QemuNbd, Qsd
from tests.data.table import Row, check, refused

MIB = 1 << 20
SIZE = 16 * MIB
Extents = list[dict[str, Any]]


def qemu_io(image: Path, *commands: str, image_format: str = "qcow2") -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", image_format, *words, str(image)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def layered(home: Path) -> Path:
    """1 MiB of data at 1 MiB in the base, 64 KiB at 4 MiB above it, 1 MiB of zeros that the top has at 6 MiB, and a
    bitmap that knows of what the top was given last: 64 KiB at 10 MiB and zeros at 12 MiB."""
    base, top = home / "base.qcow2", home / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(base), str(SIZE)], check=True)
    qemu_io(base, f"write -P 1 {MIB} {MIB}")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(top)], check=True)
    qemu_io(top, f"write -P 2 {4 * MIB} 64k", f"write -z {6 * MIB} {MIB}")
    subprocess.run(["qemu-img", "bitmap", "--add", str(top), "since"], check=True)
    qemu_io(top, f"write -P 3 {10 * MIB} 64k", f"write -z {12 * MIB} 64k")
    return top


@pytest.fixture(scope="module", params=["qemu-nbd", "qsd"])
def export(layered: Path, request: pytest.FixtureRequest) -> Iterator[NbdServer]:
    server: NbdServer = (
        QemuNbd(layered, "qcow2", read_only=True, bitmap="since")
        if request.param == "qemu-nbd"
        else Qsd(layered, "qcow2", read_only=True, bitmaps=["since"])
    )
    with server:
        yield server


def zero(start: int, length: int, zero: bool, hole: bool) -> dict[str, Any]:
    return {"start": start, "length": length, "zero": zero, "hole": hole}


def dirty(start: int, length: int, dirty: bool, zero: bool) -> dict[str, Any]:
    return {"start": start, "length": length, "dirty": dirty, "zero": zero}


CLUSTER = 64 * 1024
ZERO = [
    zero(0, MIB, True, True),
    zero(MIB, MIB, False, False),
    zero(2 * MIB, 2 * MIB, True, True),
    zero(4 * MIB, CLUSTER, False, False),
    zero(4 * MIB + CLUSTER, 2 * MIB - CLUSTER, True, True),
    zero(6 * MIB, MIB, True, False),
    zero(7 * MIB, 3 * MIB, True, True),
    zero(10 * MIB, CLUSTER, False, False),
    zero(10 * MIB + CLUSTER, 2 * MIB - CLUSTER, True, True),
    zero(12 * MIB, CLUSTER, True, False),
    zero(12 * MIB + CLUSTER, 4 * MIB - CLUSTER, True, True),
]
DIRTY = [(10 * MIB, CLUSTER, False), (12 * MIB, CLUSTER, True)]


def lawful(extents: Extents, size: int, start: int = 0) -> Extents:
    """Sorted, gapless, not empty, all of it; neighbours differ."""
    at = start
    for one in extents:
        assert one["start"] == at and one["length"] > 0, one
        at += one["length"]
    assert at == start + size
    said = [{key: value for key, value in one.items() if key not in ("start", "length")} for one in extents]
    assert all(one != other for one, other in itertools.pairwise(said))
    return extents


@pytest.mark.parametrize("query", ["", "?context=zero"])
def test_zeros_and_holes_of_a_chain(daemon: Daemon, export: NbdServer, query: str) -> None:
    ticket = daemon.ticket(export.url, SIZE)
    with daemon.tcp() as wire:
        assert lawful(wire.ask("GET", f"/images/{ticket}/extents{query}").json, SIZE) == ZERO


def test_what_was_written_since_a_bitmap_was_made(daemon: Daemon, export: NbdServer) -> None:
    ticket = daemon.ticket(export.url, SIZE, dirty=True)
    with daemon.tcp() as wire:
        extents = lawful(wire.ask("GET", f"/images/{ticket}/extents?context=dirty").json, SIZE)
    assert [(one["start"], one["length"], one["zero"]) for one in extents if one["dirty"]] == DIRTY
    assert all(set(one) == {"start", "length", "dirty", "zero"} for one in extents)


def test_dirty_extents_need_a_ticket_for_them(daemon: Daemon, export: NbdServer) -> None:
    ticket = daemon.ticket(export.url, SIZE)
    row = Row(
        "", "GET", f"/images/{ticket}/extents?context=dirty", refused(404, "Ticket does not support dirty extents")
    )
    with daemon.tcp() as wire:
        check(daemon, wire, row)


def test_dirty_extents_need_a_bitmap(daemon: Daemon, layered: Path) -> None:
    with QemuNbd(layered, "qcow2", read_only=True) as server:
        ticket = daemon.ticket(server.url, SIZE, dirty=True)
        row = Row(
            "", "GET", f"/images/{ticket}/extents?context=dirty", refused(404, "bitmap|does not support dirty extents")
        )
        with daemon.tcp() as wire:
            check(daemon, wire, row)


@pytest.mark.parametrize("context", ["bogus", "", "Zero", "zero,dirty"])
def test_a_context_is_zero_or_dirty(daemon: Daemon, export: NbdServer, context: str) -> None:
    ticket = daemon.ticket(export.url, SIZE)
    answer = refused(400, "Unsupported value .* for 'context', expecting one of .*'dirty', 'zero'")
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", "GET", f"/images/{ticket}/extents?context={context}", answer))


def test_a_raw_image_has_no_holes_but_zeros(daemon: Daemon, home: Path) -> None:
    image = home / "sparse.raw"
    with image.open("wb") as file:
        file.truncate(SIZE)
        file.seek(MIB)
        file.write(b"x" * MIB)
    with QemuNbd(image, read_only=True) as server:
        ticket = daemon.ticket(server.url, SIZE)
        with daemon.tcp() as wire:
            found = lawful(wire.ask("GET", f"/images/{ticket}/extents").json, SIZE)
    assert found == [zero(0, MIB, True, False), zero(MIB, MIB, False, False), zero(2 * MIB, 14 * MIB, True, False)]


def test_a_file_tells_that_all_of_it_may_be_data_or_more(daemon: Daemon, home: Path) -> None:
    image = home / "file.raw"
    image.write_bytes(b"x" * MIB)
    ticket = daemon.ticket(f"file://{image}", MIB)
    with daemon.tcp() as wire:
        assert lawful(wire.ask("GET", f"/images/{ticket}/extents").json, MIB) == [zero(0, MIB, False, False)]
        row = Row("", "GET", f"/images/{ticket}/extents?context=dirty", refused(404, "."))
        check(daemon, wire, row)


# Part of them


PARTS = [
    pytest.param("start=0&length=1048576", 0, MIB, id="one-extent"),
    pytest.param(f"start={MIB // 2}&length={MIB}", MIB // 2, MIB, id="two-halves"),
    pytest.param(f"start={4 * MIB + 5}&length=1", 4 * MIB + 5, 1, id="one-byte"),
    pytest.param(f"start={3 * MIB}", 3 * MIB, SIZE - 3 * MIB, id="to-the-end"),
    pytest.param(f"length={7 * MIB}", 0, 7 * MIB, id="from-the-beginning"),
    pytest.param(f"start=0&length={SIZE}&context=zero", 0, SIZE, id="all"),
]


@only_ours
@pytest.mark.parametrize(("query", "start", "length"), PARTS)
def test_part_of_the_extents(daemon: Daemon, export: NbdServer, query: str, start: int, length: int) -> None:
    ticket = daemon.ticket(export.url, SIZE)
    with daemon.tcp() as wire:
        found = lawful(wire.ask("GET", f"/images/{ticket}/extents?{query}").json, length, start)
    assert found == clipped(ZERO, start, length)


def clipped(extents: Extents, start: int, length: int) -> Extents:
    found = []
    for one in extents:
        first, last = max(start, one["start"]), min(start + length, one["start"] + one["length"])
        if first < last:
            found.append(one | {"start": first, "length": last - first})
    return found


@only_ours
@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("start=x", 400),
        ("start=-1", 400),
        ("length=-1", 400),
        ("length=1.5", 400),
        ("start=1_0", 400),
        (f"start={SIZE + 1}", 416),
        (f"start={SIZE}&length=1", 416),
        (f"start=0&length={SIZE + 1}", 416),
        (f"start={10**30}", 416),
    ],
)
def test_a_part_that_is_none(daemon: Daemon, export: NbdServer, query: str, status: int) -> None:
    ticket = daemon.ticket(export.url, SIZE)
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", "GET", f"/images/{ticket}/extents?{query}", refused(status, ".")))


def test_a_ticket_shorter_than_its_image_tells_of_its_own_part(daemon: Daemon, export: NbdServer) -> None:
    """Theirs tells of the whole image."""
    ticket = daemon.ticket(export.url, 5 * MIB)
    with daemon.tcp() as wire:
        found = wire.ask("GET", f"/images/{ticket}/extents").json
    size = 5 * MIB if daemon.name == "ours" else SIZE
    assert lawful(found, size) == clipped(ZERO, 0, size)
