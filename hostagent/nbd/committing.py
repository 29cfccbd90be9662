"""Commit: what an overlay holds goes down into a base.

A base is written, so nobody else may stand on it, nor on anything between it and the top: QEMU does not guard such
siblings, whose content would change under them. All folders of the layers and all pools are searched for them: when
the commit is planned, again just before QEMU may write, and once more before its end. Who makes one in between is not
stopped by anybody; the job then says which image does not hold any more what it held.

Below the top, the proof is the header of the layer above, rewritten only after the base is flushed. An active commit
rewrites no header; there the hypervisor's word is the proof. Where that is lost the job failed and nothing is: the
overlay still holds all that it held, and reads the same over a base that has part of it.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from hostagent.images.chain import OpenChain
from hostagent.nbd import base_bitmaps, copy_files
from hostagent.nbd.headers import Headers
from hostagent.nbd.operations import (
    Dependent,
    Search,
    at_most,
    backing_name,
    dependents,
    job_name,
    node_of,
    refuse_dependents,
    room,
)
from hostagent.nbd.prepared import Leasing, PreparedChain
from hostagent.nbd.space import Growth, Space, enough, judge
from jobs import commit
from jobs.errors import JobError
from jobs.model import Chain, FileId, Job, JobSpec, Layer, Need, Plan
from jobs.ports import Deletion

NAMED = 8
"""Images that one job warns of."""


class Around(TypedDict):
    """Where to look for siblings, and whom to pass over."""

    folders: list[Path]
    skip: list[FileId]


class Commit:
    def __init__(self, search: Search, space: Space, headers: Headers, file_timeout: float) -> None:
        self._headers = headers
        self._search = search
        self._space = space
        self._timeout = file_timeout

    async def plan(self, spec: JobSpec, opened: OpenChain, *, preview: bool) -> Plan:
        chain = opened.chain
        top, base = commit.resolve(chain, spec)
        after = commit.after(chain, spec)
        moving = chain.layers[chain.layers.index(top) : chain.layers.index(base)]
        if any(layer.virtual_size < base.virtual_size for layer in moving):
            raise JobError(
                "invalid",
                f"{base.path!r} has {base.virtual_size} bytes, more than an overlay above it: a commit would show them",
                field="base",
                value=base.path,
                remedy="resize the overlay first (qemu-img resize)",
            )
        refuse_devices(chain, spec, top, base)
        await self.refuse_dependents(chain, spec)
        first, last = chain.layers.index(top), chain.layers.index(base)
        fd, pruned = opened.fds[last], spec.prune_bitmaps
        found, told = await base_bitmaps.look(fd, base, self._timeout, pruned=pruned)
        free = await room(fd, self._timeout)
        if base.device:  # it does not grow, and what is free in it is not known: by size alone
            need = min(sum(layer.allocated for layer in moving), top.virtual_size)
            growth = Growth(need if base.format == "raw" else at_most(top.virtual_size))
        else:
            ample = None if preview else enough(top, free)
            growth = ample or await self._space.of_commit(opened, first, last, free)
        growth = growth.beside(0 if pruned else sum(cost.growth for cost in found))
        warnings = (*judge(spec, growth, free, f"the base {base.path!r}", field="target"), *told)
        space = {"need": growth.need, "free": free}
        return Plan(chain, after, 0, warnings, {"space": space, "bitmaps": base_bitmaps.preview(found, pruned=pruned)})

    async def refuse_dependents(self, chain: Chain, spec: JobSpec) -> None:
        """Invariant: who writes a file, or takes one away, does so alone."""
        layers = commit.touched(chain, spec)
        await refuse_dependents(self._search, layers, **_around(chain), field="target")

    async def standing_on(self, job: Job, layers: Sequence[Layer]) -> list[Dependent]:
        """The images beside the job's chain that stand on one of these of its layers."""
        return list(await dependents(self._search, layers, **_around(job.before)))

    async def delete_dropped(self, job: Job, needed: Collection[FileId], leasing: Leasing) -> Deletion:
        """Delete what the completed job took out of the chain, but for what others need by now."""
        try:
            above = await self.standing_on(job, job.dropped)
        except JobError as error:
            why = f"nothing was deleted: whether other images need it cannot be said: {error.message}"
            return Deletion(warnings=(why,))
        kept = {image.on for image in above} | set(needed)
        unneeded = [layer for layer in job.dropped if layer.file not in kept]
        deleted, busy = await asyncio.to_thread(_delete, unneeded, leasing)
        paths = {layer.file: layer.path for layer in job.dropped}
        below = [f"{paths[image.on]} was not deleted: {image.path} stands on it" for image in above[:NAMED]]
        others = [f"{path} was not deleted: it is still needed" for file, path in paths.items() if file in needed]
        return Deletion(deleted, (*below, *others, *busy))

    def needs(self, job: Job) -> list[Need]:
        writes = self.writes(job)
        return [
            Need(layer, "rw" if layer.file in writes else "r", f"job {job.id} commits it")
            for layer in job.before.layers
        ]

    def writes(self, job: Job) -> Collection[FileId]:
        _, base = commit.resolve(job.before, job.spec)
        parent = commit.parent(job)
        return (base.file,) if parent is None else (parent.file, base.file)

    def alone(self, spec: JobSpec, chain: Chain) -> Collection[FileId]:
        """Also what lies between top and base: while a commit runs QEMU lets nobody rely on what those show."""
        top, base = commit.resolve(chain, spec)
        first, last = chain.layers.index(top), chain.layers.index(base)
        return [layer.file for layer in chain.layers[first - 1 if first else 1 : last + 1]]

    async def make_ready(self, job: Job, chain: PreparedChain) -> Mapping[str, Any]:
        return {}

    async def start(self, job: Job, chain: PreparedChain) -> None:
        await self.refuse_dependents(job.before, job.spec)  # again, as late as can be: from here on QEMU writes
        top, base = commit.resolve(job.before, job.spec)
        parent = commit.parent(job)
        daemon = await chain.serve()
        nodes = [node_of(chain, layer) for layer in (top, base)]
        assert nodes[0] is not None and nodes[1] is not None
        if job.spec.prune_bitmaps:
            await base_bitmaps.prune(chain, nodes[1], self._timeout)
        backing = backing_name(parent.path, base, job.before) if parent else None
        await chain.ask(
            daemon.commit(job_name(job), chain.nodes[0], nodes[0], nodes[1], backing=backing, speed=job.bandwidth)
        )

    async def flush(self, job: Job, chain: PreparedChain) -> None:
        _, base = commit.resolve(job.before, job.spec)
        await chain.flush(base.file)

    async def proven(self, job: Job, chain: PreparedChain | None) -> bool:
        parent = commit.parent(job)
        if parent is None:
            return False
        _, base = commit.resolve(job.before, job.spec)
        _, resolved = await self._headers.backing(parent, chain)
        return resolved == base.path

    async def audit(self, job: Job, chain: PreparedChain | None) -> tuple[str, ...]:
        """Who came to stand on a layer that is written, or that QEMU lets nobody rely on meanwhile."""
        try:
            found = await self.standing_on(job, commit.touched(job.before, job.spec))
        except JobError as error:
            return (f"whether other images came to stand on what is committed cannot be said: {error.message}",)
        paths = {layer.file: layer.path for layer in job.before.layers}
        return tuple(
            f"{image.path} came to stand on {paths[image.on]} while the commit wrote there, and does not show what it "
            "showed: make it anew"
            for image in found[:NAMED]
        )

    async def seal(self, job: Job, chain: PreparedChain) -> None:
        await self.flush(job, chain)

    async def discard(self, job: Job, chain: PreparedChain | None) -> None:
        """The base has part of the overlay's data, and the overlay all of it."""


