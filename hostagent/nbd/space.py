"""Whether what a copy or a commit writes has room, asked of qemu-img measure before the job is stored.

`most` is a bound; of a commit but for what its overlays say is zeros, which no measure counts. `least` is what is
needed for certain. Only what certainly does not fit is refused; what may not is a warning, or a refusal with `--check
always`. With `--check never` nothing is refused, for a file system that compresses, or shares blocks, may have room for
more than its numbers say.

A measure needs the hypervisor user to read the files for that moment, so the ledger has rows for it. What cannot be
measured now, because its files cannot be given, say, is a warning; of what somebody writes meanwhile it is an estimate.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from hostagent.images.chain import OpenChain
from hostagent.images.measure import Measure, Measured
from hostagent.nbd.offline_bitmaps import KIND, Access
from hostagent.nbd.operations import at_most
from jobs.errors import JobError
from jobs.model import Holder, JobSpec, Layer, Need

FINE = 4096
"""Bytes of the blocks that a sparse raw file is allocated in: a coarser measure finds more than is written to it."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes that a job adds to a file. `unknown` says why they could not be measured."""

    most: int = 0
    least: int = 0
    unknown: str | None = None

    @property
    def need(self) -> int | None:
        """The bound, for people and programs; None when it is unknown."""
        return None if self.unknown is not None else self.most

    def beside(self, more: int) -> Growth:
        """With `more` bytes that something else may take."""
        return replace(self, most=self.most + more)


class Space:
    def __init__(self, measure: Measure, access: Access) -> None:
        self._measure = measure
        self._access = access

    async def of_copy(self, opened: OpenChain, layers: int, format_: str, existing: Layer | None) -> Growth:
        """Of the upper `layers`, into a new image or the `existing` one, which may have all of them already."""
        try:
            async with self._readable(opened, 0, layers):
                found = await self._of(opened, 0, layers)
        except JobError as error:
            return Growth(unknown=error.message)
        most = found.within(format_)
        if existing is None:
            return Growth(most, found.data)  # a measure has all tables that a qcow2 image may ever need
        if format_ == "raw":  # its holes are filled with zeros
            most = existing.virtual_size
        return Growth(most, max(0, found.data - _held(existing)))

    async def of_commit(self, opened: OpenChain, top: int, base: int, free: int | None) -> Growth:
        """Of the layers from `top` to above `base`, into `base`. It has some of their clusters already: how many is
        only measured when `free` bytes (None: not known) may not do."""
        target = opened.chain.layers[base]
        try:
            async with self._readable(opened, top, base + 1):
                most = (await self._of(opened, top, base)).within(target.format)
                if free is None or most <= free:
                    return Growth(most)
                cluster = _cluster(opened, base)
                together = await self._of(opened, top, base + 1, cluster=cluster)
        except JobError as error:
            return Growth(unknown=error.message)
        return Growth(most, min(most, max(0, together.data - _held(target))))

    async def _of(self, opened: OpenChain, first: int, end: int, **options: int) -> Measured:
        return await self._measure.measure(opened.chain.layers[first:end], opened.fds[first:end], **options)

    @contextlib.asynccontextmanager
    async def _readable(self, opened: OpenChain, first: int, end: int) -> AsyncIterator[None]:
        holder = Holder(KIND, str(uuid.uuid4()))
        needs = [Need(layer, "r", "qemu-img measure, for a job's space") for layer in opened.chain.layers[first:end]]
        try:
            await self._access.acquire(holder, needs)
            yield
        finally:
            await self._access.release(holder, trigger="measure")


def enough(top: Layer, free: int | None) -> Growth | None:
    """Where there is room for all of the disk: a measure takes as long as all else before a job's first byte."""
    return Growth(most) if free is not None and (most := at_most(top.virtual_size)) <= free else None


def judge(spec: JobSpec, growth: Growth, free: int | None, where: str, *, field: str) -> tuple[str, ...]:
    """The warning that space may not do, or cannot be known; JobError no_space as said above."""
    if growth.unknown is not None:
        return (f"it is not known whether there is space: {growth.unknown}",)
    if free is None:
        return (f"it is not known how much is free beside {where}",)
    if growth.most <= free:
        return ()
    certain = growth.least > free
    need = f"needs {growth.least}" if certain else f"may need up to {growth.most}"
    text = f"the {spec.operation} {need} bytes, and {free} are free beside {where}"
    if spec.check == "always" or (certain and spec.check == "auto"):
        remedy = f"make space there, or {spec.operation} with `--check never`, which refuses nothing"
        raise JobError("no_space", text, field=field, remedy=remedy, need=growth.least or growth.most, free=free)
    return (text,)


def _held(layer: Layer) -> int:
    """What a file can take in without growing, at most: a raw one what is allocated, a qcow2 image (which has free
    clusters, too) all of its length."""
    return layer.allocated if layer.format == "raw" else max(layer.length, layer.allocated)


def _cluster(opened: OpenChain, layer: int) -> int:
    header = opened.headers[layer]
    return FINE if header is None else header.cluster_size
