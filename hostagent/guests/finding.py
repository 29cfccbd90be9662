"""The guest's disk that a job is asked for: that it runs, that the job may have it, and whom it will wait for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from hostagent.drivers.domain_claims import DomainClaims
from hostagent.drivers.domain_xml import Disk
from hostagent.drivers.domains import Domains
from jobs.errors import JobError
from jobs.model import Drive, Job, JobSpec, Layer


@dataclass(frozen=True, slots=True)
class Found:
    """`warnings` say whose end the job will wait for."""

    drive: Drive
    disk: Disk
    warnings: tuple[str, ...]


class Finder:
    """`off` says why no job can work on a guest's disk, and the remedy; None when it can."""

    def __init__(self, domains: Domains, claims: DomainClaims, off: tuple[str, str] | None) -> None:
        self._domains = domains
        self._claims = claims
        self._off = off

    async def find(self, spec: JobSpec) -> Found:
        """The disk that `spec` names, or why no job can begin there. Changes nothing."""

        def error(code: str, message: str, remedy: str) -> JobError:
            return JobError(code, message, field="target", value=spec.target, remedy=remedy)

        if self._off is not None:
            why, remedy = self._off
            raise error("not_supported", f"{spec.target!r} is a guest's disk, and libvirt is {why}", remedy)
        found = await self._domains.disk(spec.target)
        drive, top = Drive(found.domain.uuid, found.domain.name, found.disk.target), found.disk.top
        assert top is not None
        if not found.domain.active:
            start = f"virsh start --paused {shlex.quote(drive.name)}"
            message = f"domain {drive.name} does not run"
            raise error("conflict", message, f"start it ({start} is enough), or undefine it")
        if found.layer is not top:
            raise error("invalid", f"{spec.target} is not the top of its disk", f"name the disk, {drive}, and --base")
        holder = self._claims.holder(drive.uuid)
        if holder is None and (found.job is not None or found.disk.mirror is not None):
            raise error("busy", f"{drive} has a block job of somebody else's", look_at(drive))
        waits = f"it begins after {holder}: one block operation on domain {drive.name} at a time"
        return Found(drive, found.disk, () if holder is None else (waits,))

    async def refuse_used(self, layers: Sequence[Layer], *, besides: Drive, field: str) -> None:
        """A `busy` that names the domain, running or defined, with one of these files in the chain of another disk."""
        for layer in layers:
            for use in await self._domains.users(layer.file):
                if (use.domain.uuid, use.target) != (besides.uuid, besides.target):
                    remedy = f"see `virsh domblklist {use.domain.name}`"
                    what = f"{layer.path!r} is used by {use}"
                    raise JobError("busy", what, field=field, value=layer.path, remedy=remedy, holders=[str(use)])


def look_at(drive: Drive) -> str:
    return f"see `virsh blockjob {drive.name} {drive.target}`"


def claimant(job: Job) -> str:
    """As it is called in the claims."""
    return f"job {job.id}"
