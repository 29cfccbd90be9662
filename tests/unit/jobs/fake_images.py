"""What outlives an agent, in memory: images with their headers, storage daemons, block jobs; and what jobs do to them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from jobs import commit
from jobs.model import Chain, FileId, Holder, Job, Layer, Operation
from jobs.ports import Phase


@dataclass(slots=True)
class BlockJob:
    """What a storage daemon knows of its job."""

    end: int
    cur: int = 0
    phase: Phase = Phase.RUNNING
    error: str | None = None
    speed: int = 0


@dataclass(slots=True)
class Daemon:
    """A storage daemon; it goes on when the engine stops. `beside` is a copy's target that it has open."""

    blocks: dict[str, BlockJob] = field(default_factory=dict)
    beside: FileId | None = None


@dataclass(slots=True)
class Image:
    """An image on disk, named by its top, and the prepared chain that stands on it."""

    chain: Chain
    backing: str | None
    users: set[Holder] = field(default_factory=set)
    prepared: bool = False
    daemon: Daemon | None = None
    answers: bool = True
    relinked: dict[str, str | None] = field(default_factory=dict)
    """Headers below the top that were rewritten."""
    moved: Image | None = None
    """What the chain became by a pivot."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain as the headers have it now."""
        members = {layer.path: layer for layer in self.chain.layers}
        below = {one.path: other.path for one, other in itertools.pairwise(self.chain.layers)} | self.relinked
        found, name = [self.chain.top], self.backing
        while name is not None:
            found.append(members[name])
            name = below.get(name)
        return tuple(found)

    def header(self, path: str) -> str | None:
        """The backing file that this layer's header names."""
        layers = (*self.layers, None)
        return next(
            (below.path if below else None for one, below in itertools.pairwise(layers) if one and one.path == path),
            None,
        )

    def rewrite(self, path: str, backing: str | None) -> None:
        if path == self.chain.top.path:
            self.backing = backing
        else:
            self.relinked[path] = backing


def becomes_ready(job: Job) -> bool:
    """Whether its block job waits to be told how it ends."""
    return job.spec.operation is Operation.COPY or (
        job.spec.operation is Operation.COMMIT and commit.parent(job) is None
    )


def rewritten(job: Job) -> tuple[str, str | None]:
    """Whose header names the end of the job, and what it names then."""
    if job.spec.operation is Operation.PULL:
        return job.before.top.path, job.after.layers[1].path if len(job.after.layers) > 1 else None
    parent = commit.parent(job)
    assert parent is not None
    return parent.path, commit.resolve(job.before, job.spec)[1].path


def written(job: Job) -> FileId:
    """The file that has the job's result: a copy's target, a commit's base."""
    if job.target is not None:
        assert job.target.file is not None
        return job.target.file
    return commit.resolve(job.before, job.spec)[1].file


def part_of(job: Job) -> str:
    return f"{job.spec.dest}.part-{job.id}"
