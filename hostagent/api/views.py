"""Domain values as the JSON that contract.md promises. Pure; one function an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hostagent.records import AccessFile, AccessRow, DrainRecord, ExportRecord
from jobs.model import Chain, Job, Plan, State
from jobs.progress import View

Json = dict[str, Any]


def time(value: datetime | None) -> str | None:
    return None if value is None else value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def job(value: Job, view: View | None = None) -> Json:
    error = value.error
    return {
        "id": value.id,
        "operation": value.spec.operation.value,
        "target": value.spec.target,
        "path": value.before.top.path,
        "domain": value.drive.name if value.drive else "",
        "disk": value.drive.target if value.drive else "",
        "state": value.state.value,
        "cursor": {"cur": value.cursor.cur, "end": value.cursor.end},
        "upto": value.upto,
        "bandwidth": value.bandwidth,
        "base": value.spec.base,
        "increment": value.spec.increment,
        "dest": _target(value),
        "synchronous_writes": value.spec.synchronous_writes,
        "completion": value.completion or value.sealed or value.spec.completion,
        "group": {"id": value.group.id, "jobs": list(value.group.jobs)} if value.group else None,
        "check": value.spec.check,
        "labels": dict(value.spec.labels),
        "origin": value.origin,
        "revision": value.revision,
        "created": time(value.created),
        "since": time(value.since),
        "started": time(value.started),
        "finished": time(value.finished),
        "error": {"code": error.code, "message": error.message, "remedy": error.remedy} if error else None,
        "revocation": value.revocation.value,
        "chain": {
            "before": value.before.paths(),
            "after": (value.before if value.state in (State.FAILED, State.ABORTED) else value.after).paths(),
            "revoked": list(value.revoked),
            "kept": [{"path": k.path, "reason": k.reason, "holders": list(k.holders)} for k in value.kept],
        },
        "rate": round(view.rate) if view else None,
        "eta": view.eta if view else None,
        "stalled_seconds": round(view.stalled, 1) if view and not value.state.terminal else 0.0,
        "warnings": list(value.warnings),
    }


def _target(value: Job) -> Json | None:
    target = value.target
    return None if target is None else {"path": target.path, "format": target.format, "state": target.state.value}


def plan(value: Plan, kept: Mapping[str, list[str]], completion: str | None) -> Json:
    """What a dry run says; `kept` are the keepers of each file that the chain would lose. Where `completion` is left
    open, `after`, `revoke` and `keep` are what a pivot would bring; a finish leaves the chain as it was."""
    lost = [layer.path for layer in value.before.layers if layer not in value.after.layers]
    return {
        "dry_run": True,
        "completion": completion,
        "before": value.before.paths(),
        "after": value.after.paths(),
        "revoke": [{"path": path} for path in lost if not kept.get(path)],
        "keep": [
            {"path": path, "reason": "needed by others", "holders": kept[path]} for path in lost if kept.get(path)
        ],
        "space": dict(value.preview["space"]),
        "bitmaps": list(value.preview.get("bitmaps", ())),
        "warnings": list(value.warnings),
    }


def export(value: ExportRecord, clients: Sequence[Json] = (), *, answers: bool = True) -> Json:
    return {
        "id": value.id,
        "image": value.image,
        "path": value.path,
        "uri": value.uri,
        "socket": value.socket,
        "name": value.id,
        "format": value.format,
        "size": value.size,
        "offset": value.part.offset if value.part else 0,
        "shallow": value.shallow,
        "writable": value.writable,
        "max_clients": value.max_clients,
        "bitmaps": list(value.bitmaps),
        "tls": value.tls,
        "port": value.port,
        "state": value.state if answers else "unresponsive",
        "reason": value.reason or (value.ending.trouble or None if value.ending else None),
        "created": time(value.created),
        "stopped": time(value.stopped),
        "expires": time(value.expires),
        "ttl": value.ttl,
        "idle_timeout": value.idle_timeout,
        "clients": list(clients),
        "daemon": value.daemon,
        "pid": value.pid,
        "labels": dict(value.labels),
        "revision": value.revision,
    }


def drain(
    record: DrainRecord,
    *,
    jobs: Sequence[Job],
    exports: Sequence[tuple[ExportRecord, Sequence[Json]]],
    revocations: int,
    beginning: int,
) -> Json:
    return {
        "draining": record.since is not None,
        "since": time(record.since),
        "pause": record.pause,
        "paused": list(record.paused),
        "drained": record.since is not None and not (jobs or exports or revocations or beginning),
        "jobs": [
            {
                "id": job.id,
                "operation": job.spec.operation.value,
                "target": job.spec.target,
                "state": job.state.value,
                "cursor": {"cur": job.cursor.cur, "end": job.cursor.end},
            }
            for job in jobs
        ],
        "exports": [
            {"id": export.id, "image": export.image, "state": export.state, "clients": list(clients)}
            for export, clients in exports
        ],
        "revocations": revocations,
        "beginning": beginning,
    }


def grant(row: AccessRow, file: AccessFile | None) -> Json:
    state, detail = (file.verdict, file.reason) if file else ("pending", None)
    if row.file.network:
        state, detail = "granted", "its server says who may open it: nothing was given here, nothing will be revoked"
    return {
        "id": row.id,
        "path": row.path,
        "mode": row.mode,
        "holder": {"kind": row.holder.kind, "id": row.holder.id, **({"name": row.name} if row.name else {})},
        "since": time(row.since),
        "reason": row.reason,
        "access": file.access if file else "none",
        "given": _given(file),
        "state": state,
        "detail": detail,
    }


def _given(file: AccessFile | None) -> str | None:
    """What the file's ACL lets the hypervisor user do because of us; None where it needs nothing of us."""
    return (file.mode or None) if file is not None and file.access == "acl" else None


def leftover(file: AccessFile) -> Json:
    """A file that nobody needs, and that could not be closed (yet), or whose owner was changed to close it."""
    return {
        "id": f"file-{file.file.dev}-{file.file.ino}",
        "path": file.path,
        "mode": file.mode,
        "holder": {"kind": "none", "id": ""},
        "since": time(file.since),
        "reason": "nobody needs it any more",
        "access": file.access,
        "given": _given(file),
        "state": "pending" if file.verdict == "granted" else file.verdict,
        "detail": file.reason,
    }


def bitmaps(path: str, found: Sequence[Any], *, lost: bool, holders: Sequence[str] | None) -> Json:
    """`holders`, when not None, write to the image: what it says of its bitmaps does not count then."""
    return {
        "path": path,
        "items": [
            {
                "name": bitmap.name,
                "granularity": bitmap.granularity,
                "recording": bitmap.enabled,
                "state": _bitmap_state(bitmap, in_use=holders is not None),
            }
            for bitmap in found
        ],
        "lost": lost,
        "holders": None if holders is None else list(holders),
    }


def _bitmap_state(bitmap: Any, *, in_use: bool) -> str:
    if in_use:
        return "in use"
    return "inconsistent" if bitmap.in_use else "consistent"


def image(chain: Chain, headers: Sequence[Any]) -> Json:
    layers = [
        {
            "path": layer.path,
            "format": layer.format,
            "virtual_size": layer.virtual_size,
            "allocated": layer.allocated,
            "backing": layer.backing,
            "device": layer.file.dev,
            "inode": layer.file.ino,
            "dirty": bool(header and header.dirty),
        }
        for layer, header in zip(chain.layers, headers, strict=True)
    ]
    return {**layers[0], "chain": layers}
