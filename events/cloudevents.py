"""The one envelope: a record as CloudEvents 1.0 JSON, and back.

`id` is the sequence number. A transient record (progress) has none, so it gets a random UUID, which can never be taken
for a number. `data` holds the fields of the event's dataclass; the kind is in `type`. A reader takes what it knows and
ignores the rest, so a newer agent may add fields.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from events.model import (
    Event,
    ExportEvent,
    ExportEventKind,
    GrantEvent,
    GrantEventKind,
    HostEvent,
    HostEventKind,
    JobEvent,
    JobEventKind,
    Record,
    Status,
)

PREFIX = "org.hostagent"
VERSION = "v1"

FAMILIES: dict[str, tuple[type[Event], type[StrEnum]]] = {
    "job": (JobEvent, JobEventKind),
    "grant": (GrantEvent, GrantEventKind),
    "export": (ExportEvent, ExportEventKind),
    "host": (HostEvent, HostEventKind),
}
_FAMILY_OF: dict[type[Event], str] = {event: name for name, (event, _) in FAMILIES.items()}


def type_of(event: Event) -> str:
    """The CloudEvents `type`: org.hostagent.job.completed.v1"""
    return f"{PREFIX}.{_FAMILY_OF[type(event)]}.{event.kind}.{VERSION}"


def subject_of(event: Event) -> str:
    """What it happened to: a job's or an export's id, a granted path, a part of the host."""
    match event:
        case JobEvent():
            return event.job
        case GrantEvent():
            return event.path
        case ExportEvent():
            return event.export
        case HostEvent():
            return event.subject


def to_json(record: Record, host: str) -> dict[str, Any]:
    event = record.event
    return {
        "specversion": "1.0",
        "id": str(record.seq) if record.seq else str(uuid.uuid4()),
        "source": f"/hosts/{host}",
        "type": type_of(event),
        "subject": subject_of(event),
        "time": record.time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": {field.name: _plain(getattr(event, field.name)) for field in fields(event) if field.name != "kind"},
    }


def from_json(envelope: Mapping[str, Any]) -> Record:
    """The record that `to_json` made. Raises ValueError for anything that is no event of ours."""
    try:
        event = _event(envelope["type"], envelope["data"])
        time = datetime.fromisoformat(envelope["time"])
        name = envelope["id"]
        return Record(seq=int(name) if name.isdecimal() else 0, time=time, event=event)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an event of ours: {error!r}") from error


def _event(name: str, data: Mapping[str, Any]) -> Event:
    parts = name.removeprefix(PREFIX + ".").split(".")
    if not name.startswith(PREFIX + ".") or len(parts) != 3 or parts[2] != VERSION or parts[0] not in FAMILIES:
        raise ValueError(f"unknown event type {name!r}")
    event, kinds = FAMILIES[parts[0]]
    known = {field.name for field in fields(event)}
    values = {key: _typed(key, value) for key, value in data.items() if key in known}
    return event(**{**values, "kind": kinds(parts[1])})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _typed(key: str, value: Any) -> Any:
    if key == "status" and value is not None:
        return Status(value)
    return tuple(value) if key == "holders" else value
