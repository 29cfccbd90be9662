"""What a job's end means to others: its event, and what it changes in the ledger. Pure."""

from __future__ import annotations

from events.model import JobEvent, JobEventKind, Status
from jobs.errors import JobError
from jobs.model import Failure, Holder, Job, Need, State
from jobs.ports import AccessChange
from jobs.settle import classify

END_EVENTS = {
    State.COMPLETED: JobEventKind.COMPLETED,
    State.FAILED: JobEventKind.FAILED,
    State.ABORTED: JobEventKind.CANCELLED,
}


def job_event(job: Job, kind: JobEventKind) -> JobEvent:
    status = None
    if kind is JobEventKind.COMPLETED:
        status = Status.COMPLETED
    elif kind in (JobEventKind.FAILED, JobEventKind.CANCELLED):
        status = Status.FAILED
    error = job.error
    return JobEvent(
        kind=kind,
        job=job.id,
        operation=job.spec.operation,
        path=job.before.top.path,
        state=job.state,
        cur=job.cursor.cur,
        end=job.cursor.end,
        domain=job.drive.name if job.drive else "",
        disk=job.drive.target if job.drive else "",
        status=status,
        reason=error.code if error else None,
        error={"code": error.code, "message": error.message, "remedy": error.remedy} if error else None,
        origin=job.origin,
        labels=job.spec.labels,
    )


def access_change(job: Job, sharers: tuple[Holder, ...]) -> AccessChange:
    """What the ledger loses and gains with the job.

    Who shared the chain goes over to its new top with it. A job that did not complete leaves its backing chain to the
    image, and one that left the chain as it was changes nothing for anybody else. What a guest's disk depends on was
    given by libvirt, and stays its own to give.
    """
    image = Holder("image", job.before.top.path)
    if job.state is State.COMPLETED and job.dropped:
        known = {layer.file for layer in job.before.layers}
        new = [Need(layer, "r", f"{job.spec.operation} {job.id} put it on top") for layer in job.after.layers[:1]]
        gains = tuple((holder, need) for holder in sharers for need in new if need.layer.file not in known)
        forget = tuple(layer.file for layer in job.dropped)
        images = {image, Holder("image", job.after.top.path)}  # what it stands on now is proven, whoever noted the loss
        return AccessChange((job.holder, image), forget=forget, sharers=(*sharers, *sorted(images)), gains=gains)
    if job.state is State.COMPLETED or not job.started or job.drive is not None:
        return AccessChange((job.holder,))
    reason = f"job {job.id} is {job.state}: the image still depends on it"
    return AccessChange(
        (job.holder,), gains=tuple((image, Need(layer, "r", reason)) for layer in job.before.layers[1:])
    )


def failure_of(job: Job, error: JobError) -> Failure:
    """What stood in the way of a job, as its outcome will say it."""
    if error.code == "job_failed":
        return classify(job, error.message)
    return Failure(error.code, error.message, error.remedy)
