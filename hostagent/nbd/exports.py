"""Exports: an image over NBD for as long as somebody needs it.

An export is `running` when a handshake with it succeeded, not when a socket exists. Exports of one chain share its
storage daemon and listener; a writable one is alone on its chain (claims). Stopping is graceful: it is refused while
clients are connected, and names them; `force` cuts them off. What was written is durable when a writable export is
stopped. An export whose daemon ended is `lost`, told so, and holds nothing any more.

Persist, then act: that an export is `stopping` is stored before it is taken away, so that where the store cannot be
written it stays served, and whoever comes after a kill finishes the stop. An end that cannot be stored is shown, holds
what the export held, and is tried again until it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from events.model import Event, ExportEvent, ExportEventKind
from hostagent.drivers.qmp import Refused
from hostagent.errors import AgentError
from hostagent.locks import Locks
from hostagent.nbd.bitmaps import add_export, find_served
from hostagent.nbd.chains import Chains
from hostagent.nbd.claims import Claims
from hostagent.nbd.export_spec import ExportSpec, apart
from hostagent.nbd.network import Remote
from hostagent.nbd.offline import Grants
from hostagent.nbd.prepared import Apart, PreparedChain
from hostagent.nbd.serving import clients, connections, reached
from hostagent.nbd.tls import TlsSettings, listener
from hostagent.nbd.uri import is_uri
from hostagent.nbdclient import connection, conversations
from hostagent.records import Ending, ExportRecord
from jobs.errors import JobError
from jobs.model import FileId, Holder, Need
from jobs.ports import Clock

log = logging.getLogger(__name__)

SPOILT = "an earlier flush failed"


@dataclass(frozen=True, slots=True)
class Settings:
    limit: int
    nbd_timeout: float
    merge_timeout: float
    idle_check: float
    tls: TlsSettings


class ExportStore(Protocol):
    async def put_export(
        self, export: ExportRecord, events: Sequence[Event] = (), *, end: Holder | None = None
    ) -> None: ...

    async def forget_export(self, export: ExportRecord) -> None: ...

    async def exports(
        self, *, active: bool | None = None, state: str | None = None, image: str | None = None,
        labels: Mapping[str, str] | None = None, after: str | None = None, limit: int = -1,
    ) -> list[ExportRecord]: ...  # fmt: skip

    async def export(self, export_id: str) -> ExportRecord | None: ...


class Converging(Grants, Protocol):
    async def converge(self, files: Sequence[FileId], *, trigger: str) -> Any: ...


class Exports:
    def __init__(
        self,
        chains: Chains,
        store: ExportStore,
        access: Converging,
        claims: Claims,
        *,
        settings: Settings,
        clock: Clock,
        started: Callable[[float], None],
        changed: Callable[[ExportRecord], None],
    ) -> None:
        self._chains = chains
        self._store = store
        self._access = access
        self._claims = claims
        self._settings = settings
        self._clock = clock
        self._started = started
        self._changed = changed
        self._active: dict[str, ExportRecord] = {}
        self._timers: dict[str, asyncio.Task[None]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._requests = Locks()
        self._background: set[asyncio.Task[None]] = set()

    # Reading

    def active(self) -> list[ExportRecord]:
        return list(self._active.values())

    async def get(self, export_id: str) -> ExportRecord:
        found = self._active.get(export_id) or await self._store.export(export_id)
        if found is None:
            remedy = "see `hostagent export list`"
            raise JobError("not_found", f"no export {export_id}", field="id", value=export_id, remedy=remedy)
        return found

    async def page(
        self, *, state: str | None, image: str | None, labels: Mapping[str, str], limit: int, after: str | None
    ) -> list[ExportRecord]:
        """Present and past, newest first; `after` is the id of the last one of the page before."""
        found = await self._store.exports(state=state, image=image, labels=labels, limit=limit, after=after)
        return [self._active.get(record.id, record) for record in found]

    # Start

    async def start(self, spec: ExportSpec, export_id: str | None, *, anywhere: bool) -> tuple[ExportRecord, bool]:
        """A running export; or the one that the same id and request made before, and False."""
        if not connection.available():
            raise JobError("unavailable", "the libnbd binding is not installed", remedy="apt install python3-libnbd")
        export_id = export_id or str(uuid.uuid4())
        async with self._requests.alone(export_id):
            if known := self._active.get(export_id) or await self._store.export(export_id):
                return spec.matches(known), False
            if len(self._active) >= self._settings.limit:
                remedy = "stop some, or raise exports.limit"
                raise JobError("limit", f"{len(self._active)} exports run already", remedy=remedy)
            began = self._clock.monotonic()
            if is_uri(spec.image):
                record = await self._start_network(spec, export_id)
            else:
                record = await self._start_local(spec, export_id, anywhere=anywhere)
            self._started(self._clock.monotonic() - began)
            return record, True

    async def _start_local(self, spec: ExportSpec, export_id: str, *, anywhere: bool) -> ExportRecord:
        listening = await asyncio.to_thread(listener, spec.tcp, spec.tls, self._settings.tls)
        opened = await self._chains.open(spec.image, format=spec.format, anywhere=anywhere)
        try:
            record = spec.record(export_id, opened.chain.top, self._clock.now())
        except JobError:
            opened.close()
            raise
        files = [layer.file for layer in opened.chain.layers]
        try:
            async with self._chains.joined(opened, shallow=spec.shallow, apart=apart(record, listening)) as chain:
                return await self._serve(record, chain)
        except BaseException:
            await self._access.converge(files, trigger="export")  # now that the chain is closed again
            raise

    async def _start_network(self, spec: ExportSpec, export_id: str) -> ExportRecord:
        spec.refuse_local_options()
        layer = await self._chains.network_layer(spec.image)
        record = spec.network_record(export_id, layer, self._clock.now())
        remote = Remote(layer.path, record.writable, self._chains.settings.network.open_timeout)
        own = Apart(record.id, record.max_clients, record.part, remote=remote)
        async with self._chains.connected(layer, own) as chain:
            return await self._serve(record, chain)

    async def _serve(self, record: ExportRecord, chain: PreparedChain) -> ExportRecord:
        """Persist, lease, grant, open, export, shake hands; undone in reverse when a step fails. Holds the lock."""
        await self._store.put_export(record)
        self._active[record.id] = record
        try:
            if record.writable:
                await self._claims.claim(record.holder, chain)
            else:
                await chain.lease()
            served = await find_served(record, chain, self._settings.nbd_timeout)
            await self._access.acquire(record.holder, _needs(record, chain))
            daemon = await chain.serve()
            chain.users.add(record.holder)
            if record.writable:
                chain.writer = record.holder
                await chain.open_for_writing((chain.file,))
            patience = conversations.Patience(self._settings.nbd_timeout, self._settings.merge_timeout)
            await add_export(record, chain, served, patience)
            self._chains.publish_socket(chain)
            record = await reached(record, chain, self._settings.tls, self._settings.nbd_timeout)
            record = replace(record, state="running", revision=record.revision + 1)
            if chain.died:
                raise daemon.death()
            await self._store.put_export(record, [_event(record, ExportEventKind.STARTED)])
        except BaseException as error:
            await self._undo(record, chain)
            if isinstance(error, AgentError):
                raise JobError(error.code, error.message, remedy=error.remedy) from error
            raise
        if record.id not in self._active:
            return await self.get(record.id)  # it was lost meanwhile
        self._keep(record)
        log.info("export running", extra={"fields": {"export": record.id, "path": record.path, "uri": record.uri}})
        return record

    async def _undo(self, record: ExportRecord, chain: PreparedChain) -> None:
        if chain.daemon is not None and chain.daemon.alive:
            with contextlib.suppress(JobError):
                await chain.ask(chain.daemon.remove_export(record.id, hard=True))
        chain.leave(record.holder)
        self._active.pop(record.id, None)
        await self._store.forget_export(record)

    # Stop

    async def stop(self, export_id: str, *, force: bool, reason: str = "stopped by request") -> ExportRecord:
        async with self._requests.alone(export_id):
            record = await self.get(export_id)
            if not record.active:
                return record
            chain = self._chains.of_daemon(record.daemon)
            if chain is None or chain.daemon is None:
                return await self._gone(record, "its storage daemon ended")
            files = [layer.file for layer in chain.layers]
            async with chain.lock:
                if record.writable and not force:
                    await self._flush(record, chain)
                record = await self._stopping(record, Ending(reason, force))
                cut = False
                try:
                    removed = await chain.ask(chain.daemon.remove_export(record.id, hard=force))
                    if not removed:
                        raise await self._in_use(record)
                except JobError as error:
                    cut = force and record.file.network and error.code == "unresponsive"
                    if not cut:
                        await self._goes_on(record)
                        raise
                try:
                    if cut:
                        return await self._cut(record, chain, reason)
                    record = await self._ended(record, chain, reason, force=force)
                except JobError as error:
                    if not cut or error.code == "store_full":  # else its daemon cannot be killed, and may serve it
                        self._not_ended(record.id, error)
                    raise
                try:
                    await chain.release(record.holder)
                except JobError as error:
                    log.warning("the storage daemon lives on", extra={"fields": {"error": error.message}})
            await self._access.converge(files, trigger="export")
            return record

    async def _stopping(self, record: ExportRecord, ending: Ending) -> ExportRecord:
        """Store what is about to be done, unless that was done before."""
        if record.state == "stopping":
            return record
        record = replace(record, state="stopping", ending=ending, revision=record.revision + 1)
        await self._store.put_export(record)
        self._active[record.id] = record
        return record

    async def _goes_on(self, record: ExportRecord) -> None:
        """It was not taken away. Where that cannot be stored, who comes after a kill asks for the stop once more."""
        if record.ending is not None and record.ending.trouble:
            return  # that was done before
        record = replace(record, state="running", ending=None, revision=record.revision + 1)
        self._active[record.id] = record
        self._changed(record)
        try:
            await self._store.put_export(record)
        except JobError as error:
            fields = {"export": record.id, "error": error.message}
            log.error("that an export goes on cannot be stored", extra={"fields": fields})

    def _not_ended(self, export_id: str, error: JobError) -> None:
        """It is not served any more, and that could not be recorded, which is shown. For lack of space it is tried
        again; what else stands in the way is for a stop with `force` to give up."""
        record = self._active.get(export_id)
        if record is None or record.ending is None:
            return
        ending = record.ending._replace(trouble=f"it is not served any more, but {error.message}")
        self._active[export_id] = record = replace(record, ending=ending, revision=record.revision + 1)
        self._changed(record)
        if error.code == "store_full":
            self._finish_later(export_id, ending)

    def _finish_later(self, export_id: str, ending: Ending) -> None:
        async def stop() -> None:
            await self.stop(export_id, force=ending.force, reason=ending.reason)

        self._until_recorded(export_id, stop)

    def _until_recorded(self, export_id: str, end: Callable[[], Awaitable[None]]) -> None:
        """End it in the background, again and again while the store is full."""
        if export_id not in self._ending:
            self._ending[export_id] = asyncio.create_task(
                self._record_end(export_id, end), name=f"export {export_id} ends"
            )

    async def _record_end(self, export_id: str, end: Callable[[], Awaitable[None]]) -> None:
        try:
            while export_id in self._active:
                try:
                    await end()
                    return
                except JobError as error:
                    fields = {"export": export_id, "error": error.message}
                    log.error("an export cannot be ended yet", extra={"fields": fields})
                    if error.code != "store_full":
                        return
                await asyncio.sleep(self._settings.idle_check)
        finally:
            self._ending.pop(export_id, None)

    async def _cut(self, record: ExportRecord, chain: PreparedChain, reason: str) -> ExportRecord:
        """End an export by force, with its own storage daemon, which waits for a server that may never answer."""
        await chain.kill()
        if not record.writable:
            return await self._end(record, "stopped", reason, ExportEventKind.STOPPED)
        reason = f"{reason}; its server does not answer: what clients had not flushed is lost"
        return await self._end(record, "lost", reason, ExportEventKind.LOST)

    async def _ended(self, record: ExportRecord, chain: PreparedChain, reason: str, *, force: bool) -> ExportRecord:
        """Record the end of an export that is not served any more; of a writable one when all is durable.

        With `force` it ends also when that cannot be: `lost`, which says so.
        """
        try:
            if record.writable:
                await chain.close_for_writing()
                if record.file.network and record.reason is not None:
                    raise JobError("io_error", SPOILT)
        except JobError as error:
            if not force:
                await self._spoil(record, error)
                raise
            reason = f"{reason}; what clients had not flushed is lost: {error.message}"
            return await self._end(record, "lost", reason, ExportEventKind.LOST)
        return await self._end(record, "stopped", reason, ExportEventKind.STOPPED)

    async def _flush(self, record: ExportRecord, chain: PreparedChain) -> None:
        """What cannot be written is told while the export still stands.

        Trying again is no use: after one failed fdatasync nobody knows what is on the disk, and QEMU says so for ever.
        """
        if record.file.network and record.reason is not None:
            raise _unwritten(record, SPOILT)
        try:
            await chain.flush(chain.file)
        except JobError as error:
            if not _is_failure(error):
                raise
            await self._spoil(record, error)
            raise _unwritten(record, error.message) from error

    async def _spoil(self, record: ExportRecord, error: JobError) -> None:
        """Remember that a network image was not flushed: its server may say later that it was."""
        if record.file.network and record.reason is None and _is_failure(error):
            reason = f"what clients wrote is perhaps lost: {error.message}"
            spoilt = replace(record, reason=reason, revision=record.revision + 1)
            await self._store.put_export(spoilt)
            self._active[record.id] = spoilt
            self._changed(spoilt)

    async def _in_use(self, record: ExportRecord) -> JobError:
        found = await asyncio.to_thread(clients, record)
        names = ", ".join(str(client) for client in found) or "a client that cannot be seen from here"
        return JobError(
            "busy",
            f"export {record.id} is in use by {names}",
            field="id",
            value=record.id,
            remedy="let them disconnect, or use --force to cut them off",
            clients=[client._asdict() for client in found],
        )

    async def _gone(self, record: ExportRecord, why: str) -> ExportRecord:
        """Record the end of an export that has no storage daemon. One that was being stopped, and was only read, has
        lost nothing."""
        if record.ending is not None and not record.writable:
            return await self._end(record, "stopped", record.ending.reason, ExportEventKind.STOPPED)
        return await self._end(record, "lost", why, ExportEventKind.LOST)

    async def _end(self, record: ExportRecord, state: str, reason: str, kind: ExportEventKind) -> ExportRecord:
        """Record the end; its rows of the ledger go in the same transaction."""
        ended = replace(
            record,
            state=state,
            reason=reason,
            stopped=self._clock.now(),
            pid=None,
            ending=None,
            revision=record.revision + 1,
        )
        await self._store.put_export(ended, [_event(ended, kind)], end=record.holder)
        self._active.pop(record.id, None)
        if (timer := self._timers.pop(record.id, None)) and timer is not asyncio.current_task():
            timer.cancel()
        self._changed(ended)
        log.info("export %s", state, extra={"fields": {"export": record.id, "path": record.path, "reason": reason}})
        return ended

    # What happens to them

    def daemon_gone(self, chain: PreparedChain) -> None:
        """The chain's storage daemon ended: its exports are lost."""
        task = asyncio.create_task(self._lose(chain), name=f"exports lost with {chain.path}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _lose(self, chain: PreparedChain) -> None:
        for holder in [user for user in chain.users if user.kind == "export"]:
            while record := self._active.get(holder.id):
                try:
                    await self._gone(record, "its storage daemon ended")
                except JobError as error:
                    log.error("a lost export cannot be stored", extra={"fields": {"error": error.message}})
                    await asyncio.sleep(self._settings.idle_check)
        await self._access.converge([layer.file for layer in chain.layers], trigger="export")

    async def moved(self, chain: PreparedChain) -> None:
        """A job put another image on top of the chain, and the exports went over to it."""
        users = [user for user in chain.users if user.kind == "export"]
        moved = [self._on(chain, self._active[user.id]) for user in users if user.id in self._active]
        for record in moved:  # all in memory first: a request that comes in between finds its export
            self._active[record.id] = record
        for record in moved:
            if chain.died:  # they are lost, and what is stored of that comes before or after this, but not under it
                return
            await self._store.put_export(record)
            self._changed(record)

    def _on(self, chain: PreparedChain, record: ExportRecord) -> ExportRecord:
        top = chain.layers[0]
        return replace(record, path=top.path, file=top.file, format=top.format, revision=record.revision + 1)

    async def recover(self) -> None:
        """After a restart: exports whose daemon was adopted go on, a stop that was begun is finished, the others are
        lost."""
        for record in await self._store.exports(active=True):
            chain = self._chains.of_daemon(record.daemon)
            if record.ending is None:
                chain = chain or self._chains.find(record.file, shallow=record.shallow)
            served = chain is not None and record.state == "running" and await self._still_served(chain, record)
            if chain is not None and (served or record.ending is not None):
                chain.users.add(record.holder)
                if record.writable:
                    chain.writer = record.holder
                self._keep(record if record.file == chain.file else self._on(chain, record))
                if record.file.network:
                    await self._connected_still(record, chain)
                if record.ending is not None:
                    self._finish_later(record.id, record.ending)
                continue
            if chain is not None and chain.daemon is not None and not record.file.network:  # whose own daemon ends now
                with contextlib.suppress(JobError):
                    await chain.ask(chain.daemon.remove_export(record.id, hard=True))
            await self._lost_meanwhile(record)

    async def _lost_meanwhile(self, record: ExportRecord) -> None:
        """A store that is full keeps no agent from its start: that is recorded when there is space."""
        why = "it was not served any more when the agent came back"

        async def end() -> None:
            await self._gone(record, why)
            await self._access.converge([record.file], trigger="export")  # the others' turn comes with the timer

        try:
            await self._gone(record, why)
        except JobError as error:
            if error.code != "store_full":
                raise
            told = replace(record, state="lost", reason=f"{why}; {error.message}", pid=None)
            self._active[record.id] = told
            self._until_recorded(record.id, end)

    async def _connected_still(self, record: ExportRecord, chain: PreparedChain) -> None:
        """What is known of a network image's chain, and its lease; nobody can have asked for that yet."""
        chain.connection = record.connection
        try:
            await chain.lease(exclusive=(chain.file,) if record.writable else ())
        except JobError as error:
            log.warning("a lease was lost", extra={"fields": {"path": chain.path, "error": error.message}})

    async def _still_served(self, chain: PreparedChain, record: ExportRecord) -> bool:
        assert chain.daemon is not None
        if not chain.answers:
            return chain.daemon.alive  # it is not ended for that
        try:
            return record.id in await chain.ask(chain.daemon.exports())
        except JobError:
            return chain.daemon.alive

    async def close(self) -> None:
        """Let go of all exports; they stay served. What could not be recorded yet is for the next start to find."""
        waiting = [*self._timers.values(), *self._ending.values(), *self._background]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    # Time

    def _keep(self, record: ExportRecord) -> None:
        self._active[record.id] = record
        self._changed(record)
        if record.expires is not None or record.idle_timeout is not None:
            self._timers[record.id] = asyncio.create_task(self._expire(record), name=f"export {record.id} expires")

    async def _expire(self, record: ExportRecord) -> None:
        """Waits for the time to live; looks for clients only when there is an idle timeout; stops it in the end."""
        idle_since = self._clock.monotonic()
        while True:
            left = (record.expires - self._clock.now()).total_seconds() if record.expires else None
            idle = record.idle_timeout
            try:
                if left is not None and left <= 0:
                    await self.stop(record.id, force=True, reason="its time to live is over")
                    return
                if idle is not None and await asyncio.to_thread(connections, record) > 0:
                    idle_since = self._clock.monotonic()
                elif idle is not None and self._clock.monotonic() - idle_since >= idle:
                    await self.stop(record.id, force=True, reason=f"no client for {idle:g} s")
                    return
            except JobError as error:
                fields = {"export": record.id, "error": error.message}
                log.warning("an export cannot be stopped yet", extra={"fields": fields})
                left = None
            pause = self._settings.idle_check if idle is None else max(self._settings.idle_check, idle / 10)
            await asyncio.sleep(pause if left is None else left if idle is None else min(pause, left))


def _needs(record: ExportRecord, chain: PreparedChain) -> list[Need]:
    reads = [Need(layer, "r", f"export {record.id} serves it") for layer in chain.layers]
    return [reads[0]._replace(mode="rw"), *reads[1:]] if record.writable else reads


def _is_failure(error: JobError) -> bool:
    """Whether it says that something was not flushed, and not only that it took too long."""
    return isinstance(error, Refused) or error.code == "io_error"


def _unwritten(record: ExportRecord, why: str) -> JobError:
    return JobError(
        "io_error",
        f"what clients wrote to {record.path!r} cannot be made durable: {why}",
        field="id",
        value=record.id,
        remedy="the export goes on: copy out what is needed; --force gives up what was not flushed",
    )


def _event(record: ExportRecord, kind: ExportEventKind) -> ExportEvent:
    return ExportEvent(
        kind, export=record.id, path=record.path, uri=record.uri, reason=record.reason, labels=record.labels
    )
