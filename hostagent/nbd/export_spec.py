"""What is asked of an export, and the record that it begins as. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from hostagent.drivers.tls import TlsListener
from hostagent.nbd.prepared import Apart
from hostagent.records import ExportRecord, Part
from jobs.errors import JobError
from jobs.model import Layer

SECTOR = 512
"""What a raw image's part is counted in (QEMU's BDRV_SECTOR_SIZE)."""


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """What the caller asks. Times in seconds; `offset` and `size` are bytes of a raw image."""

    image: str
    format: str | None = None
    shallow: bool = False
    writable: bool = False
    offset: int | None = None
    size: int | None = None
    max_clients: int | None = None
    bitmaps: tuple[str, ...] = ()
    tcp: str | None = None
    tls: str | None = None
    ttl: float | None = None
    idle_timeout: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def record(self, export_id: str, top: Layer, now: datetime) -> ExportRecord:
        """Raises JobError invalid when the image has no such part, or a write would hide what lies below it."""
        if self.writable and self.shallow and top.backing is not None:
            message = f"{top.path!r} stands on {top.backing!r}: written alone, it would hide data of that"
            raise _invalid("shallow", self.shallow, message, "export it with its backing chain")
        return self._record(export_id, top, now, self._part(top))

    def refuse_local_options(self) -> None:
        """Raises JobError for what a network image cannot have."""
        if self.format not in (None, "raw"):
            message = f"a network image is exported as raw: no header is read from a server, and {self.format} has one"
            remedy = "export it as raw, and let the client open the format; or copy it into a file first"
            raise JobError("not_supported", message, field="format", value=self.format, remedy=remedy)
        for name in ("shallow", "bitmaps", "tcp", "tls"):
            if value := getattr(self, name):
                message = f"a network image cannot be exported with {name}"
                raise JobError("not_supported", message, field=name, value=value, remedy="leave it out")

    def network_record(self, export_id: str, image: Layer, now: datetime) -> ExportRecord:
        """Raises JobError invalid when no image has such a part; whether this one has it is known when it is opened."""
        part = None
        if self.offset is not None or self.size is not None:
            part = Part(self.offset or 0, self.size or 0)
            for field_, value in (("offset", part.offset), ("size", part.size)):
                _refuse_fraction(field_, value)
            if self.size == 0:
                raise _invalid("size", 0, "a part of 0 bytes", "say a part of the image")
        return self._record(export_id, image, now, part)

    def _record(self, export_id: str, top: Layer, now: datetime, part: Part | None) -> ExportRecord:
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
            size=part.size if part else top.virtual_size,
            part=part,
            max_clients=self.max_clients,
            bitmaps=self.bitmaps,
            tcp=self.tcp,
            tls=self.tls,
            ttl=self.ttl,
            idle_timeout=self.idle_timeout,
            expires=now + timedelta(seconds=self.ttl) if self.ttl else None,
            labels=self.labels,
        )

    def _part(self, top: Layer) -> Part | None:
        if self.offset is None and self.size is None:
            return None
        name = "size" if self.offset is None else "offset"
        if top.format != "raw":
            remedy = "leave it out, or export a raw image"
            raise _invalid(name, self.size, f"{top.path!r} is {top.format}: parts are for raw images", remedy)
        offset = self.offset or 0
        size = top.virtual_size - offset if self.size is None else self.size
        for field_, value in (("offset", offset), ("size", size)):
            _refuse_fraction(field_, value)
        if size <= 0 or offset + size > top.virtual_size:
            message = f"{size} bytes at {offset} are not within the {top.virtual_size} bytes of {top.path!r}"
            raise _invalid(name, offset if name == "offset" else size, message, "say a part of the image")
        return Part(offset, size)

    def matches(self, known: ExportRecord) -> ExportRecord:
        """The export that was made with the same id, if it was for the same request."""
        same = all(getattr(self, name) == getattr(known, name) for name in _COMPARED) and self._same_part(known.part)
        if not same or dict(self.labels) != dict(known.labels) or self.format not in (None, known.format):
            raise JobError(
                "conflict",
                f"export {known.id} exists with another request",
                field="id",
                value=known.id,
                remedy="choose another id, or leave it out",
            )
        return known

    def _same_part(self, part: Part | None) -> bool:
        if part is None:
            return self.offset is None and self.size is None
        return (self.offset or 0) == part.offset and self.size in (None, part.size)


_COMPARED = ("image", "shallow", "writable", "max_clients", "bitmaps", "tcp", "tls", "ttl", "idle_timeout")


def apart(record: ExportRecord, listener: TlsListener | None) -> Apart | None:
    """Whether the export needs a storage daemon of its own, and what is special about that."""
    if record.part is None and record.max_clients is None and not record.bitmaps and listener is None:
        return None
    return Apart(record.id, record.max_clients, record.part, listener)


def _refuse_fraction(name: str, value: int) -> None:
    if value % SECTOR:
        raise _invalid(name, value, f"{name} {value} is no multiple of {SECTOR}", "say one that is")


def _invalid(name: str, value: object, message: str, remedy: str) -> JobError:
    return JobError("invalid", message, field=name, value=value, remedy=remedy)
