"""The names that other programs know: the states of a job, and what stands beside an outcome."""

from __future__ import annotations

from pathlib import Path

from events.model import JobEventKind, Status
from hostagent.errors import CODES
from jobs.machine import TRANSITIONS
from jobs.model import Operation, Revocation, State
from jobs.outcome import END_EVENTS

PUBLISHED = (Path(__file__).parent / "states.txt").read_text().split()


def test_the_states_are_the_published_ones() -> None:
    assert sorted(State) == sorted(PUBLISHED)
    assert set(TRANSITIONS) == set(State)


def test_the_terminal_states_are_the_three_outcomes() -> None:
    assert {state for state in State if state.terminal} == {"completed", "failed", "aborted"}


def test_every_outcome_has_its_event_and_the_proposals_status() -> None:
    assert END_EVENTS == {
        State.COMPLETED: JobEventKind.COMPLETED,
        State.FAILED: JobEventKind.FAILED,
        State.ABORTED: JobEventKind.CANCELLED,
    }
    assert set(Status) == {"COMPLETED", "FAILED"}
    assert set(JobEventKind) == {"started", "progress", "ready", "completed", "failed", "cancelled"}


def test_operations_and_revocations_are_the_published_ones() -> None:
    assert set(Operation) == {"pull", "copy", "commit"}
    assert set(Revocation) == {"none", "pending", "done", "kept", "failed"}


def test_the_exit_statuses_are_the_published_ones() -> None:
    exits = {code: value.exit for code, value in CODES.items()}
    assert set(exits.values()) <= {1, 2, 3, 4, 5, 6, 7, 8}
    expected = {"invalid": 2, "not_found": 3, "job_failed": 4, "timeout": 5, "busy": 6, "conflict": 6, "denied": 7}
    assert {code: exits[code] for code in expected} == expected
