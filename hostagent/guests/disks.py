"""What jobs ask libvirt about a guest's disk, and of it.

Without libvirt nothing is known of a guest, so `unresponsive` is what a call says that could not be made, or whose
answer was lost; a broken connection is never a job's failure.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from hostagent.drivers.domain_xml import Disk, Domain
from hostagent.drivers.domains import Domains
from hostagent.drivers.hypervisor import Hypervisor
from hostagent.drivers.libvirt import (
    PACKAGE,
    SYNCHRONOUS_SINCE,
    BlockJobInfo,
    CommitCall,
    CopyCall,
    DomainRef,
    Session,
)
from jobs.errors import JobError
from jobs.model import Drive, Job

T = TypeVar("T")

PULL, COPY, COMMIT, ACTIVE_COMMIT = 1, 2, 3, 4
"""virDomainBlockJobType"""
MOMENT = 0.5
"""Seconds that libvirt may take to see that a guest ends whose job it refused, or said to have been cancelled."""


def drive_of(job: Job) -> Drive:
    assert job.drive is not None, f"job {job.id} is not a guest's"
    return job.drive


def stopped(drive: Drive) -> JobError:
    return JobError("guest_stopped", f"domain {drive.name} ended", remedy="start it, and pull on")


class Disks:
    """`connect_timeout` (seconds): how long a connection is waited for, when the agent or libvirtd has just begun."""

    def __init__(self, hypervisor: Hypervisor, domains: Domains, connect_timeout: float) -> None:
        self._hypervisor = hypervisor
        self._domains = domains
        self._timeout = connect_timeout
        self._up = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self._hypervisor.status.connected

    def reconnected(self) -> None:
        self._up.set()

    def refuse_deaf(self) -> None:
        """A JobError where QEMU's own word on a job cannot be heard, which alone proves one that changes no chain."""
        if (deaf := self._hypervisor.status.deaf) is not None:
            raise JobError(
                "not_supported",
                f"nothing would prove that it ended well: QEMU's own events are not heard ({deaf})",
                field="completion",
                value="finish",
                remedy=f"install {PACKAGE} with its module libvirt_qemu, and start the agent again; or let it pivot",
            )

    def refuse_asynchronous(self) -> None:
        """A JobError where libvirt is too old for synchronous writes."""
        versions = self._hypervisor.status.versions
        if versions is not None and tuple(map(int, versions.libvirt.split("."))) < SYNCHRONOUS_SINCE:
            since = ".".join(map(str, SYNCHRONOUS_SINCE))
            message = f"libvirt {versions.libvirt} has no synchronous writes; {since} has"
            raise JobError("not_supported", message, field="synchronous_writes", value=True, remedy="leave it out")

    async def contact(self) -> bool:
        """Whether there is a connection, now or soon."""
        if not self.connected:
            self._up.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout):
                    await self._up.wait()
        return self.connected

    async def look(self, drive: Drive) -> tuple[int | None, BlockJobInfo | None]:
        """Which run of the guest this is, None when it does not run, and the block job on its disk."""
        with _unknown_is_off():
            return await self._call("look", lambda session: session.look(drive.uuid, drive.target), drive)
        return None, None

    async def look_closely(self, drive: Drive) -> tuple[int | None, BlockJobInfo | None, Disk | None]:
        """The same, and the disk where it has no job (any more): None, too, where it cannot be described now."""
        describing = self._domains.describing(ref_of(drive))

        def look(session: Session) -> tuple[int | None, BlockJobInfo | None, Disk | None]:
            runs, job = session.look(drive.uuid, drive.target)
            if runs is None or job is not None:
                return runs, job, None
            with contextlib.suppress(JobError):
                return runs, job, _disk_of(describing(session), drive)
            return runs, job, None

        with _unknown_is_off():
            return await self._call("look", look, drive)
        return None, None, None

    async def fail_as(self, drive: Drive, error: JobError) -> NoReturn:
        """Raise what kept a job from beginning: that the guest has ended, where it has, or does so now."""
        if await self.ends(drive):
            raise stopped(drive) from error
        raise error

    async def ends(self, drive: Drive) -> bool:
        """Whether the guest has ended, or does so within a moment: of one whose QEMU was killed libvirt tells first
        what that led to."""
        for wait in (MOMENT, 0.0):
            runs: int | None = 0
            with contextlib.suppress(JobError):  # just while it ends libvirt refuses to look, too
                runs, _ = await self.look(drive)
            if runs is None:
                return True
            await asyncio.sleep(wait)
        return False

    async def describe(self, drive: Drive) -> Disk:
        """The disk and its live chain."""
        with _no_answer():
            return _disk_of(await self._domains.describe(ref_of(drive)), drive)

    async def described_aside(self, drive: Drive) -> Domain:
        """All disks of the domain, also while another call for it has no answer: libvirt knows them by itself."""
        with _no_answer():
            return await self._domains.describe_aside(ref_of(drive))

    async def pull(self, drive: Drive, base: str | None, bandwidth: int) -> None:
        await self._call("pull", lambda session: session.block_pull(drive.uuid, drive.target, base, bandwidth), drive)

    async def copy(self, drive: Drive, wanted: CopyCall) -> None:
        await self._call("copy", lambda session: session.block_copy(drive.uuid, drive.target, wanted), drive)

    async def commit(self, drive: Drive, wanted: CommitCall) -> None:
        await self._call("commit", lambda session: session.block_commit(drive.uuid, drive.target, wanted), drive)

    async def pivot(self, drive: Drive) -> None:
        await self._call("pivot", lambda session: session.block_pivot(drive.uuid, drive.target), drive)

    async def set_speed(self, drive: Drive, bandwidth: int) -> None:
        """Of the disk's block job. It is no error when there is none any more, and a conflict while QEMU ends it."""
        try:
            await self._call("speed", lambda session: session.block_speed(drive.uuid, drive.target, bandwidth), drive)
        except JobError as error:
            if (await self.look(drive))[1] is None:
                return
            if error.code == "job_failed":
                remedy = "it is about to end: look at it again"
                raise JobError("conflict", error.message, field="bandwidth", value=bandwidth, remedy=remedy) from error
            raise

    async def abort(self, drive: Drive) -> None:
        """Ask for the end of the disk's block job. It is no error when there is none any more."""
        try:
            await self._call("abort", lambda session: session.block_abort(drive.uuid, drive.target), drive)
        except JobError as error:
            if error.code == "unresponsive" or (await self.look(drive))[1] is not None:
                raise

    async def _call(self, name: str, call: Callable[[Session], T], drive: Drive) -> T:
        with _no_answer():
            return await self._hypervisor.call(name, call, domain=ref_of(drive))


def ref_of(drive: Drive) -> DomainRef:
    return DomainRef(drive.uuid, drive.name, True)


def _disk_of(domain: Domain, drive: Drive) -> Disk:
    for disk in domain.disks:
        if disk.target == drive.target and disk.top is not None:
            return disk
    raise JobError("not_found", f"domain {drive.name} has no disk {drive.target} any more")


@contextlib.contextmanager
def _unknown_is_off() -> Iterator[None]:
    """Leaves its block for a transient domain that ended, or one that was undefined after its end."""
    try:
        yield
    except JobError as error:
        if error.code != "not_found":
            raise


@contextlib.contextmanager
def _no_answer() -> Iterator[None]:
    try:
        yield
    except JobError as error:
        if error.code == "unavailable":
            raise JobError("unresponsive", error.message, remedy=error.remedy) from error
        raise
