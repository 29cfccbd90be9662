"""What is special about a copy: what the chain is when it is done, and what becomes of its target."""

from __future__ import annotations

from jobs.model import Chain, Completion, FileId, Job, JobSpec, Layer, Target, TargetState

NOT_YET = FileId(0, 0)
"""Stands for the identity of a file that is not made yet."""


def after(chain: Chain, spec: JobSpec, target: Target) -> Chain:
    """The chain after a pivot: the target on top. A copy that is only finished leaves the chain as it is."""
    if spec.completion is Completion.FINISH:
        return chain
    below = chain.layers[1:] if spec.shallow else ()
    top = chain.top
    backing = top.backing if spec.shallow else None
    file, size = target.file or NOT_YET, top.virtual_size
    return Chain((Layer(target.path, target.format, file, size, 0, backing, device=target.device), *below))


def ended(job: Job, *, completed: bool, deleted: bool) -> TargetState:
    """What the target is worth after the job; that of a decided member was whole before."""
    assert job.target is not None
    if completed or job.decided:
        return TargetState.COMPLETE
    if job.target.state is TargetState.UNTOUCHED:
        return TargetState.UNTOUCHED
    return TargetState.DELETED if deleted else TargetState.UNUSABLE
