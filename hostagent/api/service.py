"""The use-cases, for every front end: validate, authorise, resolve, operate, and answer with JSON-ready values.

Front ends translate and do nothing else; whatever this refuses has changed nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from events.model import Record, now
from hostagent import __version__
from hostagent.access.ledger import Ledger
from hostagent.access.subject import Subject
from hostagent.api import views
from hostagent.api.changes import Changes
from hostagent.api.peer import Peer
from hostagent.drain import Drain
from hostagent.images.bitmap_changes import Add, Change, Merge, Remove
from hostagent.live import Live
from hostagent.nbd import serving
from hostagent.nbd.chains import Chains
from hostagent.nbd.export_spec import ExportSpec
from hostagent.nbd.exports import Exports
from hostagent.nbd.offline_bitmaps import Bitmaps, Found
from hostagent.nbd.prepared import PreparedChain
from hostagent.nbd.uri import is_uri
from hostagent.nbd.watch import Watch
from hostagent.records import AccessFile, ExportRecord
from hostagent.store import Store
from jobs.engine import Engine
from jobs.errors import JobError
from jobs.model import Completion, Holder, Job, JobSpec, Operation, Plan, State

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What does not change while the agent runs."""

    host: str
    qemu: str
    state_dir: Path
    runtime_dir: Path
    started: datetime
    min_free: int
    settings: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Trouble:
    """One of the last errors, for `status`."""

    time: datetime
    what: str
    message: str
    remedy: str | None


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
    ) -> None:
        self._engine = engine
        self._exports = exports
        self._bitmaps = bitmaps
        self._chains = chains
        self._ledger = ledger
        self._store = store
        self._subject = subject
        self._facts = facts
        self._changes = changes
        self._drain = drain
        self._watch = watch
        self._live = live
        self.troubles: deque[Trouble] = deque(maxlen=20)

    # Jobs

    async def start_job(self, spec: Json, *, peer: Peer) -> tuple[Json, bool]:
        self._has_room()
        job_id = _id(spec)
        asked = _job_spec(spec, self._anywhere(peer))
        known = job_id and await self._store.get(job_id)
        with self._admitted(known), _about("target"):
            if not (known or _is_guests(asked.target)):
                await self._live.refuse_guests(asked.target, whole_chain=False)
            job, created = await self._engine.create(asked, job_id)
        return self._job(job), created

    async def plan_job(self, spec: Json, *, peer: Peer) -> Json:
        asked = _job_spec(spec, self._anywhere(peer))
        with _about("target"):
            if not _is_guests(asked.target):
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
        self._has_room()
        group_id = _id(spec)
        with self._admitted(group_id and await self._store.jobs(group=group_id, limit=1)), _about("target"):
            jobs, created = await self._engine.create_group(_group_specs(spec, self._anywhere(peer)), group_id)
        return self._group(jobs), created

    async def plan_group(self, spec: Json, *, peer: Peer) -> Json:
        asked = _group_specs(spec, self._anywhere(peer))
        with _about("target"):
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
        self._has_room()
        asked = ExportSpec(
            image=spec["image"] if is_uri(spec["image"]) else _offline(spec["image"], "image"),
            format=spec.get("format"),
            shallow=bool(spec.get("shallow")),
            writable=bool(spec.get("writable")),
            offset=spec.get("offset"),
            size=spec.get("size"),
            max_clients=spec.get("max_clients"),
            tcp=spec.get("tcp"),
            tls=spec.get("tls"),
            bitmaps=tuple(dict.fromkeys(spec.get("bitmaps") or ())),
            ttl=spec.get("ttl"),
            idle_timeout=spec.get("idle_timeout"),
            labels=spec.get("labels") or {},
        )
        if asked.tcp is not None and not self._anywhere(peer):
            raise JobError("denied", "only root may export over TCP", field="tcp", remedy="leave it out")
        export_id = _id(spec)
        known = export_id and await self._store.export(export_id)
        with self._admitted(known), _about("image"):
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
        with _about("path"):
            image, anywhere = _offline(path, "path"), self._anywhere(peer)
            opened = await self._chains.open(image, format=format, anywhere=anywhere)
        with opened:
            return views.image(opened.chain, opened.headers)

    async def list_bitmaps(self, path: str, *, peer: Peer) -> Json:
        with _about("path"):
            return _bitmaps(await self._bitmaps.list(_offline(path, "path"), anywhere=self._anywhere(peer)))

    async def add_bitmap(self, path: str, spec: Json, *, peer: Peer) -> Json:
        change = Add(spec["name"], spec.get("granularity"), recording=not spec.get("disabled"))
        return await self._change_bitmaps(path, change, peer=peer)

    async def remove_bitmap(self, path: str, name: str, *, peer: Peer) -> Json:
        return await self._change_bitmaps(path, Remove(name), peer=peer)

    async def merge_bitmap(self, path: str, spec: Json, *, peer: Peer) -> Json:
        source = _offline(spec["source"], "source") if spec.get("source") else None
        return await self._change_bitmaps(path, Merge(spec["name"], spec["source_name"]), source=source, peer=peer)

    async def _change_bitmaps(self, path: str, change: Change, *, source: str | None = None, peer: Peer) -> Json:
        self._has_room()
        with self._drain.work(), _about("path"):
            found = await self._bitmaps.change(
                _offline(path, "path"), change, source=source, anywhere=self._anywhere(peer)
            )
        return _bitmaps(found)

    async def list_grants(self, *, path: str | None, holder: str | None, limit: int, after: str | None) -> Json:
        items = [
            item
            for item in await self._grants()
            if path in (None, item["path"])
            and holder in (None, item["holder"]["id"], f"{item['holder']['kind']}:{item['holder']['id']}")
        ]
        if after is not None:
            items = items[1 + next((n for n, item in enumerate(items) if item["id"] == after), len(items)) :]
        return {"items": items[:limit], "next": items[limit - 1]["id"] if len(items) > limit else None}

    async def get_grant(self, id: str) -> Json:
        for item in await self._grants():
            if item["id"] == id:
                return item
        raise JobError("not_found", f"no grant {id}", field="id", value=id, remedy="see `hostagent grant list`")

    async def revoke_grant(self, id: str) -> Json:
        """Take back what nobody who lives needs; what somebody needs is `busy`, naming them."""
        grant = await self.get_grant(id)
        entry = next((row for row in await self._store.access_rows() if row.id == id), None)
        if entry is None:
            files = [f for f in await self._store.access_files() if views.leftover(f)["id"] == id]
        else:
            rows = await self._store.access_rows([entry.file])
            needy = [row.title for row in rows if await self._needs(row.holder)]
            if needy:
                raise JobError(
                    "busy",
                    f"{grant['path']!r} is needed by {', '.join(needy)}",
                    field="id",
                    value=id,
                    remedy="end them first; their access ends with them",
                    holders=needy,
                )
            await self._store.delete_row(id)
            files = await self._store.access_files([entry.file])
        results = await self._ledger.converge([f.file for f in files], trigger="operator")
        for result in results.values():
            grant |= {"state": result.verdict.value, "detail": result.reason}
        return grant

    async def undo_grant(self, id: str, *, peer: Peer) -> Json:
        """Give a file back to the user from whom libvirt's ownership of it was taken."""
        self._only_operators(peer)
        await self.get_grant(id)
        entry = next((f for f in await self._store.access_files() if views.leftover(f)["id"] == id), None)
        if entry is None or entry.taken is None:
            raise JobError(
                "conflict",
                f"grant {id} is none whose owner was changed at its end",
                field="id",
                value=id,
                remedy="see `hostagent grant list`: those have the access `owner` and the state `revoked`",
            )
        result = await self._ledger.undo(entry.file)
        after = next(iter(await self._store.access_files([entry.file])), entry)
        return views.leftover(after) | {"state": result.verdict.value, "detail": result.reason}

    async def _needs(self, holder: Holder) -> bool:
        """Whether the holder lives. An image that merely stands on a file is not open; it gets access when it is."""
        if holder.kind == "job":
            return any(job.id == holder.id for job in self._engine.active())
        if holder.kind == "export":
            return any(export.id == holder.id for export in self._exports.active())
        if holder.kind == "tool":
            return self._bitmaps.runs(holder)
        return holder.kind == "domain"

    async def _grants(self) -> list[Json]:
        files = {entry.file: entry for entry in await self._store.access_files()}
        rows = await self._store.access_rows()
        held = {row.file for row in rows}
        left = [f for f in files.values() if f.file not in held and (f.verdict in ("kept", "pending") or f.taken)]
        return [*(views.grant(row, files.get(row.file)) for row in rows), *(views.leftover(f) for f in left)]

    # The host

    async def host(self) -> Json:
        pending = await self._owed()
        oldest = min(pending, key=lambda file: file.since, default=None)
        exports: dict[str, int] = {}
        for record in self._exports.active():
            exports[record.state] = exports.get(record.state, 0) + 1
        return {
            "host": self._facts.host,
            "version": __version__,
            "qemu": self._facts.qemu,
            "libvirt": self._live.facts(),
            "user": {"name": self._subject.name, "uid": self._subject.uid},
            "access": "own" if self._subject.own else "acl",
            "pid": os.getpid(),
            "started": views.time(self._facts.started),
            "state_dir": str(self._facts.state_dir),
            "runtime_dir": str(self._facts.runtime_dir),
            "storage_daemons": [self._daemon(chain) for chain in self._chains.all() if chain.daemon],
            "orphans": [
                {"id": o.id, "pid": o.pid, "image": None, "exports": list(o.exports), "holds": o.holds}
                for o in self._chains.orphans
            ],
            "revocations": {
                "pending": len(pending),
                "oldest_seconds": (now() - oldest.since).total_seconds() if oldest else None,
                "oldest": {"path": oldest.path, "reason": oldest.reason} if oldest else None,
            },
            "changed_files": [
                {"path": d.path, "what": d.what, "lost": d.lost, "remedy": d.remedy} for d in self._watch.found
            ],
            "last_errors": [
                {"time": views.time(t.time), "what": t.what, "message": t.message, "remedy": t.remedy}
                for t in reversed(self.troubles)
            ],
            "store": {
                "path": str(self._facts.state_dir),
                "events": self._store.last_seq(),
                "free": self._free(),
                "min_free": self._facts.min_free,
            },
            "jobs": await self._store.counts(),
            "exports": exports,
            "drain": {"draining": self._drain.on, "since": views.time(self._drain.record.since)},
            "settings": dict(self._facts.settings),
        }

    async def drain(self, pause: bool, *, peer: Peer) -> Json:
        self._only_operators(peer)
        await self._drain.begin(pause=pause)
        return await self.drain_state()

    async def lift_drain(self, *, peer: Peer) -> Json:
        self._only_operators(peer)
        await self._drain.lift()
        return await self.drain_state()

    async def drain_state(self) -> Json:
        clients = await asyncio.to_thread(serving.clients_of, self._exports.active())
        exports = [(one, [c._asdict() for c in clients.get(one.id, [])]) for one in self._exports.active()]
        return views.drain(
            self._drain.record,
            jobs=[*self._drain.holding(), *self._engine.settling()],
            exports=exports,
            revocations=len(await self._owed()),
            beginning=self._drain.beginning,
        )

    async def _owed(self) -> list[AccessFile]:
        return [f for f in await self._store.access_files() if f.verdict == "pending"]

    def _daemon(self, chain: PreparedChain) -> Json:
        assert chain.daemon is not None
        users = sorted(str(user) for user in chain.users)
        return {
            "id": chain.daemon.id,
            "pid": chain.daemon.pid,
            "state": "running" if chain.answers else "unresponsive",
            "since": views.time(chain.silent),
            "image": chain.path,
            "exports": sum(1 for user in chain.users if user.kind == "export"),
            "job": next((user.removeprefix("job:") for user in users if user.startswith("job:")), None),
            "writable": bool(chain.writable) or chain.writer is not None,
        }

    async def ready(self) -> Json:
        checks: Json = {}
        try:
            await self._store.counts()
            self._has_room()
            checks["store"] = {"ok": True, "detail": str(self._facts.state_dir)}
        except JobError as error:
            checks["store"] = {"ok": False, "detail": error.message, "remedy": error.remedy}
        stuck = [chain.path for chain in self._chains.all() if not chain.answers]
        detail = f"unresponsive: {', '.join(stuck)}" if stuck else "all answer"
        checks["storage_daemons"] = {"ok": True, "detail": detail}
        since = views.time(self._drain.record.since)
        drain = f"since {since}: no new work is taken" if self._drain.on else "not being drained"
        checks["drain"] = {"ok": not self._drain.on, "detail": drain}
        checks["libvirt"] = self._live.check()
        return {"ready": all(check["ok"] for check in checks.values()), "checks": checks}

    async def events_since(self, seq: int, limit: int) -> list[Record] | None:
        return await self._store.events_since(seq, limit)

    def last_seq(self) -> int:
        return self._store.last_seq()

    # Rules

    def _anywhere(self, peer: Peer) -> bool:
        """Root and the agent's own user may name any image; others only images in a pool."""
        return peer.uid in (0, os.geteuid())

    def _admitted(self, known: object) -> contextlib.AbstractContextManager[None]:
        """Around what starts something; a request that was obeyed before (`known`) starts nothing, and is answered."""
        return contextlib.nullcontext() if known else self._drain.work()

    def _only_operators(self, peer: Peer) -> None:
        if not self._anywhere(peer):
            raise JobError("denied", "only root and the agent's own user may drain the host", remedy="ask as root")

    def _free(self) -> int:
        """Bytes that are free beside the store."""
        room = os.statvfs(self._facts.state_dir)
        return room.f_bavail * room.f_frsize

    def _has_room(self) -> None:
        free = self._free()
        if free < self._facts.min_free:
            raise JobError(
                "store_full",
                f"only {free} bytes are free beside the store in {str(self._facts.state_dir)!r}",
                remedy="make space there, or lower store.min_free; running work goes on",
            )


