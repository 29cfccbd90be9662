"""Which block jobs are taken for somebody else's, and which are not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from events.model import DiskJobEvent, DiskJobKind
from hostagent.drivers.domain_xml import Disk, Domain, LiveLayer, SourceType
from hostagent.drivers.libvirt import BlockJobInfo, DomainRef
from hostagent.guests.lookout import Lookout, Settings
from hostagent.images.member import ChainLimits
from jobs.model import Drive, Job, State
from jobs.ports import SystemClock
from tests.harness import overlay, raw_image
from tests.unit.guests.fake_libvirt import Host

PULL = BlockJobInfo(1, 4096, 1 << 20, 77)


class World:
    """Guests web1, web2 whose vda is one image on another; `jobs` are libvirt's by domain and disk."""

    def __init__(self, folder: Path, *, most: int = 10) -> None:
        base = raw_image(folder / "base.raw", 1 << 20)
        self.guests = [
            self._guest(f"web{number}", overlay(folder / f"{number}.qcow2", base), base) for number in (1, 2)
        ]
        self.jobs: dict[str, BlockJobInfo] = {}
        self.active: list[Job] = []
        self.said: list[str | None] = []
        self.status = self
        self.connected = True
        self.slow = 0.0
        self.ends_when_described = False
        self.told: Callable[[DomainRef, Domain, Domain], None] = lambda domain, before, now: None
        self.forgotten: list[str] = []
        this: Any = self
        settings = Settings(ChainLimits(), sample=0.01, file_timeout=5.0, most=most)
        self.lookout = Lookout(this, this, settings, clock=SystemClock(), active=lambda: self.active, adopt=self._adopt)

    @staticmethod
    def _guest(name: str, *chain: Path) -> tuple[DomainRef, Domain]:
        layers = [
            LiveLayer(SourceType.FILE, str(path), path.suffix[1:], number) for number, path in enumerate(chain, 1)
        ]
        disk = Disk("vda", "disk", tuple(layers), True, False)
        return DomainRef(f"uuid of {name}", name, True), Domain(f"uuid of {name}", name, (disk,))

    async def _adopt(self, job: Job, said: str | None) -> None:
        await asyncio.sleep(self.slow)
        self.active.append(job)
        self.said.append(said)

    async def call(self, name: str, call: Any, *, domain: DomainRef) -> Any:
        return call(self)

    def block_job(self, domain: str, disk: str) -> BlockJobInfo | None:
        return self.jobs.get(domain)

    def running(self) -> list[tuple[DomainRef, Domain]]:
        return self.guests

    async def describe(self, ref: DomainRef) -> Domain:
        if self.ends_when_described:
            self.jobs.clear()
        return next(domain for known, domain in self.guests if known == ref)

    def forget(self, uuid: str) -> None:
        self.forgotten.append(uuid)

    async def looks(self, least: int) -> None:
        """As long as it takes to find so many jobs; and no more of them by many looks."""
        task = asyncio.create_task(self.lookout.run())
        async with asyncio.timeout(30):
            while len(self.active) < least:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(self.active) == least


def test_each_is_found_once_and_not_more_than_the_limit(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.jobs = {ref.uuid: PULL for ref, _ in world.guests}
        await world.looks(2)
        job = next(job for job in world.active if str(job.drive) == "web1/vda")
        assert (job.external, job.state, job.cursor, job.bandwidth) == (True, State.RUNNING, (4096, 1 << 20), 77)
        assert job.before == job.after and [Path(path).name for path in job.before.paths()] == ["1.qcow2", "base.raw"]
        small = World(tmp_path, most=1)
        small.jobs = world.jobs
        await small.looks(1)

    asyncio.run(story())


@pytest.mark.parametrize(("state", "found"), [(State.RUNNING, 0), (State.PAUSED, 0), (State.QUEUED, 1)])
def test_what_ours_runs_is_ours(tmp_path: Path, state: State, found: int) -> None:
    async def story() -> None:
        world = World(tmp_path)
        (ref, _), _ = world.guests
        host = Host(tmp_path)
        assert host.job.drive is not None
        ours = replace(host.job, state=state, drive=replace(host.job.drive, uuid=ref.uuid))
        world.active.append(ours)
        world.jobs = {ref.uuid: PULL}
        await world.looks(1 + found)

    asyncio.run(story())


@pytest.mark.parametrize("kind", [5, 9])
def test_a_backup_and_what_is_unknown_are_no_jobs_of_a_chain(tmp_path: Path, kind: int) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.jobs = {ref.uuid: replace(PULL, type=kind) for ref, _ in world.guests}
        await world.looks(0)

    asyncio.run(story())


def test_one_that_was_too_quick_is_known_by_its_event_and_by_what_the_chain_lost(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        (ref, before), _ = world.guests
        (disk,) = before.disks
        now = replace(before, disks=(replace(disk, layers=disk.layers[:1]),))
        world.told(ref, before, now)
        await world.looks(0)  # nobody said that it was a job
        event = DiskJobEvent(DiskJobKind.COMPLETED, ref.uuid, "web1", "vda", "pull")
        world.lookout.event(event)
        world.told(ref, before, before)
        await world.looks(0)  # nothing was lost
        world.lookout.event(event)
        world.told(ref, before, now)
        await world.looks(1)
        assert world.said == ["completed"] and len(world.active[0].before.layers) == 2
        world.lookout.settled(world.active[0])
        assert world.forgotten == [ref.uuid]

    asyncio.run(story())


def test_one_that_is_found_as_it_runs_and_by_its_end_is_one(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.slow = 0.1
        (ref, before), _ = world.guests
        (disk,) = before.disks
        world.lookout.event(DiskJobEvent(DiskJobKind.COMPLETED, ref.uuid, "web1", "vda", "pull"))
        world.jobs = {ref.uuid: PULL}
        world.told(ref, before, replace(before, disks=(replace(disk, layers=disk.layers[:1]),)))
        await world.looks(1)
        assert len(world.active) == 1

    asyncio.run(story())


def test_a_chain_that_may_be_what_the_job_has_left_is_not_taken_for_what_was_before(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        (ref, _), _ = world.guests
        world.ends_when_described = True
        world.jobs = {ref.uuid: PULL}
        await world.looks(0)
        assert world.active == []

    asyncio.run(story())


def test_a_pull_right_after_a_snapshot_is_one_of_the_snapshots_overlay(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        (ref, before), _ = world.guests
        (disk,) = before.disks
        overlay_ = overlay(tmp_path / "snapshot.qcow2", tmp_path / "1.qcow2", "qcow2")
        top = LiveLayer(SourceType.FILE, str(overlay_), "qcow2", 7)
        world.lookout.event(DiskJobEvent(DiskJobKind.COMPLETED, ref.uuid, "web1", "vda", "pull"))
        world.told(ref, before, replace(before, disks=(replace(disk, layers=(top,)),)))
        await world.looks(1)
        assert [Path(path).name for path in world.active[0].before.paths()] == ["snapshot.qcow2", "1.qcow2", "base.raw"]

    asyncio.run(story())


def test_one_that_ended_while_it_was_looked_at_is_not_found_anew(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        (ref, _), _ = world.guests
        world.jobs = {ref.uuid: PULL}
        host = Host(tmp_path)
        known = replace(host.job, drive=Drive(ref.uuid, "web1", "vda"))
        describe = world.describe

        async def ends(ref: DomainRef) -> Domain:
            world.jobs.clear()
            world.lookout.settled(known)
            return await describe(ref)

        world.describe = ends  # type: ignore[method-assign]
        await world.looks(0)
        assert not world.jobs, "it was looked at"

    asyncio.run(story())
