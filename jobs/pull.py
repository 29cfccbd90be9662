"""What is special about a pull: which layers it takes in, what proves it, and where an increment ends."""

from __future__ import annotations

from jobs.errors import JobError
from jobs.model import Chain, Job, Layer


def resolve_base(chain: Chain, base: str | None) -> Layer | None:
    """The layer that stays as backing file; None for a whole pull. `base` must be a member below the top."""
    if base is None:
        return None
    for layer in chain.layers[1:]:
        if layer.path == base:
            return layer
    members = ", ".join(repr(path) for path in chain.paths()[1:]) or "none: the image has no backing file"
    raise JobError(
        "invalid",
        f"base {base!r} is not below {chain.top.path!r}",
        field="base",
        value=base,
        remedy=f"name one of the chain's members ({members})",
    )


def after(chain: Chain, base: Layer | None) -> Chain:
    """The chain when the pull is done: the top, and what stays below it."""
    if base is None:
        return Chain(chain.layers[:1])
    index = chain.layers.index(base)
    return Chain((chain.top, *chain.layers[index:]))


def proven(job: Job, backing: str | None, resolved: str | None) -> bool:
    """Whether a header that names `backing` (found at path `resolved`) shows the chain after the pull."""
    if len(job.after.layers) == 1:
        return backing is None
    return resolved == job.after.layers[1].path


def goal(job: Job, cursor: int | None = None) -> int:
    """Where the increment ends that begins at `cursor` (default: where the job is)."""
    begin = job.cursor.cur if cursor is None else cursor
    assert job.spec.increment is not None
    return min(begin + job.spec.increment, job.cursor.end)
