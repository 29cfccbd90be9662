"""The rows that the parts of the agent share through the store, and jobs as JSON.

Imports `jobs` only, so that the siblings (store, access, nbd) can exchange rows without importing each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from jobs.model import (
    Chain,
    Completion,
    Cursor,
    Drive,
    Failure,
    FileId,
    Group,
    Holder,
    Job,
    JobSpec,
    Kept,
    Layer,
    Need,
    Operation,
    Revocation,
    State,
    Target,
    TargetState,
)


class Label(NamedTuple):
    """An owner and a group: the DAC label that libvirt runs a domain's QEMU as, or who had a file before."""

    uid: int
    gid: int

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}"


class Use(NamedTuple):
    """A file that a domain needs; with a label, libvirt makes the file its own, and we give nothing."""

    need: Need
    label: Label | None


class Taken(NamedTuple):
    """An ownership that we changed: what it was, and what it was made."""

    was: Label
    now: Label


@dataclass(frozen=True, slots=True)
class AccessRow:
    """One line of the ledger: this holder needs this file, in this mode.

    `label` says that the file is opened by the ownership that libvirt gives it; then the row grants nothing. `name` is
    what people call the holder (a domain's is its name and disk). `format` is the file's, as its namer says; empty
    where that was not noted. `image` is the very file of a holder that is an image, None where that was not noted.
    """

    id: str
    file: FileId
    path: str
    holder: Holder
    mode: str
    since: datetime
    reason: str
    label: Label | None = None
    name: str = ""
    format: str = ""
    image: FileId | None = None

    @property
    def lost(self) -> bool:
        """A disk (`name`) stands on the file no more, and its image may: nobody has proven yet that it does not."""
        return self.holder.kind == "image" and bool(self.name)

    @property
    def title(self) -> str:
        return f"{self.holder} ({self.name})" if self.name else str(self.holder)


