"""Whether what was pulled has reached the image's file.

At the end of a stream QEMU rewrites the header before it writes the tables that it relies on, and no call of libvirt's
makes it write them: the guest's next flush does, or QEMU's orderly end. A QEMU that is killed before that loses what
was pulled, and the image is clean and names no base (docs/qemu.md). So a pull is done when the tables on the file have
all that the dropped layers hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

from hostagent.images import covered
from hostagent.images.covered import Range
from hostagent.images.tables import unmentioned
from hostagent.images.tool import Tool
from hostagent.looks import Late, Looks
from hostagent.nbd.offline_bitmaps import KIND, Access
from jobs.errors import JobError
from jobs.model import FileId, Holder, Job, Layer, Need

T = TypeVar("T")

KNOWN_MOST, RANGES_MOST = 64, 4096
"""Of so many chains it is remembered what they hold, where it lies in no more pieces."""
REST = 0.1
"""Seconds; one that was written just now may be written again within the same tick of the kernel's clock."""


class Durable:
    """`file_timeout`: seconds for opening the files."""

    def __init__(self, tool: Tool, access: Access, file_timeout: float) -> None:
        self._tool = tool
        self._access = access
        self._file_timeout = file_timeout
        self._looks = Looks(file_timeout)
        self._known: dict[tuple[tuple[_State, ...], tuple[str, ...], bool], list[Range]] = {}

    async def foresee(self, job: Job) -> None:
        """Find out, while it runs, what a pull must have written when it is done: that is the longer part of it."""
        await asyncio.sleep(REST)  # what was written just before is at rest then
        with contextlib.suppress(JobError):
            async with self._handles(job.dropped) as handles:
                await self._held(job.dropped, handles, bare=len(job.after.layers) == 1)

    async def missing(self, job: Job, *, running: bool) -> int:
        """Bytes that are lost if QEMU is killed now, or were when it was. While the guest runs, QEMU's user has the
        files anyway; later it gets them for the moment."""
        if not job.dropped:
            return 0
        bare = len(job.after.layers) == 1
        lost = await self.missing_from([job.before.top, *job.dropped], bare=bare, running=running)
        if lost == 0:
            await self._sync([job.before.top])
        return lost

    async def missing_from(self, layers: Sequence[Layer], *, bare: bool, running: bool) -> int:
        """Bytes that the first of these does not have on its file, and the others have; `bare`: it has no base."""

        async def look(handles: Sequence[int]) -> int:
            needs = await self._held(layers[1:], handles[1:], bare=bare)
            return await self._lacking(needs, layers[:1], handles)

        async with self._handles(layers) as handles:
            if running:
                return await look(handles)
            async with self._readable(layers):
                return await look(handles)

    async def lacking(self, above: Sequence[Layer], strand: Sequence[Layer], *, bare: bool) -> int:
        """Bytes that `above`, together, do not have on their files, and those in `strand` have; `bare`: they stand on
        nothing. When it is none, the files of `above` are on stable storage, too."""

        async def look(handles: Sequence[int]) -> int:
            needs = await covered.held(self._tool, strand, handles[len(above) :], bare=bare)
            return await self._lacking(needs, above, handles)

        lacks = await self._reading([*above, *strand], look)
        if lacks == 0:
            await self._sync(above)
        return lacks

    async def _lacking(self, needs: Sequence[Range], above: Sequence[Layer], handles: Sequence[int]) -> int:
        if len(above) == 1 and above[0].format == "qcow2":  # a raw one may have anything in it
            quick = await self._look(above[0], functools.partial(_unmentioned, handles[0], needs))
            if quick is not None:
                return quick
        return await covered.lacking(self._tool, needs, above, handles[: len(above)])

    async def _held(self, layers: Sequence[Layer], handles: Sequence[int], *, bare: bool) -> list[Range]:
        """What a running pull takes in nobody writes: it is remembered while the files are what they were. Of a device
        nothing tells that it was written: by another node of it this one's times stay what they are."""
        if any(layer.device for layer in layers):
            return await covered.held(self._tool, layers, handles, bare=bare)
        files = await self._look(layers[0], lambda: tuple(map(_state, handles)))
        state, at_rest = (files, tuple(layer.format for layer in layers), bare), _at_rest(files)
        known = self._known.pop(state, None)
        if known is None:
            known = await covered.held(self._tool, layers, handles, bare=bare)
        if len(known) <= RANGES_MOST and at_rest:
            self._known[state] = known
            while len(self._known) > KNOWN_MOST:
                del self._known[next(iter(self._known))]
        return known

    async def adds_nothing(self, strand: Sequence[Layer], rest: Sequence[Layer]) -> bool:
        """Whether `rest` reads the same without `strand` on top of it: what was there has gone down."""
        added = not await self._reading(
            [*strand, *rest], lambda handles: covered.same(self._tool, strand, rest, handles)
        )
        if not added:
            await self._sync(rest)
        return not added

    async def _reading(self, layers: Sequence[Layer], read: Callable[[Sequence[int]], Awaitable[T]]) -> T:
        """What QEMU's user can read by itself nobody need give it for the moment."""
        async with self._handles(layers) as handles:
            try:
                return await read(handles)
            except JobError as error:
                if error.code != "denied":
                    raise
            async with self._readable(layers):
                return await read(handles)

    async def _sync(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            try:
                await self._look(layer, functools.partial(_sync, layer))
            except OSError as error:
                raise JobError("io_error", f"{layer.path!r} cannot be synced: {error}") from error

    async def _look(self, layer: Layer, look: Callable[[], T], *, drop: Callable[[T], None] = lambda _: None) -> T:
        try:
            return await self._looks.look(layer.path, look, place=layer.file.dev, drop=drop)
        except Late:
            message = f"{layer.path!r} does not answer within {self._file_timeout:g} s (libvirt.file_timeout)"
            raise JobError("io_error", message, remedy="see whether its storage hangs") from None

    @contextlib.asynccontextmanager
    async def _handles(self, layers: Sequence[Layer]) -> AsyncIterator[list[int]]:
        found: list[int] = []
        try:
            for layer in layers:
                found.append(await self._look(layer, functools.partial(grasp, layer), drop=os.close))
            yield found
        except OSError as error:
            raise JobError("io_error", f"the files of {layers[0].path} cannot be opened: {error}") from error
        finally:
            for handle in found:
                os.close(handle)

    @contextlib.asynccontextmanager
    async def _readable(self, layers: Sequence[Layer]) -> AsyncIterator[None]:
        holder = Holder(KIND, str(uuid.uuid4()))
        await self._access.acquire(holder, [Need(layer, "r", "qemu-img map, for a pull's end") for layer in layers])
        try:
            yield
        finally:
            await self._access.release(holder, trigger="map")


def _unmentioned(handle: int, ranges: Sequence[Range]) -> int | None:
    """None also where we may not read it, which QEMU's user may."""
    try:
        fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        return None
    try:
        return unmentioned(fd, ranges)
    finally:
        os.close(fd)


class _State(NamedTuple):
    """Which file, and as of when; times in ns."""

    dev: int
    ino: int
    size: int
    written: int
    changed: int


def _state(handle: int) -> _State:
    found = os.fstat(handle)
    return _State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _at_rest(files: Sequence[_State]) -> bool:
    begun = time.time_ns() - int(REST * 1e9)
    return all(file.written < begun for file in files)


def _sync(layer: Layer) -> None:
    handle = grasp(layer)
    try:
        fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(handle)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def grasp(layer: Layer) -> int:
    """A descriptor of the layer's very file, which opens nothing. Blocking."""
    handle = os.open(layer.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(handle)
    if FileId(found.st_dev, found.st_ino) != layer.file:
        os.close(handle)
        raise JobError("image_changed", f"{layer.path!r} is another file now", remedy="see who replaced it")
    return handle
