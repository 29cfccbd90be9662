"""The use-cases, for every front end: validate, authorise, resolve, operate, and answer with JSON-ready values.

Front ends translate and do nothing else; whatever this refuses has changed nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from events.model import Record
from hostagent.access.ledger import Ledger
from hostagent.access.subject import Subject
from hostagent.api import requests, views
from hostagent.api.changes import Changes
from hostagent.api.grants import Grants
from hostagent.api.peer import Peer
from hostagent.api.status import HostFacts, Status
from hostagent.api.trouble import Trouble
from hostagent.drain import Drain
from hostagent.guests.holding import Holding, holder_of
from hostagent.images.bitmap_changes import Add, Change, Merge, Remove
from hostagent.live import Live
from hostagent.nbd import serving
from hostagent.nbd.chains import Chains
from hostagent.nbd.exports import Exports
from hostagent.nbd.offline_bitmaps import Bitmaps, Found
from hostagent.nbd.watch import Watch
from hostagent.records import ExportRecord
from hostagent.store import Store
from jobs.engine import Engine
from jobs.errors import JobError
from jobs.model import Completion, Holder, Job, JobSpec, Plan, State

Json = dict[str, Any]


class AgentService:
    def __init__(
        self,
        *,
        engine: Engine,
        exports: Exports,
        bitmaps: Bitmaps,
        chains: Chains,
        ledger: Ledger,
        store: Store,
        subject: Subject,
        facts: HostFacts,
        changes: Changes,
        drain: Drain,
        watch: Watch,
        live: Live,
        holding: Holding,
        dbus: Callable[[], Json],
        data: Callable[[], Json] | None = None,
    ) -> None:
        self._engine = engine
        self._exports = exports
        self._bitmaps = bitmaps
        self._chains = chains
        self._ledger = ledger
        self._store = store
        self._changes = changes
        self._drain = drain
        self._live = live
        self.troubles: deque[Trouble] = deque(maxlen=20)
        self._grants = Grants(store=store, ledger=ledger, engine=engine, exports=exports, bitmaps=bitmaps)
        self._status = Status(
            facts,
            subject,
            store=store,
            engine=engine,
            exports=exports,
            chains=chains,
            drain=drain,
            watch=watch,
            live=live,
            holding=holding,
            data=data,
            dbus=dbus,
            troubles=self.troubles,
        )

    # Jobs

    async def start_job(self, spec: Json, *, peer: Peer) -> tuple[Json, bool]:
        self._status.require_room()
        job_id = requests.id_of(spec)
        asked = requests.job_spec(spec, self._anywhere(peer))
        known = job_id and await self._store.get(job_id)
        with self._admitted(known), requests.about("target"):
            if not (known or requests.is_guests(asked.target)):
                await self._live.refuse_guests(asked.target, whole_chain=False)
            job, created = await self._engine.create(asked, job_id)
        return self._job(job), created

    async def plan_job(self, spec: Json, *, peer: Peer) -> Json:
        asked = requests.job_spec(spec, self._anywhere(peer))
        with requests.about("target"):
            if not requests.is_guests(asked.target):
                await self._live.refuse_guests(asked.target, whole_chain=False)
            plan = await self._engine.plan(asked)
        return await self._plan(asked, plan)

    async def _plan(self, asked: JobSpec, plan: Plan) -> Json:
        if busy := self._engine.on_file(plan.before.top.file):
            what = f"job {busy.id} works on {plan.before.top.path!r}"
            raise JobError("busy", what, field="target", value=asked.target, remedy="wait for it, or abort it")
        stays = {layer.file for layer in plan.after.layers}
        leaving = {Holder("image", plan.before.top.path)}
        if chain := self._chains.find(plan.before.top.file):
            leaving |= chain.users
        if plan.drive is not None:
            leaving.add(holder_of(plan.drive))
        kept = {
            layer.path: await self._ledger.keepers(layer.file, leaving, layer.path)
            for layer in plan.before.layers
            if layer.file not in stays
        }
        return views.plan(plan, kept, asked.completion)

    async def list_jobs(
        self,
        *,
        state: str | None,
        target: str | None,
        labels: Mapping[str, str],
        origin: str | None,
        group: str | None,
        limit: int,
        after: str | None,
    ) -> Json:
        found = await self._store.jobs(
            state=state, path=target, origin=origin, group=group, labels=labels, limit=limit, after=after
        )
        fresh = {job.id: job for job in self._engine.active()}
        items = [self._job(fresh.get(job.id, job)) for job in found]
        return {"items": items, "next": items[-1]["id"] if len(items) == limit else None}

    async def get_job(self, id: str) -> Json:
        return self._job(await self._engine.get(id))

    async def wait_job(self, id: str, *, revision: int | None, timeout: float) -> Json:
        return await self._changes.wait(lambda: self.get_job(id), f"job {id}", revision, timeout)

    async def patch_job(self, id: str, bandwidth: int) -> Json:
        return self._job(await self._engine.set_speed(id, bandwidth))

    async def next_job(self, id: str, cursor: int | None) -> Json:
        job = await self._engine.get(id)
        if job.state is State.WAITING and cursor in (None, job.cursor.cur):
            self._drain.refuse("another increment")
        return self._job(await self._engine.next(id, cursor))

    async def abort_job(self, id: str, force: bool) -> Json:
        return self._job(await self._engine.abort(id, force=force))

    async def pause_job(self, id: str) -> Json:
        return self._job(await self._engine.pause(id))

    async def resume_job(self, id: str) -> Json:
        if self._drain.record.pause:
            self._drain.refuse("to resume")
        return self._job(await self._engine.resume(id))

    async def complete_job(self, id: str, completion: str | None) -> Json:
        return self._job(await self._engine.complete(id, Completion(completion) if completion else None))

    async def delete_job(self, id: str) -> None:
        await self._engine.delete(id)

    # Groups

    async def start_group(self, spec: Json, *, peer: Peer) -> tuple[Json, bool]:
        self._status.require_room()
        group_id = requests.id_of(spec)
        with self._admitted(group_id and await self._store.jobs(group=group_id, limit=1)), requests.about("target"):
            jobs, created = await self._engine.create_group(requests.group_specs(spec, self._anywhere(peer)), group_id)
        return self._group(jobs), created

    async def plan_group(self, spec: Json, *, peer: Peer) -> Json:
        asked = requests.group_specs(spec, self._anywhere(peer))
        with requests.about("target"):
            plans = await self._engine.plan_group(asked)
        return {"dry_run": True, "disks": [await self._plan(*one) for one in zip(asked, plans, strict=True)]}

    async def get_group(self, id: str) -> Json:
        found = await self._store.jobs(group=id)
        if not found:
            raise JobError("not_found", f"no group {id}", field="id", value=id, remedy="see `hostagent job list`")
        jobs = {job.id: await self._engine.get(job.id) for job in found}
        assert found[0].group is not None
        return self._group([jobs[one] for one in found[0].group.jobs if one in jobs])

    def _group(self, jobs: Sequence[Job]) -> Json:
        assert jobs[0].group is not None
        return {"id": jobs[0].group.id, "jobs": [self._job(job) for job in jobs]}

    def _job(self, job: Job) -> Json:
        return views.job(job, self._engine.view(job.id))

    # Exports

    async def start_export(self, spec: Json, *, peer: Peer) -> tuple[Json, bool]:
        self._status.require_room()
        asked = requests.export_spec(spec)
        if asked.tcp is not None and not self._anywhere(peer):
            message = "exports over TCP are for root, the agent's own user and the scope admin"
            raise JobError("denied", message, field="tcp", remedy="leave it out")
        export_id = requests.id_of(spec)
        known = export_id and await self._store.export(export_id)
        with self._admitted(known), requests.about("image"):
            if asked.writable and not known:
                await self._live.refuse_guests(asked.image, whole_chain=True)
            record, created = await self._exports.start(asked, export_id, anywhere=self._anywhere(peer))
        return await self._export(record), created

    async def list_exports(
        self, *, state: str | None, target: str | None, labels: Mapping[str, str], limit: int, after: str | None
    ) -> Json:
        found = await self._exports.page(state=state, image=target, labels=labels, limit=limit + 1, after=after)
        clients = await asyncio.to_thread(serving.clients_of, found[:limit])
        items = [self._export_view(one, [c._asdict() for c in clients[one.id]]) for one in found[:limit]]
        return {"items": items, "next": items[-1]["id"] if len(found) > limit else None}

    async def get_export(self, id: str) -> Json:
        return await self._export(await self._exports.get(id))

    async def wait_export(self, id: str, *, revision: int | None, timeout: float) -> Json:
        return await self._changes.wait(lambda: self.get_export(id), f"export {id}", revision, timeout)

    async def stop_export(self, id: str, force: bool) -> Json:
        return await self._export(await self._exports.stop(id, force=force))

    async def _export(self, record: ExportRecord) -> Json:
        clients = await asyncio.to_thread(serving.clients, record)
        return self._export_view(record, [client._asdict() for client in clients])

    def _export_view(self, record: ExportRecord, clients: list[Json]) -> Json:
        chain = self._chains.of_daemon(record.daemon) if record.active else None
        return views.export(record, clients, answers=chain is None or chain.answers)

    # Images and grants

    async def inspect_image(self, path: str, format: str | None, *, peer: Peer) -> Json:
        with requests.about("path"):
            image, anywhere = requests.offline(path, "path"), self._anywhere(peer)
            opened = await self._chains.open(image, format=format, anywhere=anywhere)
        with opened:
            return views.image(opened.chain, opened.headers)

    async def list_bitmaps(self, path: str, *, peer: Peer) -> Json:
        with requests.about("path"):
            return _bitmaps(await self._bitmaps.list(requests.offline(path, "path"), anywhere=self._anywhere(peer)))

    async def add_bitmap(self, path: str, spec: Json, *, peer: Peer) -> Json:
        change = Add(spec["name"], spec.get("granularity"), recording=not spec.get("disabled"))
        return await self._change_bitmaps(path, change, peer=peer)

    async def remove_bitmap(self, path: str, name: str, *, peer: Peer) -> Json:
        return await self._change_bitmaps(path, Remove(name), peer=peer)

    async def merge_bitmap(self, path: str, spec: Json, *, peer: Peer) -> Json:
        source = requests.offline(spec["source"], "source") if spec.get("source") else None
        return await self._change_bitmaps(path, Merge(spec["name"], spec["source_name"]), source=source, peer=peer)

    async def _change_bitmaps(self, path: str, change: Change, *, source: str | None = None, peer: Peer) -> Json:
        self._status.require_room()
        with self._drain.work(), requests.about("path"):
            found = await self._bitmaps.change(
                requests.offline(path, "path"), change, source=source, anywhere=self._anywhere(peer)
            )
        return _bitmaps(found)

    async def list_grants(self, *, path: str | None, holder: str | None, limit: int, after: str | None) -> Json:
        return await self._grants.page(path=path, holder=holder, limit=limit, after=after)

    async def get_grant(self, id: str) -> Json:
        return await self._grants.get(id)

    async def revoke_grant(self, id: str) -> Json:
        return await self._grants.revoke(id)

    async def undo_grant(self, id: str, *, peer: Peer) -> Json:
        self._only_operators(peer)
        return await self._grants.undo(id)

    # The host

    async def host(self) -> Json:
        return await self._status.host()

    async def drain(self, pause: bool, *, peer: Peer) -> Json:
        self._only_operators(peer)
        await self._drain.begin(pause=pause)
        return await self.drain_state()

    async def lift_drain(self, *, peer: Peer) -> Json:
        self._only_operators(peer)
        await self._drain.lift()
        return await self.drain_state()

    async def drain_state(self) -> Json:
        return await self._status.drain()

    async def ready(self) -> Json:
        return await self._status.ready()

    async def events_since(self, seq: int, limit: int) -> list[Record] | None:
        return await self._store.events_since(seq, limit)

    def last_seq(self) -> int:
        return self._store.last_seq()

    # Rules

    def _anywhere(self, peer: Peer) -> bool:
        """Owners of the host may name any image; others only images in a pool."""
        return peer.owner

    def _admitted(self, known: object) -> contextlib.AbstractContextManager[None]:
        """Around what starts something; a request that was obeyed before (`known`) starts nothing, and is answered."""
        return contextlib.nullcontext() if known else self._drain.work()

    def _only_operators(self, peer: Peer) -> None:
        if not self._anywhere(peer):
            message = "draining is for root, the agent's own user and the scope admin"
            raise JobError("denied", message, remedy="ask as root")


def _bitmaps(found: Found) -> Json:
    return views.bitmaps(found.path, found.bitmaps.items, lost=found.bitmaps.lost, holders=found.holders)
