"""A thousand idle clients, two hundred slow readers and attackers of every kind: what they cost in memory, and what a
well-behaved download keeps of the speed that it has alone."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

from tests.bench.arena import COMPARED, SIZE, Arena, arena, digest, in_turns
from tests.bench.figure import Figure, Result, median
from tests.bench.process import rss_mib
from tests.bench.stage import Stage
from tests.data.daemons import Daemon
from tests.data.exports import Qsd
from tests.data.wire import Wire, chunked, tcp, unix
from tests.harness import raw_image

NAME = "data-crowd"
RUNS = 7
IDLE, SLOW, PER_TICKET = 1000, 200, 8
ATTACKS = (
    b"GET /info/ HTTP/1.1\r\nX: ",
    b"GET /" + b"a" * 5000,
    b"GET /info/ HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 60000,
    b"GET /info/ HTTP/1.1\r\nHost: a\r\nX: y\r\rY: z\r\n\r\n",
    b"PUT /images/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"x" * 1000),
    b"PUT /images/x HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n",
    b"PUT /images/x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
    b"PATCH /images/x HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n" + b"[" * 60000,
    b"\x16\x03\x01\x02\x00\x01\x00",
)


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    with arena(stage, "ours", "stock") as place, contextlib.ExitStack() as crowd:
        image = raw_image(place.folder / "image.raw", SIZE)
        export = crowd.enter_context(Qsd(image, "raw", read_only=True))
        case = place.download("ours", f"file://{image}", like=digest(image))
        alone = in_turns(stage, NAME, lambda _: [case], runs)["ours"]
        ours = place.daemons["ours"]
        begin = rss_mib(ours.pid)
        _idle(stage, ours, crowd)
        idle = rss_mib(ours.pid) - begin
        theirs = _theirs(stage, place, crowd)
        _slow(stage, ours, crowd, f"file://{image}", export.url)
        _attack(ours, crowd)
        time.sleep(1)
        among = in_turns(stage, NAME, lambda _: [case], runs)["ours"]
        all_of_them = rss_mib(ours.pid) - begin
        _tickets(stage, ours)
        full = rss_mib(ours.pid) - begin
    kept = median([one.seconds for one in alone]) / median([one.seconds for one in among])
    return Figure(
        name=NAME,
        measured=f"{IDLE} idle connections; {SLOW} slow readers, half of them by NBD; {len(ATTACKS)} attacks; 10,000 tickets",
        peer="ovirt-imageio 2.5.1 with as many idle connections; a download alone",
        runs=runs,
        results=(
            Result(f"memory of {IDLE} idle connections", idle, 40.0, "MiB"),
            Result("speed that a download keeps", kept, 0.8, "x", at_least=True),
            Result("memory of them all", all_of_them, 512.0, "MiB"),
        ),
        details={
            "theirs_idle_MiB": theirs,
            "with_10000_tickets_MiB": full,
            "alone_MBps": SIZE / median([one.seconds for one in alone]) / 1e6,
            "among_them_MBps": SIZE / median([one.seconds for one in among]) / 1e6,
        },
    )


def _idle(stage: Stage, daemon: Daemon, crowd: contextlib.ExitStack) -> None:
    """Each has asked once, as pools of clients have."""
    for number in range(IDLE):
        if number % 100 == 0:
            stage.say(f"{NAME}: idle connection {number} of {IDLE}")
        wire = crowd.enter_context(Wire(tcp(daemon.port)))
        if wire.ask("OPTIONS", "/images/*").status != 200:
            raise AssertionError("an idle connection was refused")


def _theirs(stage: Stage, place: Arena, crowd: contextlib.ExitStack) -> float:
    daemon = place.daemons["stock"]
    begin = rss_mib(daemon.pid)
    _idle(stage, daemon, crowd)
    return rss_mib(daemon.pid) - begin


def _slow(stage: Stage, daemon: Daemon, crowd: contextlib.ExitStack, *urls: str) -> None:
    """They have begun a whole image, and read nothing of it."""
    stage.say(f"{NAME}: {SLOW} slow readers")
    for url in urls:
        for number in range(SLOW // len(urls)):
            if number % PER_TICKET == 0:
                ticket = daemon.ticket(url, SIZE)
            wire = crowd.enter_context(Wire(tcp(daemon.port, receive_buffer=4096)))
            wire.request("GET", f"/images/{ticket}")
            if wire.head()[0] != 200:
                raise AssertionError("a slow reader was refused")


def _attack(daemon: Daemon, crowd: contextlib.ExitStack) -> None:
    """One after the other, and left open; half of each kind closes its own half."""
    for number in range(10):
        for data in ATTACKS:
            connection = crowd.enter_context(tcp(daemon.port) if number % 3 else unix(daemon.local_path))
            with contextlib.suppress(OSError):
                connection.sendall(data)
                if number % 2:
                    connection.shutdown(socket.SHUT_WR)


def _tickets(stage: Stage, daemon: Daemon) -> None:
    """As many as there may be."""
    stage.say(f"{NAME}: 10,000 tickets")
    with daemon.control() as wire:
        for number in range(10000):
            one = {
                "uuid": f"t{number}",
                "size": COMPARED,
                "ops": ["read"],
                "timeout": 300,
                "url": f"file://{Path('/x')}",
            }
            if wire.ask_json("PUT", f"/tickets/t{number}", one).status not in (200, 429):
                raise AssertionError("a ticket was refused")
