"""Extents of a fragmented image of 1 TiB: how soon they come, what they cost in memory, and a part of them."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from tests.bench.arena import arena
from tests.bench.figure import Figure, Result, median
from tests.bench.process import rss_mib
from tests.bench.stage import Stage
from tests.data.daemons import Daemon
from tests.data.exports import Qsd

NAME = "data-extents"
RUNS = 5
SIZE = 1 << 40
PIECES = 50000
"""Of 4 KiB of data, as far from each other as 1 TiB lets them; as many holes between."""
PART = SIZE // PIECES
WAIT = 300.0


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    with arena(stage, "ours", "stock") as place:
        image = place.folder / "image.raw"
        stage.say(f"{NAME}: {PIECES} pieces of data")
        _fragmented(image)
        with Qsd(image, "raw", read_only=True) as export:
            found: dict[str, list[tuple[float, ...]]] = {
                name: [] for name in ("file", "nbd", "part", "last part", "stock")
            }
            for number in range(runs):
                stage.say(f"{NAME}: run {number + 1} of {runs}")
                ours, stock = place.daemons["ours"], place.daemons["stock"]
                found["file"].append(_all(ours, f"file://{image}"))
                found["nbd"].append(_all(ours, export.url))
                found["stock"].append(_all(stock, export.url))
                found["part"].append(_part(ours, export.url, 0))
                found["last part"].append(_part(ours, export.url, SIZE - 100 * PART))
    first, last = (median([one[0] for one in found[name]]) for name in ("part", "last part"))
    return Figure(
        name=NAME,
        measured=f"extents of 1 TiB with {2 * PIECES} of them, from the request to the first and the last byte",
        peer="ovirt-imageio 2.5.1, by NBD",
        runs=runs,
        results=(
            Result("first byte, NBD", 1000 * median([one[0] for one in found["nbd"]]), 100.0, "ms"),
            Result("first byte, file", 1000 * median([one[0] for one in found["file"]]), 100.0, "ms"),
            Result("memory meanwhile, NBD", max(one[2] for one in found["nbd"]), 16.0, "MiB"),
            Result("100 extents at the end / at the begin", last / first, 3.0, "x"),
        ),
        details={
            "nbd_s": median([one[1] for one in found["nbd"]]),
            "file_s": median([one[1] for one in found["file"]]),
            "stock_s": median([one[1] for one in found["stock"]]),
            "stock_first_byte_ms": 1000 * median([one[0] for one in found["stock"]]),
            "stock_memory_MiB": max(one[2] for one in found["stock"]),
            "part_ms": 1000 * first,
        },
    )


def _fragmented(image: Path) -> None:
    fd = os.open(image, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(fd, SIZE)
        data = os.urandom(4096)
        for number in range(PIECES):
            os.pwrite(fd, data, number * PART)
    finally:
        os.close(fd)


def _all(daemon: Daemon, url: str) -> tuple[float, float, float]:
    """Seconds to the first and to the last byte; MiB by which the daemon grew meanwhile."""
    ticket = daemon.ticket(url, SIZE)
    with daemon.tcp() as wire:
        wire.socket.settimeout(WAIT)
        if wire.ask("OPTIONS", f"/images/{ticket}").status != 200:
            raise AssertionError("the image cannot be opened")
        before, peak = rss_mib(daemon.pid), [0.0]
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(daemon.pid, peak, done))
        watch.start()
        began = time.perf_counter()
        wire.request("GET", f"/images/{ticket}/extents")
        _, headers = wire.head()
        first = time.perf_counter() - began
        length = sum(map(len, wire.pieces(headers)))
        whole = time.perf_counter() - began
        done.set()
        watch.join()
        if length < PIECES * 50:
            raise AssertionError(f"the extents are {length} bytes only")
        return first, whole, peak[0] - before


def _watch(pid: int, peak: list[float], done: threading.Event) -> None:
    while not done.wait(0.02):
        peak[0] = max(peak[0], rss_mib(pid))


def _part(daemon: Daemon, url: str, start: int) -> tuple[float]:
    ticket = daemon.ticket(url, SIZE)
    with daemon.tcp() as wire:
        wire.ask("OPTIONS", f"/images/{ticket}")
        began = time.perf_counter()
        reply = wire.ask("GET", f"/images/{ticket}/extents?start={start}&length={50 * PART}")
        if reply.status != 200:
            raise AssertionError(reply)
        return (time.perf_counter() - began,)
