"""The connection, with a real libvirtd that is killed, frozen and started again, and guests whose QEMU hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from events.model import DiskJobEvent, DiskJobKind, DomainEvent, DomainEventKind, QemuJobEvent
from hostagent.drivers.libvirt import DomainRef, Lost
from jobs.errors import JobError
from tests.harness import overlay, stand_still
from tests.libvirt.held import SETTINGS, held, pull
from tests.libvirt.private import WAIT, PrivateLibvirt


def test_it_connects_and_events_come_in_order(libvirt: PrivateLibvirt, disk: Path) -> None:
    async def story() -> None:
        async with held(libvirt.uri) as one:
            await one.connected()
            await one.heard.until(lambda items: len(items) == 2)
            assert one.heard.items[1] == "resync"
            assert one.hypervisor.status.versions and one.heard.items[0][1] == one.hypervisor.status.versions.libvirt
            guest = libvirt.guest("web1", disk)
            await asyncio.to_thread(guest.start, paused=True)
            await asyncio.to_thread(pull, guest)
            await one.heard.until(lambda items: any(isinstance(item, DiskJobEvent) for item in items))
            await asyncio.to_thread(guest.destroy)
            await one.heard.until(lambda items: DomainEventKind.STOPPED in [getattr(i, "kind", None) for i in items])
            events = [event for event in one.heard.of(guest) if not isinstance(event, QemuJobEvent)]
            kinds = [event.kind for event in events if not isinstance(event, DomainEvent)]
            assert kinds == [DiskJobKind.COMPLETED]
            told = [event.kind for event in events]
            assert told[0] == DomainEventKind.DEFINED
            assert told.index(DomainEventKind.STARTED) < told.index(DiskJobKind.COMPLETED)
            assert told[-1] == DomainEventKind.STOPPED
            assert events[-1] == DomainEvent(DomainEventKind.STOPPED, guest.uuid, "web1", "destroyed")
            done = next(event for event in events if isinstance(event, DiskJobEvent))
            assert (done.operation, done.disk, done.name, done.active) == ("pull", "vda", "web1", False)
            assert one.heard.threads == {"MainThread"}

    asyncio.run(story())


def test_a_cancelled_job_is_failed_with_its_reason(libvirt: PrivateLibvirt, disk: Path) -> None:
    async def story() -> None:
        guest = libvirt.guest("web1", disk)
        guest.start(paused=True)
        async with held(libvirt.uri) as one:
            await one.connected()
            await asyncio.to_thread(pull, guest, 1)
            info = await one.block_job(guest)
            assert (info.type, info.end, info.bandwidth) == (1, 4 << 20, 1)
            with guest.domain() as domain:
                await asyncio.to_thread(domain.blockJobAbort, "vda")
            event = await one.heard.until(lambda items: next((i for i in items if isinstance(i, DiskJobEvent)), None))
            assert (event.kind, event.reason) == (DiskJobKind.FAILED, "cancelled")
            assert await one.block_job(guest) is None

    asyncio.run(story())


def test_a_killed_libvirtd_is_found_again_and_its_events_too(libvirt: PrivateLibvirt, disk: Path) -> None:
    async def story() -> None:
        guest = libvirt.guest("web1", disk)
        guest.start(paused=True)
        async with held(libvirt.uri) as one:
            await one.connected()
            await one.block_job(guest)
            for times in (1, 2):
                await asyncio.to_thread(libvirt.kill)
                await one.heard.until(lambda _, times=times: one.heard.count("disconnected") == times)
                with pytest.raises(JobError) as refused:
                    await one.block_job(guest)
                assert refused.value.code == "unavailable" and "not connected" in refused.value.message
                await asyncio.to_thread(libvirt.start)
                await one.connected(times + 1)
                assert one.heard.items[-1] == "resync"
                assert await one.block_job(guest) is None  # by a worker whose connection had broken
            await asyncio.to_thread(pull, guest)
            event = await one.heard.until(lambda items: next((i for i in items if isinstance(i, DiskJobEvent)), None))
            assert event.kind is DiskJobKind.COMPLETED
            assert len([item for item in one.heard.items if isinstance(item, DiskJobEvent)]) == 1

    asyncio.run(story())


def test_of_a_guest_that_dies_in_the_middle_of_a_call_it_is_not_said_that_the_call_failed(
    libvirt: PrivateLibvirt, disk: Path
) -> None:
    async def story() -> None:
        guest = libvirt.guest("web1", disk)
        guest.start(paused=True)
        pull(guest, 1)
        async with held(libvirt.uri) as one:
            await one.connected()
            with guest.frozen():
                call = asyncio.create_task(one.block_job(guest))
                await asyncio.wait({call}, timeout=0.3)
                assert not call.done()
                guest.kill()
                with pytest.raises(JobError) as gone:
                    await call
                assert gone.value.code == "unresponsive", gone.value

    asyncio.run(story())


def test_a_call_under_way_ends_with_libvirtd_and_a_hung_guest_stops_no_restart(
    libvirt: PrivateLibvirt, disk: Path, folder: Path
) -> None:
    async def story() -> None:
        hung = libvirt.guest("hung", disk)
        well = libvirt.guest("well", overlay(folder / "other.qcow2", folder / "base.raw"))
        for guest in (hung, well):
            guest.start(paused=True)
            pull(guest, 1)
        async with held(libvirt.uri, workers=1) as one:
            await one.connected()
            with hung.frozen():
                call = asyncio.create_task(one.block_job(hung))
                await asyncio.wait({call}, timeout=0.3)
                assert not call.done()
                await asyncio.to_thread(libvirt.kill)
                with pytest.raises(Lost):
                    await call
                await asyncio.to_thread(libvirt.start)
                await one.connected(2)
                assert (await one.block_job(well)).bandwidth == 1  # by the only worker: it is free again

    asyncio.run(story())


def test_a_libvirtd_that_comes_later_is_connected_to(libvirt: PrivateLibvirt) -> None:
    async def story() -> None:
        await asyncio.to_thread(libvirt.kill)
        async with held(libvirt.uri) as one:
            async with asyncio.timeout(WAIT):
                while "ailed to connect" not in (one.hypervisor.status.reason or ""):
                    await asyncio.sleep(0.02)
            assert one.heard.items == []  # never connected: nothing is lost
            await asyncio.to_thread(libvirt.start)
            await one.connected()

    asyncio.run(story())


def test_a_frozen_libvirtd_is_given_up_and_taken_back(libvirt: PrivateLibvirt) -> None:
    async def story() -> None:
        async with held(libvirt.uri) as one:
            await one.connected()
            pid = libvirt.pid
            stand_still(pid)
            try:
                await one.heard.until(lambda _: one.heard.count("disconnected"))
                assert "keepalive" in str(one.heard.items[-1])
                async with asyncio.timeout(WAIT):
                    while "has not answered" not in (one.hypervisor.status.reason or ""):
                        await asyncio.sleep(0.02)
            finally:
                os.kill(pid, signal.SIGCONT)
            await one.connected(2)
            assert await one.hypervisor.call("domains", lambda session: session.domains()) == []

    asyncio.run(story())


def test_a_guest_that_hangs_delays_no_other(libvirt: PrivateLibvirt, disk: Path, folder: Path) -> None:
    async def story() -> None:
        hung = libvirt.guest("hung", disk)
        well = libvirt.guest("well", overlay(folder / "other.qcow2", folder / "base.raw"))
        for guest in (hung, well):
            guest.start(paused=True)
            pull(guest, 1)
        async with held(libvirt.uri, workers=2) as one:
            await one.connected()
            with hung.frozen():
                waiting = asyncio.create_task(one.block_job(hung, timeout=1.0))
                for _ in range(20):
                    assert (await one.block_job(well)).bandwidth == 1
                with pytest.raises(JobError) as late:
                    await waiting
                assert late.value.code == "unresponsive" and "block_job of domain 'hung'" in late.value.message
                began = time.monotonic()
                for _ in range(20):  # more than workers, and than libvirtd would serve of one connection
                    with pytest.raises(JobError) as refused:
                        await one.block_job(hung)
                    assert refused.value.code == "unresponsive" and "no answer yet" in refused.value.message
                assert time.monotonic() - began < SETTINGS.call_timeout  # none of them has waited
                assert (await one.block_job(well)).bandwidth == 1
                assert len(await one.hypervisor.call("domains", lambda session: session.domains())) == 2
            async with asyncio.timeout(WAIT):  # its late answer comes, and it is served again
                while True:
                    with contextlib.suppress(JobError):
                        assert (await one.block_job(hung)).bandwidth == 1
                        break
                    await asyncio.sleep(0.02)
            assert one.results[:21].count(("block_job", "ok")) == 20
            assert ("block_job", "timeout") in one.results

    asyncio.run(story())


def test_when_all_workers_hang_that_is_explained_and_ends_with_them(
    libvirt: PrivateLibvirt, disk: Path, folder: Path
) -> None:
    async def story() -> None:
        guests = [libvirt.guest("web1", disk)]
        guests.append(libvirt.guest("web2", overlay(folder / "two.qcow2", folder / "base.raw")))
        for guest in guests:
            guest.start(paused=True)
            pull(guest, 1)
        async with held(libvirt.uri, workers=2) as one:
            await one.connected()
            with guests[0].frozen(), guests[1].frozen():
                calls = [one.block_job(guest, timeout=0.5) for guest in guests]
                late = await asyncio.gather(*calls, return_exceptions=True)
                assert [error.code for error in late if isinstance(error, JobError)] == ["unresponsive"] * 2
                with pytest.raises(JobError) as refused:
                    await one.hypervisor.call("domains", lambda session: session.domains())
                assert refused.value.code == "unavailable"
                assert "web1" in refused.value.message and "web2" in refused.value.message
                assert "libvirt.workers" in str(refused.value.remedy)
            async with asyncio.timeout(WAIT):
                while True:
                    with contextlib.suppress(JobError):
                        assert len(await one.hypervisor.call("domains", lambda session: session.domains())) == 2
                        break
                    await asyncio.sleep(0.02)

    asyncio.run(story())


def test_who_is_cancelled_leaves_a_hung_domain_as_he_found_it(libvirt: PrivateLibvirt, disk: Path) -> None:
    """Not so, each cancelled request would take one more worker."""

    async def story() -> None:
        guest = libvirt.guest("web1", disk)
        guest.start(paused=True)
        pull(guest, 1)
        async with held(libvirt.uri, workers=2) as one:
            await one.connected()
            with guest.frozen():
                for _ in range(4):
                    with contextlib.suppress(TimeoutError, JobError):
                        async with asyncio.timeout(0.3):
                            await one.block_job(guest)
                found = await one.hypervisor.call("domains", lambda session: session.domains())
                assert [domain.name for domain in found] == ["web1"]

    asyncio.run(story())


def test_errors_are_ours(libvirt: PrivateLibvirt, disk: Path) -> None:
    async def story() -> None:
        guest = libvirt.guest("web1", disk)
        async with held(libvirt.uri) as one:
            await one.connected()
            found = await one.hypervisor.call("find", lambda session: session.find("web1"))
            assert found == DomainRef(guest.uuid, "web1", False)
            assert await one.hypervisor.call("find", lambda session: session.find(guest.uuid.upper())) == found
            for name in ("web2", "no/such", "00000000-0000-0000-0000-000000000000"):
                with pytest.raises(JobError) as missing:
                    await one.hypervisor.call("find", lambda session, name=name: session.find(name))
                assert missing.value.code == "not_found" and name in missing.value.message
            with pytest.raises(JobError) as stopped:
                await one.block_job(guest)
            assert stopped.value.code == "conflict"
            guest.start(paused=True)
            with pytest.raises(JobError) as no_disk:
                await one.hypervisor.call("block_job", lambda session: session.block_job(guest.uuid, "vdz"))
            assert no_disk.value.code == "invalid"

    asyncio.run(story())
