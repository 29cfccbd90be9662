"""All prepared chains of the host: made, found, started, closed, and known again after a restart.

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
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hostagent.drivers import process, qsd_process
from hostagent.drivers.qmp import Refused
from hostagent.drivers.qsd import StorageDaemon
from hostagent.drivers.qsd_process import Places
from hostagent.images.chain import ChainLimits, OpenChain, open_chain
from hostagent.images.tool import Finished, reason
from hostagent.nbd import network
from hostagent.nbd.kept_targets import KeptTargets
from hostagent.nbd.prepared import Apart, Key, Leasing, PreparedChain
from hostagent.nbd.uri import server_of
from hostagent.nbd.uri_leases import UriLeases
from hostagent.records import DaemonRecord, Node
from jobs.errors import JobError
from jobs.model import Chain, FileId, Holder, Layer
from jobs.ports import Clock

log = logging.getLogger(__name__)
T = TypeVar("T")

INSPECTIONS = 16
"""Chains that are read at a time."""


class DaemonStore(Protocol):
    async def put_daemon(self, daemon: DaemonRecord) -> None: ...

    async def delete_daemon(self, daemon_id: str) -> None: ...

    async def daemons(self) -> list[DaemonRecord]: ...


class Sink(Protocol):
    """Who hears of what happens in and to storage daemons."""

    def qmp_event(self, chain: PreparedChain, name: str, data: Mapping[str, Any]) -> None: ...

    def daemon_gone(self, chain: PreparedChain) -> None: ...

    def responsive(self, chain: PreparedChain, answers: bool) -> None: ...

    async def moved(self, chain: PreparedChain) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    qsd: qsd_process.Settings
    limits: ChainLimits
    daemons: Path
    sockets: Path
    max_daemons: int
    probe_interval: float
    unresponsive_kill: float
    socket_gid: int | None
    inspect_timeout: float
    network: network.Settings


@dataclass(frozen=True, slots=True)
class Orphan:
    """A storage daemon of a hostagent that no record of ours names."""

    id: str
    pid: int
    exports: tuple[str, ...]
    holds: str


class Chains:
    """All prepared chains of the host."""

    def __init__(self, settings: Settings, store: DaemonStore, leasing: Leasing, clock: Clock) -> None:
        self.settings = settings
        self.leasing = leasing
        self.kept = KeptTargets(leasing)
        self.uris = UriLeases(self.users_of)
        self._store = store
        self._clock = clock
        self._chains: dict[Key, PreparedChain] = {}
        self.orphans: list[Orphan] = []
        # Threads of their own: an open() on dead storage never returns, and must not use up those that others need.
        self._inspectors = ThreadPoolExecutor(INSPECTIONS, thread_name_prefix="inspect")
        self._hanging = 0
        self._cleaning: set[asyncio.Task[None]] = set()
        self.sink: Sink

    def all(self) -> list[PreparedChain]:
        return list(self._chains.values())

    def find(self, file: FileId, *, shallow: bool = False) -> PreparedChain | None:
        """The chain that is not an export's own."""
        return self._chains.get((file, shallow, ""))

    def of_daemon(self, daemon_id: str) -> PreparedChain | None:
        """The chain that this storage daemon serves, whatever its top is by now."""
        return next((chain for chain in self._chains.values() if chain.daemon and chain.daemon.id == daemon_id), None)

    def users_of(self, file: FileId, *, besides: PreparedChain | None = None) -> list[str]:
        """Who uses the file, by another chain."""
        chains = [chain for chain in self._chains.values() if chain is not besides]
        found = {user for chain in chains if chain.uses(file) for user in chain.users}
        return sorted(str(user) for user in found)

    def refuse_written(self, chain: Chain) -> None:
        """Raise busy when clients may write a file of the chain: what they write is nobody else's to read or change."""
        files = {layer.file for layer in chain.layers}
        for other in self._chains.values():
            if other.writer is not None and other.file in files:
                raise JobError(
                    "busy",
                    f"{other.path!r} is exported for writing by {other.writer}",
                    field="path",
                    value=other.path,
                    remedy=f"stop the export first: hostagent export stop {other.writer.id}",
                    holders=[str(other.writer)],
                )

    def refuse_used(self, layer: Layer) -> None:
        """Raise busy when the file is exported: a copy is about to go over it. Jobs go by their leases: one that
        has just ended may still be listed here."""
        chains = [chain for chain in self._chains.values() if chain.uses(layer.file)]
        users = sorted({str(user) for chain in chains for user in chain.users if user.kind == "export"})
        if users:
            message = f"{layer.path!r} is used by {', '.join(users)}"
            remedy = "stop the export first, or copy somewhere else"
            raise JobError("busy", message, field="dest", value=layer.path, remedy=remedy, holders=users)

    def apart_on(self, file: FileId) -> list[Holder]:
        """The exports of this file, or of an image that stands on it, that have a storage daemon for themselves."""
        chains = [chain for chain in self._chains.values() if chain.apart is not None and chain.uses(file)]
        return sorted({user for chain in chains for user in chain.users})

    def refuse_apart(self, files: Collection[FileId], chain: Chain) -> None:
        """Raise busy when a job cannot have one of these files of the chain alone, for such an export uses it."""
        for layer in chain.layers:
            users = self.apart_on(layer.file) if layer.file in files else []
            if users:
                raise JobError(
                    "busy",
                    f"{layer.path!r} is exported by {', '.join(map(str, users))}, in a storage daemon of its own",
                    field="target",
                    value=chain.top.path,
                    remedy=f"stop it first: hostagent export stop {users[0].id}",
                    holders=[str(user) for user in users],
                )

    async def open(self, path: str, *, format: str | None = None, anywhere: bool = True) -> OpenChain:
        """Read the chain's headers, in a thread and within images.inspect_timeout."""
        limits = replace(self.settings.limits, top_anywhere=anywhere)
        read = functools.partial(open_chain, path, limits=limits, format=format)
        return await self._inspected(path, read, late=OpenChain.close)

    async def network_layer(self, uri: str) -> Layer:
        """The network image, if its server may be reached. Nobody is asked yet."""
        look = functools.partial(network.network_layer, uri, self.settings.network.servers)
        return await self._inspected(uri, look, late=lambda layer: None)

    async def _inspected(self, path: str, work: Callable[[], T], *, late: Callable[[T], None]) -> T:
        """What a look at the file says, in a thread; what comes when nobody waits any more goes to `late`."""
        if self._hanging >= INSPECTIONS:
            raise JobError(
                "limit",
                f"the storage of {self._hanging} images hangs: none can be read now",
                remedy="look at the host's storage (dmesg); reading goes on when it answers again",
            )
        loop = asyncio.get_running_loop()
        looking = loop.run_in_executor(self._inspectors, work)
        try:
            return await asyncio.wait_for(asyncio.shield(looking), self.settings.inspect_timeout)
        except BaseException as error:
            if not looking.done():
                self._hanging += 1
                looking.add_done_callback(functools.partial(self._came_late, late))
            if not isinstance(error, TimeoutError):
                raise
            raise JobError(
                "timeout",
                f"{path!r} could not be read within {self.settings.inspect_timeout:g} s (images.inspect_timeout)",
                remedy="see whether its storage hangs",
            ) from None

    def _came_late(self, late: Callable[[T], None], work: asyncio.Future[T]) -> None:
        """Nobody waits any more for what was opened."""
        self._hanging -= 1
        if not work.cancelled() and work.exception() is None:
            late(work.result())

    @contextlib.asynccontextmanager
    async def joined(
        self, opened: OpenChain, *, shallow: bool = False, apart: Apart | None = None
    ) -> AsyncIterator[PreparedChain]:
        """The chain of `opened`, which is taken over; locked, made when there is none, closed when left unused."""
        key = (opened.chain.top.file, shallow, apart.export if apart else "")
        while True:
            chain = self._chains.get(key)
            if chain is None:
                layers = opened.chain.layers[:1] if shallow else opened.chain.layers
                chain = self._chains[key] = PreparedChain(self, opened, Chain(layers), shallow=shallow, apart=apart)
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
                self.refuse_written(opened.chain)
                yield chain
                return
            finally:
                try:
                    if not chain.users and self._chains.get(key) is chain:
                        await chain.close()
                finally:
                    chain.lock.release()

    @contextlib.asynccontextmanager
    async def connected(self, layer: Layer, apart: Apart) -> AsyncIterator[PreparedChain]:
        """A new chain of a network image, for one export alone; locked, and closed when left unused."""
        chain = PreparedChain(self, None, Chain((layer,)), shallow=False, apart=apart)
        async with chain.lock:
            self._chains[chain.key] = chain
            try:
                yield chain
            finally:
                if not chain.users and self._chains.get(chain.key) is chain:
                    await chain.close()

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
            places.opening.touch()
            for fd in chain.descriptors():
                descriptors.append(os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC))
            numbers = descriptors or [-1]  # a network image has no file
            nodes = [Node(layer, n, numbers[n]) for n, layer in enumerate(chain.layers)]
            if chain.apart is not None:
                nodes[0] = replace(nodes[0], part=chain.apart.part)
            await daemon.launch(descriptors)
        except BaseException:
            chain.closed = False
            daemon.places.remove()
            raise
        finally:
            for fd in descriptors:
                os.close(fd)
        chain.daemon, chain.nodes = daemon, nodes
        chain.handed = dict(zip(chain.files(), descriptors, strict=not chain.file.network))
        try:
            await self.remember(chain)
            chain.connection = await chain.ask(_opening(daemon, nodes, chain.apart, self.settings.qsd.user.name))
            places.opening.unlink(missing_ok=True)
        except BaseException:
            await daemon.kill()  # nobody uses it yet
            await daemon.detach()
            chain.daemon, chain.nodes, chain.closed = None, [], False
            daemon.places.remove()
            await self._forget(daemon_id)
            raise
        chain.closed = False
        if not daemon.alive:
            chain.exited()
        fields = {"daemon": daemon_id, "pid": daemon.pid, "path": chain.path}
        log.info("storage daemon started", extra={"fields": fields})

    async def remember(self, chain: PreparedChain) -> None:
        """Store what a later agent must know to adopt the daemon."""
        assert chain.daemon is not None
        await self._store.put_daemon(self._record(chain, chain.daemon))

    async def moved(self, chain: PreparedChain, file: FileId) -> None:
        """The chain has another top now."""
        self._chains.pop(chain.key, None)
        chain.file = file
        if not chain.died:  # one that died in this moment is gone from here, and must not come back
            self._chains[chain.key] = chain
        await self.sink.moved(chain)
        if chain.daemon is not None and not chain.died:
            await self.remember(chain)

    def lost(self, chain: PreparedChain) -> None:
        self._chains.pop(chain.key, None)
        chain.let_go()
        fields = {"path": chain.path, "pid": chain.pid, "why": chain.daemon.death().message if chain.daemon else ""}
        log.warning("storage daemon ended", extra={"fields": fields})
        task = asyncio.create_task(self._clean(chain), name=f"clean {chain.path}")
        self._cleaning.add(task)
        task.add_done_callback(self._cleaned)
        self.sink.daemon_gone(chain)

    async def closed(self, chain: PreparedChain) -> None:
        self._chains.pop(chain.key, None)
        await chain.let_go()
        await self._clean(chain)

    async def _clean(self, chain: PreparedChain) -> None:
        if chain.daemon is not None:
            await chain.daemon.detach()
            chain.daemon.places.remove()
            await self._forget(chain.daemon.id)

    async def _forget(self, daemon_id: str) -> None:
        """A record of a daemon that ended stays where the store is full, until the next start: it finds nobody."""
        try:
            await self._store.delete_daemon(daemon_id)
        except JobError as error:
            if error.code != "store_full":
                raise
            fields = {"daemon": daemon_id, "error": error.message}
            log.warning("a daemon's record stays until the next start", extra={"fields": fields})

    def _cleaned(self, task: asyncio.Task[None]) -> None:
        self._cleaning.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a daemon's record stays until the next start", extra={"fields": {"error": str(error)}})

    def suspect(self, chain: PreparedChain) -> None:
        if chain.answers:
            chain.answers, chain.silent = False, self._clock.now()
            self.sink.responsive(chain, False)
        chain.watch_until_it_answers(self.settings.probe_interval, self.settings.unresponsive_kill)

    def answered(self, chain: PreparedChain) -> None:
        chain.answers, chain.silent = True, None
        self.sink.responsive(chain, True)

    def publish_socket(self, chain: PreparedChain) -> None:
        """Let clients in: until its first export a daemon's NBD socket is the agent's alone."""
        assert chain.daemon is not None
        chain.published = True
        if chain.apart is not None and chain.apart.listener is not None:
            return  # whom it lets in is for its credentials to say
        socket = chain.daemon.places.socket
        if self.settings.socket_gid is not None:
            os.chown(socket, -1, self.settings.socket_gid)
        socket.chmod(0o660 if self.settings.socket_gid is not None else 0o600)

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
                await self._forget(record.id)

    def _is_same(self, record: DaemonRecord) -> bool:
        return (
            record.boot_id == process.boot_id()
            and process.start_time(record.pid) == record.start_time
            and qsd_process.is_ours(record.pid, record.id)
        )

    async def _adopt(self, record: DaemonRecord) -> None:
        opened = None if record.file.network else await self._opened_again(record)
        apart = Apart(record.apart) if record.apart else None
        chain = PreparedChain(self, opened, record.chain, shallow=record.shallow, apart=apart)
        daemon = self._daemon(chain, record.id, self._places(record.id))
        chain.daemon = daemon
        self._chains[chain.key] = chain
        await daemon.adopt(record.pid)
        files = {node.layer.file for node in (*record.nodes, *record.beside)}
        modes = await asyncio.to_thread(daemon.open_modes, files)
        if daemon.places.opening.exists() or (record.file not in modes and not record.file.network):
            await self._give_up(chain, daemon)
            return
        chain.nodes = _open(record.nodes, modes)
        chain.beside = _open(record.beside, modes)
        chain.begun = frozenset(node.layer.file for node in chain.beside if modes.get(node.layer.file))
        chain.layers = [node.layer for node in chain.nodes]
        chain.writable = {layer.file for layer in chain.layers if modes.get(layer.file)}
        chain.published = True  # it may have been
        if opened is not None:
            await self._lease_again(chain)
        if not daemon.connected:
            self.suspect(chain)
        log.info("storage daemon adopted", extra={"fields": {"daemon": record.id, "pid": record.pid}})

    async def _opened_again(self, record: DaemonRecord) -> OpenChain | None:
        """The daemon's files, if they can be read and its top still has its name."""
        with contextlib.suppress(JobError):
            opened = await self.open(record.chain.top.path, format=record.chain.top.format)
            if opened.chain.top.file == record.file:
                return opened
            opened.close()
        return None

    async def _give_up(self, chain: PreparedChain, daemon: StorageDaemon) -> None:
        """The agent was killed before it had heard that this daemon has opened its chain. It serves nobody, and some of
        its nodes may be missing although their files are open: QEMU forgets the commands of who is gone."""
        chain.closed = True
        await daemon.kill()
        await self.closed(chain)
        fields = {"daemon": daemon.id, "pid": daemon.pid}
        log.warning("storage daemon without its chain ended", extra={"fields": fields})

    async def _lease_again(self, chain: PreparedChain) -> None:
        """Leases went with the agent before; the daemon's own locks kept the worst away meanwhile."""
        try:
            chain.layers = [layer for layer in chain.layers if chain.descriptor(layer.file) is not None]
            await chain.lease(exclusive=_alone(chain))
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
                elif chain.answers and chain.writer is None and not any(user.kind == "job" for user in chain.users):
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
        alive = await asyncio.to_thread(qsd_process.find_ours)
        for folder in sorted(self.settings.daemons.iterdir()):
            if folder.name in alive and folder.name not in known:
                await self._examine(folder.name, alive[folder.name])
            elif folder.name not in known:
                self._places(folder.name).remove()  # launched, and dead before it had a record

    async def _examine(self, daemon_id: str, pid: int) -> None:
        """A daemon in our folder that no record names: end it when it holds nothing, or cannot yet; else report it."""
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
        if daemon.places.opening.exists():
            await daemon.kill()
            if not daemon.alive:
                daemon.places.remove()
                return
        await daemon.detach()
        self.orphans.append(Orphan(daemon_id, pid, tuple(exports), holds))

    async def forget_ended_orphans(self) -> None:
        """Somebody may have ended them."""
        if self.orphans:
            ended = await asyncio.to_thread(lambda: [o for o in self.orphans if not qsd_process.is_ours(o.pid, o.id)])
            for orphan in ended:
                self._places(orphan.id).remove()
            self.orphans = [orphan for orphan in self.orphans if orphan not in ended]

    # Small things

    def _places(self, daemon_id: str) -> Places:
        folder = self.settings.daemons / daemon_id
        return Places(folder, folder / "qmp.sock", self.settings.sockets / f"{daemon_id}.sock")

    def _daemon(self, chain: PreparedChain, daemon_id: str, places: Places) -> StorageDaemon:
        def event(name: str, data: Mapping[str, Any]) -> None:
            self.sink.qmp_event(chain, name, data)

        settings = self.settings.qsd
        if chain.apart is not None and chain.apart.max_clients is not None:
            settings = replace(settings, max_connections=chain.apart.max_clients)
        listener = chain.apart.listener if chain.apart else None
        return StorageDaemon(daemon_id, places, settings, on_event=event, on_exit=chain.exited, tls=listener)

    def _record(self, chain: PreparedChain, daemon: StorageDaemon) -> DaemonRecord:
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
            nodes=tuple(chain.nodes),
            beside=tuple(chain.beside),
            apart=chain.apart.export if chain.apart else "",
            created=self._clock.now(),
        )


