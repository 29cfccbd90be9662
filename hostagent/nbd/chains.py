"""Prepared chains: a backing chain with its leases, its storage daemon, and those who use it.

One storage daemon serves one chain (one top file): all its exports and its one job. Its graph changes under one lock
per chain, so that an export can never join a chain in the moment in which a job's end takes layers from it. A chain
whose last user left is closed: the daemon ends, then the leases go.

A daemon outlives the agent. After a restart it is known again by id, pid, start time and boot id, and the state of its
graph is read from the kernel (which files it has open, and how): `query-named-block-nodes` is not safe to use.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hostagent.drivers import process, qsd
from hostagent.drivers.qmp import Refused
from hostagent.drivers.qsd import Node, Places, StorageDaemon
from hostagent.images.chain import ChainLimits, OpenChain, open_chain
from hostagent.records import DaemonRecord
from jobs.errors import JobError
from jobs.model import Chain, FileId, Holder, Layer
from jobs.ports import Clock

log = logging.getLogger(__name__)

CONTROL = "hostagent-control"
READER = "hostagent-reader"
"""Exports for the agent's own connections; never left behind between two slices."""
INSPECTIONS = 16
"""Chains that are read at a time."""


class Lease(Protocol):
    """One file's lease (access.leases)."""

    def exclude(self, *, ours: Sequence[int]) -> None: ...

    def share(self, *, ours: Sequence[int]) -> None: ...

    def release(self) -> None: ...


class Leasing(Protocol):
    def __call__(self, fd: int, *, exclusive: bool, ours: Sequence[int]) -> Lease: ...


class DaemonStore(Protocol):
    async def put_daemon(self, daemon: DaemonRecord) -> None: ...

    async def delete_daemon(self, daemon_id: str) -> None: ...

    async def daemons(self) -> list[DaemonRecord]: ...


