"""The JSON that goes in and out, as OpenAPI shows it.

Requests are strict: an unknown field, a text where a number belongs, or anything over its bound is refused with the
field's name. Responses are documentation: what the service says is sent as it is, and may have more keys than stand
here. Sizes and cursors are bytes, rates bytes per second, durations seconds, times RFC 3339 UTC.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from hostagent.api.problem import nearest

PATH_MAX = 4096  # PATH_MAX of Linux
INT_MAX = 2**63 - 1  # what QEMU (int64) and SQLite can hold

Text = Annotated[str, Field(min_length=1, max_length=PATH_MAX, pattern=r"^[^\x00]+$")]
Name = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
BitmapName = Annotated[str, Field(min_length=1, max_length=1023, pattern=r"^[^\x00-\x1f\x7f]+$")]
LabelKey = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^=\x00-\x1f\x7f]+$")]
LabelValue = Annotated[str, Field(max_length=256)]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=32)]
Bytes = Annotated[int, Field(ge=0, le=INT_MAX)]
Seconds = Annotated[float, Field(gt=0, le=10 * 365 * 86400, allow_inf_nan=False)]
Id = Annotated[UUID, Field(strict=False, description="Chosen by the caller, so that a retry is safe.")]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    remedy = nearest(str(name), list(cls.model_fields))
                    raise PydanticCustomError("unknown_field", "unknown field", {"name": str(name), "remedy": remedy})
        return data

    def spec(self) -> dict[str, Any]:
        """What the caller said, in JSON types; what he left out is not there."""
        return self.model_dump(mode="json", exclude_none=True)


class JobCreate(Request):
    operation: Annotated[str, Field(min_length=1, max_length=32, examples=["pull"])]
    target: Annotated[Text, Field(description="An absolute path of an offline image, or DOMAIN/DISK.")]
    id: Id | None = None
    base: Annotated[
        Text | None,
        Field(description="The layer to stop at; it stays. Of a guest's disk also as vda[N]. Default: none."),
    ] = None
    increment: Annotated[int | None, Field(gt=0, le=INT_MAX, description="Bytes for each `next`.")] = None
    bandwidth: Annotated[Bytes | None, Field(description="Bytes per second; 0 is no limit.")] = None
    check: Literal["auto", "always", "never"] | None = None
    labels: Labels | None = None
    dry_run: Annotated[bool | None, Field(description="Say what would happen, change nothing.")] = None
    dest: Annotated[Text | None, Field(description="Copy: where to, an absolute path or an NBD URI.")] = None
    format: Annotated[Literal["raw", "qcow2"] | None, Field(description="Copy: the target's; default the image's.")] = (
        None
    )
    source_format: Annotated[Literal["raw", "qcow2"] | None, Field(description="Copy: needed for a raw image.")] = None
    shallow: Annotated[bool | None, Field(description="Copy: the top layer alone; the backing file is shared.")] = None
    reuse_external: Annotated[bool | None, Field(description="Copy: write over what exists.")] = None
    synchronous_writes: Annotated[
        bool | None,
        Field(description="Copy of a guest's disk: each of its writes waits for the copy, too."),
    ] = None
    top: Annotated[Text | None, Field(description="Commit: the highest layer that goes down. Default: the image.")] = (
        None
    )
    delete: Annotated[bool | None, Field(description="Commit: delete what is committed.")] = None
    prune_bitmaps: Annotated[
        bool | None, Field(description="Commit: remove all bitmaps of the base before anything is committed.")
    ] = None
    completion: Annotated[
        Literal["pivot", "finish"] | None,
        Field(description="How a ready job ends: the disk goes over, or stays (a commit keeps its overlay)."),
    ] = None


class Disk(Request):
    target: Annotated[Text, Field(description="An absolute path of an offline image.")]
    dest: Annotated[Text, Field(description="Where to, an absolute path.")]
    format: Annotated[Literal["raw", "qcow2"] | None, Field(description="The target's; default the image's.")] = None
    source_format: Annotated[Literal["raw", "qcow2"] | None, Field(description="Needed for a raw image.")] = None


class GroupCreate(Request):
    """Copies that complete together or not at all. What is said beside `disks` is said of each."""

    disks: Annotated[list[Disk], Field(min_length=2, max_length=100)]
    id: Id | None = None
    bandwidth: Annotated[Bytes | None, Field(description="Bytes per second of each; 0 is no limit.")] = None
    check: Literal["auto", "always", "never"] | None = None
    labels: Labels | None = None
    dry_run: Annotated[bool | None, Field(description="Say what would happen, change nothing.")] = None
    shallow: Annotated[bool | None, Field(description="The top layers alone; the backing files are shared.")] = None
    reuse_external: Annotated[bool | None, Field(description="Write over what exists.")] = None
    completion: Annotated[
        Literal["pivot", "finish"] | None, Field(description="How all of them end, once all are ready.")
    ] = None


class CompleteBody(Request):
    completion: Literal["pivot", "finish"] | None = None


class JobPatch(Request):
    bandwidth: Annotated[Bytes, Field(description="Bytes per second; 0 is no limit.")]


class NextBody(Request):
    cursor: Annotated[Bytes | None, Field(description="A job that is already past it only answers.")] = None


class AbortBody(Request):
    force: bool = False


class EmptyBody(Request):
    pass


class DrainBody(Request):
    pause: Annotated[bool, Field(description="Pause the running jobs instead of waiting for their ends.")] = False


class ExportCreate(Request):
    image: Annotated[
        Text,
        Field(
            description="An absolute path of an offline image; or nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH,"
            " whose server images.network lists: exported as raw, without bitmaps and TCP."
        ),
    ]
    id: Id | None = None
    format: Literal["raw", "qcow2"] | None = None
    shallow: Annotated[bool | None, Field(description="Only this layer, not its backing chain.")] = None
    writable: bool | None = None
    bitmaps: Annotated[list[Name] | None, Field(max_length=64)] = None
    offset: Annotated[Bytes | None, Field(description="Raw images: where the part begins, in bytes.")] = None
    size: Annotated[Bytes | None, Field(description="Raw images: the part's bytes. Default: to the end.")] = None
    max_clients: Annotated[
        int | None, Field(ge=1, le=10000, description="Connections at a time; one more waits for its turn.")
    ] = None
    tcp: Annotated[
        Name | None, Field(description="`auto`, PORT or HOST:PORT: over TCP, with `tls`, instead of a unix socket.")
    ] = None
    tls: Literal["x509", "psk"] | None = None
    ttl: Annotated[Seconds | None, Field(description="Stopped after this time.")] = None
    idle_timeout: Annotated[Seconds | None, Field(description="Stopped when no client was there for so long.")] = None
    labels: Labels | None = None


class BitmapCreate(Request):
    name: BitmapName
    granularity: Annotated[
        int | None, Field(gt=0, le=1 << 31, description="Bytes of one bit, a power of two from 512. Default: QEMU's.")
    ] = None
    disabled: Annotated[bool | None, Field(description="Does not record what the next guest writes.")] = None


class BitmapMerge(Request):
    name: Annotated[BitmapName, Field(description="The bitmap that the bits come into.")]
    source_name: Annotated[BitmapName, Field(description="The bitmap that they come from, which stays as it is.")]
    source: Annotated[Text | None, Field(description="The image that has it. Default: the same.")] = None


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class Problem(Answer):
    """RFC 9457. `code` is stable; `remedy` says what to do."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    remedy: str | None = None
    field: str | None = None
    value: str | None = None


