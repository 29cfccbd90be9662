"""The bitmaps of an offline image, read and changed.

They are read by our own reader. They are changed by qemu-img, as the hypervisor user, for whom a row of the ledger
opens the file while it runs; the exclusive lease keeps everybody else away, and is refused while somebody has the image
open. What is answered is what the image on stable storage says afterwards.

A qemu-img that is killed while it writes leaves all bitmaps of the image inconsistent. So a change that takes too long
goes on behind the caller's back, with its lease and its grants, and only its processor time is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from hostagent.images.bitmap_changes import Add, Change
from hostagent.images.bitmaps import BitmapList, list_bitmaps
from hostagent.images.chain import OpenChain
from hostagent.images.tool import Finished, Tool, alone, grasped, reason
from hostagent.nbd.chains import Chains
from hostagent.nbd.prepared import Lease
from hostagent.records import AccessRow
from jobs.errors import JobError
from jobs.model import FileId, Holder, Layer, Need

log = logging.getLogger(__name__)

KIND = "tool"
"""The holders of the rows that a running qemu-img needs."""
CHANGES = 16
"""Images whose bitmaps are changed at a time; one on storage that hangs counts until that answers."""


class Access(Protocol):
    """The part of the access ledger that a change needs."""

    async def acquire(self, holder: Holder, needs: Sequence[Need]) -> None: ...

    async def release(self, holder: Holder, *, trigger: str) -> None: ...


class Rows(Protocol):
    async def access_rows(self) -> list[AccessRow]: ...


@dataclass(frozen=True, slots=True)
class Found:
    """The bitmaps of the image at `path`. `holders` have it open for writing: their bitmaps are in their memory, and
    what the image says of them does not count until they end."""

    path: str
    bitmaps: BitmapList
    holders: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """images.bitmaps and images.bitmap_timeout (seconds) of the configuration."""

    most: int
    timeout: float


class Bitmaps:
    def __init__(self, chains: Chains, access: Access, tool: Tool, settings: Settings) -> None:
        self._chains = chains
        self._access = access
        self._tool = tool
        self._settings = settings
        self._running: dict[FileId, asyncio.Task[Found]] = {}
        self._holders: set[Holder] = set()

    # Reading

    async def list(self, path: str, *, anywhere: bool) -> Found:
        with await self._open(path, anywhere=anywhere) as opened:
            try:
                lease = await self._lease(opened, exclusive=False)
            except JobError as error:
                if error.code != "busy":
                    raise
                holders = self._users(opened.chain.top.file) or tuple(error.details.get("holders", ()))
                return Found(opened.chain.top.path, await self._read(opened), holders)
            try:
                return Found(opened.chain.top.path, await self._read(opened))
            finally:
                await asyncio.to_thread(lease.release)

    # Changing

    async def change(self, path: str, change: Change, *, source: str | None = None, anywhere: bool) -> Found:
        """Do it, or nothing. `source` is the other image of a merge."""
        opened = await self._open(path, anywhere=anywhere)
        try:
            other = await self._source(source, opened, anywhere=anywhere) if source is not None else None
            task = self._begin(opened, other, change)
        except BaseException:
            opened.close()
            raise
        try:
            async with asyncio.timeout(self._settings.timeout):
                return await asyncio.shield(task)
        except TimeoutError:
            raise JobError(
                "timeout",
                f"the bitmaps of {path!r} were not changed within images.bitmap_timeout ({self._settings.timeout:g} s)",
                remedy="the change goes on; see `hostagent bitmap list`, and whether the storage hangs",
                value=path,
            ) from None

    def runs(self, holder: Holder) -> bool:
        return holder in self._holders

    async def recover(self, rows: Rows) -> None:
        """Give back what was granted to the changes of an agent that was killed. Their qemu-img ends by itself."""
        for holder in {row.holder for row in await rows.access_rows() if row.holder.kind == KIND}:
            await self._access.release(holder, trigger="start")

    async def close(self, timeout: float) -> None:
        """Let running changes come to their end. One that does not goes on without us; `recover` gives back for it."""
        if self._running:
            await asyncio.wait(self._running.values(), timeout=timeout)

    # One change

    def _begin(self, opened: OpenChain, other: OpenChain | None, change: Change) -> asyncio.Task[Found]:
        top = opened.chain.top
        holders = self._users(top.file)
        try:
            if holders:
                raise _busy(top, holders)
            if len(self._running) >= CHANGES:
                raise JobError("limit", f"{CHANGES} images' bitmaps are changed just now", remedy="try again later")
            if isinstance(change, Add) and opened.headers[0] is not None and opened.headers[0].version == 2:
                remedy = f"qemu-img amend -f qcow2 -o compat=1.1 {shlex.quote(top.path)}"
                raise JobError("not_supported", f"{top.path} is of qcow2 version 2, without bitmaps", remedy=remedy)
        except BaseException:
            if other is not None:
                other.close()
            raise
        task = asyncio.create_task(self._run(opened, other, change), name=f"bitmap {top.path}")
        self._running[top.file] = task
        task.add_done_callback(lambda ended: self._ended(top, ended))
        return task

    def _ended(self, top: Layer, task: asyncio.Task[Found]) -> None:
        self._running.pop(top.file, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("bitmaps unchanged", extra={"fields": {"path": top.path, "error": str(error)}})

    async def _run(self, opened: OpenChain, other: OpenChain | None, change: Change) -> Found:
        with opened, other or contextlib.nullcontext():
            async with self._leased(opened, other):
                before = await self._read(opened)
                source = before if other is None else await self._read(other)
                change.refuse(before, source, self._settings.most)
                finished = await self._granted(opened, other, change)
                after = await asyncio.to_thread(_durable, opened.fds[0], self._settings.most)
        if finished.status == 0 and change.is_done(after):
            log.info("bitmaps changed", extra={"fields": {"path": opened.chain.top.path, "bitmap": change.name}})
            return Found(opened.chain.top.path, after)
        raise _failed(opened.chain.top, finished, before, after)

    async def _granted(self, opened: OpenChain, other: OpenChain | None, change: Change) -> Finished:
        """Run qemu-img while the ledger says that its user needs the files."""
        holder = Holder(KIND, str(uuid.uuid4()))
        reason = f"qemu-img bitmap, for {change.name}"
        needs = [Need(opened.chain.top, "rw", reason)]
        needs += [] if other is None else [Need(other.chain.top, "r", reason)]
        self._holders.add(holder)
        try:
            await self._access.acquire(holder, needs)
            try:
                return await self._tell(opened, other, change)
            finally:
                await self._access.release(holder, trigger="bitmap")
        finally:
            self._holders.discard(holder)

    async def _tell(self, opened: OpenChain, other: OpenChain | None, change: Change) -> Finished:
        with grasped(opened.fds[0], *([] if other is None else other.fds[:1])) as handles:
            words = ["bitmap", *change.arguments]
            words += [f"--source-file={alone('qcow2', handles[1])}"] if len(handles) > 1 else []
            finished = await self._tool.write(
                [*words, "--", alone("qcow2", handles[0], writable=True), change.name], handles
            )
        return finished

    # Small things

    @contextlib.asynccontextmanager
    async def _leased(self, opened: OpenChain, other: OpenChain | None) -> AsyncIterator[None]:
        leases = [await self._lease(opened, exclusive=True)]
        try:
            if other is not None:
                leases.append(await self._lease(other, exclusive=False))
            yield
        finally:
            for lease in leases:
                await asyncio.to_thread(lease.release)

    async def _lease(self, opened: OpenChain, *, exclusive: bool) -> Lease:
        return await asyncio.to_thread(self._chains.leasing, opened.fds[0], exclusive=exclusive, ours=())

    async def _open(self, path: str, *, anywhere: bool) -> OpenChain:
        try:
            return await self._chains.open(path, anywhere=anywhere)
        except JobError as error:
            if error.field != "format":
                raise
            message = f"{path} is not a qcow2 image, and only those carry bitmaps"
            raise JobError(
                "not_supported", message, value=path, remedy="convert it: qemu-img convert -O qcow2"
            ) from None

    async def _source(self, path: str, opened: OpenChain, *, anywhere: bool) -> OpenChain | None:
        """The other image of a merge; None when it is the same."""
        other = await self._open(path, anywhere=anywhere)
        one, two = opened.chain.top, other.chain.top
        if one.file == two.file:
            other.close()
            return None
        if one.virtual_size != two.virtual_size:
            other.close()
            message = f"{one.path} has {one.virtual_size} bytes, and {two.path} {two.virtual_size}"
            remedy = "only bitmaps of disks of one size can be merged"
            raise JobError("invalid", message, field="source", value=path, remedy=remedy)
        return other

    async def _read(self, opened: OpenChain) -> BitmapList:
        return await asyncio.to_thread(list_bitmaps, opened.fds[0], most=self._settings.most)

    def _users(self, file: FileId) -> tuple[str, ...]:
        """Who of ours uses the image: the lease only knows that somebody does."""
        chains = [chain for chain in self._chains.all() if any(layer.file == file for layer in chain.layers)]
        users = sorted({str(user) for chain in chains for user in chain.users})
        return tuple([*users, *(["another change of its bitmaps"] if file in self._running else [])])


def _durable(fd: int, most: int) -> BitmapList:
    os.fdatasync(fd)
    return list_bitmaps(fd, most=most)


def _busy(top: Layer, holders: Sequence[str]) -> JobError:
    message = f"{top.path!r} is in use by {', '.join(holders)}"
    remedy = "wait for it, or end it"
    return JobError("busy", message, field="path", value=top.path, remedy=remedy, holders=list(holders))


def _failed(top: Layer, finished: Finished, before: BitmapList, after: BitmapList) -> JobError:
    """Why qemu-img did not do it, and what it left."""
    last = finished.said.splitlines()[-1][-500:] if finished.said else "it gave no reason"
    broken = [bitmap.name for bitmap in after.items if bitmap.in_use and bitmap not in before.items]
    left = f"; inconsistent now: {', '.join(broken)}" if broken else ""
    if finished.status == 0:
        message = f"qemu-img says that it changed the bitmaps of {top.path}, and the image does not{left}"
        return JobError("unproven", message, value=top.path, remedy="see `hostagent bitmap list`")
    if finished.status < 0:
        why = f"qemu-img was ended by {signal.Signals(-finished.status).name}"
        remedy = "raise images.tool_cpu or images.tool_memory, and remove what is inconsistent"
        return JobError("limit", f"the bitmaps of {top.path}: {why}{left}", value=top.path, remedy=remedy)
    unknown = ("io_error", "see whether `hostagent image check` finds something")
    code, remedy = reason(finished, top.path, access="rw") or unknown
    return JobError(code, f"the bitmaps of {top.path} were not changed: {last}{left}", value=top.path, remedy=remedy)
