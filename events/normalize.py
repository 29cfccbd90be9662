"""Raw hypervisor events → what concerns us. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from events.model import (
    DiskErrorEvent,
    DiskJobEvent,
    DiskJobKind,
    DomainEvent,
    DomainEventKind,
    HypervisorEvent,
    QemuJobEvent,
    ThresholdEvent,
)

_STATES_THAT_MATTER = frozenset({"pending", "concluded", "ready", "null"})


def job_of(name: str, data: Mapping[str, Any]) -> str | None:
    """The hypervisor's id of the block job that a QMP event tells news of; None when it tells none.

    running ⇄ paused and ready ⇄ standby come in pairs whenever QEMU drains the graph, and mean nothing by themselves.
    BLOCK_JOB_* name the job `device` or `id` (qapi/block-core.json), JOB_STATUS_CHANGE `id` (qapi/job.json).
    """
    if name == "JOB_STATUS_CHANGE":
        return str(data.get("id")) if data.get("status") in _STATES_THAT_MATTER else None
    if name.startswith("BLOCK_JOB_"):
        found = data.get("device", data.get("id"))
        return None if found is None else str(found)
    return None


# libvirt


class RawEvent(NamedTuple):
    """What a callback of libvirt's was told: `args` are those after the domain."""

    kind: str
    domain: str
    name: str
    args: tuple[Any, ...]


OPERATIONS = {1: "pull", 2: "copy", 3: "commit", 4: "commit", 5: "backup"}
"""virDomainBlockJobType; 4 is a commit of the active layer."""
ACTIVE_COMMIT = 4

_BLOCK_JOBS: dict[int, tuple[DiskJobKind, str | None]] = {
    0: (DiskJobKind.COMPLETED, None),
    1: (DiskJobKind.FAILED, "failed"),
    2: (DiskJobKind.FAILED, "cancelled"),
    3: (DiskJobKind.READY, None),
}
"""virConnectDomainEventBlockJobStatus"""

_LIFECYCLE = {
    0: DomainEventKind.DEFINED,
    1: DomainEventKind.UNDEFINED,
    2: DomainEventKind.STARTED,
    3: DomainEventKind.SUSPENDED,
    4: DomainEventKind.RESUMED,
    5: DomainEventKind.STOPPED,
    6: DomainEventKind.SHUTDOWN,
    7: DomainEventKind.SUSPENDED,  # PMSUSPENDED
    8: DomainEventKind.CRASHED,
}
"""virDomainEventType"""

_STOPPED = {0: "shutdown", 1: "destroyed", 2: "crashed", 3: "migrated", 4: "saved", 5: "failed", 6: "from_snapshot"}
"""virDomainEventStoppedDetailType"""
_SUSPENDED = {
    0: "paused",
    1: "migrated",
    2: "io_error",
    3: "watchdog",
    4: "restored",
    5: "from_snapshot",
    6: "api_error",
    7: "postcopy",
    8: "postcopy_failed",
}
"""virDomainEventSuspendedDetailType"""
_IO_ACTIONS = {0: "none", 1: "pause", 2: "report"}
"""virDomainEventIOErrorAction"""


def of_libvirt(raw: RawEvent) -> HypervisorEvent | None:
    """The event in our words; None for one that tells nothing of disks, or that a newer libvirt has added."""
    match raw.kind, raw.args:
        case "block_job", (str(disk), int(type), int(status)) if status in _BLOCK_JOBS:
            kind, reason = _BLOCK_JOBS[status]
            operation = OPERATIONS.get(type, "unknown")
            active = type == ACTIVE_COMMIT
            return DiskJobEvent(kind, raw.domain, raw.name, disk, operation, active=active, reason=reason)
        case "monitor", (str(said), str(data)):
            return _of_monitor(raw, said, data)
        case "lifecycle", (int(event), int(detail)) if event in _LIFECYCLE:
            details = {5: _STOPPED, 3: _SUSPENDED}.get(event, {})
            return DomainEvent(_LIFECYCLE[event], raw.domain, raw.name, details.get(detail))
        case "io_error", (path, alias, int(action), reason):
            said = _IO_ACTIONS.get(action, "unknown")
            return DiskErrorEvent(raw.domain, raw.name, str(path or ""), str(alias or ""), said, str(reason or ""))
        case "block_threshold", (str(disk), path, int(threshold), int(excess)):
            return ThresholdEvent(raw.domain, raw.name, disk, str(path or ""), threshold, excess)
    return None


_JOB_NAME = re.compile(r"(?P<operation>pull|copy|commit)-(?P<disk>[^-]{1,64})-libvirt-\d{1,9}-(format|storage)")
"""What libvirt calls the block jobs that it begins: commit-vda-libvirt-4-format."""


def _of_monitor(raw: RawEvent, event: str, details: str) -> QemuJobEvent | None:
    """The end of a block job that libvirt began, in QEMU's words. An end with an error is BLOCK_JOB_COMPLETED, too."""
    try:
        data = json.loads(details)
    except ValueError:
        return None
    job = _JOB_NAME.fullmatch(str(data.get("device"))) if isinstance(data, dict) else None
    if job is None or event not in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
        return None
    error = data.get("error")
    return QemuJobEvent(
        raw.domain,
        raw.name,
        job["disk"],
        job["operation"],
        good=event == "BLOCK_JOB_COMPLETED" and error is None,
        error=None if error is None else str(error)[:1000],
    )
