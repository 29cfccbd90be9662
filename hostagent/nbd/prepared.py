"""A prepared chain: its leases, its storage daemon, and those who use it.

One storage daemon serves one chain (one top file): its exports and its one job; an export that needs a listener or a
graph of its own has a chain apart. Its graph changes under one lock
per chain, so that an export can never join a chain in the moment in which a job's end takes layers from it. A chain
whose last user left is closed: the daemon ends, then the leases go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from hostagent.drivers.qmp import Refused
from hostagent.drivers.qsd import Link, StorageDaemon
from hostagent.drivers.tls import TlsListener
from hostagent.images.chain import OpenChain
from hostagent.nbd.network import Remote
from hostagent.nbd.uri import server_of
from hostagent.records import Node, Part
from jobs.errors import JobError
from jobs.model import Chain, FileId, Holder, Layer

if TYPE_CHECKING:
    from hostagent.nbd.chains import Chains

log = logging.getLogger(__name__)

Key = tuple[FileId, bool, str]
"""What a chain is found by: its top, whether it is the top alone, and the export that has it for itself."""

CONTROL = "hostagent-control"
READER = "hostagent-reader"
"""Exports for the agent's own connections; never left behind between two slices."""


@dataclass(frozen=True, slots=True)
class Apart:
    """What makes an export need a storage daemon of its own: QEMU has one listener, with one limit, for all exports,
    loses its head over a job that ends under an exported bitmap, and waits for a network image's server."""

    export: str
    max_clients: int | None = None
    part: Part | None = None
    listener: TlsListener | None = None
    remote: Remote | None = None


class Lease(Protocol):
    """One file's lease (access.leases)."""

    def exclude(self, *, ours: Sequence[int]) -> None: ...

    def share(self, *, ours: Sequence[int]) -> None: ...

    def release(self) -> None: ...


class Leasing(Protocol):
    def __call__(self, fd: int, *, exclusive: bool, ours: Sequence[int]) -> Lease: ...


