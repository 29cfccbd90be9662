"""Whether a pull is done, seen from outside: libvirt's chain and the image's header must both have lost its layers.

The header is read while QEMU has the image open: it is the one thing of it that QEMU writes through at once.
"""

from __future__ import annotations

import asyncio
import logging

from hostagent.drivers.domain_xml import Disk
from hostagent.guests.chain import has_become
from hostagent.guests.disks import Disks, drive_of
from hostagent.nbd.headers import Headers
from jobs import pull
from jobs.errors import JobError
from jobs.model import Job

log = logging.getLogger(__name__)

LOOK_AGAIN = 0.1
"""Seconds between two looks while header and libvirt do not agree."""


class Proof:
    """`timeout`: seconds for files; `agree`: until header and libvirt, which follows it, must agree."""

    def __init__(self, disks: Disks, headers: Headers, *, timeout: float, agree: float) -> None:
        self._disks = disks
        self._headers = headers
        self._timeout = timeout
        self._agree = agree

    async def of_running(self, job: Job, disk: Disk | None = None) -> bool | None:
        """Of a guest that runs, and has no job on the disk; None when it cannot be asked now. `disk` as libvirt has
        just described it, if that is known."""
        deadline = asyncio.get_running_loop().time() + self._agree
        while True:
            header, live = await asyncio.gather(self.of_header(job), self._live(job, disk))
            disk = None
            if header is None or live is None:
                return None
            if header == live or asyncio.get_running_loop().time() > deadline:
                return header and live
            await asyncio.sleep(LOOK_AGAIN)

    async def of_header(self, job: Job) -> bool | None:
        """What the image itself says; a file that is gone or replaced says no. None when it cannot be read now."""
        try:
            name, resolved = await self._headers.backing(job.before.top)
        except (FileNotFoundError, NotADirectoryError, JobError) as error:
            log.warning("the image proves nothing", extra={"fields": {"job": job.id, "error": str(error)}})
            return False
        except (TimeoutError, OSError) as error:
            log.warning("the image cannot be read back", extra={"fields": {"job": job.id, "error": str(error)}})
            return None
        return pull.proven(job, name, resolved)

    async def _live(self, job: Job, disk: Disk | None) -> bool | None:
        try:
            disk = disk or await self._disks.describe(drive_of(job))
            shown = await asyncio.wait_for(asyncio.to_thread(has_become, disk, job), self._timeout)
        except JobError as error:
            return False if error.code == "not_found" else None
        except TimeoutError:
            return None
        if disk.layers[0].index is None:
            return None  # that is its definition: the guest has ended since it was seen to run
        return shown