class Sink(Protocol):
    """Who hears of what happens in and to storage daemons."""

    def qmp_event(self, chain: PreparedChain, name: str, data: Mapping[str, Any]) -> None: ...

    def daemon_gone(self, chain: PreparedChain) -> None: ...

    def responsive(self, chain: PreparedChain, answers: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    qsd: qsd.Settings
    limits: ChainLimits
    daemons: Path
    sockets: Path
    max_daemons: int
    probe_interval: float
    unresponsive_kill: float
    socket_gid: int | None
    inspect_timeout: float


@dataclass(frozen=True, slots=True)
class Orphan:
    """A storage daemon of a hostagent that no record of ours names."""

    id: str
    pid: int
    exports: tuple[str, ...]
    holds: str


class PreparedChain:
    """Use it under `lock`; `users` says why it is kept."""

    def __init__(self, registry: Chains, opened: OpenChain | None, chain: Chain, *, shallow: bool) -> None:
        self._registry = registry
        self.file = chain.top.file
        self.path = chain.top.path
        self.shallow = shallow
        self.layers: list[Layer] = list(chain.layers)
        self.nodes: list[Node] = []
        self.users: set[Holder] = set()
        self.lock = asyncio.Lock()
        self.daemon: StorageDaemon | None = None
        self.writable = False
        self.published = False
        """Whether others than the agent could ever connect to the daemon's socket. It is never taken back: who
        connected then may still be about to name the export that he wants."""
        self.answers = True
        self.closed = False
        self.died = False
        self._opened = opened
        self._leases: dict[FileId, Lease] = {}
        self._probing: asyncio.Task[None] | None = None

    @property
    def chain(self) -> Chain:
        return Chain(tuple(self.layers))

    @property
    def pid(self) -> int | None:
        return self.daemon.pid if self.daemon else None

    @property
    def _ours(self) -> tuple[int, ...]:
        return (self.daemon.pid,) if self.daemon else ()

    def descriptor(self, file: FileId) -> int | None:
        """The agent's own read descriptor of a layer."""
        if self._opened is None:
            return None
        for layer, fd in zip(self._opened.chain.layers, self._opened.fds, strict=True):
            if layer.file == file:
                return fd
        return None

    def take_over(self, opened: OpenChain) -> None:
        """The same files, opened once more by somebody who joins: kept where we have none, else closed."""
        if opened is self._opened:
            return
        same_format = opened.chain.top.format == self.layers[0].format
        if self._opened is None and same_format:
            self._opened = opened
        else:
            opened.close()
        if not same_format:
            raise self._other_format(opened.chain.top.format)

    def _other_format(self, asked: str) -> JobError:
        return JobError(
            "busy",
            f"{self.path!r} is in use as {self.layers[0].format}, and cannot be {asked} too",
            field="format",
            value=asked,
            remedy="stop its exports first, or say the format that they use",
            holders=sorted(str(user) for user in self.users),
        )

    # Leases

    async def lease(self, *, write: bool) -> None:
        """Shared leases on all layers, exclusive on the top with `write`. A JobError busy has changed nothing."""
        if self._opened is None:
            raise JobError("unavailable", f"the files of {self.path!r} could not be opened", remedy="see the log")
        taken: list[FileId] = []
        try:
            for layer in self.layers[1:] if write else self.layers:
                if layer.file not in self._leases:
                    await self._take(layer, exclusive=False)
                    taken.append(layer.file)
            top = self._leases.get(self.file)
            if write and top is None:
                await self._take(self.layers[0], exclusive=True)
            elif write and top is not None:
                await asyncio.to_thread(top.exclude, ours=self._ours)
        except JobError:
            for file in taken:
                self._leases.pop(file).release()
            raise

    async def _take(self, layer: Layer, *, exclusive: bool) -> None:
        fd = self.descriptor(layer.file)
        assert fd is not None
        leasing = self._registry.leasing
        self._leases[layer.file] = await asyncio.to_thread(leasing, fd, exclusive=exclusive, ours=self._ours)

    # The daemon

    async def serve(self) -> StorageDaemon:
        """The chain's storage daemon, with all layers open read-only; started when there is none."""
        if self.died:
            raise JobError("storage_daemon_died", f"the storage daemon of {self.path!r} ended")
        if self.daemon is None:
            await self._registry.start(self)
        assert self.daemon is not None
        return self.daemon

    async def open_for_writing(self) -> None:
        daemon = await self.serve()
        if self.writable:
            return
        try:
            await self._reopen(daemon, writable=True)
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

    async def flush(self) -> None:
        """Make everything that was written through this daemon durable. Reopening a node flushes it (block.c)."""
        if self.daemon is not None:
            await self._reopen(self.daemon, writable=True)

    async def close_for_writing(self) -> None:
        """Read-only again, and a shared lease. Flushes."""
        if self.writable and self.daemon is not None:
            await self._reopen(self.daemon, writable=False)
        lease = self._leases.get(self.file)
        if lease is not None:
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
        await self.remove_internal(reader=True)
        await self.close_for_writing()

    async def _reopen(self, daemon: StorageDaemon, *, writable: bool) -> None:
        below = self.nodes[1] if len(self.nodes) > 1 else None
        await self.ask(daemon.reopen(self.nodes[0], below, writable=writable))
        self.writable = writable

    async def shed(self, after: Chain) -> None:
        """Forget the layers that the chain lost: cut the link, close their nodes, their descriptors, their leases."""
        stays = {layer.file for layer in after.layers}
        gone = [node for node in self.nodes if node.layer.file not in stays]
        if gone and self.daemon is not None and self.daemon.alive:
            self.nodes = [node for node in self.nodes if node.layer.file in stays]
            try:
                await self._reopen(self.daemon, writable=False)
                for node in gone:
                    await self.ask(self.daemon.remove(node))
            except JobError:
                self.nodes += gone
                raise
        self.layers = list(after.layers)
        leases = [self._leases.pop(file) for file in list(self._leases) if file not in stays]
        await asyncio.to_thread(_let_go, leases, self._opened, stays)

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
        self.users.discard(holder)
        if not self.users:
            await self.close()

    async def close(self) -> None:
        """End the daemon and give up the leases. A daemon that does not end keeps both, and is reported."""
        self.closed = True
        if self.daemon is not None and not await self.daemon.quit():
            self.closed = False
            self._registry.suspect(self)
            raise JobError(
                "unresponsive",
                f"storage daemon {self.daemon.id} (pid {self.daemon.pid}) does not end",
                remedy="its storage may hang; it ends by itself when that answers again",
            )
        await self._registry.closed(self)

    def let_go(self) -> asyncio.Future[None]:
        """Close what the agent has open: leases and descriptors. In a thread, for on dead storage it may hang."""
        leases, opened = list(self._leases.values()), self._opened
        self._leases, self._opened = {}, None
        return asyncio.get_running_loop().run_in_executor(None, _let_go, leases, opened, ())

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


class Chains:
    """All prepared chains of the host."""

    def __init__(self, settings: Settings, store: DaemonStore, leasing: Leasing, clock: Clock) -> None:
        self.settings = settings
        self.leasing = leasing
        self._store = store
        self._clock = clock
        self._chains: dict[tuple[FileId, bool], PreparedChain] = {}
        self.orphans: list[Orphan] = []
        # Threads of their own: an open() on dead storage never returns, and must not use up those that others need.
        self._inspectors = ThreadPoolExecutor(INSPECTIONS, thread_name_prefix="inspect")
        self._hanging = 0
        self._cleaning: set[asyncio.Task[None]] = set()
        self.sink: Sink

    def all(self) -> list[PreparedChain]:
        return list(self._chains.values())

    def find(self, file: FileId, *, shallow: bool = False) -> PreparedChain | None:
        return self._chains.get((file, shallow))

    async def open(self, path: str, *, format: str | None = None, anywhere: bool = True) -> OpenChain:
        """Read the chain's headers, in a thread and within images.inspect_timeout."""
        limits = self.settings.limits
        if not anywhere:
            limits = ChainLimits(limits.pools, limits.max_depth, top_anywhere=False)
        if self._hanging >= INSPECTIONS:
            raise JobError(
                "limit",
                f"the storage of {self._hanging} images hangs: none can be read now",
                remedy="look at the host's storage (dmesg); reading goes on when it answers again",
            )
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._inspectors, functools.partial(open_chain, path, limits=limits, format=format))
        try:
            return await asyncio.wait_for(asyncio.shield(work), self.settings.inspect_timeout)
        except BaseException as error:
            if not work.done():
                self._hanging += 1
                work.add_done_callback(self._came_late)
            if not isinstance(error, TimeoutError):
                raise
            raise JobError(
                "timeout",
                f"{path!r} could not be read within {self.settings.inspect_timeout:g} s (images.inspect_timeout)",
                remedy="see whether its storage hangs",
            ) from None

    def _came_late(self, work: asyncio.Future[OpenChain]) -> None:
        """Nobody waits any more for what was opened."""
        self._hanging -= 1
        if not work.cancelled() and work.exception() is None:
            work.result().close()

    @contextlib.asynccontextmanager
    async def joined(self, opened: OpenChain, *, shallow: bool = False) -> AsyncIterator[PreparedChain]:
        """The chain of `opened`, which is taken over; locked, made when there is none, closed when left unused."""
        key = (opened.chain.top.file, shallow)
        while True:
            chain = self._chains.get(key)
            if chain is None:
                layers = opened.chain.layers[:1] if shallow else opened.chain.layers
                chain = self._chains[key] = PreparedChain(self, opened, Chain(layers), shallow=shallow)
            try:
                await chain.lock.acquire()
            except BaseException:
                if chain._opened is not opened:
                    opened.close()
                raise
            try:
                if self._chains.get(key) is not chain:
                    continue
                chain.take_over(opened)
                yield chain
                return
            finally:
                try:
                    if not chain.users and self._chains.get(key) is chain:
                        await chain.close()
                finally:
                    chain.lock.release()

    # What the chains call

    async def start(self, chain: PreparedChain) -> None:
        """Start the chain's storage daemon and open the layers in it."""
        running = sum(1 for other in self._chains.values() if other.daemon)
        if running >= self.settings.max_daemons:
            raise JobError("limit", f"{running} storage daemons run already", remedy="raise qsd.max_daemons")
        daemon_id = uuid.uuid4().hex[:12]
        places = self._places(daemon_id)
        places.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        daemon = self._daemon(chain, daemon_id, places)
        descriptors = []
        chain.closed = True  # until it serves, an end of the process is the starter's to tell
        try:
            for layer in chain.layers:
                fd = chain.descriptor(layer.file)
                descriptors.append(os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC))
            nodes = [Node(layer, n, descriptors[n]) for n, layer in enumerate(chain.layers)]
            await daemon.launch(descriptors)
        except BaseException:
            chain.closed = False
            daemon.places.remove()
            raise
        finally:
            for fd in descriptors:
                os.close(fd)
        chain.daemon, chain.nodes = daemon, nodes
        try:
            await self._store.put_daemon(self._record(chain, daemon, tuple(node.descriptor for node in nodes)))
            await chain.ask(daemon.open_chain(nodes))
        except BaseException:
            await daemon.kill()  # nobody uses it yet
            await daemon.detach()
            chain.daemon, chain.nodes, chain.closed = None, [], False
            daemon.places.remove()
            await self._store.delete_daemon(daemon_id)
            raise
        chain.closed = False
        if not daemon.alive:
            chain.exited()
        fields = {"daemon": daemon_id, "pid": daemon.pid, "path": chain.path}
        log.info("storage daemon started", extra={"fields": fields})

    def lost(self, chain: PreparedChain) -> None:
        self._chains.pop((chain.file, chain.shallow), None)
        chain.let_go()
        fields = {"path": chain.path, "pid": chain.pid, "why": chain.daemon.death().message if chain.daemon else ""}
        log.warning("storage daemon ended", extra={"fields": fields})
        task = asyncio.create_task(self._clean(chain), name=f"clean {chain.path}")
        self._cleaning.add(task)
        task.add_done_callback(self._cleaned)
        self.sink.daemon_gone(chain)

    async def closed(self, chain: PreparedChain) -> None:
        self._chains.pop((chain.file, chain.shallow), None)
        await chain.let_go()
        await self._clean(chain)

    async def _clean(self, chain: PreparedChain) -> None:
        if chain.daemon is not None:
            await chain.daemon.detach()
            chain.daemon.places.remove()
            await self._store.delete_daemon(chain.daemon.id)

    def _cleaned(self, task: asyncio.Task[None]) -> None:
        self._cleaning.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a daemon's record stays until the next start", extra={"fields": {"error": str(error)}})

    def suspect(self, chain: PreparedChain) -> None:
        if chain.answers:
            chain.answers = False
            self.sink.responsive(chain, False)
        chain.watch_until_it_answers(self.settings.probe_interval, self.settings.unresponsive_kill)

    def answered(self, chain: PreparedChain) -> None:
        chain.answers = True
        self.sink.responsive(chain, True)

    def publish_socket(self, chain: PreparedChain) -> None:
        """Let clients in: until its first export a daemon's NBD socket is the agent's alone."""
        assert chain.daemon is not None
        socket = chain.daemon.places.socket
        if self.settings.socket_gid is not None:
            os.chown(socket, -1, self.settings.socket_gid)
        socket.chmod(0o660)
        chain.published = True

    # Restart

    async def recover(self) -> None:
        """Adopt the daemons that still run; side by side, since one that does not answer takes all its timeouts."""
        gate = asyncio.Semaphore(INSPECTIONS)
        await asyncio.gather(*(self._take_up(record, gate) for record in await self._store.daemons()))
        await self._find_orphans()

    async def _take_up(self, record: DaemonRecord, gate: asyncio.Semaphore) -> None:
        async with gate:
            if self._is_same(record):
                await self._adopt(record)
            else:
                self._places(record.id).remove()
                await self._store.delete_daemon(record.id)

    def _is_same(self, record: DaemonRecord) -> bool:
        return (
            record.boot_id == process.boot_id()
            and process.start_time(record.pid) == record.start_time
            and qsd.is_ours(record.pid, record.id)
        )

    async def _adopt(self, record: DaemonRecord) -> None:
        opened = None
        with contextlib.suppress(JobError):
            opened = await self.open(record.chain.top.path, format=record.chain.top.format)
            if opened.chain.top.file != record.file:
                opened.close()
                opened = None
        chain = PreparedChain(self, opened, record.chain, shallow=record.shallow)
        daemon = self._daemon(chain, record.id, self._places(record.id))
        chain.daemon = daemon
        self._chains[(record.file, record.shallow)] = chain
        await daemon.adopt(record.pid)
        modes = await asyncio.to_thread(daemon.open_modes, {layer.file for layer in record.chain.layers})
        layers = list(enumerate(zip(record.chain.layers, record.descriptors, strict=True)))
        chain.nodes = [Node(layer, n, fd) for n, (layer, fd) in layers if layer.file in modes]
        chain.layers = [node.layer for node in chain.nodes]
        chain.writable = modes.get(record.file, False)
        chain.published = True  # it may have been
        if opened is not None:
            await self._lease_again(chain)
        if not daemon.connected:
            self.suspect(chain)
        log.info("storage daemon adopted", extra={"fields": {"daemon": record.id, "pid": record.pid}})

    async def _lease_again(self, chain: PreparedChain) -> None:
        """Leases went with the agent before; the daemon's own locks kept the worst away meanwhile."""
        try:
            chain.layers = [layer for layer in chain.layers if chain.descriptor(layer.file) is not None]
            await chain.lease(write=chain.writable)
        except JobError as error:
            log.warning("a lease was lost", extra={"fields": {"path": chain.path, "error": error.message}})

    async def sweep(self) -> None:
        """End the adopted daemons that no export and no job claimed; rid the others of what an ended job left."""
        await asyncio.gather(*(self._sweep(chain) for chain in self.all()))

    async def _sweep(self, chain: PreparedChain) -> None:
        async with chain.lock:
            with contextlib.suppress(JobError):
                if not chain.users:
                    await chain.close()
                elif chain.answers and not any(user.kind == "job" for user in chain.users):
                    await chain.tidy()

    async def let_go(self) -> None:
        """The agent ends: daemons go on."""
        self._inspectors.shutdown(wait=False)
        for chain in self.all():
            if chain._probing is not None:
                chain._probing.cancel()
            if chain.daemon is not None:
                await chain.daemon.detach()

    async def _find_orphans(self) -> None:
        known = {chain.daemon.id for chain in self._chains.values() if chain.daemon}
        self.orphans = []
        alive = await asyncio.to_thread(qsd.find_ours)
        for folder in sorted(self.settings.daemons.iterdir()):
            if folder.name in alive and folder.name not in known:
                await self._examine(folder.name, alive[folder.name])
            elif folder.name not in known:
                self._places(folder.name).remove()  # launched, and dead before it had a record

    async def _examine(self, daemon_id: str, pid: int) -> None:
        """A daemon in our folder that no record names: end it when it holds nothing, else report it."""
        daemon = StorageDaemon(
            daemon_id, self._places(daemon_id), self.settings.qsd, on_event=lambda n, d: None, on_exit=lambda: None
        )
        try:
            await daemon.adopt(pid)
            exports = sorted(await daemon.exports())
            jobs = [str(job["id"]) for job in await daemon.execute("query-jobs")]
        except JobError as error:
            exports, jobs = [], [f"unknown: {error.message}"]
        holds = ", ".join([*(f"export {name}" for name in exports), *(f"job {name}" for name in jobs)])
        fields = {"daemon": daemon_id, "pid": pid, "holds": holds or "nothing"}
        log.warning("orphaned storage daemon", extra={"fields": fields})
        if not holds and await daemon.quit():
            daemon.places.remove()
            return
        await daemon.detach()
        self.orphans.append(Orphan(daemon_id, pid, tuple(exports), holds))

    # Small things

    def _places(self, daemon_id: str) -> Places:
        folder = self.settings.daemons / daemon_id
        return Places(folder, folder / "qmp.sock", self.settings.sockets / f"{daemon_id}.sock")

    def _daemon(self, chain: PreparedChain, daemon_id: str, places: Places) -> StorageDaemon:
        def event(name: str, data: Mapping[str, Any]) -> None:
            self.sink.qmp_event(chain, name, data)

        return StorageDaemon(daemon_id, places, self.settings.qsd, on_event=event, on_exit=chain.exited)

    def _record(self, chain: PreparedChain, daemon: StorageDaemon, descriptors: tuple[int, ...]) -> DaemonRecord:
        start_time = process.start_time(daemon.pid)
        if start_time is None:
            raise JobError("storage_daemon_died", f"storage daemon {daemon.id} ended at once")
        return DaemonRecord(
            id=daemon.id,
            file=chain.file,
            shallow=chain.shallow,
            pid=daemon.pid,
            start_time=start_time,
            boot_id=process.boot_id(),
            monitor=str(daemon.places.monitor),
            socket=str(daemon.places.socket),
            chain=chain.chain,
            descriptors=descriptors,
            created=self._clock.now(),
        )


def _let_go(leases: Sequence[Lease], opened: OpenChain | None, stays: Collection[FileId]) -> None:
    for lease in leases:
        lease.release()
    if opened is not None:
        opened.keep(stays)
