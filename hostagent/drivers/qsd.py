"""One qemu-storage-daemon: its block graph, its exports, its job.

The graph has two nodes for each layer, `f<n>` (the file) and `l<n>` (its format), n counted from the top, and every
backing link is explicit. Files are reached through inherited O_PATH descriptors (`/proc/self/fd/N`): such a descriptor
gives no access by itself (the kernel checks the inode's permissions at each open), but it pins *which* file is opened,
now and at every reopen, whatever happens to the path. All nodes are read-only, on the format and on the file: a
read-only format over a writable file lets one NBD_CMD_CACHE abort the process (QEMU 7.2). A job reopens the two top
nodes for writing in one command, and puts them back.

QEMU facts: qapi/block-core.json, qapi/block-export.json, docs/interop/qemu-storage-daemon-qmp-ref.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hostagent.drivers import descriptors
from hostagent.drivers.qmp import Refused
from hostagent.drivers.qsd_process import DaemonProcess
from hostagent.records import Node
from jobs.errors import JobError
from jobs.model import Cursor, Layer
from jobs.ports import Phase

STREAM_FILTER = "stream"
STREAM_TOP = "pull"
MIRROR_FILTER = "mirror"
COMMIT_FILTER = "commit"
COPY_ON_READ = "cor"
EXPORT = "export-"
"""Prefix of QEMU's export ids, which must begin with a letter; the NBD name is what follows."""

Link = tuple[Node, Node | None]
"""A layer and the one below it."""


@dataclass(frozen=True, slots=True)
class BlockJob:
    phase: Phase
    cursor: Cursor | None = None
    error: str | None = None


