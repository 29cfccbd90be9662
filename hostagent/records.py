"""The rows that the parts of the agent share through the store, and jobs as JSON.

Imports `jobs` only, so that the siblings (store, access, nbd) can exchange rows without importing each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jobs.model import (
    Chain,
    Cursor,
    Failure,
    FileId,
    Holder,
    Job,
    JobSpec,
    Kept,
    Layer,
    Operation,
    Revocation,
    State,
)


@dataclass(frozen=True, slots=True)
class AccessRow:
    """One line of the ledger: this holder needs this file, in this mode."""

    id: str
    file: FileId
    path: str
    holder: Holder
    mode: str
    since: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class AccessFile:
    """What the converger did to one file. `before` and `given` are ACL snapshots, to undo to the byte.

    `mode` is what we gave ("", "r", "rw"); `verdict` granted | revoked | kept | pending; `access` acl | own | none.
    """

    file: FileId
    path: str
    access: str
    mode: str
    verdict: str
    since: datetime
    uid: int
    before: Mapping[str, Any] | None = None
    given: Mapping[str, Any] | None = None
    reason: str | None = None
    holders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """An NBD export. States: starting, running, stopped, lost."""

    id: str
    image: str
    path: str
    file: FileId
    format: str
    state: str
    created: datetime
    shallow: bool = False
    writable: bool = False
    size: int = 0
    socket: str = ""
    uri: str = ""
    daemon: str = ""
    pid: int | None = None
    ttl: float | None = None
    idle_timeout: float | None = None
    expires: datetime | None = None
    stopped: datetime | None = None
    reason: str | None = None
    revision: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        return self.state in ("starting", "running")

    @property
    def holder(self) -> Holder:
        return Holder("export", self.id)


@dataclass(frozen=True, slots=True)
class DaemonRecord:
    """A storage daemon that we started, so that a later agent knows it for its own.

    `pid`, `start_time` (clock ticks since boot, proc(5)) and `boot_id` together name a process for ever. `descriptors`
    are the numbers that the O_PATH descriptors of the chain's layers have inside the daemon.
    """

    id: str
    file: FileId
    shallow: bool
    pid: int
    start_time: int
    boot_id: str
    monitor: str
    socket: str
    chain: Chain
    descriptors: tuple[int, ...]
    created: datetime


def encode(value: Any) -> Any:
    """Dataclasses, enums, times and tuples as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return str(value) if isinstance(value, str) else value
    raise TypeError(f"cannot store {type(value).__name__}")


def when(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def layer(data: Mapping[str, Any]) -> Layer:
    return Layer(**{**data, "file": FileId(*data["file"])})


def chain(data: Mapping[str, Any]) -> Chain:
    return Chain(tuple(layer(item) for item in data["layers"]))


def job(data: Mapping[str, Any]) -> Job:
    values = dict(data)
    spec = values.pop("spec")
    error = values.pop("error")
    return Job(
        **{
            **values,
            "spec": JobSpec(**{**spec, "operation": Operation(spec["operation"])}),
            "state": State(values["state"]),
            "before": chain(values["before"]),
            "after": chain(values["after"]),
            "cursor": Cursor(*values["cursor"]),
            "created": _time(values["created"]),
            "since": _time(values["since"]),
            "started": when(values["started"]),
            "finished": when(values["finished"]),
            "error": Failure(**error) if error else None,
            "revocation": Revocation(values["revocation"]),
            "revoked": tuple(values["revoked"]),
            "kept": tuple(Kept(k["path"], k["reason"], tuple(k["holders"])) for k in values["kept"]),
            "warnings": tuple(values["warnings"]),
        }
    )


def export(data: Mapping[str, Any]) -> ExportRecord:
    return ExportRecord(
        **{
            **data,
            "file": FileId(*data["file"]),
            "created": _time(data["created"]),
            "expires": when(data["expires"]),
            "stopped": when(data["stopped"]),
        }
    )


def daemon(data: Mapping[str, Any]) -> DaemonRecord:
    return DaemonRecord(
        **{
            **data,
            "file": FileId(*data["file"]),
            "chain": chain(data["chain"]),
            "descriptors": tuple(data["descriptors"]),
            "created": _time(data["created"]),
        }
    )


def access_file(data: Mapping[str, Any]) -> AccessFile:
    return AccessFile(
        **{
            **data,
            "file": FileId(*data["file"]),
            "since": _time(data["since"]),
            "holders": tuple(data["holders"]),
        }
    )
