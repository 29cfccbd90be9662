"""Live disks by name, their chains, and which domain uses which file, with real guests."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from events.model import DiskJobEvent, HypervisorEvent
from hostagent.drivers.domain_xml import SourceType
from hostagent.drivers.domains import Domains, Settings, Use
from hostagent.drivers.hypervisor import Hypervisor
from hostagent.drivers.libvirt import DomainRef
from jobs.errors import JobError
from jobs.model import FileId
from tests.harness import overlay
from tests.libvirt.held import SETTINGS, Heard, pull
from tests.libvirt.private import WAIT, PrivateLibvirt


class Both(Heard):
    """As the agent does: what the connection tells goes on to the domains."""

    domains: Domains

    def libvirt_event(self, event: HypervisorEvent) -> None:
        super().libvirt_event(event)
        self.domains.event(event)

    def libvirt_resync(self) -> None:
        super().libvirt_resync()
        self.domains.resync()


@contextlib.asynccontextmanager
async def known(libvirt: PrivateLibvirt, **settings: Any) -> AsyncIterator[tuple[Domains, Both]]:
    heard = Both()
    settings = {"xml_size": 4 << 20, "refresh": 3600.0, "file_timeout": WAIT, **settings}
    hypervisor = Hypervisor(replace(SETTINGS, uri=libvirt.uri), heard, observe=lambda *_: None)
    heard.domains = Domains(hypervisor, Settings(**settings))
    tasks = [asyncio.create_task(hypervisor.run()), asyncio.create_task(heard.domains.run())]
    try:
        await heard.until(lambda _: heard.count("connected"))
        yield heard.domains, heard
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        hypervisor.close()


def identity(path: Path) -> FileId:
    return FileId(path.stat().st_dev, path.stat().st_ino)


async def until_users(domains: Domains, path: Path, expected: list[str]) -> list[Use]:
    """The event that changes the answer may still be on its way."""
    async with asyncio.timeout(WAIT):
        while True:
            found = await domains.users(identity(path))
            if [str(use) for use in found] == expected:
                return found
            await asyncio.sleep(0.02)


def test_a_running_guests_disk_by_its_names(libvirt: PrivateLibvirt, disk: Path) -> None:
    async def story() -> None:
        top = overlay(disk.parent / "top.qcow2", disk, "qcow2")
        guest = libvirt.guest("web1", top)
        guest.start(paused=True)
        async with known(libvirt) as (domains, _):
            by_name = await domains.disk("web1/vda")
            assert str(by_name) == "web1/vda"
            assert by_name.domain == DomainRef(guest.uuid, "web1", True)
            assert [layer.path for layer in by_name.disk.layers] == [str(top), str(disk), str(disk.parent / "base.raw")]
            assert [layer.format for layer in by_name.disk.layers] == ["qcow2", "qcow2", "raw"]
            assert {layer.type for layer in by_name.disk.layers} == {SourceType.FILE}
            assert by_name.disk.whole
            assert by_name.job is None
            assert await domains.disk(f"{guest.uuid}/{top}") == by_name
            for layer in by_name.disk.layers:
                assert (await domains.disk(f"web1/vda[{layer.index}]")).layer == layer
            await asyncio.to_thread(pull, guest, 1)
            job = (await domains.disk("web1/vda")).job
            assert job is not None and (job.type, job.end, job.bandwidth) == (1, 4 << 20, 1)

    asyncio.run(story())


def test_what_there_is_not(libvirt: PrivateLibvirt, disk: Path) -> None:
    async def story() -> None:
        libvirt.guest("web1", disk)
        async with known(libvirt) as (domains, _):
            stopped = await domains.disk("web1/vda")
            assert ([layer.path for layer in stopped.disk.layers], stopped.disk.whole) == ([str(disk)], False)
            for target in ("web2/vda", "web1/vdb", "web1/vda[1]", f"web1/{disk}x"):
                with pytest.raises(JobError) as missing:
                    await domains.disk(target)
                assert missing.value.code == "not_found"
                assert (missing.value.field, missing.value.value) == ("target", target)
            for target in ("web1", "web1/", "/vda", "./web1/vda", ""):
                with pytest.raises(JobError) as wrong:
                    await domains.disk(target)
                assert wrong.value.code == "invalid"

    asyncio.run(story())


def test_who_uses_a_file_follows_events(libvirt: PrivateLibvirt, disk: Path) -> None:
    async def story() -> None:
        base = disk.parent / "base.raw"
        async with known(libvirt) as (domains, heard):
            assert await domains.users(identity(base)) == []
            guest = libvirt.guest("web1", disk)
            (stopped,) = await until_users(domains, disk, ["web1/vda"])
            assert stopped == Use(DomainRef(guest.uuid, "web1", False), "vda", 0, True)
            assert await domains.users(identity(base)) == []  # libvirt does not say it of a domain that does not run
            await asyncio.to_thread(guest.start, paused=True)
            (below,) = await until_users(domains, base, ["web1/vda"])
            assert (below.domain.active, below.depth, below.writes) == (True, 1, False)
            await asyncio.to_thread(pull, guest)
            await heard.until(lambda items: any(isinstance(item, DiskJobEvent) for item in items))
            await until_users(domains, base, [])
            await until_users(domains, disk, ["web1/vda"])
            await asyncio.to_thread(guest.remove)
            await until_users(domains, disk, [])

    asyncio.run(story())


def test_it_is_the_file_that_counts_and_not_its_name(libvirt: PrivateLibvirt, disk: Path) -> None:
    async def story() -> None:
        other = disk.parent / "other-name.qcow2"
        os.link(disk, other)
        libvirt.guest("web1", disk)
        async with known(libvirt) as (domains, _):
            await until_users(domains, other, ["web1/vda"])

    asyncio.run(story())


def test_what_happened_while_libvirtd_was_away_is_known_after_it(libvirt: PrivateLibvirt, disk: Path) -> None:
    async def story() -> None:
        guest = libvirt.guest("web1", disk)
        guest.start(paused=True)
        async with known(libvirt) as (domains, heard):
            base = disk.parent / "base.raw"
            await until_users(domains, base, ["web1/vda"])
            await asyncio.to_thread(libvirt.kill)
            await heard.until(lambda _: heard.count("disconnected"))
            assert [str(use) for use in await domains.users(identity(base))] == ["web1/vda"]  # as it was seen last
            await asyncio.to_thread(guest.kill)
            await asyncio.to_thread(libvirt.start)
            await until_users(domains, base, [])
            async with asyncio.timeout(WAIT):  # a libvirtd that has just begun finds out that it is gone
                while (await until_users(domains, disk, ["web1/vda"]))[0].domain.active:
                    await asyncio.sleep(0.05)

    asyncio.run(story())