class StorageDaemon(DaemonProcess):
    """A running daemon: what it is told to do with its block graph. A JobError storage_daemon_died is its end."""

    # Graph

    async def open_chain(self, nodes: Sequence[Node]) -> None:
        """Add all layers read-only, base first; sent at once, carried out in order."""
        below: str | None = None
        options = []
        for node in reversed(nodes):
            options.append(_file_options(node, writable=False))
            options.append(_format_options(node, below, writable=False))
            below = node.format_node
        adding = (self.execute("blockdev-add", **one) for one in options)
        replies = await asyncio.gather(*adding, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply

    async def reopen(self, *links: Link, writable: bool) -> None:
        """Reopen both nodes of each layer, all in one command; a link to None cuts the backing chain there."""
        options = []
        for node, below in links:
            options.append(_file_options(node, writable=writable))
            options.append(_format_options(node, below.format_node if below else None, writable=writable))
        await self.execute("blockdev-reopen", None if writable else self._settings.flush_timeout, options=options)

    async def flush(self, node: Node, below: Node | None) -> None:
        """Make durable what was written through a node that is open for writing: reopening it does.

        The format node alone: after a reopening in the same mode QEMU 7.2 is wrong about how the file is open, and its
        next change of permissions closes the descriptor under those who read from it ("Bad file descriptor").
        """
        backing = below.format_node if below else None
        options = [_format_options(node, backing, writable=True)]
        await self.execute("blockdev-reopen", self._settings.flush_timeout, options=options)

    async def remove(self, node: Node) -> None:
        """Close a layer that nothing uses any more. Idempotent; sent at once, carried out in order."""
        removing = (self._remove(name) for name in (node.format_node, node.file_node, _pin(node.index)))
        replies = await asyncio.gather(*removing, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply

    async def _remove(self, name: str) -> None:
        try:
            await self.execute("blockdev-del", node_name=name)
        except Refused as error:
            if "failed to find" not in error.text.lower():
                raise

    # A copy's target

    async def grasp(self, path: str, layer: Layer, index: int) -> Node:
        """Open a file that came after the daemon's start. What it opened is proven to be the right one, and stays open:
        from then on it is reached through that descriptor, as the others are through theirs."""
        await self._remove(_pin(index))
        self.inodes |= {layer.file.ino}
        known = await asyncio.to_thread(descriptors.reading, self.pid, layer.file)
        await self.execute(
            "blockdev-add",
            driver=_protocol(layer),
            node_name=_pin(index),
            filename=path,
            read_only=True,
            locking="off",
        )
        found = await asyncio.to_thread(descriptors.reading, self.pid, layer.file) - known
        if not found:
            await self._remove(_pin(index))
            raise JobError("image_changed", f"{path!r} is another file now", field="dest", remedy="see who replaced it")
        return Node(layer, index, min(found))

    async def add_target(self, node: Node, below: Node | None, *, new: bool, backing: tuple[str, str] | None) -> None:
        """Open a copy's target for writing; `new` makes it an empty image, on `backing` (name, format) if given.

        A new one stays sparse: without `discard` the zeros that a mirror writes are allocated, all of a raw disk's.
        """
        sparse: dict[str, Any] = {"discard": "unmap"} if new and not node.layer.device else {}
        await self.execute("blockdev-add", **_file_options(node, writable=True), **sparse)
        if new and node.layer.format != "raw":
            options = {"driver": node.layer.format, "file": node.file_node, "size": node.layer.virtual_size}
            if backing is not None:
                options |= {"backing-file": backing[0], "backing-fmt": backing[1]}
            await self._create(f"create-{node.index}", options)
        link = below.format_node if below else None
        await self.execute("blockdev-add", **_format_options(node, link, writable=True), **sparse)

    async def add_remote(
        self, node: Node, server: Mapping[str, Any], name: str, timeout: float, *, writable: bool = True
    ) -> None:
        """Open an NBD export. A server that goes away is an error at once; one that does not answer is one after
        `timeout` seconds, while it is opened: nothing else is answered meanwhile."""
        await self.execute(
            "blockdev-add",
            timeout + self._settings.call_timeout,
            driver="nbd",
            node_name=node.file_node,
            server=dict(server),
            export=name,
            read_only=not writable,
            reconnect_delay=0,
            open_timeout=max(1, round(timeout)),
        )
        await self.execute("blockdev-add", **_format_options(node, None, writable=writable))

    async def _create(self, job_id: str, options: Mapping[str, Any]) -> None:
        """Write a new image's metadata (blockdev-create, a job). It is small: bounded by qmp.call_timeout."""
        await self.dismiss(job_id)
        await self.execute("blockdev-create", job_id=job_id, options=options)
        deadline = asyncio.get_running_loop().time() + self._settings.call_timeout
        while (job := await self.block_job(job_id)).phase is not Phase.CONCLUDED:
            if asyncio.get_running_loop().time() > deadline:
                raise JobError("unresponsive", "a new image is not written in time", remedy="its storage may hang")
            await asyncio.sleep(0.005)
        await self.dismiss(job_id)
        if job.error is not None:
            raise JobError("job_failed", job.error)

    async def mirror(self, job_id: str, top: Node, target: Node, *, shallow: bool, speed: int) -> None:
        """Start blockdev-mirror; it becomes `ready`, and stays `concluded` until dismiss."""
        await self.execute(
            "blockdev-mirror",
            job_id=job_id,
            device=top.format_node,
            target=target.format_node,
            sync="top" if shallow else "full",
            speed=speed,
            on_source_error="report",
            on_target_error="report",
            auto_dismiss=False,
            filter_node_name=MIRROR_FILTER,
        )

    async def commit(
        self, job_id: str, device: Node, top: Node, base: Node, *, backing: str | None, speed: int
    ) -> None:
        """Start block-commit of all from `top` to above `base`. Of the device itself (an active commit) it becomes
        `ready`; below it, it stays `pending` at its end until finalize. `concluded` until dismiss."""
        arguments: dict[str, Any] = {
            "job_id": job_id,
            "device": device.format_node,
            "top_node": top.format_node,
            "base_node": base.format_node,
            "speed": speed,
            "on_error": "report",
            "auto_dismiss": False,
            "filter_node_name": MIRROR_FILTER,
        }
        if device != top:  # its filter stands within the chain, where no export belongs
            arguments |= {"backing_file": backing, "auto_finalize": False, "filter_node_name": COMMIT_FILTER}
        await self.execute("block-commit", **arguments)

    async def complete(self, job_id: str, *, pivot: bool) -> None:
        """End a ready job: with `pivot` all that stands on the device goes over to the target, else it stays.

        block-job-cancel is the good end of a ready job, job-cancel the bad one.
        """
        if pivot:
            await self._job("job-complete", job_id)
            return
        try:
            await self.execute("block-job-cancel", device=job_id)
        except Refused as error:
            if "not found" not in error.text.lower() and "cannot accept" not in error.text.lower():
                raise

    async def add_copy_on_read(self, top: Node, bottom: Node) -> None:
        """A filter over the top that copies up what it reads, but nothing from below `bottom`."""
        await self.execute(
            "blockdev-add",
            driver="copy-on-read",
            node_name=COPY_ON_READ,
            file=top.format_node,
            bottom=bottom.format_node,
        )

    async def remove_copy_on_read(self) -> None:
        await self._remove(COPY_ON_READ)

    # Exports

    async def add_export(
        self, name: str, node: str, *, writable: bool = False, depth: bool = True, bitmaps: Sequence[str] = ()
    ) -> None:
        await self.execute(
            "block-export-add",
            type="nbd",
            id=EXPORT + name,
            name=name,
            node_name=node,
            writable=writable,
            allocation_depth=depth,
            bitmaps=list(bitmaps),
        )

    async def add_client_export(
        self, name: str, top: Node, *, writable: bool = False, bitmaps: Sequence[str] = ()
    ) -> None:
        """An export for clients. While a copy or a commit runs it stands on the job's filter, as those do that were
        there before, and goes over to the target with them."""
        try:
            await self.add_export(name, MIRROR_FILTER, writable=writable, bitmaps=bitmaps)
        except Refused as error:
            if "cannot find" not in error.text.lower():
                raise
            await self.add_export(name, top.format_node, writable=writable, bitmaps=bitmaps)

    async def remove_export(self, name: str, *, hard: bool) -> bool:
        """True when it is gone; False when a client is connected and `hard` is false."""
        try:
            await self.execute("block-export-del", id=EXPORT + name, mode="hard" if hard else "safe")
        except Refused as error:
            if "still in use" in error.text:
                return False
            if "not found" not in error.text.lower() and "does not exist" not in error.text.lower():
                raise
        await self._until_export_gone(name)
        return True

    async def _until_export_gone(self, name: str) -> None:
        """block-export-del returns before the export is closed; its node is busy until then. A few milliseconds."""
        deadline = asyncio.get_running_loop().time() + self._settings.call_timeout
        delay = 0.001
        while name in await self.exports():
            if asyncio.get_running_loop().time() > deadline:
                raise JobError("unresponsive", f"export {name} does not close", remedy="a read below it may hang")
            await asyncio.sleep(delay)
            delay = min(delay * 2, 0.1)

    async def exports(self) -> set[str]:
        """The NBD names of all exports."""
        return {str(item["id"]).removeprefix(EXPORT) for item in await self.execute("query-block-exports")}

    # The job

    async def stream(self, job_id: str, top: Node, base: Node | None, *, backing: str | None, speed: int) -> None:
        """Start block-stream; it stays `pending` at its end until finalize, and `concluded` until dismiss.

        It works on a filter of its own over the top. On the top itself its copy-on-read filter would come between the
        top and the exports there: what clients read would be copied up, and fail where the overlay cannot grow.
        """
        await self._added("object-add", qom_type="throttle-group", id=STREAM_TOP)
        await self._added(
            "blockdev-add", driver="throttle", node_name=STREAM_TOP, throttle_group=STREAM_TOP, file=top.format_node
        )
        arguments: dict[str, Any] = {
            "job_id": job_id,
            "device": STREAM_TOP,
            "speed": speed,
            "on_error": "report",
            "auto_finalize": False,
            "auto_dismiss": False,
            "filter_node_name": STREAM_FILTER,
        }
        if base is not None:
            arguments |= {"base_node": base.format_node, "backing_file": backing}
        await self.execute("block-stream", **arguments)

    async def remove_stream_top(self) -> None:
        """Remove the filter that a dismissed stream worked on. Idempotent."""
        await self._remove(STREAM_TOP)

    async def _added(self, command: str, **arguments: Any) -> None:
        """Add what an earlier job may have left."""
        try:
            await self.execute(command, **arguments)
        except Refused as error:
            if "duplicate" not in error.text.lower():
                raise

    async def block_job(self, job_id: str) -> BlockJob:
        jobs = await self.execute("query-jobs")
        found = next((job for job in jobs if job["id"] == job_id), None)
        if found is None:
            return BlockJob(Phase.ABSENT)
        cursor = Cursor(int(found["current-progress"]), int(found["total-progress"]))
        return BlockJob(_PHASES[found["status"]], cursor, found.get("error"))

    async def concluded(self) -> list[str]:
        """The block jobs that have ended and were not dismissed."""
        return [str(job["id"]) for job in await self.execute("query-jobs") if job["status"] == "concluded"]

    async def finalize(self, job_id: str) -> None:
        await self._job("job-finalize", job_id)

    async def cancel(self, job_id: str) -> None:
        await self._job("job-cancel", job_id)

    async def dismiss(self, job_id: str) -> None:
        await self._job("job-dismiss", job_id)

    async def pause(self, job_id: str) -> None:
        await self._job("job-pause", job_id, "already paused")

    async def resume(self, job_id: str) -> None:
        await self._job("job-resume", job_id, "not paused")

    async def set_speed(self, job_id: str, speed: int) -> None:
        try:
            await self.execute("block-job-set-speed", device=job_id, speed=speed)
        except Refused as error:
            if "cannot accept" not in error.text.lower() and "not found" not in error.text.lower():
                raise  # a job at its end needs no speed

    async def _job(self, command: str, job_id: str, done: str = "") -> None:
        """A job command whose purpose may be fulfilled already."""
        try:
            await self.execute(command, id=job_id)
        except Refused as error:
            text = error.text.lower()
            if "not found" not in text and "cannot accept" not in text and (not done or done not in text):
                raise


_PHASES = {
    "undefined": Phase.RUNNING,
    "created": Phase.RUNNING,
    "running": Phase.RUNNING,
    "paused": Phase.PAUSED,
    "ready": Phase.READY,
    "standby": Phase.PAUSED,
    "waiting": Phase.RUNNING,
    "pending": Phase.PENDING,
    "aborting": Phase.RUNNING,
    "concluded": Phase.CONCLUDED,
    "null": Phase.CONCLUDED,
}


def _pin(index: int) -> str:
    """The node that keeps a late file open."""
    return f"p{index}"


def _protocol(layer: Layer) -> str:
    return "host_device" if layer.device else "file"


def _file_options(node: Node, *, writable: bool) -> dict[str, Any]:
    return {
        "driver": _protocol(node.layer),
        "node-name": node.file_node,
        "filename": f"/proc/self/fd/{node.descriptor}",
        "read-only": not writable,
    }


def _format_options(node: Node, below: str | None, *, writable: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "driver": node.layer.format,
        "node-name": node.format_node,
        "file": node.file_node,
        "read-only": not writable,
    }
    if node.layer.format != "raw":
        options["backing"] = below
    elif node.part is not None:  # 0 is what QEMU takes for unsaid: from the beginning, and to the end
        options |= {key: value for key, value in node.part._asdict().items() if value}
    return options
