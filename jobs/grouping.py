"""Which copies may be asked for as one group, and what their jobs are called. Pure."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence

from jobs.errors import JobError
from jobs.model import FileId, Group, JobSpec, Operation, Plan
from jobs.world import Limits


def group_of(group_id: str | None, number: int) -> Group:
    """The group with this id; its jobs' ids follow from it, so that the same request leads to the same jobs."""
    group = uuid.UUID(group_id) if group_id else uuid.uuid4()
    return Group(str(group), tuple(str(uuid.uuid5(group, str(n))) for n in range(number)))


def refuse_unlike(specs: Sequence[JobSpec], limits: Limits) -> None:
    """Raise what is wrong with the request itself, whatever the images are."""
    if len(specs) > min(limits.group, limits.width):
        what, most = ("jobs.group", limits.group) if limits.group < limits.width else ("jobs.width", limits.width)
        message = f"a group has {most} disks at most ({what}): all of them are copied at once"
        raise JobError("limit", message, field="disks", value=len(specs), remedy=f"copy fewer, or raise {what}")
    if len(specs) < 2:
        raise JobError("invalid", "a group has two disks or more", field="disks", remedy="copy one disk alone")
    if any(spec.operation is not Operation.COPY for spec in specs) or len({spec.completion for spec in specs}) > 1:
        message = "a group is of copies that end in the same way"
        raise JobError("invalid", message, field="disks", remedy="leave the others out")


def refuse_overlap(specs: Sequence[JobSpec], plans: Sequence[Plan]) -> None:
    """Raise when two of the copies are of one disk, or one writes what another reads or writes."""
    if guests := [plan.drive for plan in plans if plan.drive is not None]:
        message = f"{guests[0]} is a guest's disk: a group is of images that no guest uses"
        raise JobError("not_supported", message, field="disks", remedy="copy each disk alone: they wait for each other")
    pairs = list(zip(specs, plans, strict=True))
    for (_, one), (other, plan) in itertools.combinations(pairs, 2):
        if one.before.top.file == plan.before.top.file:
            raise _twice("target", other.target, "is copied twice")
        if _place(one) == _place(plan):
            raise _twice("dest", other.dest, "is the target of two copies")
    for (_, one), (other, plan) in itertools.permutations(pairs, 2):
        if plan.target and plan.target.file in {layer.file for layer in one.before.layers}:
            raise _twice("dest", other.dest, f"belongs to the chain of {one.before.top.path!r}, which is copied too")


def _place(plan: Plan) -> FileId | str:
    assert plan.target is not None
    return plan.target.file or plan.target.path


def _twice(field: str, path: str | None, why: str) -> JobError:
    return JobError("invalid", f"{path!r} {why}", field=field, value=path, remedy="leave one out")
