"""What is special about a commit: which layers go down into which, and what the chain is when that is done."""

from __future__ import annotations

from jobs.errors import JobError
from jobs.model import Chain, Completion, Job, JobSpec, Layer


def resolve(chain: Chain, spec: JobSpec) -> tuple[Layer, Layer]:
    """Top and base: all from top down to just above base is committed into base."""
    if len(chain.layers) == 1:
        remedy = "there is nothing to commit into"
        raise JobError("invalid", f"{chain.top.path!r} has no backing file", field="target", remedy=remedy)
    top = chain.top if spec.top is None else _member(chain, spec.top, "top")
    base = chain.layers[-1] if spec.base is None else _member(chain, spec.base, "base")
    if chain.layers.index(base) <= chain.layers.index(top):
        raise JobError(
            "invalid",
            f"base {base.path!r} is not below {top.path!r}",
            field="base",
            value=base.path,
            remedy="name a layer further down in the chain",
        )
    return top, base


def _member(chain: Chain, path: str, field: str) -> Layer:
    for layer in chain.layers:
        if layer.path == path:
            return layer
    members = ", ".join(repr(member) for member in chain.paths())
    raise JobError(
        "invalid",
        f"{field} {path!r} is not in the chain of {chain.top.path!r}",
        field=field,
        value=path,
        remedy=f"name one of the chain's members ({members})",
    )


def after(chain: Chain, spec: JobSpec) -> Chain:
    """The chain when the commit is done. With the overlay kept it is what it was."""
    top, base = resolve(chain, spec)
    above, below = chain.layers[: chain.layers.index(top)], chain.layers[chain.layers.index(base) :]
    if not above and spec.completion is Completion.FINISH:
        return chain
    return Chain((*above, *below))


def touched(chain: Chain, spec: JobSpec) -> tuple[Layer, ...]:
    """The layers on which nobody else may stand: base, whose content changes, and what stands on it up to top.

    What top itself shows stays the same (it still holds its own data), so others may stand on it unless it is deleted.
    """
    top, base = resolve(chain, spec)
    first = chain.layers.index(top) + (0 if spec.delete else 1)
    return chain.layers[first : chain.layers.index(base) + 1]


def parent(job: Job) -> Layer | None:
    """The layer above top, whose header will name base; None for an active commit."""
    top, _ = resolve(job.before, job.spec)
    index = job.before.layers.index(top)
    return job.before.layers[index - 1] if index else None
