"""The last errors, for `status`: which events are one, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from events.model import Event, ExportEvent, ExportEventKind, HostEvent, HostEventKind, JobEvent, JobEventKind


@dataclass(frozen=True, slots=True)
class Trouble:
    """One of the last errors, for `status`."""

    time: datetime
    what: str
    message: str
    remedy: str | None


def trouble_of(event: Event, time: datetime) -> Trouble | None:
    """The event as a trouble, where it is one."""
    if isinstance(event, JobEvent) and event.kind is JobEventKind.FAILED and event.error:
        return Trouble(time, f"job {event.job}", str(event.error["message"]), event.error.get("remedy"))
    if isinstance(event, ExportEvent) and event.kind is ExportEventKind.LOST:
        return Trouble(time, f"export {event.export}", event.reason or "lost", "start it again")
    if isinstance(event, HostEvent) and event.kind is HostEventKind.UNRESPONSIVE:
        return Trouble(time, event.subject, event.reason or "unresponsive", "see whether its storage hangs")
    if isinstance(event, HostEvent) and event.kind is HostEventKind.DISCONNECTED:
        return Trouble(time, event.subject, event.reason or "disconnected", "it is connected again by itself")
    return None
