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


def now() -> datetime:
    return datetime.now(UTC)
