"""Data daemons side by side: ours and ovirt-imageio's, on the same images, asked by the same client in turns.

Two of the original stand beside ours: as it comes, and tuned to buffers of 1 MiB, which it should have had. A case is
one transfer whose seconds and processor seconds (the server's and the storage daemon's) are taken; what it delivers was
compared with the image before. Daemons are started anew for each round: how fast one is can be chance, decided when it
starts, by where its memory lies, and stays so as long as it lives.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench import sink
from tests.bench.figure import Result, median
from tests.bench.process import cpu_seconds
from tests.bench.sink import Where
from tests.bench.stage import Stage
from tests.data.daemons import Daemon, Imageio, Ours
from tests.data.exports import NbdServer
from tests.data.pki import Pki

GIB = 1 << 30
SIZE = GIB
MEMORY = Path("/dev/shm")
ROOM = 6 * GIB
COMPARED = 64 << 20
TUNED = {"backend_nbd": {"buffer_size": 1 << 20}, "backend_file": {"buffer_size": 1 << 20}}
BREATH = 0.2
"""Seconds between two cases, in which what the one before has left is cleared away."""


@dataclass(frozen=True, slots=True)
class Case:
    """`move` returns its seconds. `storage` is the storage daemon's pid, where there is one."""

    name: str
    move: Callable[[], float]
    server: int
    storage: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    seconds: float
    server: float
    storage: float

    @property
    def cpu(self) -> float:
        return self.server + self.storage


Samples = dict[str, list[Sample]]


@dataclass
class Arena:
    """`folder` is in memory where there is room, so that no disk is measured."""

    folder: Path
    pki: Pki
    daemons: dict[str, Daemon] = field(default_factory=dict)

    def anew(self) -> None:
        """Start the daemons again; their tickets are gone."""
        for daemon in self.daemons.values():
            daemon.stop()
            daemon.start()

    def where(self, name: str, *, unix: bool = False) -> Where:
        daemon = self.daemons[name]
        if unix:
            return Where(daemon.local_path)
        return Where(("127.0.0.1", daemon.port), daemon.pki.context() if daemon.pki else None)

    def download(
        self, name: str, url: str, *, label: str = "", connections: int = 1, storage: NbdServer | None = None,
        unix: bool = False, ticket: Mapping[str, Any] | None = None, like: str = "",
    ) -> Case:  # fmt: skip
        """`like`: the digest that its first bytes must have."""
        daemon, where = self.daemons[name], self.where(name, unix=unix)
        target = f"/images/{daemon.ticket(url, SIZE, **(ticket or {}))}"
        if like and sink.digest(where, target, COMPARED) != like:
            raise AssertionError(f"{name} delivers other bytes than the image has: {url}")
        move = _moves(sink.download, where, target, connections)
        return Case(label or name, move, daemon.pid, storage.pid if storage else None)

    def upload(
        self, name: str, url: str, *, label: str = "", connections: int = 1, storage: NbdServer | None = None
    ) -> Case:
        daemon = self.daemons[name]
        target = f"/images/{daemon.ticket(url, SIZE, 'read', 'write')}"
        move = _moves(sink.upload, self.where(name), target, connections)
        return Case(label or name, move, daemon.pid, storage.pid if storage else None)


def _moves(
    move: Callable[[Where, str, int, int], float], where: Where, target: str, number: int
) -> Callable[[], float]:
    return lambda: move(where, target, SIZE, number)


@contextlib.contextmanager
def arena(stage: Stage, *names: str) -> Iterator[Arena]:
    """With these daemons: ours, stock, tuned, and each with `-tls`."""
    kinds: dict[str, Callable[..., Daemon]] = {"ours": Ours, "stock": Imageio, "tuned": Imageio}
    place = MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM else stage.folder
    with tempfile.TemporaryDirectory(prefix="hostagent-bench-", dir=place) as folder, ExitStack() as open_:
        found = Arena(Path(folder), Pki(Path(folder) / "pki"))
        for name in names:
            kind, _, tls = name.partition("-")
            home = Path(folder) / name
            home.mkdir()
            settings = TUNED if kind == "tuned" else None
            daemon = kinds[kind](home, tls=found.pki if tls else None, settings=settings)
            found.daemons[name] = open_.enter_context(daemon)
        yield found


def digest(content: Path) -> str:
    with content.open("rb") as file:
        return hashlib.sha256(file.read(COMPARED)).hexdigest()


def in_turns(stage: Stage, name: str, cases: Callable[[ExitStack], Sequence[Case]], runs: int) -> Samples:
    """Rounds of cases, each begun with another one. `cases` makes them for a round; what they open is closed with it."""
    found: Samples = {}
    for number in range(runs):
        stage.say(f"{name}: round {number + 1} of {runs}")
        with ExitStack() as open_:
            turns = cases(open_)
            first = number % len(turns)
            for case in [*turns[first:], *turns[:first]]:
                found.setdefault(case.name, []).append(_sample(case))
    return found


def _sample(case: Case) -> Sample:
    time.sleep(BREATH)
    before = _cpu(case)
    seconds = case.move()
    server, storage = (after - b for after, b in zip(_cpu(case), before, strict=True))
    return Sample(seconds, server, storage)


def _cpu(case: Case) -> tuple[float, float]:
    return cpu_seconds(case.server), cpu_seconds(case.storage) if case.storage else 0.0


def faster(found: Samples, ours: str, theirs: str, target: float, what: str) -> Result:
    """Throughput against a peer, round by round."""
    ratios = [b.seconds / a.seconds for a, b in zip(found[ours], found[theirs], strict=True)]
    return Result(f"{what}, throughput / {theirs}", median(ratios), target, "x", at_least=True)


def cheaper(found: Samples, ours: str, theirs: str, target: float, what: str) -> Result:
    """Processor time against a peer; medians of each, since the kernel counts in hundredths of a second."""
    ratio = median([one.cpu for one in found[ours]]) / median([one.cpu for one in found[theirs]])
    return Result(f"{what}, CPU / {theirs}", ratio, target, "x")


def details(found: Samples) -> dict[str, float]:
    """MB/s, and milliseconds of processor per GiB, of each case."""
    said = {}
    for name, samples in found.items():
        key = name.replace(" ", "_").replace("-", "_")
        said[f"{key}_MBps"] = SIZE / median([one.seconds for one in samples]) / 1e6
        said[f"{key}_cpu_ms_per_GiB"] = 1000 * median([one.cpu for one in samples])
    return said
