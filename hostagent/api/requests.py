"""What a request asks for: its body as a spec, checked as far as that needs no look at the host. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from hostagent.nbd.export_spec import ExportSpec
from hostagent.nbd.uri import is_uri
from jobs.errors import JobError
from jobs.model import Completion, JobSpec, Operation

Json = dict[str, Any]


@contextlib.contextmanager
def about(field: str) -> Iterator[None]:
    """What is wrong with an image is said of the member of the request that named it."""
    try:
        yield
    except JobError as error:
        if error.field in (None, "path"):
            error.field = field
        raise


def job_spec(spec: Json, anywhere: bool) -> JobSpec:
    """What a job is asked to do; `anywhere` lets it name images outside of pools. JobError invalid, not_supported."""
    try:
        operation = Operation(spec["operation"])
    except ValueError:
        known = ", ".join(operation.value for operation in Operation)
        raise JobError(
            "invalid",
            f"operation {spec['operation']!r} is not known",
            field="operation",
            value=spec["operation"],
            remedy=f"one of {known}",
        ) from None
    for field in _FIELDS - _FIELDS_OF[operation]:
        if spec.get(field):
            remedy = f"leave it out: it is not for a {operation.value}"
            raise JobError("invalid", f"{field} and {operation.value}", field=field, value=spec[field], remedy=remedy)
    if operation is Operation.COPY and not spec.get("dest"):
        remedy = "say where the copy goes: an absolute path"
        raise JobError("invalid", "a copy without dest", field="dest", remedy=remedy)
    target = _target(spec["target"])
    if spec.get("synchronous_writes") and not is_guests(target):
        remedy = "leave it out; it is for the disk of a running guest (DOMAIN/DISK)"
        message = "nobody writes an image while it is copied, so there are no writes to wait for"
        raise JobError("invalid", message, field="synchronous_writes", value=True, remedy=remedy)
    completion = spec.get("completion")
    return JobSpec(
        operation=operation,
        target=target,
        base=spec.get("base"),
        top=spec.get("top"),
        dest=_dest(spec["dest"]) if spec.get("dest") else None,
        format=spec.get("format"),
        source_format=spec.get("source_format"),
        shallow=bool(spec.get("shallow")),
        reuse_external=bool(spec.get("reuse_external")),
        synchronous_writes=bool(spec.get("synchronous_writes")),
        completion=Completion(completion) if completion else None,
        delete=bool(spec.get("delete")),
        prune_bitmaps=bool(spec.get("prune_bitmaps")),
        increment=spec.get("increment"),
        bandwidth=spec.get("bandwidth") or 0,
        check=spec.get("check") or "auto",
        labels=spec.get("labels") or {},
        anywhere=anywhere,
    )


def group_specs(spec: Json, anywhere: bool) -> list[JobSpec]:
    """A group's copies, each with what the group has in common."""
    each = {key: value for key, value in spec.items() if key not in ("id", "disks")}
    return [job_spec({**each, "operation": Operation.COPY, **disk}, anywhere) for disk in spec["disks"]]


def export_spec(spec: Json) -> ExportSpec:
    """What is asked of an export. JobError invalid, not_supported."""
    return ExportSpec(
        image=spec["image"] if is_uri(spec["image"]) else offline(spec["image"], "image"),
        format=spec.get("format"),
        shallow=bool(spec.get("shallow")),
        writable=bool(spec.get("writable")),
        offset=spec.get("offset"),
        size=spec.get("size"),
        max_clients=spec.get("max_clients"),
        tcp=spec.get("tcp"),
        tls=spec.get("tls"),
        bitmaps=tuple(dict.fromkeys(spec.get("bitmaps") or ())),
        ttl=spec.get("ttl"),
        idle_timeout=spec.get("idle_timeout"),
        labels=spec.get("labels") or {},
    )


def _dest(dest: str) -> str:
    return dest if is_uri(dest) else offline(dest, "dest")


_FIELDS_OF = {
    Operation.PULL: {"base", "increment"},
    Operation.COPY: {
        *("dest", "format", "source_format", "shallow", "reuse_external", "synchronous_writes", "completion")
    },
    Operation.COMMIT: {"base", "top", "delete", "prune_bitmaps", "completion"},
}
_FIELDS = set().union(*_FIELDS_OF.values())


def is_guests(target: str) -> bool:
    """Whether it reads as DOMAIN/DISK."""
    domain, slash, disk = target.partition("/")
    return bool(domain and slash and disk) and not domain.startswith(".") and "://" not in target


def _target(target: str) -> str:
    return target if is_guests(target) else offline(target, "target")


def offline(target: str, field: str) -> str:
    """The absolute path of an image, which `field` of the request must name. JobError invalid, not_supported."""
    if target.startswith("/"):
        return target
    if "://" in target:
        raise _network(target, field)
    if is_guests(target):
        raise JobError(
            "not_supported",
            f"{target!r} is a domain's disk: only jobs work on those, not yet this",
            field=field,
            value=target,
            remedy="give the absolute path of an image that no guest uses",
        )
    raise JobError("invalid", f"{target!r} is no target", field=field, value=target, remedy="give an absolute path")


def _network(target: str, field: str) -> JobError:
    """The URI is not repeated: it may have a password."""
    if field == "image":
        remedy = "write nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH"
        return JobError("not_supported", "URIs of this kind cannot be exported", field=field, remedy=remedy)
    remedy = "a network image can be exported, and be where a copy goes; copy it into a file for anything else"
    return JobError("not_supported", "a network image cannot be used here", field=field, remedy=remedy)


def id_of(spec: Json) -> str | None:
    """The id that the caller chose."""
    return str(spec["id"]) if spec.get("id") else None