@contextlib.contextmanager
def _about(field: str) -> Iterator[None]:
    """What is wrong with an image is said of the member of the request that named it."""
    try:
        yield
    except JobError as error:
        if error.field in (None, "path"):
            error.field = field
        raise


def _bitmaps(found: Found) -> Json:
    return views.bitmaps(found.path, found.bitmaps.items, lost=found.bitmaps.lost, holders=found.holders)


def _job_spec(spec: Json, anywhere: bool) -> JobSpec:
    try:
        operation = Operation(spec["operation"])
    except ValueError:
        known = ", ".join(operation.value for operation in Operation)
        raise JobError(
            "invalid",
            f"operation {spec['operation']!r} is not known",
            field="operation",
            value=spec["operation"],
            remedy=f"one of {known}",
        ) from None
    for field in _FIELDS - _FIELDS_OF[operation]:
        if spec.get(field):
            remedy = f"leave it out: it is not for a {operation.value}"
            raise JobError("invalid", f"{field} and {operation.value}", field=field, value=spec[field], remedy=remedy)
    if operation is Operation.COPY and not spec.get("dest"):
        remedy = "say where the copy goes: an absolute path"
        raise JobError("invalid", "a copy without dest", field="dest", remedy=remedy)
    completion = spec.get("completion")
    return JobSpec(
        operation=operation,
        target=_target(spec["target"]),
        base=spec.get("base"),
        top=spec.get("top"),
        dest=_dest(spec["dest"]) if spec.get("dest") else None,
        format=spec.get("format"),
        source_format=spec.get("source_format"),
        shallow=bool(spec.get("shallow")),
        reuse_external=bool(spec.get("reuse_external")),
        completion=Completion(completion) if completion else None,
        delete=bool(spec.get("delete")),
        prune_bitmaps=bool(spec.get("prune_bitmaps")),
        increment=spec.get("increment"),
        bandwidth=spec.get("bandwidth") or 0,
        check=spec.get("check") or "auto",
        labels=spec.get("labels") or {},
        anywhere=anywhere,
    )


