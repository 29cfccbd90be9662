"""A service that keeps everything in memory, so that the front-end can be tried as it runs: over a real socket."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

from events.bus import Bus
from events.model import HostEvent, HostEventKind, JobEvent, JobEventKind, Record, now
from hostagent.api.peer import Peer
from jobs.errors import JobError

Json = dict[str, Any]
TIME = "2024-05-01T12:00:00Z"


def job_json(id: str, spec: Json) -> Json:
    return {
        "id": id,
        "operation": spec["operation"],
        "target": spec["target"],
        "path": spec["target"],
        "domain": "",
        "disk": "",
        "state": "running",
        "cursor": {"cur": 0, "end": 1 << 30},
        "upto": None,
        "bandwidth": spec.get("bandwidth", 0),
        "base": spec.get("base"),
        "increment": spec.get("increment"),
        "check": spec.get("check", "auto"),
        "labels": spec.get("labels", {}),
        "origin": "agent",
        "revision": 1,
        "created": TIME,
        "since": TIME,
        "started": TIME,
        "finished": None,
        "error": None,
        "revocation": "none",
        "chain": {"before": ["/top", "/base"], "after": ["/top"], "revoked": [], "kept": []},
        "rate": None,
        "eta": None,
        "stalled_seconds": 0.0,
        "warnings": [],
        "dest": None,
        "synchronous_writes": False,
        "completion": None,
        "group": None,
    }


def export_json(id: str, spec: Json) -> Json:
    return {
        "id": id,
        "image": spec["image"],
        "uri": f"nbd+unix:///{id}?socket=/run/x",
        "socket": "/run/x",
        "name": id,
        "format": spec.get("format", "qcow2"),
        "size": 1 << 30,
        "shallow": spec.get("shallow", False),
        "writable": spec.get("writable", False),
        "offset": 0,
        "max_clients": spec.get("max_clients"),
        "bitmaps": spec.get("bitmaps", []),
        "tls": spec.get("tls"),
        "port": None,
        "state": "running",
        "reason": None,
        "created": TIME,
        "stopped": None,
        "expires": None,
        "ttl": spec.get("ttl"),
        "idle_timeout": spec.get("idle_timeout"),
        "clients": [{"pid": 1, "name": "qemu-img", "uid": 0}],
        "daemon": "d1",
        "pid": 1,
        "labels": spec.get("labels", {}),
        "revision": 1,
    }


class FakeService:
    """Jobs and exports are dicts; `calls` remembers what the front-end asked for."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.wakeups = asyncio.Condition()
        self.forget()

    def forget(self) -> None:
        self.jobs: dict[str, Json] = {}
        self.groups: dict[str, Json] = {}
        self.exports: dict[str, Json] = {}
        self.bodies: dict[str, Json] = {}
        self.calls: list[tuple[str, Any]] = []
        self.log: list[Record] = []
        self.forgotten = 0
        self.is_ready = True

    # Events

    def happen(self, subject: str, *, published: bool = True) -> Record:
        record = Record(self.last_seq() + 1, now(), HostEvent(HostEventKind.CONNECTED, subject))
        self.log.append(record)
        if published:
            self.bus.publish(record)
        return record

    def progress(self, job: str) -> None:
        self.bus.publish(Record(0, now(), JobEvent(JobEventKind.PROGRESS, job, "pull", "/a", "running", 1, 2)))

    async def events_since(self, seq: int, limit: int) -> list[Record] | None:
        await asyncio.sleep(0)
        return None if seq < self.forgotten else [record for record in self.log if record.seq > seq][:limit]

    def last_seq(self) -> int:
        return self.log[-1].seq if self.log else 0

    # Jobs

    async def start_job(self, spec: Json, *, peer: Peer) -> tuple[Json, bool]:
        self.calls.append(("start_job", (spec, peer)))
        if spec["operation"] != "pull":
            raise JobError("not_supported", f"{spec['operation']} is not supported yet", field="operation")
        id = spec.get("id") or str(uuid.uuid4())
        if id in self.jobs:
            if self.bodies[id] != spec:
                raise JobError("conflict", f"job {id} exists with another body", field="id", value=id, job=id)
            return self.jobs[id], False
        self.bodies[id] = spec
        self.jobs[id] = job_json(id, spec)
        return self.jobs[id], True

    async def plan_job(self, spec: Json, *, peer: Peer) -> Json:
        return {"chain": {"before": [spec["target"], "/base"], "after": [spec["target"]]}}

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
        asked = {"state": state, "target": target, "labels": labels, "origin": origin, "group": group}
        asked |= {"limit": limit, "after": after}
        self.calls.append(("list_jobs", asked))
        return {"items": list(self.jobs.values())[:limit], "next": None}

    async def start_group(self, spec: Json, *, peer: Peer) -> tuple[Json, bool]:
        self.calls.append(("start_group", (spec, peer)))
        id = spec.get("id") or str(uuid.uuid4())
        created = id not in self.groups
        self.groups[id] = {
            "id": id,
            "jobs": [job_json(str(uuid.uuid4()), {"operation": "copy", **disk}) for disk in spec["disks"]],
        }
        return self.groups[id], created

    async def plan_group(self, spec: Json, *, peer: Peer) -> Json:
        return {"dry_run": True, "disks": spec["disks"]}

    async def get_group(self, id: str) -> Json:
        if id not in self.groups:
            raise JobError("not_found", f"no group {id}")
        return self.groups[id]

    async def get_job(self, id: str) -> Json:
        if id == "00000000-0000-0000-0000-00000000dead":
            raise RuntimeError("secret detail of a fault")
        if id not in self.jobs:
            raise JobError("not_found", f"no job {id}", remedy="hostagent job list")
        return dict(self.jobs[id])

    async def wait_job(self, id: str, *, revision: int | None, timeout: float) -> Json:
        known = revision if revision is not None else self.jobs[id]["revision"]
        try:
            async with asyncio.timeout(timeout), self.wakeups:
                await self.wakeups.wait_for(lambda: self.jobs[id]["revision"] != known)
        except TimeoutError:
            pass
        return dict(self.jobs[id])

    async def touch(self, id: str, **changes: Any) -> Json:
        async with self.wakeups:
            self.jobs[id] |= {**changes, "revision": self.jobs[id]["revision"] + 1}
            self.wakeups.notify_all()
        return self.jobs[id]

    async def patch_job(self, id: str, bandwidth: int) -> Json:
        return await self.touch(id, bandwidth=bandwidth)

    async def next_job(self, id: str, cursor: int | None) -> Json:
        self.calls.append(("next_job", cursor))
        return await self.touch(id)

    async def abort_job(self, id: str, force: bool) -> Json:
        self.calls.append(("abort_job", force))
        return await self.touch(id, state="aborting")

    async def pause_job(self, id: str) -> Json:
        return await self.touch(id, state="paused")

    async def resume_job(self, id: str) -> Json:
        return await self.touch(id, state="running")

    async def complete_job(self, id: str, completion: str | None) -> Json:
        raise JobError("conflict", f"job {id} is running, not ready", state="running")

    async def delete_job(self, id: str) -> None:
        del self.jobs[id]

    # Exports, images, grants

    async def start_export(self, spec: Json, *, peer: Peer) -> tuple[Json, bool]:
        self.calls.append(("start_export", (spec, peer)))
        id = spec.get("id") or str(uuid.uuid4())
        self.exports[id] = export_json(id, spec)
        return self.exports[id], True

    async def list_exports(
        self, *, state: str | None, target: str | None, labels: Mapping[str, str], limit: int, after: str | None
    ) -> Json:
        return {"items": list(self.exports.values())[:limit], "next": None}

    async def get_export(self, id: str) -> Json:
        return self.exports[id]

    async def wait_export(self, id: str, *, revision: int | None, timeout: float) -> Json:
        return self.exports[id]

    async def stop_export(self, id: str, force: bool) -> Json:
        self.calls.append(("stop_export", force))
        self.exports[id] |= {"state": "stopped", "revision": 2}
        return self.exports[id]

    async def inspect_image(self, path: str, format: str | None, *, peer: Peer) -> Json:
        return {"chain": [{"path": path, "format": format or "qcow2"}, {"path": "/not\udcffutf8", "format": "raw"}]}

    async def list_bitmaps(self, path: str, *, peer: Peer) -> Json:
        b0 = {"name": "b0", "granularity": 65536, "recording": True, "state": "consistent"}
        return {"path": path, "items": [b0], "lost": False, "holders": None}

    async def add_bitmap(self, path: str, spec: Json, *, peer: Peer) -> Json:
        self.calls.append(("add_bitmap", (path, spec)))
        return await self.list_bitmaps(path, peer=peer)

    async def remove_bitmap(self, path: str, name: str, *, peer: Peer) -> Json:
        self.calls.append(("remove_bitmap", (path, name)))
        return await self.list_bitmaps(path, peer=peer)

    async def merge_bitmap(self, path: str, spec: Json, *, peer: Peer) -> Json:
        self.calls.append(("merge_bitmap", (path, spec)))
        return await self.list_bitmaps(path, peer=peer)

    async def list_grants(self, *, path: str | None, holder: str | None, limit: int, after: str | None) -> Json:
        return {"items": [await self.get_grant("g1")], "next": "g1"}

    async def get_grant(self, id: str) -> Json:
        return {
            "id": id,
            "path": "/base",
            "mode": "r",
            "holder": {"kind": "job", "id": "j"},
            "since": TIME,
            "reason": "pull",
            "access": "acl",
            "given": "r",
            "state": "granted",
            "detail": None,
        }

    async def undo_grant(self, id: str, *, peer: Peer) -> Json:
        return await self.get_grant(id) | {"state": "kept"}

    async def revoke_grant(self, id: str) -> Json:
        raise JobError("busy", "/base is needed by job j", holders=["job:j"])

    async def host(self) -> Json:
        return {"host": "h1", "version": "0"}

    async def drain(self, pause: bool, *, peer: Peer) -> Json:
        self.calls.append(("drain", (pause, peer)))
        return await self.drain_state()

    async def lift_drain(self, *, peer: Peer) -> Json:
        self.calls.append(("lift_drain", peer))
        return await self.drain_state()

    async def drain_state(self) -> Json:
        return {"draining": True, "drained": False}

    async def ready(self) -> Json:
        return {"ready": self.is_ready, "checks": {"store": {"ok": self.is_ready, "detail": "writable"}}}