async def _opening(daemon: StorageDaemon, nodes: Sequence[Node], apart: Apart | None, user: str) -> int:
    """Open the chain's layers, or the network image that stands in their place: then the socket to its server. `user`
    is who the daemon runs as."""
    if apart is None or apart.remote is None:
        try:
            await daemon.open_chain(nodes)
        except Refused as error:
            raise _unopened([node.layer.path for node in nodes], error) from error
        return 0
    remote = apart.remote
    server, name = server_of(remote.uri, "image")
    before = await asyncio.to_thread(daemon.sockets)
    try:
        await daemon.add_remote(nodes[0], server, name, remote.timeout, writable=remote.writable)
    except Refused as error:
        raise network.refused(remote.uri, user, error) from error
    made = await asyncio.to_thread(daemon.sockets) - before
    if len(made) != 1:  # nobody else can connect to the daemon yet
        remedy = "see that the server does not break connections, and try again"
        raise JobError("unavailable", f"{remote.uri!r} was opened and lost at once", field="image", remedy=remedy)
    return made.pop()


def _unopened(paths: Sequence[str], error: Refused) -> JobError:
    """What stood in QEMU's way: a format that it does not take, of a header that ours does; else what it says itself of
    a file."""
    if any(words in error.text for words in ("Could not open", "Permission denied", "Cannot allocate memory")):
        return error
    known = reason(Finished(1, b"", error.text.encode()), *paths)
    code, remedy = known or ("image_invalid", "see `hostagent image check`")
    return JobError(code, f"{paths[0]!r} cannot be opened: {error.text}", remedy=remedy, value=paths[0])


def _alone(chain: PreparedChain) -> set[FileId]:
    """Whom nobody else may use: what is open for writing, and what a commit takes in on the way down."""
    written = [n for n, layer in enumerate(chain.layers) if layer.file in chain.writable]
    between = chain.layers[1 : max(written, default=0) + 1]
    return chain.writable | {layer.file for layer in between}


def _open(nodes: Sequence[Node], modes: Mapping[FileId, bool]) -> list[Node]:
    """Of these nodes those that the daemon still has open; of a remote one (no descriptor) the kernel cannot say."""
    return [node for node in nodes if node.layer.file in modes or node.descriptor < 0]
