"""settle: the one way to an outcome, for events, restarts and reconnects alike.

A terminal event brings a job here and says nothing more: what the image's header proves wins over everything that was
heard. For a pull, and for a commit below the top, the proof is a header that names the new base, or none. It is sound
because `finalize` makes all data durable *before* QEMU rewrites the header (a job is started with auto-finalize off for
this reason): the new header therefore means that nothing is missing, even when the storage daemon was killed a moment
later. Where no header changes (a copy, an active commit), the hypervisor's word counts once its result is sealed.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.machine import Signal
from jobs.model import Completion, Failure, Job, Operation
from jobs.ports import Contact, Observation, Phase

PIVOT_REFUSED = "pivot_refused"
GUEST_STOPPED = "guest_stopped"
WITHOUT_GUEST = (GUEST_STOPPED, "conflict", "not_found")
"""What is heard of a guest that has just ended, by who asks it for something."""


def again(job: Job) -> str:
    """What to do about a job that failed."""
    if job.spec.operation is Operation.COPY:
        return "start the copy again; the image is what it was"
    return f"start the {job.spec.operation} again: it goes on from what is already there"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`signal` None means that the job has not ended; LOST that nothing can be said now."""

    signal: Signal | None
    failure: Failure | None = None


def decide(job: Job, seen: Observation, failure: Failure | None = None) -> Verdict:
    """The outcome that one look at the job proves. `failure` is what the agent itself knows of why it ended."""
    if seen.contact is Contact.UNRESPONSIVE:
        return Verdict(Signal.LOST)
    if seen.contact is Contact.ALIVE and seen.phase not in (Phase.ABSENT, Phase.CONCLUDED):
        return Verdict(None)
    if job.decided:
        refused = _refused_pivot(job, seen, failure)
        return Verdict(Signal.PROVEN_FAILED if refused else Signal.PROVEN_COMPLETED, refused)
    # Of a job that ran, the header tells more than anything that was heard; unless there was nothing to change in it.
    if seen.proven and (failure is None or (job.started is not None and job.dropped)):
        return Verdict(Signal.PROVEN_COMPLETED)
    if job.intent == "abort":
        return Verdict(Signal.PROVEN_ABORTED, Failure("cancelled", "the job was aborted", again(job)))
    if seen.cancelled and failure is None:
        return Verdict(Signal.PROVEN_ABORTED, Failure("cancelled", seen.error or "somebody aborted it", again(job)))
    ended = job.drive is not None and seen.contact is Contact.DEAD
    if ended and failure is not None and failure.code in WITHOUT_GUEST:
        failure = None  # that its guest ended is less than what became of the image then
    return Verdict(Signal.PROVEN_FAILED, failure or explain(job, seen))


def _refused_pivot(job: Job, seen: Observation, failure: Failure | None) -> Failure | None:
    """Of a decided member whose daemon lives, and says that its job ended badly: who is there still uses the source.
    Nobody is where the daemon died, and a copy that is only finished needs no end of the job to be whole."""
    if job.completion is not Completion.PIVOT:
        return None
    if failure is not None and failure.code == PIVOT_REFUSED:
        return failure
    return pivot_refused(job, seen.error) if seen.contact is Contact.ALIVE and seen.error is not None else None


def pivot_refused(job: Job, why: str) -> Failure:
    """A member's end after the decision: its copy is whole and has its name, and the disk did not go over to it."""
    path, dest = job.before.top.path, job.target.path if job.target else ""
    return Failure(
        PIVOT_REFUSED,
        f"its group completed and the copy {dest!r} is whole, but QEMU refused to go over to it: {why}; "
        f"exports of {path!r} still read that image, which is what it was",
        f"stop the exports of {path} and export {dest} in its place; or delete the copy, and copy the disk again",
    )


def explain(job: Job, seen: Observation) -> Failure:
    """Why a job ended without its proof, for its user."""
    if job.drive is not None and seen.contact is Contact.DEAD:
        text = seen.error or f"domain {job.drive.name} ended while the job ran"
        return Failure(GUEST_STOPPED, text, again(job))
    if seen.error is not None:
        return classify(job, seen.error)
    if seen.contact is Contact.DEAD:
        return Failure("storage_daemon_died", "the storage daemon ended while the job ran", again(job))
    if seen.phase is Phase.CONCLUDED:
        return Failure(
            "unproven",
            f"the job ended without an error, but {job.before.top.path} does not show it: it still names its backing "
            "file, or is another file by now",
            f"inspect the image with `hostagent image inspect`, then {again(job)}",
        )
    return Failure("unproven", "the storage daemon does not know the job", again(job))


STORAGE = (
    "input/output error", "transport endpoint", "caused connection abort", "stale file handle", "no such device",
)  # fmt: skip
"""What a disk that is broken or gone makes QEMU say, or the server of a file system that died or forgot the file."""


def classify(job: Job, text: str) -> Failure:
    """QEMU's error text as a code. QEMU says "read" even where writing the overlay failed, so the text decides."""
    lower = text.lower()
    if "no space left" in lower or "disk quota" in lower:
        where = {Operation.PULL: "the overlay", Operation.COPY: "the target", Operation.COMMIT: "the base"}
        remedy = f"make space on the file system of {where[job.spec.operation]}; {again(job)}"
        return Failure("no_space", f"no space left: {text}", remedy)
    if any(words in lower for words in STORAGE):
        server = ", and at the target's server" if job.target is not None and job.target.network else ""
        return Failure("io_error", text, f"look at the storage below the chain (dmesg){server}; then {again(job)}")
    if "different sizes" in lower:
        size = job.before.top.virtual_size
        return Failure(
            "invalid", text, f"make the target exactly as large as the image ({size} bytes), then copy again"
        )
    if "permission denied" in lower:
        return Failure("denied", text, "run `hostagent doctor`")
    if "root block node" in lower and job.drive is not None:
        # A mirror that fails while QEMU 7.2 flushes the disks of a guest that it has just stopped, leaves its filter.
        remedy = "QEMU keeps the filter of a job that failed on this disk: shut the guest down, start it, and try again"
        return Failure("job_failed", text, remedy)
    return Failure("job_failed", text, again(job))
