"""When QEMU's connections to a copy's server are cut, and when never."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from hostagent.drivers import cutting, domain_xml
from hostagent.drivers.calls import Late
from hostagent.drivers.cutting import Address
from hostagent.drivers.domain_xml import Domain
from hostagent.guests.nbd_copying import NbdCopy, Settings
from hostagent.guests.network_disks import disk_xml
from hostagent.nbd.uri_leases import UriLeases
from jobs.errors import JobError
from jobs.model import Chain, Failure, FileId, Job, JobSpec, Layer, Operation, State, Target
from tests.unit.guests.fake_libvirt import DRIVE, END, NOW, play

URI = "nbd://192.0.2.7:10809/vol7"
SERVER: Address = ("192.0.2.7", 10809)


class Host:
    """A QEMU with one connection to the server; cutting it wakes what waits there. `disks` are the guest's, as XML."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, answer: float = 0.05, abort: float = 0.05) -> None:
        self.disks = ""
        self.connections = 1
        self.woken = asyncio.Event()
        self.late = False
        self.stands_still = False
        disks: Any = self
        self.leases = UriLeases(lambda file: [])
        self.work = NbdCopy(disks, self.leases, Settings(answer, abort, "qemu"))
        monkeypatch.setattr(cutting, "process_of", lambda domain: 42 if domain == DRIVE.uuid else None)
        monkeypatch.setattr(cutting, "cut", self._cut)
        monkeypatch.setattr(cutting, "count", lambda pid, wanted: self.connections)
        self._loop = asyncio.get_running_loop()

    def _cut(self, pid: int, wanted: Collection[Address]) -> int:
        assert (pid, set(wanted)) == (42, {SERVER})
        found, self.connections = self.connections, 0
        self._loop.call_soon_threadsafe(self.woken.set)
        return found

    async def described_aside(self, drive: object) -> Domain:
        text = f"<domain><uuid>{DRIVE.uuid}</uuid><name>web1</name><devices>{self.disks}</devices></domain>"
        return domain_xml.parse(text, size=1 << 20)

    async def copy(self, drive: object, wanted: object) -> None:
        if self.late:
            raise Late("copy", 0.1)
        await self.hangs()

    async def look(self, drive: object) -> tuple[int, None]:
        if self.stands_still:
            raise Late("look", 0.1)
        return 1, None

    async def hangs(self) -> None:
        await self.woken.wait()
        raise JobError("job_failed", "end of file")

    def job(self, **changed: Any) -> Job:
        before = Chain((Layer("/images/top.qcow2", "qcow2", FileId(1, 1), END, 1),))
        spec = JobSpec(Operation.COPY, "web1/vda", dest=URI)
        job = Job("4711", spec, State.RUNNING, NOW, NOW, before, before, drive=DRIVE)
        return replace(job, target=Target(URI, "raw", made=False), **changed)


def disk(uri: str, target: str, mirror: str = "") -> str:
    inner = ""
    if mirror:
        inner = disk_xml(mirror).replace("<disk type='network'>", "<mirror type='network'>").replace("disk>", "mirror>")
    return disk_xml(uri).replace("</disk>", f"<target dev='{target}'/>{inner}</disk>")


def test_a_call_that_waits_for_the_server_too_long_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        host = Host(monkeypatch)
        with pytest.raises(JobError, match="end of file"):
            await asyncio.wait_for(host.work.end(host.job(intent="abort"), host.hangs()), 20)
        assert host.connections == 0

    play(story())


def test_qemu_that_is_not_connected_yet_waits_for_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        host = Host(monkeypatch)
        host.connections = 0
        begun = asyncio.ensure_future(host.work.begin(host.job(), None))  # type: ignore[arg-type]
        await asyncio.wait({begun}, timeout=0.5)
        assert not begun.done() and not host.woken.is_set()
        host.connections = 1
        with pytest.raises(JobError, match="end of file"):
            await asyncio.wait_for(begun, 20)

    play(story())


@pytest.mark.parametrize("stands_still", [True, False])
def test_a_call_of_which_nothing_is_heard_any_more_leaves_no_guest_standing_still(
    monkeypatch: pytest.MonkeyPatch, stands_still: bool
) -> None:
    async def story() -> None:
        host = Host(monkeypatch)
        host.connections = 0  # it connects when we have given up
        host.late = True
        host.stands_still = stands_still
        begun = asyncio.ensure_future(host.work.begin(host.job(), None))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        host.connections = 1
        with pytest.raises(Late):
            await asyncio.wait_for(begun, 20)
        assert host.connections == (0 if stands_still else 1)

    play(story())


@pytest.mark.parametrize("why", ["shared", "gateway", "mirror"])
def test_a_connection_that_a_disk_of_the_guest_may_need_is_never_cut(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    async def story() -> None:
        host = Host(monkeypatch)
        other = URI.replace("vol7", "vol8")
        host.disks = {
            "shared": disk(other, "vdb"),
            "gateway": disk(other, "vdb").replace("protocol='nbd'", "protocol='iscsi'"),
            "mirror": disk("nbd://192.0.2.8/x", "vdb", mirror=other),
        }[why]
        with pytest.raises(JobError) as refused:
            await host.work.cut(host.job(intent="abort"))
        assert refused.value.code == "not_supported" and host.connections == 1
        call = asyncio.ensure_future(host.work.end(host.job(intent="abort"), host.hangs()))
        await asyncio.wait({call}, timeout=0.5)
        assert not call.done() and host.connections == 1
        call.cancel()

    play(story())


def test_its_own_mirror_and_other_servers_are_no_reason_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        host = Host(monkeypatch)
        host.disks = disk("nbd://192.0.2.8/x", "vda", mirror=URI) + disk(URI.replace("10809", "10810"), "vdb")
        await host.work.cut(host.job(intent="abort"))
        assert host.connections == 0

    play(story())


@pytest.mark.parametrize(
    ("changed", "cut"),
    [({}, False), ({"intent": "abort"}, True), ({"error": Failure("io_error", "no")}, True)],
)
def test_only_what_was_given_up_is_hastened_and_only_in_its_time(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], cut: bool
) -> None:
    async def story() -> None:
        host = Host(monkeypatch, abort=0.2)
        job = host.job(**changed)
        await host.work.hasten(job)
        assert host.connections == 1
        await asyncio.sleep(0.3)
        await host.work.hasten(job)
        assert host.connections == (0 if cut else 1)

    play(story())


def test_a_finish_is_let_wait_unless_the_guest_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        host = Host(monkeypatch)
        call = asyncio.ensure_future(host.work.end(host.job(), host.hangs()))
        await asyncio.wait({call}, timeout=0.5)
        assert not call.done() and host.connections == 1
        call.cancel()
        job = host.job()
        with pytest.raises(JobError, match="end of file"):
            spec = replace(job.spec, synchronous_writes=True)
            await asyncio.wait_for(host.work.end(replace(job, spec=spec), host.hangs()), 20)

    play(story())


def test_its_lease_names_it_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        host = Host(monkeypatch)
        job = host.job()
        host.work.claim(job)
        host.work.claim(job)
        with pytest.raises(JobError) as busy:
            host.work.claim(replace(job, id="4712"))
        assert (busy.value.code, busy.value.details["holders"]) == ("busy", ["job:4711"])
        host.work.release(job)
        host.work.release(job)
        host.work.claim(replace(job, id="4712"))

    play(story())
