"""The composition root: the only place that makes services and joins them. Nothing here decides anything about a disk.

Order at start: the store (and with it the claim to the state folder), the storage daemons that still run, the exports,
the claims of jobs on them, then the ledger, then the jobs, and last the socket. So when the first request is answered,
everything that a crash or a reboot left is already being settled. At the end it lets go in reverse: storage daemons
go on, and are adopted by the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from events.bus import Bus
from events.model import now
from hostagent import __version__, activation, data_child, host, reboot, reload, sdnotify, watchdog
from hostagent.access import holders
from hostagent.access.leases import FileLease
from hostagent.access.ledger import Ledger
from hostagent.access.ledger import Settings as LedgerSettings
from hostagent.access.prober import Prober
from hostagent.access.subject import OwnProbe, Probe, Subject
from hostagent.addresses import tcp_address
from hostagent.api import identities, remote
from hostagent.api.audited import audited
from hostagent.api.changes import Changes
from hostagent.api.http import HttpSettings, Server, build_app
from hostagent.api.peercred import PeerPolicy
from hostagent.api.projection.projection import Projection
from hostagent.api.remote import Doors
from hostagent.api.scrapes import Bounds, Scraping
from hostagent.api.service import AgentService
from hostagent.api.status import HostFacts
from hostagent.audit import Audit
from hostagent.audit import Settings as AuditSettings
from hostagent.config import Config
from hostagent.config_text import plain
from hostagent.drain import Drain
from hostagent.drivers import qsd_process
from hostagent.drivers.libvirt import last_beat
from hostagent.gauges import Gauges
from hostagent.guest_jobs import GuestJobs, Parts
from hostagent.guests.router import Router
from hostagent.images.dependents import Dependent, ScanLimits, find_dependents
from hostagent.images.measure import Measure
from hostagent.images.member import ChainLimits
from hostagent.images.qemu_img import QemuImg, RunAs, ToolLimits
from hostagent.images.tool import Tool
from hostagent.live import Live
from hostagent.metrics import Metrics
from hostagent.nbd import chains as nbd_chains
from hostagent.nbd import exports as nbd_exports
from hostagent.nbd import offline_bitmaps
from hostagent.nbd.chains import Chains
from hostagent.nbd.claims import Claims
from hostagent.nbd.committing import Commit
from hostagent.nbd.copying import Copy
from hostagent.nbd.exports import Exports
from hostagent.nbd.headers import Headers
from hostagent.nbd.network import Settings as NetworkSettings
from hostagent.nbd.offline import OfflineDriver
from hostagent.nbd.offline_bitmaps import Bitmaps
from hostagent.nbd.operations import Search
from hostagent.nbd.pulling import Pull, SliceLimits
from hostagent.nbd.space import Space
from hostagent.nbd.tls import TlsSettings
from hostagent.nbd.watch import Watch
from hostagent.news import News
from hostagent.retention import Retention, keep_house
from hostagent.store import Store
from jobs.engine import Engine
from jobs.errors import JobError
from jobs.model import FileId, State
from jobs.ports import SystemClock
from jobs.world import Limits

log = logging.getLogger(__name__)

WORKERS = 32
"""Threads for files, processes and NBD: one job's slice or one slow disk must not wait for another's."""
API = "api"
"""The name of its socket to the service manager (FileDescriptorName=)."""
STOP_MORE = 30.0
"""Seconds that the agent's end may take beside agent.stop_timeout, which is for requests: so the service manager is
told."""


def run(config: Config, load: Callable[[], Config]) -> int:
    """Serve until SIGTERM or SIGINT; SIGHUP reads the settings anew, with `load`. What keeps it from starting is raised
    as AgentError or JobError."""
    asyncio.run(_serve(config, load))
    return 0


async def _serve(config: Config, load: Callable[[], Config]) -> None:
    loop = asyncio.get_running_loop()
    workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="work")
    loop.set_default_executor(workers)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to reload yet, and it must not end us
    agent = Agent(config)
    try:
        await agent.start()
        anew = reload.Reload(config, load, agent.reload, agent.news.status, agent.reopen)
        loop.add_signal_handler(signal.SIGHUP, anew.now)
        gc.freeze()  # what was imported stays: no need to walk it again and again, 50 ms in which nothing is done
        gc.set_threshold(10_000, 10, 10)  # a list of 100 jobs is 10,000 objects: not ten collections each
        await stop.wait()
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        sdnotify.stopping(config.agent.stop_timeout + STOP_MORE)
        await agent.stop()
        workers.shutdown(wait=False)
        _leave_hanging_threads(config.agent.stop_timeout)


def _leave_hanging_threads(timeout: float) -> None:
    """End the process here if a thread does not: one that is in a call to dead storage never returns, and Python waits
    for every thread at its end. All that matters is stored and synced."""
    deadline = time.monotonic() + timeout
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("a thread still hangs", extra={"fields": {"thread": thread.name}})
                logging.shutdown()
                os._exit(0)


class Agent:
    """Everything that lives as long as the process does."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._clock = SystemClock()
        self._bus = Bus()
        self._changes = Changes()
        self._state_dir, self._runtime_dir = Path(config.agent.state_dir), Path(config.agent.runtime_dir)
        self._user = host.storage_user(config)
        self._group = host.socket_group(config)
        self._background: list[asyncio.Task[Any]] = []
        self.news = News(self._bus, self._changes, self._later)
        self._own_socket = True
        self._serving: asyncio.Task[None] | None = None
        self._scraping: Scraping | None = None
        self._store = Store(
            self._state_dir,
            host=config.agent.host,
            publish=self.news.publish,
            busy_timeout=config.store.busy_timeout,
        )
        self._prober: Probe = (
            OwnProbe()
            if self._user.is_us
            else Prober(self._user.uid, self._user.gid, self._user.groups, timeout=config.access.probe_timeout)
        )
        self._subject = Subject(
            self._user.name, self._user.uid, (self._user.gid, *self._user.groups), own=self._user.is_us
        )
        self._qemu = host.qemu_version(config)
        self._metrics = Metrics(
            lambda: self._gauges.snapshot(), version=__version__, qemu=self._qemu, refusals=identities.REASONS
        )
        self._live = Live(
            config.libvirt,
            record=self.news.record,
            count=lambda type_: self._metrics.event("libvirt", type_),
            observe=self._metrics.libvirt_call,
        )
        self._ledger = self._make_ledger()
        self._chains = self._make_chains()
        self._dependents = Search(self._find_dependents, self._config.images.scan_timeout)
        self._exports = self._make_exports()
        self._driver = self._make_driver()
        self._guests = self._make_guests()
        self._bitmaps = self._make_bitmaps()
        self._watch = Watch(self._chains, interval=config.images.watch_interval, tell=self.news.drifted)
        self._engine = self._make_engine()
        self._drain = Drain(self._store, self._engine, self._clock, self._later)
        self._data = data_child.make(config, self._group, self.news.data_daemon) if config.data.start else None
        self._projection = Projection(config.dbus, host=config.agent.host, never=self._strangers)
        self._service: AgentService
        self._server: Server
        self._doors: Doors | None = None
        self._audit: Audit
        self._gauges = Gauges(
            store=self._store,
            engine=self._engine,
            chains=self._chains,
            exports=self._exports,
            watch=self._watch,
            live=self._live,
            bus=self._bus,
            folder=self._state_dir,
            min_free=config.store.min_free,
            interval=config.metrics.refresh,
            projection=self._projection,
        )
        news = self.news
        news.store, news.metrics, news.engine, news.exports = self._store, self._metrics, self._engine, self._exports
        news.drain, news.gauges, news.settled = self._drain, self._gauges, self._guests.settled
        news.touched = self._projection.touch

    # Making

    def _make_ledger(self) -> Ledger:
        access = self._config.access
        return Ledger(
            self._store,
            self._subject,
            self._prober,
            settings=LedgerSettings(
                access.converge_timeout,
                access.shared_filesystems == "manage",
                protected=access.protected,
                unknown_owner=host.unknown_owner(access.unknown_owner),
            ),
            clock=self._clock,
            daemons=lambda: {c.daemon.pid: c.daemon.inodes for c in self._chains.all() if c.daemon},
            observe=lambda trigger, result: self._metrics.revocation(trigger, result),
        )

    def _make_chains(self) -> Chains:
        config = self._config
        settings = nbd_chains.Settings(
            qsd=qsd_process.Settings(
                binary=config.qsd.binary,
                user=self._user,
                connect_timeout=config.qmp.connect_timeout,
                call_timeout=config.qmp.call_timeout,
                start_timeout=config.qsd.start_timeout,
                stop_timeout=config.qsd.stop_timeout,
                flush_timeout=config.qsd.flush_timeout,
                open_files=config.qsd.open_files,
                max_connections=config.qsd.max_connections,
            ),
            limits=ChainLimits(tuple(config.images.pools), config.images.max_depth),
            daemons=self._runtime_dir / "qsd",
            sockets=self._runtime_dir / "nbd",
            max_daemons=config.qsd.max_daemons,
            probe_interval=config.qsd.probe_interval,
            unresponsive_kill=config.qsd.unresponsive_kill,
            socket_gid=self._group,
            inspect_timeout=config.images.inspect_timeout,
            network=NetworkSettings(config.images.network, config.exports.open_timeout),
        )
        chains = Chains(settings, self._store, FileLease, self._clock)
        chains.sink = self.news
        return chains

    def _make_exports(self) -> Exports:
        exports, tls_ = self._config.exports, self._config.tls
        tls = TlsSettings(tls_.listen, tls_.x509_dir, tls_.psk_dir, tls_.x509_names, self._config.agent.host)
        return Exports(
            self._chains,
            self._store,
            self._ledger,
            Claims(self._ledger, self._dependents, openers=_openers, jobs=lambda: self._engine.active()),
            settings=nbd_exports.Settings(
                exports.limit, exports.nbd_timeout, exports.merge_timeout, exports.idle_check, tls
            ),
            clock=self._clock,
            started=self._metrics.export_started,
            changed=self.news.export_changed,
        )

    def _make_driver(self) -> OfflineDriver:
        images, jobs = self._config.images, self._config.jobs
        user, tools = self._tools()
        timeout = self._config.exports.nbd_timeout
        slices = SliceLimits(
            slice=jobs.slice,
            requests_in_flight=jobs.requests_in_flight,
            request_size=jobs.request_size,
            nbd_timeout=timeout,
        )
        measure = Measure(user=user, limits=replace(tools, timeout=images.measure_timeout), binary=images.qemu_img)
        space = Space(measure, self._ledger)
        headers = Headers(timeout)
        self._copy = Copy(self._chains, self._dependents, space, timeout)
        self._commit = Commit(self._dependents, space, headers, timeout)
        return OfflineDriver(
            self._chains,
            self._ledger,
            QemuImg(user=user, limits=tools, binary=images.qemu_img),
            pull=Pull(slices, headers),
            copy=self._copy,
            commit=self._commit,
            check_auto=images.check_auto_size,
        )

    def _make_guests(self) -> GuestJobs:
        run_as, tools = self._tools()
        return GuestJobs(
            Parts(
                self._config,
                self._live,
                self._ledger,
                self._store,
                self._chains,
                self._copy,
                self._commit,
                self._clock,
                self._user,
                run_as,
                tools,
                engine=lambda: self._engine,
                alarm=self.news.not_whole,
            )
        )

    def _make_bitmaps(self) -> Bitmaps:
        images = self._config.images
        user, limits = self._tools()
        tool = Tool(user=user, limits=limits, binary=images.qemu_img)
        settings = offline_bitmaps.Settings(images.bitmaps, images.bitmap_timeout)
        return Bitmaps(self._chains, self._ledger, tool, settings)

    def _tools(self) -> tuple[RunAs | None, ToolLimits]:
        """Who qemu-img runs as, and its bounds."""
        images = self._config.images
        user = None if self._user.is_us else RunAs(self._user.uid, self._user.gid, self._user.groups)
        return user, ToolLimits(timeout=images.check_timeout, cpu=images.tool_cpu, memory=images.tool_memory)

    def _find_dependents(
        self, files: Collection[FileId], *, folders: Sequence[Path], skip: Collection[FileId]
    ) -> list[Dependent]:
        images = self._config.images
        return find_dependents(
            files,
            folders=folders,
            pools=[Path(pool) for pool in images.pools],
            limits=ScanLimits(images.scan_entries, images.scan_timeout),
            skip=skip,
        )

    def _make_engine(self) -> Engine:
        jobs = self._config.jobs
        return Engine(
            Router(self._driver, self._guests.pulls, self._guests.mirrors, self._guests.external, self._live),
            self._store,
            self._ledger,
            clock=self._clock,
            observer=self.news,
            limits=Limits(
                width=jobs.width,
                queue=jobs.queue,
                group=jobs.group,
                progress_interval=jobs.progress_interval,
                abort_timeout=jobs.abort_timeout,
                settle_retry=jobs.settle_retry,
                settle_retry_max=jobs.settle_retry_max,
                end_retries=jobs.end_retries,
                request_timeout=jobs.start_timeout,
                live_interval=self._config.libvirt.sample,
            ),
            changed=self.news.job_changed,
        )

    def _start_prober(self) -> None:
        """By a question: the first revocation need not wait for it. Where it cannot start, that one says so."""
        with contextlib.suppress(JobError, OSError), open(os.devnull, "rb") as nothing:
            self._prober.can_open(nothing.fileno(), "r")

    # Life

    async def start(self) -> None:
        host.raise_file_limit()
        host.make_folders(self._state_dir, self._runtime_dir, self._group)
        given = activation.listeners().get(API)
        if given is not None:
            host.refuse_other_address(given, self._config.api.socket)
        else:
            host.refuse_second_listener(self._config.api.socket)
        self._doors = remote.doors(self._config.api, self._metrics.refused)  # bound early: it may keep us from starting
        await self._store.open()
        self._audit = self._make_audit()
        await reboot.renumber(self._store)
        await self._chains.recover()
        await self._exports.recover()
        unsettled = await self._store.unsettled()
        claims = [job for job in unsettled if job.state not in (State.QUEUED, State.WAITING)]
        await asyncio.gather(*map(self._driver.claim, claims))
        self._guests.recover(unsettled)
        await self._chains.sweep()
        await self._bitmaps.recover(self._store)
        await self._converge_at_start()
        self._metrics.reconcile("start")
        await self._drain.load()
        recovered = await self._engine.recover()
        self._later(self._drain.settle())
        self._make_service()
        self._later(asyncio.to_thread(self._start_prober))
        await self._gauges.refresh()
        self._live.start()
        listener = given or host.listen(self._config.api.socket, self._group)
        self._own_socket = given is None
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="api")
        metrics = self._config.metrics
        if (address := tcp_address(metrics.listen)) is not None:
            bounds = Bounds(metrics.max_connections, metrics.max_head, metrics.timeout)
            self._scraping = Scraping(address, self._metrics.render, bounds, metrics.refresh)
            self._later(self._scraping.run())
        self._background += [
            asyncio.create_task(self._ledger.run(self._config.access.converge_interval), name="ledger"),
            asyncio.create_task(self._watch.run(), name="watch"),
            asyncio.create_task(self._gauges.run(), name="gauges"),
            asyncio.create_task(self._projection.run(self._use_cases, self._audit.tell), name="dbus"),
            asyncio.create_task(keep_house(self._store, self._retention(), self._clock), name="house"),
        ]
        for look in self._guests.looks():
            self._later(look)
        if self._data is not None:
            data_child.write_settings(self._config)
            self._background.append(asyncio.create_task(self._data.run(), name="data"))
        where = self._config.api.socket
        log.info(
            "agent ready",
            extra={
                "fields": {
                    "version": __version__,
                    "socket": str(where),
                    "user": self._user.name,
                    "jobs": recovered,
                    "storage_daemons": len(self._chains.all()),
                }
            },
        )
        self.news.status = self._status
        sdnotify.ready(self._status())
        if (patience := watchdog.interval()) is not None:
            self._later(watchdog.feed(patience, self._store.counts, last_beat))

    async def _converge_at_start(self) -> None:
        """A full store keeps no agent from its start: the ledger's timer comes back to what is left."""
        try:
            await self._ledger.converge_all(trigger="start")
        except JobError as error:
            if error.code != "store_full":
                raise
            log.error("access is not settled yet", extra={"fields": {"error": error.message}})

    def _status(self) -> str:
        """For people, in the service manager's words on us."""
        jobs, exports, live = len(self._engine.active()), len(self._exports.active()), self._live
        libvirt = "off" if live.off is not None else "connected" if live.status.connected else "away"
        return f"{jobs} jobs, {exports} exports, libvirt {libvirt}"

    async def stop(self) -> None:
        """Let go of everything; storage daemons run on."""
        if self._scraping is not None:
            self._scraping.stop()
        if self._serving is not None:
            self._server.should_exit = True
            await asyncio.wait({self._serving}, timeout=self._config.agent.stop_timeout + 1)
            self._serving.cancel()
            if self._own_socket:
                self._config.api.socket.unlink(missing_ok=True)
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._data is not None:
            await self._data.stop()
        await self._engine.stop()
        await self._live.stop()
        await self._bitmaps.close(self._config.agent.stop_timeout)
        await self._exports.close()
        self._watch.close()
        await self._chains.let_go()
        self._ledger.close()
        self._dependents.close()
        self._prober.close()
        with contextlib.suppress(AttributeError):  # it was never opened
            await self._store.close()
        with contextlib.suppress(AttributeError):
            await asyncio.to_thread(self._audit.close, self._config.agent.stop_timeout)
        log.info("agent stopped")

    def _make_audit(self) -> Audit:
        loop, settings = asyncio.get_running_loop(), self._config.audit

        def lost() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._metrics.audit_lost)

        bounds = AuditSettings(settings.file, settings.size, settings.keep, settings.queue, settings.refusals)
        return Audit(bounds, lost)

    def reload(self, config: Config) -> None:
        """What can be read anew while we run. AgentError: it is wrong, and nothing has changed."""
        if self._doors is not None:
            self._doors.identities.rescope(config.api.certificate_scopes)

    def reopen(self) -> None:
        """Files that others may have put in the place of those that are open: the audit's, certificates."""
        self._audit.reopen()
        if self._doors is not None:
            self._later(asyncio.to_thread(self._doors.reload))

    def _make_service(self) -> None:
        config = self._config
        facts = HostFacts(
            host=config.agent.host,
            qemu=self._qemu,
            state_dir=self._state_dir,
            runtime_dir=self._runtime_dir,
            started=now(),
            min_free=config.store.min_free,
            settings=plain(config),
        )
        self._service = AgentService(
            engine=self._engine,
            exports=self._exports,
            bitmaps=self._bitmaps,
            chains=self._chains,
            ledger=self._ledger,
            store=self._store,
            subject=self._subject,
            facts=facts,
            changes=self._changes,
            drain=self._drain,
            watch=self._watch,
            live=self._live,
            holding=self._guests.holding,
            dbus=self._projection.check,
            data=self._data.facts if self._data is not None else None,
        )
        self.news.trouble = self._service.troubles.append
        self._use_cases = audited(self._service, self._audit.tell)  # what every front-end is given
        names = {item.name for item in fields(HttpSettings)} - {"host", "stop_timeout"}
        settings = HttpSettings(
            host=config.agent.host,
            stop_timeout=config.agent.stop_timeout,
            **{name: getattr(config.api, name) for name in names},
        )
        app = build_app(
            self._use_cases,
            self._bus,
            settings=settings,
            metrics=self._metrics.render,
            told=self._metrics.refused,
            audit=self._audit.tell,
        )
        group = config.api.socket_group if self._group is not None else None
        policy = PeerPolicy.for_group(group, never=self._strangers())
        told = self._metrics.refused
        self._server = Server(app, self._bus, policy=policy, settings=settings, doors=self._doors, told=told)

    def _strangers(self) -> set[int]:
        return host.strangers(self._config)

    def _retention(self) -> Retention:
        jobs, exports, store = self._config.jobs, self._config.exports, self._config.store
        return Retention(
            days=jobs.retention_days,
            jobs=jobs.retention_count,
            exports=exports.retention_count,
            events=store.events_kept,
            rows=store.prune_rows,
            interval=store.prune_interval,
        )

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.append(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        if task in self._background:
            self._background.remove(task)
        if not task.cancelled() and (error := task.exception()):
            log.warning("a background task failed", extra={"fields": {"error": str(error)}})


def _openers(file: FileId) -> list[str]:
    """The processes that have the file open, but for this one. Blocking."""
    return [str(process) for process in holders.find_open([file], skip_pids=[os.getpid()])[file]]
