"""Which driver a job has: the disk of a running guest is libvirt's, an image that nobody runs on ours.

A job that somebody else started on a guest's disk is only followed.

A job's driver never changes. The engine knows nothing of this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Protocol

from hostagent.nbd.uri import is_uri
from jobs import commit
from jobs.errors import JobError
from jobs.model import Chain, Drive, FileId, Holder, Job, JobSpec, Operation, Plan, Target
from jobs.ports import BlockDriver, Deletion, Observation


def is_guests(target: str) -> bool:
    """Whether a target is DOMAIN/DISK; an image's is an absolute path."""
    return not target.startswith("/")


class External(BlockDriver, Protocol):
    """The driver of others' jobs, which knows whether there is one on a disk."""

    def refuse(self, drive: Drive) -> None: ...


class Live(Protocol):
    """Who knows which domain, running or defined, uses a file, or an NBD export."""

    async def refuse_guests(self, path: str, *, whole_chain: bool) -> None: ...

    def refuse_served(self, uri: str, *, besides: Drive | None = None) -> None: ...


class Router:
    """A BlockDriver of four: `offline` for images, `pulls` and `mirrors` for guests' disks, and `external` for what
    somebody else has started there."""

    def __init__(
        self, offline: BlockDriver, pulls: BlockDriver, mirrors: BlockDriver, external: External, live: Live
    ) -> None:
        self._offline = offline
        self._pulls = pulls
        self._mirrors = mirrors
        self._external = external
        self._live = live

    def _of(self, job: Job) -> BlockDriver:
        if job.external:
            return self._external
        return self._offline if job.drive is None else self._of_guests(job.spec)

    def _of_guests(self, spec: JobSpec) -> BlockDriver:
        return self._pulls if spec.operation is Operation.PULL else self._mirrors

    async def plan(self, spec: JobSpec, *, preview: bool = False) -> Plan:
        if is_guests(spec.target):
            plan = await self._of_guests(spec).plan(spec, preview=preview)
            self._refuse_served(plan.target)
            return plan
        plan = await self._offline.plan(spec, preview=preview)
        await self._refuse_guests(spec, plan.before, plan.target)
        return plan

    async def _refuse_guests(self, spec: JobSpec, before: Chain, target: Target | None) -> None:
        """What an image's job writes or takes away beside the image itself is no guest's. Of one that does not run
        nothing else tells."""
        if spec.operation is Operation.COMMIT:
            for layer in commit.touched(before, spec):
                await self._live.refuse_guests(layer.path, whole_chain=True)
        elif target is not None and not target.made:
            self._refuse_served(target)
            if is_uri(target.path):
                return
            try:
                await self._live.refuse_guests(target.path, whole_chain=True)
            except JobError as error:
                error.field = "dest"
                raise

    def _refuse_served(self, target: Target | None, besides: Drive | None = None) -> None:
        """NBD has no locks: who fills an export does so alone, as far as is known here."""
        if target is not None and is_uri(target.path):
            self._live.refuse_served(target.path, besides=besides)

    async def turn(self, job: Job) -> None:
        await self._of(job).turn(job)

    async def prepare(self, job: Job) -> Mapping[str, Any]:
        if job.started is None:  # again: somebody may have come while ours was queued
            if job.drive is not None:
                self._external.refuse(job.drive)
                self._refuse_served(job.target, job.drive)
            else:
                await self._refuse_guests(job.spec, job.before, job.target)
        return await self._of(job).prepare(job)

    async def check(self, job: Job) -> tuple[str, ...]:
        return await self._of(job).check(job)

    async def start(self, job: Job) -> None:
        await self._of(job).start(job)

    async def advance(self, job: Job, stop: asyncio.Event) -> int:
        return await self._of(job).advance(job, stop)

    async def rest(self, job: Job) -> None:
        await self._of(job).rest(job)

    async def observe(self, job: Job) -> Observation:
        return await self._of(job).observe(job)

    async def audit(self, job: Job) -> tuple[str, ...]:
        return await self._of(job).audit(job)

    async def finalize(self, job: Job) -> None:
        await self._of(job).finalize(job)

    async def complete(self, job: Job) -> None:
        await self._of(job).complete(job)

    async def seal(self, job: Job) -> None:
        await self._of(job).seal(job)

    async def harden(self, job: Job) -> None:
        await self._of(job).harden(job)

    async def name(self, job: Job) -> None:
        await self._of(job).name(job)

    async def discard(self, job: Job) -> bool:
        return await self._of(job).discard(job)

    async def delete_dropped(self, job: Job, needed: Collection[FileId]) -> Deletion:
        return await self._of(job).delete_dropped(job, needed)

    async def cancel(self, job: Job, *, force: bool = False) -> None:
        await self._of(job).cancel(job, force=force)

    async def pause(self, job: Job) -> None:
        await self._of(job).pause(job)

    async def resume(self, job: Job) -> None:
        await self._of(job).resume(job)

    async def set_speed(self, job: Job, bandwidth: int) -> None:
        await self._of(job).set_speed(job, bandwidth)

    async def conclude(self, job: Job, record: Callable[[tuple[Holder, ...]], Awaitable[Job]]) -> None:
        await self._of(job).conclude(job, record)

    async def drop(self, job: Job) -> None:
        await self._of(job).drop(job)

    async def leave(self, job: Job) -> None:
        await self._of(job).leave(job)