def _group_specs(spec: Json, anywhere: bool) -> list[JobSpec]:
    each = {key: value for key, value in spec.items() if key not in ("id", "disks")}
    return [_job_spec({**each, "operation": Operation.COPY, **disk}, anywhere) for disk in spec["disks"]]


def _dest(dest: str) -> str:
    return dest if is_uri(dest) else _offline(dest, "dest")


_FIELDS_OF = {
    Operation.PULL: {"base", "increment"},
    Operation.COPY: {"dest", "format", "source_format", "shallow", "reuse_external", "completion"},
    Operation.COMMIT: {"base", "top", "delete", "prune_bitmaps", "completion"},
}
_FIELDS = set().union(*_FIELDS_OF.values())


def _is_guests(target: str) -> bool:
    """Whether it reads as DOMAIN/DISK."""
    domain, slash, disk = target.partition("/")
    return bool(domain and slash and disk) and not domain.startswith(".") and "://" not in target


def _target(target: str) -> str:
    return target if _is_guests(target) else _offline(target, "target")


def _offline(target: str, field: str) -> str:
    if target.startswith("/"):
        return target
    if "://" in target:
        raise _network(target, field)
    if _is_guests(target):
        raise JobError(
            "not_supported",
            f"{target!r} is a domain's disk: only jobs work on those, not yet this",
            field=field,
            value=target,
            remedy="give the absolute path of an image that no guest uses",
        )
    raise JobError("invalid", f"{target!r} is no target", field=field, value=target, remedy="give an absolute path")


def _network(target: str, field: str) -> JobError:
    """The URI is not repeated: it may have a password."""
    if field == "image":
        remedy = "write nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH"
        return JobError("not_supported", "URIs of this kind cannot be exported", field=field, remedy=remedy)
    remedy = "a network image can be exported, and be where a copy goes; copy it into a file for anything else"
    return JobError("not_supported", "a network image cannot be used here", field=field, remedy=remedy)


def _id(spec: Json) -> str | None:
    return str(spec["id"]) if spec.get("id") else None
