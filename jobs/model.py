"""The nouns of a job: what is asked, what the chain looks like, how far it is, how it ended.

Everything here is a frozen value. Sizes and cursors are bytes of the virtual disk, rates bytes per second, times UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple


class Operation(StrEnum):
    PULL = "pull"
    COPY = "copy"
    COMMIT = "commit"


EXTERNAL = "external"
"""The origin of a job that somebody else started."""


class State(StrEnum):
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    WAITING = "waiting"
    READY = "ready"
    COMPLETING = "completing"
    ABORTING = "aborting"
    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"

    @property
    def terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({State.COMPLETED, State.FAILED, State.ABORTED})


class Completion(StrEnum):
    """How a job that is ready ends: the disk goes over to the result, or stays where it is."""

    PIVOT = "pivot"
    FINISH = "finish"


class Revocation(StrEnum):
    NONE = "none"
    PENDING = "pending"
    DONE = "done"
    KEPT = "kept"
    FAILED = "failed"


NETWORK = -(1 << 62)
"""In place of a device number: of an image that another host or program serves. No file system has it."""


class FileId(NamedTuple):
    """A file's identity: what stays when a path is swapped. Device number and inode, as in stat(2); of a network image
    NETWORK, and a number for its URI."""

    dev: int
    ino: int

    @property
    def network(self) -> bool:
        return self.dev == NETWORK

    def __str__(self) -> str:
        return f"{self.dev}:{self.ino}"


@dataclass(frozen=True, slots=True)
class Layer:
    """One image file of a chain. `backing` is the name as the header has it, None at the bottom of the chain; `device`
    says that it is a block device.

    `length` is the file's when it was looked at, `mtime_ns` when it was last written (nanoseconds since 1970), as of
    the moment from which nobody else has a right to write it; 0 where that is not known. Neither says which layer this
    is.
    """

    path: str
    format: str
    file: FileId
    virtual_size: int
    allocated: int
    backing: str | None = None
    device: bool = False
    length: int = field(default=0, compare=False)
    mtime_ns: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Chain:
    """A backing chain, top (the overlay that is named) first, base last."""

    layers: tuple[Layer, ...]

    @property
    def top(self) -> Layer:
        return self.layers[0]

    def paths(self) -> list[str]:
        return [layer.path for layer in self.layers]


class Cursor(NamedTuple):
    """`cur` of `end` bytes. `cur == end` alone says nothing about success."""

    cur: int = 0
    end: int = 0


START = Cursor()


class Holder(NamedTuple):
    """Who needs a file: kind `job`, `export`, `domain`, or `image` (an overlay, by path, that still depends on it)."""

    kind: str
    id: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.id}"


class Need(NamedTuple):
    """A file that a holder must be able to open, `r` or `rw`."""

    layer: Layer
    mode: str
    reason: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that is no longer needed and could still be opened, and why."""

    path: str
    reason: str
    holders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job did not do what was asked."""

    code: str
    message: str
    remedy: str | None = None


class TargetState(StrEnum):
    """What the target of a copy is worth. One that was there before is untouched until it may be written."""

    UNTOUCHED = "untouched"
    WRITING = "writing"
    COMPLETE = "complete"
    UNUSABLE = "unusable"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a copy goes: a file or an NBD URI. `made` says that it is our file: until it is complete it lies at `part`,
    and gets its name only then, so that the name itself is the proof. `device` says that it is a block device, `fresh`
    that it was empty, and a new image is made on it."""

    path: str
    format: str
    made: bool
    state: TargetState = TargetState.WRITING
    part: str | None = None
    file: FileId | None = None
    device: bool = False
    fresh: bool = False

    @property
    def network(self) -> bool:
        """It is a URI: what is there is its server's."""
        return not self.made and self.file is None


@dataclass(frozen=True, slots=True)
class Drive:
    """A disk of a domain: the domain's UUID, its name when the job was planned, and the disk's target (vda)."""

    uuid: str
    name: str
    target: str

    def __str__(self) -> str:
        return f"{self.name}/{self.target}"


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What the caller asks. `increment` (bytes) makes a pull incremental; `bandwidth` 0 is no limit; `anywhere` says
    that this caller may name an image outside the pools. `completion` None lets a job stay ready until it is asked;
    with `synchronous_writes` a guest's write is done when the copy has it, too."""

    operation: Operation
    target: str
    base: str | None = None
    top: str | None = None
    dest: str | None = None
    format: str | None = None
    source_format: str | None = None
    shallow: bool = False
    reuse_external: bool = False
    synchronous_writes: bool = False
    completion: Completion | None = None
    delete: bool = False
    prune_bitmaps: bool = False
    increment: int | None = None
    bandwidth: int = 0
    check: str = "auto"
    labels: Mapping[str, str] = field(default_factory=dict)
    anywhere: bool = True


@dataclass(frozen=True, slots=True)
class Group:
    """Copies that complete together or not at all: its id, and its jobs as they were asked for."""

    id: str
    jobs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One job, whole. `revision` grows with each change; `upto` is where the present increment ends; `intent` is
    `abort` once an abort was asked for, and `since` when the present state began. `completion` is set once the end of
    a ready job was asked for.

    `drive` is set when the job works on a disk of a running guest, and not on an image that nobody has open.

    In a group `sealed` is set when the target is whole and durable, and says for which end; `completion` is stored for
    all its jobs in one transaction, when all targets have their names: that is the group's decision.
    """

    id: str
    spec: JobSpec
    state: State
    created: datetime
    since: datetime
    before: Chain
    after: Chain
    origin: str = "agent"
    revision: int = 1
    cursor: Cursor = START
    upto: int | None = None
    bandwidth: int = 0
    intent: str | None = None
    target: Target | None = None
    completion: Completion | None = None
    group: Group | None = None
    sealed: Completion | None = None
    started: datetime | None = None
    ready: datetime | None = None
    finished: datetime | None = None
    error: Failure | None = None
    revocation: Revocation = Revocation.NONE
    revoked: tuple[str, ...] = ()
    kept: tuple[Kept, ...] = ()
    warnings: tuple[str, ...] = ()
    drive: Drive | None = None

    @property
    def external(self) -> bool:
        """Somebody else started it: it is followed to its end, and never interfered with."""
        return self.origin == EXTERNAL

    @property
    def incremental(self) -> bool:
        return self.spec.increment is not None

    @property
    def dropped(self) -> tuple[Layer, ...]:
        """The layers that the chain loses when this job completes."""
        stays = {layer.file for layer in self.after.layers}
        return tuple(layer for layer in self.before.layers if layer.file not in stays)

    @property
    def holder(self) -> Holder:
        return Holder("job", self.id)

    @property
    def decided(self) -> bool:
        """Of a member: that the whole group completes, whatever happens from now on."""
        return self.group is not None and self.completion is not None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job would do, found without changing anything."""

    before: Chain
    after: Chain
    size: int
    warnings: tuple[str, ...] = ()
    preview: Mapping[str, Any] = field(default_factory=dict)
    target: Target | None = None
    drive: Drive | None = None
