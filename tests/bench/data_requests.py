"""Small requests: OPTIONS on a connection that is kept; and the checksum of an image, by all processors."""

from __future__ import annotations

import time
from contextlib import ExitStack

from tests.bench import sink
from tests.bench.arena import SIZE, Arena, Case, arena, details, faster, in_turns
from tests.bench.figure import Figure, median
from tests.bench.stage import Stage
from tests.data.exports import Qsd
from tests.harness import raw_image

NAME, CHECKSUM = "data-requests", "data-checksum"
RUNS = 7
REQUESTS = 3000


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    with arena(stage, "ours", "stock") as place:
        image = raw_image(place.folder / "image.raw", 1 << 20)

        def cases(_: ExitStack) -> list[Case]:
            place.anew()
            return [_options(place, name, f"file://{image}") for name in place.daemons]

        found = in_turns(stage, NAME, cases, runs)
    per_second = {f"{name}_per_s": REQUESTS / median([one.seconds for one in found[name]]) for name in found}
    cpu = {f"{name}_cpu_us": 1e6 * median([one.cpu for one in found[name]]) / REQUESTS for name in found}
    return Figure(
        name=NAME,
        measured=f"{REQUESTS} OPTIONS of one image, one after the other, on one connection",
        peer="ovirt-imageio 2.5.1",
        runs=runs,
        results=(faster(found, "ours", "stock", 1.0, "OPTIONS"),),
        details=per_second | cpu,
    )


def _options(place: Arena, name: str, url: str) -> Case:
    daemon, where = place.daemons[name], place.where(name)
    request = f"OPTIONS /images/{daemon.ticket(url, 1 << 20)} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
    return Case(name, lambda: sink.requests(where, request, REQUESTS), daemon.pid)


def checksum(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    with arena(stage, "ours", "stock") as place:
        image = raw_image(place.folder / "image.raw", SIZE)

        def cases(open_: ExitStack) -> list[Case]:
            place.anew()
            export = open_.enter_context(Qsd(image, "raw", read_only=True))
            return [*_checksums(place, f"file://{image}", "file"), *_checksums(place, export.url, "NBD", export.pid)]

        found = in_turns(stage, CHECKSUM, cases, runs)
    return Figure(
        name=CHECKSUM,
        measured=f"checksum of a {SIZE >> 30} GiB raw file (blake2b); beside it of the same behind a storage daemon, "
        "which takes a processor itself",
        peer="ovirt-imageio 2.5.1",
        runs=runs,
        results=(faster(found, "ours file", "stock file", 1.8, "checksum"),),
        details=details(found),
    )


def _checksums(place: Arena, url: str, way: str, *storage: int) -> list[Case]:
    tickets = {name: daemon.ticket(url, SIZE) for name, daemon in place.daemons.items()}
    if len({_digest(place, name, tickets[name]) for name in tickets}) != 1:
        raise AssertionError("the daemons' checksums of the same image differ")
    return [
        Case(f"{name} {way}", lambda name=name: _timed(place, name, tickets[name]), place.daemons[name].pid, *storage)
        for name in tickets
    ]


def _digest(place: Arena, name: str, ticket: str) -> str:
    with place.daemons[name].tcp() as wire:
        wire.socket.settimeout(sink.WAIT)
        return str(wire.ask("GET", f"/images/{ticket}/checksum").json["checksum"])


def _timed(place: Arena, name: str, ticket: str) -> float:
    began = time.perf_counter()
    _digest(place, name, ticket)
    return time.perf_counter() - began
