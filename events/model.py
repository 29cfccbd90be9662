"""What happened, as frozen dataclasses.

An event is a fact that a subscriber may act on without asking again. It gets its sequence number from the store, in
the same transaction as the change that it tells of; `progress` alone is transient and carries none (seq 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any


class JobEventKind(StrEnum):
    STARTED = "started"
    PROGRESS = "progress"
    READY = "ready"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class GrantEventKind(StrEnum):
    GRANTED = "granted"
    REVOKED = "revoked"
    KEPT = "kept"


class ExportEventKind(StrEnum):
    STARTED = "started"
    STOPPED = "stopped"
    LOST = "lost"


class HostEventKind(StrEnum):
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    UNRESPONSIVE = "unresponsive"


class Status(StrEnum):
    """The two ends of the original virDomainBlockPull proposal; a cancelled job is FAILED with reason `cancelled`."""

    COMPLETED = "COMPLETED"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class JobEvent:
    kind: JobEventKind
    job: str
    operation: str
    path: str
    state: str
    cur: int
    end: int
    domain: str = ""
    disk: str = ""
    status: Status | None = None
    reason: str | None = None
    error: Mapping[str, Any] | None = None
    origin: str = "agent"
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GrantEvent:
    kind: GrantEventKind
    path: str
    mode: str
    trigger: str
    reason: str | None = None
    holders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExportEvent:
    kind: ExportEventKind
    export: str
    path: str
    uri: str
    reason: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HostEvent:
    kind: HostEventKind
    subject: str
    reason: str | None = None


Event = JobEvent | GrantEvent | ExportEvent | HostEvent


@dataclass(frozen=True, slots=True)
class Record:
    """An event with its place in the log. `seq` is 0 for a transient one (progress), which no replay returns."""

    seq: int
    time: datetime
    event: Event


# What a hypervisor tells of its domains. These are hints, not facts of ours: they are neither stored nor published.


class DiskJobKind(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    READY = "ready"


class DomainEventKind(StrEnum):
    DEFINED = "defined"
    UNDEFINED = "undefined"
    STARTED = "started"
    SUSPENDED = "suspended"
    RESUMED = "resumed"
    STOPPED = "stopped"
    SHUTDOWN = "shutdown"
    CRASHED = "crashed"


@dataclass(frozen=True, slots=True)
class DiskJobEvent:
    """A block job of a live disk ended, or a mirror is in sync. `domain` is the UUID, `disk` the target (vda);
    `operation` is pull, copy, commit, backup or unknown, `active` tells a commit of the top layer; `reason` of FAILED
    is failed or cancelled."""

    kind: DiskJobKind
    domain: str
    name: str
    disk: str
    operation: str
    active: bool = False
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class QemuJobEvent:
    """QEMU's own word on how a block job of a live disk ended, which comes before libvirt's and says more: `good` that
    it did what was asked (a mirror that was ended when it was in sync, too), `error` why it did not."""

    domain: str
    name: str
    disk: str
    operation: str
    good: bool
    error: str | None = None


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """`reason` is libvirt's detail of a stop or a pause: destroyed, crashed, failed, io_error, …"""

    kind: DomainEventKind
    domain: str
    name: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class DiskErrorEvent:
    """A guest's request failed. `action`: none, pause (the guest stands still now) or report (it was told)."""

    domain: str
    name: str
    path: str
    alias: str
    action: str
    reason: str


@dataclass(frozen=True, slots=True)
class ThresholdEvent:
    """A write went `excess` bytes beyond the threshold, in bytes of the file, of one layer (`disk`: vda or vda[3])."""

    domain: str
    name: str
    disk: str
    path: str
    threshold: int
    excess: int


HypervisorEvent = DiskJobEvent | QemuJobEvent | DomainEvent | DiskErrorEvent | ThresholdEvent


def now() -> datetime:
    return datetime.now(UTC)