class PreparedChain:
    """Use it under `lock`; `users` says why it is kept."""

    def __init__(
        self, registry: Chains, opened: OpenChain | None, chain: Chain, *, shallow: bool, apart: Apart | None = None
    ) -> None:
        self._registry = registry
        self.file = chain.top.file
        self.path = chain.top.path
        self.shallow = shallow
        self.apart = apart
        self.layers: list[Layer] = list(chain.layers)
        self.nodes: list[Node] = []
        self.users: set[Holder] = set()
        self.writer: Holder | None = None
        """The user whose clients write the top: nobody else may use the chain, and its daemon is never killed."""
        self.lock = asyncio.Lock()
        self.daemon: StorageDaemon | None = None
        self.writable: set[FileId] = set()
        """The layers that the daemon has open for writing, of those that a job opens and puts back."""
        self.beside: list[Node] = []
        """What else the daemon has open: a copy's target, or layers that the chain lost and that are not closed yet."""
        self.begun: frozenset[FileId] = frozenset()
        """What of `beside` the daemon had open for writing when it was adopted: nobody else has written that since."""
        self.handed: dict[FileId, int] = {}
        """The files that the daemon was handed when it started, and their descriptors inside it."""
        self.published = False
        """Whether others than the agent could ever connect to the daemon's socket. It is never taken back: who
        connected then may still be about to name the export that he wants."""
        self.answers = True
        self.silent: datetime | None = None
        """Since when the daemon does not answer."""
        self.closed = False
        self.died = False
        self._opened = opened
        self._leases: dict[FileId, Lease] = {}
        self._target: tuple[Layer, int] | None = None
        self.keeps_target = False
        """Whether the target is whole, so that its lease is kept when the daemon dies."""
        self._server: Layer | None = None
        """The network image that a copy goes into."""
        self.connection = 0
        """The daemon's socket to the server of the network image that the chain is (its inode number)."""
        self._probing: asyncio.Task[None] | None = None

    @property
    def key(self) -> Key:
        return self.file, self.shallow, self.apart.export if self.apart else ""

    @property
    def chain(self) -> Chain:
        return Chain(tuple(self.layers))

    @property
    def pid(self) -> int | None:
        return self.daemon.pid if self.daemon else None

    @property
    def _links(self) -> list[Link]:
        return list(zip(self.nodes, [*self.nodes[1:], None], strict=True))

    @property
    def _ours(self) -> tuple[int, ...]:
        return (self.daemon.pid,) if self.daemon else ()

    def descriptor(self, file: FileId) -> int | None:
        """The agent's own read descriptor of a layer, or of a copy's target."""
        if self._target is not None and self._target[0].file == file:
            return self._target[1]
        opened = self._opened  # who looks at files does it in a thread, and the chain may be closed meanwhile
        if opened is None:
            return None
        with contextlib.suppress(ValueError):
            for layer, fd in zip(opened.chain.layers, opened.fds, strict=True):
                if layer.file == file:
                    return fd
        return None

    def files(self) -> list[FileId]:
        """What a new daemon is handed: the chain's layers, then a copy's target."""
        return [layer.file for layer in self.layers] + ([self._target[0].file] if self._target else [])

    def descriptors(self) -> list[int]:
        """The agent's own descriptors of `files()`, in that order."""
        return [fd for fd in map(self.descriptor, self.files()) if fd is not None]

    def uses(self, file: FileId) -> bool:
        """Whether the file is a layer, or a copy's target."""
        return file in self.files() or (self._server is not None and self._server.file == file)

    def take_over(self, opened: OpenChain) -> None:
        """The same files, opened once more by somebody who joins: kept where we have none, else closed.

        We lack a copy's target that came to the top when the agent was killed before it knew the chain by that.
        """
        if opened is self._opened:
            return
        same_format = opened.chain.top.format == self.layers[0].format
        lacking = any(self.descriptor(layer.file) is None for layer in self.layers)
        if lacking and same_format:
            if self._opened is not None:
                self._opened.close()
            self._opened = opened
        else:
            opened.close()
        if not same_format:
            raise self._other_format(opened.chain.top.format)
        top = opened.chain.top
        if top.device and top.format == "raw" and top.virtual_size != self.layers[0].virtual_size:
            raise self._other_size()

    def _other_format(self, asked: str) -> JobError:
        return JobError(
            "busy",
            f"{self.path!r} is in use as {self.layers[0].format}, and cannot be {asked} too",
            field="format",
            value=asked,
            remedy="stop its exports first, or say the format that they use",
            holders=sorted(str(user) for user in self.users),
        )

    def _other_size(self) -> JobError:
        """A copy came to stand on a larger device: who is there sees the image, who opens it anew the whole device."""
        return JobError(
            "busy",
            f"the first {self.layers[0].virtual_size} bytes of {self.path!r} are in use as an image",
            field="path",
            value=self.path,
            remedy="stop its exports first, or make the device as large as the image",
            holders=sorted(str(user) for user in self.users),
        )

    def leave(self, holder: Holder) -> None:
        """One user less."""
        self.users.discard(holder)
        if self.writer == holder:
            self.writer = None

    # Leases

    async def lease(self, *, exclusive: Collection[FileId] = ()) -> None:
        """Shared leases on all layers, exclusive ones as asked. A JobError busy has changed nothing."""
        self._refuse_when_dead()
        if self._opened is None and not self.file.network:
            raise JobError("unavailable", f"the files of {self.path!r} could not be opened", remedy="see the log")
        taken: list[FileId] = []
        raised: list[FileId] = []
        try:
            for layer in self.layers:
                self._refuse_when_dead()
                lease, wanted = self._leases.get(layer.file), layer.file in exclusive
                if lease is None:
                    await self._take(layer, exclusive=wanted)
                    taken.append(layer.file)
                elif wanted:
                    await self._exclude(lease, layer)
                    raised.append(layer.file)
            self._refuse_when_dead()
        except JobError as error:
            if self.died:  # and everything was let go
                raise self._death() from error
            for file in taken:
                if (mine := self._leases.pop(file, None)) is not None:
                    mine.release()
            for file in raised:
                if file not in self.writable and file in self._leases:
                    await asyncio.to_thread(self._leases[file].share, ours=self._ours)
            raise

    async def _exclude(self, lease: Lease, layer: Layer) -> None:
        try:
            await asyncio.to_thread(lease.exclude, ours=self._ours)
        except JobError as error:
            raise self._named(error, layer) from error

    def _named(self, error: JobError, layer: Layer) -> JobError:
        """The kernel says only that this agent has a lease of the file; say for whom."""
        users = self._registry.users_of(layer.file, besides=self)
        if error.code != "busy" or not users:
            return error
        return JobError(
            "busy",
            f"{layer.path!r} is in use by {', '.join(users)}",
            field=error.field,
            value=error.value,
            remedy="end them first",
            holders=users,
        )

    async def _take(self, layer: Layer, *, exclusive: bool) -> None:
        if layer.file.network:
            self._leases[layer.file] = self._registry.uris.take(layer, exclusive=exclusive)
            return
        fd = self.descriptor(layer.file)
        assert fd is not None
        own, leasing, ours = os.dup(fd), self._registry.leasing, self._ours  # when the daemon dies ours are closed

        def take() -> Lease:
            try:
                return leasing(own, exclusive=exclusive, ours=ours)
            finally:
                os.close(own)

        try:
            lease = await asyncio.to_thread(take)
        except JobError as error:
            raise self._named(error, layer) from error
        if self.died:  # meanwhile, and all that the chain had was let go
            lease.release()
            raise self._death()
        self._leases[layer.file] = lease

    # The daemon

    async def serve(self) -> StorageDaemon:
        """The chain's storage daemon, with all layers open read-only; started when there is none."""
        self._refuse_when_dead()
        if self.daemon is None:
            await self._registry.start(self)
        assert self.daemon is not None
        return self.daemon

    def _refuse_when_dead(self) -> None:
        if self.died:
            raise self._death()

    def _death(self) -> JobError:
        return JobError("storage_daemon_died", f"the storage daemon of {self.path!r} ended")

    async def open_for_writing(self, files: Collection[FileId]) -> None:
        """Open these layers for writing, all in one step; their leases are exclusive already. A network image is open
        as its export needs it from the beginning on."""
        await self.serve()
        if self.file.network:
            return
        links = [
            link for link in self._links if link[0].layer.file in files and link[0].layer.file not in self.writable
        ]
        if not links:
            return
        try:
            await self._reopen(links, writable=True)
        except Refused as error:
            # A refused NBD_CMD_CACHE leaves a cluster in qcow2's caches that can never be written (QEMU 7.2).
            if "failed to flush" not in error.text.lower():
                raise
            raise JobError(
                "busy",
                f"the storage daemon of {self.path!r} can write no more: a client of its read-only export sent CACHE",
                field="target",
                value=self.path,
                remedy="stop the image's exports (they serve until then), pull, and export it again",
                holders=sorted(str(user) for user in self.users if user.kind == "export"),
            ) from error

    async def flush(self, file: FileId) -> None:
        """Make everything durable that was written to this layer. Only a layer whose backing link is as it was: QEMU
        aborts when a reopening would change one that a job has put its filter into.

        QEMU connects again to a server that went away, and flushes then what it wrote to the new one, whatever became
        of the rest. So of a network image nothing is durable but over the first connection: JobError io_error."""
        for node, below in self._links:
            if node.layer.file == file and self.daemon is not None:
                await self.ask(self.daemon.flush(node, below))
                if file.network and self.connection not in await asyncio.to_thread(self.daemon.sockets):
                    raise JobError("io_error", "its server went away since the export began")

    async def close_for_writing(self) -> None:
        """Read-only again, and shared leases. Flushes. A network image stays as it was opened, and is flushed only."""
        if self.file.network:
            if self.writer is not None:
                await self.flush(self.file)
            return
        if self.daemon is not None:
            await self._reopen([link for link in self._links if link[0].layer.file in self.writable], writable=False)
        for layer in self.layers:
            if (lease := self._leases.get(layer.file)) is not None:
                await asyncio.to_thread(lease.share, ours=self._ours)

    async def remove_internal(self, *, reader: bool) -> None:
        """Remove what serves only the agent's own connections, left by a slice or by an agent that was killed."""
        assert self.daemon is not None
        left = await self.ask(self.daemon.exports())
        for name in (READER, CONTROL):
            if name in left:
                await self.ask(self.daemon.remove_export(name, hard=True))
        if reader:
            await self.ask(self.daemon.remove_copy_on_read())

    async def tidy(self) -> None:
        """Remove what a job left that ended, or came to rest, just before the agent was killed: a block job that is not
        dismissed keeps the top busy, and no other could ever start."""
        assert self.daemon is not None
        for job in await self.ask(self.daemon.concluded()):
            await self.ask(self.daemon.dismiss(job))
        await self.ask(self.daemon.remove_stream_top())
        await self.remove_internal(reader=True)
        await self.close_beside()
        await self.close_for_writing()

    async def _reopen(self, links: Sequence[Link], *, writable: bool) -> None:
        if links and self.daemon is not None:
            await self.ask(self.daemon.reopen(*links, writable=writable))
            files = {node.layer.file for node, _ in links}
            self.writable = self.writable | files if writable else self.writable - files

    # A copy's target

    async def take_target(self, layer: Layer, fd: int) -> None:
        """The target's file, with an exclusive lease; `fd` is ours to close."""
        if self._target is not None and self._target[0].file == layer.file:
            os.close(fd)
            return
        self._target = (layer, fd)
        try:
            await self._take(layer, exclusive=True)
        except BaseException:
            self.give_up_target()
            raise

    async def open_target(self, path: str, *, below: Node | None, new: bool, backing: tuple[str, str] | None) -> Node:
        """Open the target in the daemon: `new` as an empty image, on `below` when it shares the backing chain."""
        assert self._target is not None
        daemon = await self.serve()
        await self.close_beside()
        index = 1 + max(node.index for node in self.nodes)
        layer = self._target[0]
        if layer.file in self.handed:
            node = Node(layer, index, self.handed[layer.file])
        else:
            node = await self.ask(daemon.grasp(path, layer, index))
        if layer.device and layer.format == "raw":  # it may have more bytes than the image
            node = replace(node, part=Part(0, layer.virtual_size))
        self.beside = [node]
        await self._registry.remember(self)
        await self.ask(daemon.add_target(node, below, new=new, backing=backing))
        return node

    async def take_server(self, layer: Layer) -> None:
        """The exclusive lease on a target that is a network image. Idempotent."""
        if self._server is None:
            await self._take(layer, exclusive=True)
            self._server = layer

    async def open_remote(self, layer: Layer, timeout: float) -> Node:
        """Open an NBD export as the target; `timeout` seconds to connect, in which no client here is served."""
        daemon = await self.serve()
        await self.close_beside()
        node = Node(layer, 1 + max(node.index for node in self.nodes), -1)
        self.beside = [node]
        await self._registry.remember(self)
        server, name = server_of(layer.path)
        timeout = min(timeout, self._registry.settings.qsd.call_timeout / 2)
        await self.ask(daemon.add_remote(node, server, name, timeout))
        return node

    async def flush_target(self, below: Node | None) -> None:
        """Make what was written to the target durable."""
        if self.daemon is not None:
            for node in self.beside:
                await self.ask(self.daemon.flush(node, below))

    async def close_beside(self) -> None:
        """Close what the chain does not need. Idempotent."""
        if self.daemon is not None and self.daemon.alive:
            for node in self.beside:
                await self.ask(self.daemon.remove(node))
        self.beside, self.begun = [], frozenset()

    def give_up_target(self) -> None:
        """Give up the target's lease and descriptor. Idempotent."""
        self.keeps_target = False
        if self._server is not None:
            if lease := self._leases.pop(self._server.file, None):
                lease.release()
            self._server = None
        if self._target is not None:
            layer, fd = self._target
            self._target = None
            if lease := self._leases.pop(layer.file, None):
                lease.release()
            os.close(fd)

    async def become(self, after: Chain) -> None:
        """The chain is `after` now. Who stands on its top stands there already; what it lost is closed: the links, the
        nodes, the descriptors, the leases. Idempotent."""
        stays = {layer.file for layer in after.layers}
        moved = self.file != after.top.file
        if self.daemon is not None and self.daemon.alive:
            await self._relink(after)
        self.layers = list(after.layers)
        if self._target is not None and self._target[0].file in stays and self._opened is not None:
            self._opened.put_on_top(after.top, self._target[1])
            self._target = None
        if moved:
            self.path = after.top.path
            await self._registry.moved(self, after.top.file)
        await self.close_beside()
        leases = [self._leases.pop(file) for file in list(self._leases) if file not in stays]
        await asyncio.to_thread(_let_go, leases, self._opened, stays)
        if self._opened is not None and not self._opened.chain.layers:
            self._opened = None  # all that we had of the chain went; see take_over

    async def _relink(self, after: Chain) -> None:
        """Put the nodes into their new order, read-only. What is left over stands beside the chain then."""
        assert self.daemon is not None
        known = {node.layer.file: node for node in (*self.nodes, *self.beside)}
        nodes = [replace(known[layer.file], layer=layer) for layer in after.layers if layer.file in known]
        links: list[Link] = list(zip(nodes, [*nodes[1:], None], strict=True))
        was = {node.index: below.index if below else None for node, below in self._links}
        changed = [
            (node, below)
            for node, below in links
            if node.layer.file in self.writable or was.get(node.index, -1) != (below.index if below else None)
        ]
        if changed:
            await self.ask(self.daemon.reopen(*changed, writable=False))
        stays = {node.index for node in nodes}
        self.beside = [node for node in known.values() if node.index not in stays]
        self.nodes, self.writable = nodes, set()

    async def ask(self, command: Any) -> Any:
        """Await a command of the daemon; one that is not answered makes the daemon `unresponsive` for all to see."""
        try:
            return await command
        except JobError as error:
            if error.code == "unresponsive" and self.daemon is not None and self.daemon.alive:
                self._registry.suspect(self)
            raise

    # Ends

    def exited(self) -> None:
        """The daemon's process is gone, asked or not."""
        if not self.closed:
            self.died = True
            self._registry.lost(self)

    async def release(self, holder: Holder) -> None:
        """One user less; the last one closes the chain. Call under `lock`."""
        self.leave(holder)
        if not self.users:
            await self.close()

    async def close(self) -> None:
        """End the daemon and give up the leases. A daemon that does not end keeps both, and is reported; that of a
        network image is killed then: its server is silent, and all that it had for it is flushed, or given up."""
        self.closed = True
        if self.daemon is not None and not await self.daemon.quit():
            if self.file.network:
                await self.kill()
                return
            self.closed = False
            self._registry.suspect(self)
            raise JobError(
                "unresponsive",
                f"storage daemon {self.daemon.id} (pid {self.daemon.pid}) does not end",
                remedy="its storage may hang; it ends by itself when that answers again",
            )
        await self._registry.closed(self)

    async def kill(self) -> None:
        """End the daemon, whatever it holds."""
        self.closed = True
        if self.daemon is not None:
            await self.daemon.kill()
            if self.daemon.alive:
                self.closed = False
                raise JobError("unresponsive", f"storage daemon {self.daemon.id} (pid {self.pid}) cannot be killed")
        await self._registry.closed(self)

    def let_go(self) -> asyncio.Future[None]:
        """Close what the agent has open: leases and descriptors. In a thread, for on dead storage it may hang."""
        kept = self._keep_target() if self.died and self.keeps_target else None
        self.give_up_target()
        leases, opened = list(self._leases.values()), self._opened
        self._leases, self._opened = {}, None

        def let_go() -> None:
            if kept is not None:  # first: the others may hang on their storage
                self._registry.kept.share(kept)
            _let_go(leases, opened, ())

        return asyncio.get_running_loop().run_in_executor(None, let_go)

    def _keep_target(self) -> FileId | None:
        """Hand the target's descriptor and lease on, to outlive the chain."""
        if self._target is None or (lease := self._leases.pop(self._target[0].file, None)) is None:
            return None
        (layer, fd), self._target = self._target, None
        self._registry.kept.keep(layer.file, fd, lease)
        return layer.file

    def watch_until_it_answers(self, interval: float, kill_after: float) -> None:
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe(interval, kill_after), name=f"probe {self.path}")

    async def _probe(self, interval: float, kill_after: float) -> None:
        """Only an unresponsive daemon is asked again and again; one that answers is left in peace.

        It is killed only where the configuration says so and it serves nobody but a job.
        """
        loop = asyncio.get_running_loop()
        since = loop.time()
        while self.daemon is not None and self.daemon.alive:
            with contextlib.suppress(JobError):
                await self.daemon.execute("query-version")
                self._registry.answered(self)
                return
            if kill_after and loop.time() - since > kill_after and all(user.kind == "job" for user in self.users):
                log.error("killing an unresponsive storage daemon", extra={"fields": {"path": self.path}})
                await self.daemon.kill()
            await asyncio.sleep(interval)


def _let_go(leases: Sequence[Lease], opened: OpenChain | None, stays: Collection[FileId]) -> None:
    for lease in leases:
        lease.release()
    if opened is not None:
        opened.keep(stays)