@dataclass(frozen=True, slots=True)
class AccessFile:
    """What the converger did to one file. `before` and `given` are ACL snapshots, to undo to the byte.

    `mode` is what we gave ("", "r", "rw"); `verdict` granted | revoked | kept | pending; `access` acl | owner | own |
    none. `labels` are those that libvirt may have left the file with, `owner` who had it before as far as that was
    seen, and `taken` the ownership that we changed at the end, for an undo. `born` (ns since 1970, where the file
    system says) tells the file from a later one with its inode number. `rests`: when last looked at for a domain, it
    was not libvirt's.
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
    labels: tuple[Label, ...] = ()
    owner: Label | None = None
    taken: Taken | None = None
    born: int | None = None
    rests: bool = False


class Part(NamedTuple):
    """A part of a raw image, in bytes. A size of 0 is all that follows: of a network image that is not open yet."""

    offset: int
    size: int


class Ending(NamedTuple):
    """How an export is being stopped: why, and whether clients are cut off; `trouble` is why it has not ended yet
    though it is not served any more."""

    reason: str
    force: bool
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """An NBD export. States: starting, running, stopping, stopped, lost. `size` is what clients see; `tcp` and `tls`
    are as asked, `host` and `port` what the storage daemon listens on. `connection` is its socket to the server of a
    network image (an inode number), from the beginning on. `ending` is there while it is `stopping`."""

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
    part: Part | None = None
    max_clients: int | None = None
    bitmaps: tuple[str, ...] = ()
    tcp: str | None = None
    tls: str | None = None
    connection: int = 0
    host: str = ""
    port: int | None = None
    socket: str = ""
    uri: str = ""
    daemon: str = ""
    pid: int | None = None
    ttl: float | None = None
    idle_timeout: float | None = None
    expires: datetime | None = None
    stopped: datetime | None = None
    reason: str | None = None
    ending: Ending | None = None
    revision: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        return self.state in ("starting", "running", "stopping")

    @property
    def holder(self) -> Holder:
        return Holder("export", self.id)


@dataclass(frozen=True, slots=True)
class Node:
    """A layer in a storage daemon's graph. `index` names its nodes; `descriptor` leads to its file inside the daemon:
    `/proc/self/fd/N` there is this file, and no other, as long as the daemon runs. `part` is all that it shows."""

    layer: Layer
    index: int
    descriptor: int
    part: Part | None = None

    @property
    def file_node(self) -> str:
        return f"f{self.index}"

    @property
    def format_node(self) -> str:
        return f"l{self.index}"


@dataclass(frozen=True, slots=True)
class DaemonRecord:
    """A storage daemon that we started, so that a later agent knows it for its own.

    `pid`, `start_time` (clock ticks since boot, proc(5)) and `boot_id` together name a process for ever. `nodes` are
    the chain's layers, top first, with their places in the daemon's graph; `beside` is what else it has open. `apart`
    names the export that has the daemon for itself.
    """

    id: str
    file: FileId
    shallow: bool
    pid: int
    start_time: int
    boot_id: str
    nodes: tuple[Node, ...]
    created: datetime
    beside: tuple[Node, ...] = ()
    apart: str = ""

    @property
    def chain(self) -> Chain:
        return Chain(tuple(node.layer for node in self.nodes))


@dataclass(frozen=True, slots=True)
class DrainRecord:
    """Whether the host is being drained (`since`), whether running jobs are to pause, and those that we paused."""

    since: datetime | None = None
    pause: bool = False
    paused: tuple[str, ...] = ()


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


def _spec(data: Mapping[str, Any]) -> JobSpec:
    completion = data.get("completion")
    return JobSpec(
        **{
            **data,
            "operation": Operation(data["operation"]),
            "completion": Completion(completion) if completion else None,
        }
    )


def _target(data: Mapping[str, Any]) -> Target:
    file = FileId(*data["file"]) if data["file"] else None
    return Target(**{**data, "file": file, "state": TargetState(data["state"])})


def _node(data: Mapping[str, Any]) -> Node:
    return Node(layer(data["layer"]), data["index"], data["descriptor"], _part(data.get("part")))


def job(data: Mapping[str, Any]) -> Job:
    values = dict(data)
    error = values.pop("error")
    target, completion = values.pop("target", None), values.pop("completion", None)
    group, sealed = values.pop("group", None), values.pop("sealed", None)
    drive = values.pop("drive", None)
    return Job(
        **{
            **values,
            "spec": _spec(values["spec"]),
            "target": _target(target) if target else None,
            "drive": Drive(**drive) if drive else None,
            "completion": Completion(completion) if completion else None,
            "group": Group(group["id"], tuple(group["jobs"])) if group else None,
            "sealed": Completion(sealed) if sealed else None,
            "state": State(values["state"]),
            "before": chain(values["before"]),
            "after": chain(values["after"]),
            "cursor": Cursor(*values["cursor"]),
            "created": _time(values["created"]),
            "since": _time(values["since"]),
            "started": when(values["started"]),
            "ready": when(values.get("ready")),
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
            "part": _part(data.get("part")),
            "ending": Ending(*ending) if (ending := data.get("ending")) else None,
            "bitmaps": tuple(data.get("bitmaps", ())),
        }
    )


def _part(data: Any) -> Part | None:
    return Part(*data) if data else None


def daemon(data: Mapping[str, Any]) -> DaemonRecord:
    return DaemonRecord(
        **{
            **data,
            "file": FileId(*data["file"]),
            "nodes": tuple(_node(item) for item in data["nodes"]),
            "beside": tuple(_node(item) for item in data["beside"]),
            "created": _time(data["created"]),
        }
    )


def drain(data: Mapping[str, Any]) -> DrainRecord:
    return DrainRecord(since=when(data["since"]), pause=data["pause"], paused=tuple(data["paused"]))


def access_file(data: Mapping[str, Any]) -> AccessFile:
    return AccessFile(
        **{
            **data,
            "file": FileId(*data["file"]),
            "since": _time(data["since"]),
            "holders": tuple(data["holders"]),
            "labels": tuple(Label(*item) for item in data.get("labels", ())),
            "owner": Label(*owner) if (owner := data.get("owner")) else None,
            "taken": Taken(*(Label(*item) for item in taken)) if (taken := data.get("taken")) else None,
        }
    )
