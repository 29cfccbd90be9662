"""The life of a job, as a table.

Two rules. Every change of state is in TRANSITIONS, and nothing else changes a state. The table knows nothing of how a
signal came about: an event, a look at the image, a user's request and a restart feed the same `step`.

    queued → starting → running ⇄ paused        running → waiting → queued   (incremental pull)
    anything that may end → completing | aborting → completed | failed | aborted
    contact lost → unknown → running | paused | completing | aborting

An outcome is only reached through completing or aborting, so that "the end was seen" and "the end is proven" are never
one step. A signal that does not fit is a JobError `conflict` and changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from jobs.errors import JobError
from jobs.model import Job, State


class Signal(StrEnum):
    ADMIT = "admit"  # a slot is free
    STARTED = "started"  # the block job runs
    STEPPED = "stepped"  # an increment is durable, and is not the last
    NEXT = "next"  # the user wants the next increment
    PAUSED = "paused"
    RESUMED = "resumed"
    IN_SYNC = "in_sync"  # a mirror is ready
    ABORT = "abort"  # the user wants it to end
    ENDED = "ended"  # an end was requested or seen
    LOST = "lost"  # no answer
    PROVEN_COMPLETED = "proven_completed"
    PROVEN_FAILED = "proven_failed"
    PROVEN_ABORTED = "proven_aborted"


_ENDING = {
    Signal.PROVEN_COMPLETED: State.COMPLETED,
    Signal.PROVEN_FAILED: State.FAILED,
    Signal.PROVEN_ABORTED: State.ABORTED,
    Signal.LOST: State.UNKNOWN,
}
_MAY_END = {Signal.ABORT: State.ABORTING, Signal.ENDED: State.COMPLETING}

TRANSITIONS: dict[State, dict[Signal, State]] = {
    State.QUEUED: {Signal.ADMIT: State.STARTING, **_MAY_END},
    State.STARTING: {Signal.STARTED: State.RUNNING, Signal.LOST: State.UNKNOWN, **_MAY_END},
    State.RUNNING: {
        Signal.PAUSED: State.PAUSED,
        Signal.STEPPED: State.WAITING,
        Signal.IN_SYNC: State.READY,
        Signal.LOST: State.UNKNOWN,
        **_MAY_END,
    },
    State.PAUSED: {Signal.RESUMED: State.RUNNING, Signal.LOST: State.UNKNOWN, **_MAY_END},
    State.WAITING: {Signal.NEXT: State.QUEUED, **_MAY_END},
    State.READY: {Signal.LOST: State.UNKNOWN, **_MAY_END},
    State.COMPLETING: {**_ENDING, Signal.STARTED: State.RUNNING, Signal.ABORT: State.ABORTING},
    State.ABORTING: _ENDING,
    State.UNKNOWN: {Signal.STARTED: State.RUNNING, Signal.PAUSED: State.PAUSED, **_MAY_END},
    State.COMPLETED: {},
    State.FAILED: {},
    State.ABORTED: {},
}

HOLDS_SLOT = frozenset({State.STARTING, State.RUNNING, State.PAUSED, State.READY, State.COMPLETING, State.ABORTING})
"""States in which a job counts against `jobs.width`."""


def accepts(job: Job, signal: Signal) -> bool:
    return signal in TRANSITIONS[job.state]


def step(job: Job, signal: Signal, at: datetime, **changes: Any) -> Job:
    """The job after `signal`, with `changes` to its other fields. Raises JobError and leaves the job as it was."""
    target = TRANSITIONS[job.state].get(signal)
    if target is None:
        raise JobError(
            "conflict",
            f"job {job.id} is {job.state}: {signal} does not apply",
            remedy="look at it again with `hostagent job show`",
            state=job.state.value,
        )
    return replace(job, state=target, since=at, revision=job.revision + 1, **changes)


def diagram() -> str:
    """The table as Markdown, for the documents."""
    rows = ["| state | signal | becomes |", "|---|---|---|"]
    for state, signals in TRANSITIONS.items():
        rows += [f"| {state} | {signal} | {after} |" for signal, after in signals.items()]
    return "\n".join(rows)