def _around(chain: Chain) -> Around:
    return {
        "folders": [Path(layer.path).parent for layer in chain.layers],
        "skip": [layer.file for layer in chain.layers],
    }


def refuse_devices(chain: Chain, spec: JobSpec, top: Layer, base: Layer) -> None:
    """What a device cannot do: grow, or be deleted."""
    if base.device and base.format == "raw" and top.virtual_size > base.virtual_size:
        raise JobError(
            "invalid",
            f"{top.path!r} has {top.virtual_size} bytes, and the device {base.path!r} only {base.virtual_size}",
            field="base",
            value=base.path,
            remedy="make the device larger first",
        )
    first, last = chain.layers.index(top), chain.layers.index(base)
    devices = [layer.path for layer in chain.layers[first:last] if layer.device]
    if spec.delete and devices:
        remedy = "commit without --delete, and remove the device yourself (lvremove, say)"
        message = f"{devices[0]!r} is a device, which is not ours to delete"
        raise JobError("invalid", message, field="delete", value=devices[0], remedy=remedy)


def _delete(layers: Sequence[Layer], leasing: Leasing) -> tuple[frozenset[FileId], list[str]]:
    """Blocking. Only the very files: what has taken their names meanwhile stays; and only while they are nobody's: the
    job gave up its own leases at its end, which may be long ago. What is no more, and what stays, and why."""
    deleted, told = set(), []
    for layer in layers:
        if layer.device:  # its node is not the image
            continue
        try:
            fd = os.open(layer.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENOENT:
                told.append(f"{layer.path} was not deleted: {error.strerror}")
            continue
        try:
            found = os.fstat(fd)
            if FileId(found.st_dev, found.st_ino) == layer.file:
                lease = leasing(fd, exclusive=True, ours=())
                try:
                    copy_files.unlink(Path(layer.path), layer.file)
                    if os.fstat(fd).st_nlink == 0:  # it has no other name, and was not moved before
                        deleted.add(layer.file)
                finally:
                    lease.release()
        except (JobError, OSError) as error:
            told.append(f"{layer.path} was not deleted: {error}")
        finally:
            os.close(fd)
    return frozenset(deleted), told
