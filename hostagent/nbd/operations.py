"""What differs between pull, copy and commit on an offline image, as one protocol; and what they share."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from hostagent.images.chain import OpenChain
from hostagent.nbd.prepared import PreparedChain
from hostagent.records import Node
from jobs.errors import JobError
from jobs.model import Chain, FileId, Job, JobSpec, Layer, Need, Plan

log = logging.getLogger(__name__)

SEARCHES = 4
"""Searches for dependent images at a time."""
MOMENT = 1.0
"""Seconds that a search has beyond its time to say so itself."""


class UnreadableError(Exception):
    """What would prove the job cannot be read now."""


class Operation(Protocol):
    """One operation. What takes a chain is called under its lock."""

    async def plan(self, spec: JobSpec, opened: OpenChain, *, preview: bool) -> Plan: ...

    def needs(self, job: Job) -> list[Need]:
        """What the hypervisor user must be able to open."""

    def writes(self, job: Job) -> Collection[FileId]:
        """The members of the chain that are opened for writing."""

    def alone(self, spec: JobSpec, chain: Chain) -> Collection[FileId]:
        """The members of the chain that nobody else may use meanwhile; all that it writes is among them."""

    async def make_ready(self, job: Job, chain: PreparedChain) -> Mapping[str, Any]:
        """What comes before the grants, beyond the leases of the chain; changes to the job. Idempotent."""

    async def start(self, job: Job, chain: PreparedChain) -> None:
        """Start the block job; the layers that it writes are open."""

    async def flush(self, job: Job, chain: PreparedChain) -> None:
        """Make durable what a header relies on that is about to be rewritten."""

    async def proven(self, job: Job, chain: PreparedChain | None) -> bool:
        """What stable storage says. Raises OSError or TimeoutError when it cannot be asked."""

    async def audit(self, job: Job, chain: PreparedChain) -> tuple[str, ...]:
        """Look, before the end is asked for, at what others may have done meanwhile: warnings, or a JobError."""

    async def seal(self, job: Job, chain: PreparedChain) -> None: ...

    async def discard(self, job: Job, chain: PreparedChain | None) -> None: ...


class Dependent(Protocol):
    """An image that stands on a file that it was asked about."""

    @property
    def path(self) -> str: ...

    @property
    def on(self) -> FileId: ...


class Find(Protocol):
    """Find the images, other than `skip`, that stand on `files`. Blocking; raises JobError when it cannot be sure."""

    def __call__(
        self, files: Collection[FileId], *, folders: Sequence[Path], skip: Collection[FileId]
    ) -> Sequence[Dependent]: ...


class Search:
    """Such a search, in threads of its own and bounded: a read from dead storage never returns."""

    def __init__(self, find: Find, timeout: float) -> None:
        """`timeout` seconds (images.scan_timeout), by which `find` gives up itself where it is not stuck."""
        self._find = find
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(SEARCHES, thread_name_prefix="search")

    def close(self) -> None:
        """Its threads end as they are done; our process waits for them at its end."""
        self._threads.shutdown(wait=False)

    async def __call__(
        self, files: Collection[FileId], *, folders: Sequence[Path], skip: Collection[FileId]
    ) -> Sequence[Dependent]:
        work = functools.partial(self._find, files, folders=folders, skip=skip)
        looking = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.wait_for(looking, self._timeout + MOMENT)
        except TimeoutError:
            names = ", ".join(repr(str(folder)) for folder in folders[:8])
            message = f"the images in {names} and the pools were not looked through in {self._timeout:g} s"
            remedy = "see whether their storage hangs, or raise images.scan_timeout"
            raise JobError("timeout", message, remedy=remedy) from None


async def dependents(
    search: Search, layers: Sequence[Layer], *, folders: Collection[Path], skip: Collection[FileId]
) -> Sequence[Dependent]:
    """The images, other than `skip`, that stand on one of `layers`. A JobError when that cannot be said."""
    files = [layer.file for layer in layers]
    return await search(files, folders=sorted(set(folders)), skip=skip)


async def refuse_dependents(
    search: Search, layers: Sequence[Layer], *, folders: Collection[Path], skip: Collection[FileId], field: str
) -> None:
    """A `busy` that names the images, other than `skip`, which stand on one of `layers`."""
    found = await dependents(search, layers, folders=folders, skip=skip)
    if not found:
        return
    names = ", ".join(repr(image.path) for image in found[:8])
    paths = {layer.file: layer.path for layer in layers}
    on = ", ".join(sorted({repr(paths[image.on]) for image in found}))
    raise JobError(
        "busy",
        f"other images stand on {on}, and would not hold any more what they hold now: {names}",
        field=field,
        value=layers[0].path,
        remedy="pull them first (`hostagent job pull`), delete what is done with, or name another file",
        holders=[image.path for image in found[:8]],
    )


def job_name(job: Job) -> str:
    """The block job's id inside the storage daemon."""
    return f"{job.spec.operation}-{job.id}"


def job_id(name: str) -> str:
    """The job that a block job's id belongs to."""
    return name.partition("-")[2]


def node_of(chain: PreparedChain, layer: Layer | None) -> Node | None:
    """The layer's node; an image_changed when the daemon does not have it."""
    if layer is None:
        return None
    for node in chain.nodes:
        if node.layer.file == layer.file:
            return node
    raise JobError("image_changed", f"{layer.path!r} is not open in the storage daemon", remedy="start the job again")


def backing_name(overlay: str, base: Layer, chain: Chain) -> str:
    """How an overlay names its base: by name alone in the same folder, so that the folder can be moved. A device keeps
    the name by which `chain` knows it: the kernel's own may be another device's after the next boot."""
    if base.device:
        above = chain.layers[chain.layers.index(base) - 1]
        assert above.backing is not None
        return str(Path(above.path).parent / above.backing)
    return Path(base.path).name if Path(base.path).parent == Path(overlay).parent else base.path


async def room(place: Path | int, timeout: float) -> int | None:
    """Free bytes on the file system of a folder or a file; all bytes of a block device. None when it does not say so,
    as some network file systems, or not within `timeout` seconds."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(_room, place), timeout)
    except TimeoutError:
        return None


def _room(place: Path | int) -> int | None:
    if isinstance(place, int) and stat.S_ISBLK(os.fstat(place).st_mode):
        return os.lseek(place, 0, os.SEEK_END)
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def at_most(virtual_size: int) -> int:
    """Bytes of a qcow2 image that is allocated whole, with its tables: what a device must have, for it cannot grow.
    8 bytes of L2 table and 2 of refcounts for each cluster of 64 KiB, and a MiB for what every image has."""
    return virtual_size + virtual_size // 4096 + (1 << 20)


def preflight(spec: JobSpec, need: int, free: int | None, where: str) -> tuple[str, ...]:
    """The warning that space may not do; a refusal instead with `--check always`."""
    if free is None:
        return (f"it is not known how much is free beside {where}",)
    if need <= free:
        return ()
    text = f"the {spec.operation} may need {need} bytes, and {free} are free beside {where}"
    if spec.check == "always":
        remedy = f"make space, or {spec.operation} without `--check always`"
        raise JobError("no_space", text, field="target", value=spec.target, remedy=remedy)
    return (text,)


def closed(fd: int | None) -> None:
    if fd is not None:
        with contextlib.suppress(OSError):
            os.close(fd)