class Cursor(Answer):
    cur: int
    end: int


class Failure(Answer):
    code: str
    message: str
    remedy: str | None


class Kept(Answer):
    path: str
    reason: str
    holders: list[str]


class Target(Answer):
    path: str
    format: str
    state: Literal["untouched", "writing", "complete", "unusable", "deleted"]


class Chain(Answer):
    before: list[str]
    after: list[str]
    revoked: list[str]
    kept: list[Kept]


class GroupOf(Answer):
    id: str
    jobs: list[str]


class Job(Answer):
    id: str
    operation: Literal["pull", "copy", "commit"]
    target: str
    path: str
    domain: str
    disk: str
    state: Literal[
        "queued",
        "starting",
        "running",
        "paused",
        "waiting",
        "ready",
        "completing",
        "aborting",
        "completed",
        "failed",
        "aborted",
        "unknown",
    ]
    cursor: Cursor
    upto: int | None
    bandwidth: int
    base: str | None
    increment: int | None
    dest: Target | None
    synchronous_writes: Annotated[bool, Field(description="Whether a guest's writes wait for the copy, too.")]
    completion: Literal["pivot", "finish"] | None
    group: Annotated[GroupOf | None, Field(description="Those that it completes with, or not at all.")]
    check: str
    labels: dict[str, str]
    origin: str
    revision: int
    created: datetime
    since: datetime
    started: datetime | None
    finished: datetime | None
    error: Failure | None
    revocation: Literal["none", "pending", "done", "kept", "failed"]
    chain: Chain
    rate: float | None
    eta: float | None
    stalled_seconds: float
    warnings: list[str]


