"""What is special about a copy or a commit of a guest's disk; guests.mirrors has what they have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Mapping
from typing import Any, Protocol

from hostagent.drivers.domain_xml import Disk
from hostagent.guests.finding import Found
from jobs.errors import JobError
from jobs.model import Chain, FileId, Job, JobSpec, Plan
from jobs.ports import Deletion


class Work(Protocol):
    """`types` are libvirt's numbers of its block jobs. What has a body here is what most have in common."""

    types: tuple[int, ...]

    async def plan(self, spec: JobSpec, found: Found, before: Chain) -> Plan: ...

    def claim(self, job: Job) -> None:
        """Hold again, after a restart, what a job holds that has begun. Waits for nothing."""
        return

    async def make_ready(self, job: Job) -> Mapping[str, Any]:
        """What comes before the block job; changes to the job. Idempotent."""

    async def begin(self, job: Job, disk: Disk) -> None: ...

    def is_ours(self, job: Job, disk: Disk) -> bool:
        """Whether the block job of our type that runs on the disk may be this one."""

    def is_mirrored(self, job: Job) -> bool:
        """Whether libvirt shows a mirror while it runs."""
        return True

    async def proven(self, job: Job, disk: Disk) -> bool:
        """Whether the disk, as it is described now, or the files show that all is done."""

    async def named(self, job: Job) -> bool:
        """Whether the result has the name that it only gets when it is whole."""

    async def end(self, job: Job, call: Awaitable[None]) -> None:
        """Carry out `call`, which asks for the block job's end."""
        await call

    async def hasten(self, job: Job) -> None:
        """Before each look: see to it that a job ends that was given up."""
        return

    async def cut(self, job: Job) -> None:
        """End by force a job that was given up."""
        remedy = "wait; or end the guest itself, which loses what it has not flushed"
        raise JobError("not_supported", "a guest is not killed for a job", remedy=remedy)

    async def audit(self, job: Job) -> tuple[str, ...]: ...

    async def seal(self, job: Job) -> None: ...

    async def discard(self, job: Job, disk: Disk | None, *, over: bool) -> bool: ...

    async def delete_dropped(self, job: Job, needed: Collection[FileId]) -> Deletion:
        return Deletion()

    def release(self, job: Job) -> None:
        """The block job is gone for good. Idempotent."""
        return
