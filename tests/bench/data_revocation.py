"""How long a revoked ticket's stream goes on: from DELETE until its client sees the end, whatever the stream waits for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from tests.bench.arena import SIZE, arena
from tests.bench.figure import Figure, Result, median
from tests.bench.stage import Stage
from tests.data.daemons import Daemon
from tests.data.exports import QemuNbd
from tests.data.wire import Wire
from tests.harness import raw_image

NAME = "data-revocation"
RUNS = 10
LIMIT = 2.0
SETTLE = 0.2  # seconds until a stream waits for what it will not get


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    with arena(stage, "ours", "ours-tls") as place:
        image, served = raw_image(place.folder / "image.raw", SIZE), raw_image(place.folder / "served.raw", SIZE)
        url = f"file://{image}"
        with QemuNbd(served) as export:
            plain, secure = place.daemons["ours"], place.daemons["ours-tls"]
            cases: dict[str, Callable[[], float]] = {
                "slow reader": lambda: _ended(plain, url, _reading),
                "slow reader, TLS": lambda: _ended(secure, url, _reading),
                "slow writer": lambda: _ended(plain, url, _writing),
                "reader of an NBD server that hangs": lambda: _hanging(plain, export, _asking),
                "writer to an NBD server that hangs": lambda: _hanging(plain, export, _writing),
                "expiry, slow reader": lambda: _ended(plain, url, _reading, expire=True),
            }
            lags: dict[str, list[float]] = {name: [] for name in cases}
            for number in range(runs):
                stage.say(f"{NAME}: run {number + 1} of {runs}")
                for name, run in cases.items():
                    lags[name].append(run())
    return Figure(
        name=NAME,
        measured="DELETE of a ticket, or its expiry, until its stream's client sees the end",
        peer="none (ovirt-imageio answers 409 after its timeout, and the stream goes on)",
        runs=runs,
        results=tuple(Result(f"{name}, worst", max(found), LIMIT, "s") for name, found in lags.items()),
        details={
            f"{name.replace(', ', ' ').replace(' ', '_')}_ms": 1000 * median(found) for name, found in lags.items()
        },
    )


def _reading(wire: Wire, ticket: str) -> None:
    wire.request("GET", f"/images/{ticket}")
    wire.head()


def _asking(wire: Wire, ticket: str) -> None:
    wire.request("GET", f"/images/{ticket}")


def _writing(wire: Wire, ticket: str) -> None:
    head = f"PUT /images/{ticket} HTTP/1.1\r\nHost: bench\r\nContent-Length: {SIZE}\r\n\r\n"
    wire.send(head.encode() + bytes(2 << 20))


def _ended(daemon: Daemon, url: str, begin: Callable[[Wire, str], None], *, expire: bool = False) -> float:
    ticket = daemon.ticket(url, SIZE, "read", "write")
    with daemon.tcp() as wire:
        begin(wire, ticket)
        time.sleep(SETTLE)
        began = time.perf_counter()
        with daemon.control() as control:
            if expire:
                control.ask_json("PATCH", f"/tickets/{ticket}", {"timeout": 0})
            else:
                control.ask("DELETE", f"/tickets/{ticket}")
        if wire.drained(10 * LIMIT) >= SIZE:
            raise AssertionError("all of it came")
        return time.perf_counter() - began


def _hanging(daemon: Daemon, export: QemuNbd, begin: Callable[[Wire, str], None]) -> float:
    with _stalled(export):
        return _ended(daemon, export.url, begin)


@contextlib.contextmanager
def _stalled(export: QemuNbd) -> Iterator[None]:
    export.stall()
    try:
        yield
    finally:
        export.resume()
