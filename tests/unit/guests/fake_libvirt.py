"""A libvirt of one guest in memory, as far as jobs on its disk see it, and the driver on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from hostagent.drivers.domain_claims import DomainClaims
from hostagent.drivers.domain_xml import Disk, LiveLayer, SourceType
from hostagent.drivers.libvirt import BlockJobInfo
from hostagent.guests.disks import stopped
from hostagent.guests.driver import GuestDriver, Settings
from hostagent.guests.finding import Finder
from hostagent.guests.holding import Holding
from hostagent.guests.proof import Proof
from hostagent.guests.pulling import Pulling
from hostagent.images.member import ChainLimits
from hostagent.nbd.headers import Headers
from jobs.errors import JobError
from jobs.model import Chain, Cursor, Drive, FileId, Holder, Job, JobSpec, Layer, Operation, State

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DRIVE = Drive("4dea22b3-1d52-d8f3-2516-782e98ab3fa0", "web1", "vda")
END = 1 << 30
RUNNING = BlockJobInfo(1, 5, END, 0)


class FakeDisks:
    """Disks. `away`: nothing answers, `error`: it says that; `defined`: the guest has ended; `run` the guest's; `job` on
    its disk; `stuck`: an abort does not end it."""

    def __init__(self, paths: list[Path]) -> None:
        self.away = False
        self.error: JobError | None = None
        self.run: int | None = 1
        self.job: BlockJobInfo | None = None
        self.stuck = False
        self.detached = False
        self.defined = False
        self.paths = paths
        self.calls: list[str] = []

    @property
    def connected(self) -> bool:
        return not self.away

    async def contact(self) -> bool:
        return not self.away

    def reconnected(self) -> None:
        self.away = False

    def _answer(self, what: str) -> None:
        self.calls.append(what)
        if self.away:
            raise JobError("unresponsive", "libvirt is away")
        if self.error is not None:
            raise self.error

    async def look(self, drive: Drive) -> tuple[int | None, BlockJobInfo | None]:
        self._answer("look")
        return self.run, self.job if self.run is not None else None

    async def look_closely(self, drive: Drive) -> tuple[int | None, BlockJobInfo | None, Disk | None]:
        runs, job = await self.look(drive)
        return runs, job, None

    async def describe(self, drive: Drive) -> Disk:
        self._answer("describe")
        if self.detached:
            raise JobError("not_found", "domain web1 has no disk vda any more")
        index = None if self.defined else 1
        layers = [LiveLayer(SourceType.FILE, str(path), "qcow2", index) for path in self.paths]
        return Disk("vda", "disk", tuple(layers), True, False)

    async def fail_as(self, drive: Drive, error: JobError) -> NoReturn:
        raise stopped(drive) if self.run is None else error

    async def pull(self, drive: Drive, base: str | None, bandwidth: int) -> None:
        self._answer(f"pull to {base}")
        self.job = RUNNING

    async def set_speed(self, drive: Drive, bandwidth: int) -> None:
        self._answer("speed")
        if self.job is None:
            raise JobError("conflict", "no job")

    async def abort(self, drive: Drive) -> None:
        self._answer("abort")
        if not self.stuck:
            self.job = None


class FakeProof(Proof):
    """What the header says is `header`; libvirt's word is as the disks have it."""

    def __init__(self, disks: Any) -> None:
        super().__init__(disks, Headers(10), timeout=10, agree=0.2)
        self.header: bool | None = False

    async def of_header(self, job: Job) -> bool | None:
        return self.header


class FakeFile:
    """Durable: `lost` bytes would be lost."""

    def __init__(self) -> None:
        self.lost = 0
        self.error: JobError | None = None

    async def foresee(self, job: Job) -> None: ...

    async def missing(self, job: Job, *, running: bool) -> int:
        if self.error is not None:
            raise self.error
        return self.lost


class Host:
    """A guest whose disk has three layers, and a job on it."""

    def __init__(self, folder: Path) -> None:
        paths = [folder / f"{name}.qcow2" for name in ("top", "middle", "base")]
        for path in paths:
            path.write_bytes(b"x")
        self.disks = FakeDisks(paths)
        self.proof = FakeProof(self.disks)
        self.file = FakeFile()
        self.hints: list[str] = []
        self.renewed = 0
        self.shared: list[tuple[str, str, list[Layer]]] = []
        self.claims = DomainClaims()
        disks: Any = self.disks
        file: Any = self.file
        domains: Any = None
        holding: Any = self
        self.driver = GuestDriver(
            disks,
            self.claims,
            Pulling(disks, self.proof, file_timeout=10, end_timeout=0.2),
            self.proof,
            file,
            settings=Settings(ChainLimits(), 10),
            finder=Finder(domains, self.claims, None),
            hint=self.hints.append,
            holding=holding,
        )
        layers = tuple(_layer(path) for path in paths)
        spec = JobSpec(Operation.PULL, "web1/vda")
        before, after = Chain(layers), Chain(layers[:1])
        job = Job("4711", spec, State.STARTING, NOW, NOW, before, after, cursor=Cursor(0, END), drive=DRIVE)
        self.job = job

    begin, end = Holding.begin, Holding.end

    async def renew(self, drive: Drive, *, proven: Collection[FileId] = ()) -> None:
        self.renewed += 1
        if self.disks.away:
            raise JobError("unavailable", "libvirt is away")

    def foresee(self, drive: Drive) -> None: ...

    async def conclude(self, job: Job, record: Callable[[], Awaitable[object]]) -> None:
        await record()
        await self.end(job)

    async def share(self, source: Holder, holder: Holder, layers: Sequence[Layer]) -> None:
        self.shared.append((str(source), str(holder), list(layers)))

    async def leave_unproven(self, job: Job, layers: Sequence[Layer]) -> None:
        await self.share(job.holder, Holder("image", job.before.top.path), layers)

    async def started(self) -> Job:
        await self.driver.prepare(self.job)
        await self.driver.start(self.job)
        return replace(self.job, state=State.RUNNING, started=NOW)

    def done(self) -> None:
        """QEMU has pulled all."""
        self.disks.job = None
        self.disks.paths = self.disks.paths[:1]
        self.proof.header = True


def _layer(path: Path) -> Layer:
    found = path.stat()
    return Layer(str(path), "qcow2", FileId(found.st_dev, found.st_ino), END, 1)


def play(story: Any) -> None:
    asyncio.run(asyncio.wait_for(story, 30))