class Client(Answer):
    """A client on another host is an address, without a process."""

    pid: int | None
    name: str
    uid: int | None


class Export(Answer):
    id: str
    image: str
    uri: str
    socket: str
    name: str
    format: str
    size: int
    offset: int
    shallow: bool
    writable: bool
    max_clients: int | None
    bitmaps: list[str]
    tls: Literal["x509", "psk"] | None
    port: int | None
    state: str
    reason: str | None
    created: datetime
    stopped: datetime | None
    expires: datetime | None
    ttl: float | None
    idle_timeout: float | None
    clients: list[Client]
    daemon: str | None
    pid: int | None
    labels: dict[str, str]
    revision: int


class Holder(Answer):
    kind: str
    id: str
    name: Annotated[str | None, Field(description="What people call a domain's disk: web1/vda.")] = None


class Grant(Answer):
    id: str
    path: str
    mode: Literal["r", "rw"]
    holder: Holder
    since: datetime
    reason: str
    access: Literal["acl", "owner", "none"]
    given: Annotated[
        Literal["r", "rw"] | None, Field(description="What the hypervisor user may do by the ACL that the agent set.")
    ]
    state: str
    detail: str | None


class JobPage(Answer):
    items: list[Job]
    next: Annotated[str | None, Field(description="The next page's `after`, none on the last page.")]


class Group(Answer):
    id: str
    jobs: list[Job]


class ExportPage(Answer):
    items: list[Export]
    next: str | None


class GrantPage(Answer):
    items: list[Grant]
    next: str | None


class Check(Answer):
    ok: bool
    detail: str
    remedy: str | None = None


class Ready(Answer):
    ready: bool
    checks: dict[str, Check]


class Health(Answer):
    ok: bool


class Host(Answer):
    host: str
    version: str


class DrainJob(Answer):
    id: str
    operation: str
    target: str
    state: str
    cursor: Cursor


class DrainExport(Answer):
    id: str
    image: str
    state: str
    clients: list[Client]


class Drain(Answer):
    """`drained`: nothing holds any more. `paused` are the jobs that draining has paused; `revocations` counts files,
    `beginning` requests that were let in before."""

    draining: bool
    since: datetime | None
    pause: bool
    paused: list[str]
    drained: bool
    jobs: list[DrainJob]
    exports: list[DrainExport]
    revocations: int
    beginning: int


class Bitmap(Answer):
    name: str
    granularity: int
    recording: bool
    state: Literal["consistent", "inconsistent", "in use"]


class BitmapList(Answer):
    """`holders` have the image open for writing, null when nobody has; `lost`: a program that knows no bitmaps changed
    the image, and its bitmaps are gone."""

    path: str
    items: list[Bitmap]
    lost: bool
    holders: list[str] | None


class Image(Answer):
    """What is known about an image and its backing chain, top first."""
