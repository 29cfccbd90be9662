"""The pull of a guest's disk: begun and ended by libvirt, whole or increment by increment.

libvirt can neither pause a job nor stop it at a cursor. So a pause is an abort, and a resume a new pull: QEMU goes over
what is local already without copying it, at some 6 s/TiB. An increment is a pull that is aborted when QEMU's cursor has
passed its goal; the last one runs to the end.
"""

from __future__ import annotations

import asyncio
import contextlib

from hostagent.drivers.libvirt import BlockJobInfo
from hostagent.guests import chain
from hostagent.guests.disks import PULL, Disks, drive_of, stopped
from hostagent.guests.proof import Proof
from jobs.errors import JobError
from jobs.model import Job

LOOK = 0.02
"""Seconds between two looks at a cursor that is to stop somewhere, or at a job that is to end."""


class Pulling:
    """`end_timeout`: seconds for an aborted job to be gone."""

    def __init__(self, disks: Disks, proof: Proof, *, file_timeout: float, end_timeout: float) -> None:
        self._disks = disks
        self._proof = proof
        self._file_timeout = file_timeout
        self._end_timeout = end_timeout

    async def begin(self, job: Job) -> None:
        drive, base = drive_of(job), None
        if len(job.after.layers) > 1:
            disk = await self._disks.describe(drive)
            work = asyncio.to_thread(chain.name_of, disk, job.after.layers[1])
            base = await asyncio.wait_for(work, self._file_timeout)
        await self._disks.pull(drive, base, job.bandwidth)

    async def end(self, job: Job) -> None:
        """Abort it, and wait until it is gone. What was pulled stays. `unresponsive` when it does not go: a read of its
        base may hang."""
        drive = drive_of(job)
        await self._disks.abort(drive)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._end_timeout):
                while await self._pulls(job):  # noqa: ASYNC110 - libvirt may have lost the event
                    await asyncio.sleep(LOOK)
                return
        message = f"the pull of {drive} did not end within {self._end_timeout:g} s (jobs.abort_timeout)"
        raise JobError("unresponsive", message, remedy="see whether the storage of its backing files hangs")

    async def advance(self, job: Job, stop: asyncio.Event) -> int:
        """One increment, to `job.upto`; where QEMU's cursor is then. `stop` ends it early."""
        drive = drive_of(job)
        if not await self._pulls(job):
            if await self._proof.of_running(job):
                return job.cursor.end
            await self.begin(job)
        cur = job.cursor.cur
        try:
            while (found := await self._pulls(job)) is not None:
                cur = max(cur, found.cur)
                if stop.is_set() or (job.upto is not None and job.upto <= cur and job.upto < job.cursor.end):
                    await self.end(job)
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK):
                        await stop.wait()
        except asyncio.CancelledError:  # the agent stops: nobody would be there to end it at its goal
            with contextlib.suppress(JobError):
                await self._disks.abort(drive)
            raise
        if await self._proof.of_running(job):
            return job.cursor.end
        if found is None:
            raise JobError("job_failed", f"the pull of {drive} ended before its goal")
        return min(cur, job.cursor.end)

    async def _pulls(self, job: Job) -> BlockJobInfo | None:
        """The pull that runs on the disk."""
        runs, found = await self._disks.look(drive_of(job))
        if runs is None:
            raise stopped(drive_of(job))
        if found is not None and found.type != PULL:
            raise JobError("conflict", f"another block job runs on {drive_of(job)}", remedy="see `virsh blockjob`")
        return found
