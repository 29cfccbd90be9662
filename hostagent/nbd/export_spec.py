"""What is asked of an export, and the record that it begins as. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from hostagent.records import ExportRecord
from jobs.errors import JobError
from jobs.model import Layer


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """What the caller asks. Times in seconds."""

    image: str
    format: str | None = None
    shallow: bool = False
    writable: bool = False
    ttl: float | None = None
    idle_timeout: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def record(self, export_id: str, top: Layer, now: datetime) -> ExportRecord:
        return ExportRecord(
            id=export_id,
            image=self.image,
            path=top.path,
            file=top.file,
            format=top.format,
            state="starting",
            created=now,
            shallow=self.shallow,
            writable=self.writable,
            size=top.virtual_size,
            ttl=self.ttl,
            idle_timeout=self.idle_timeout,
            expires=now + timedelta(seconds=self.ttl) if self.ttl else None,
            labels=self.labels,
        )

    def matches(self, known: ExportRecord) -> ExportRecord:
        """The export that was made with the same id, if it was for the same request."""
        same = all(getattr(self, name) == getattr(known, name) for name in _COMPARED)
        if not same or dict(self.labels) != dict(known.labels) or self.format not in (None, known.format):
            raise JobError(
                "conflict",
                f"export {known.id} exists with another request",
                field="id",
                value=known.id,
                remedy="choose another id, or leave it out",
            )
        return known


_COMPARED = ("image", "shallow", "writable", "ttl", "idle_timeout")
