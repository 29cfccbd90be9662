from __future__ import annotations

from datetime import UTC, datetime

import pytest

from jobs.errors import JobError
from jobs.machine import HOLDS_SLOT, TRANSITIONS, Signal, accepts, diagram, step
from jobs.model import TERMINAL, Chain, FileId, Job, JobSpec, Layer, Operation, State

THEN = datetime(2026, 1, 1, tzinfo=UTC)
NOW = datetime(2026, 1, 2, tzinfo=UTC)
PAIRS = [(state, signal) for state in State for signal in Signal]

# The life of a job as the contract tells it, written down a second time and by hand.
LIFE = {
    "queued": "admit:starting abort:aborting ended:completing",
    "starting": "started:running lost:unknown abort:aborting ended:completing",
    "running": "paused:paused stepped:waiting in_sync:ready lost:unknown abort:aborting ended:completing",
    "paused": "resumed:running lost:unknown abort:aborting ended:completing",
    "waiting": "next:queued abort:aborting ended:completing",
    "ready": "lost:unknown abort:aborting ended:completing",
    "completing": "proven_completed:completed proven_failed:failed proven_aborted:aborted lost:unknown "
    "started:running abort:aborting",
    "aborting": "proven_completed:completed proven_failed:failed proven_aborted:aborted lost:unknown",
    "unknown": "started:running paused:paused abort:aborting ended:completing",
    "completed": "",
    "failed": "",
    "aborted": "",
}


def job(state: State) -> Job:
    layer = Layer("/a", "qcow2", FileId(1, 2), 100, 100)
    return Job("j", JobSpec(Operation.PULL, "/a"), state, THEN, THEN, Chain((layer,)), Chain((layer,)))


def legal(state: State) -> dict[str, str]:
    return dict(pair.split(":") for pair in LIFE[state].split())


@pytest.mark.parametrize(("state", "signal"), PAIRS)
def test_a_signal_moves_a_job_as_the_table_says_or_not_at_all(state: State, signal: Signal) -> None:
    before = job(state)
    if signal in legal(state):
        after = step(before, signal, NOW, intent="abort")
        assert after.state == legal(state)[signal]
        assert (after.since, after.revision, after.intent) == (NOW, before.revision + 1, "abort")
        assert accepts(before, signal)
    else:
        with pytest.raises(JobError) as refused:
            step(before, signal, NOW, intent="abort")
        assert refused.value.code == "conflict"
        assert state.value in refused.value.message
        assert refused.value.remedy
        assert not accepts(before, signal)
    assert before == job(state)


def test_nothing_leaves_a_terminal_state() -> None:
    assert frozenset(state for state in State if not TRANSITIONS[state]) == TERMINAL
    assert all(state.terminal == (state in TERMINAL) for state in State)


def test_an_outcome_is_reached_only_from_completing_or_aborting() -> None:
    into = {state for state, signals in TRANSITIONS.items() if TERMINAL & set(signals.values())}
    assert into == {State.COMPLETING, State.ABORTING}


def test_only_a_proof_leads_to_an_outcome() -> None:
    proofs = {signal for signals in TRANSITIONS.values() for signal, to in signals.items() if to in TERMINAL}
    assert proofs == {Signal.PROVEN_COMPLETED, Signal.PROVEN_FAILED, Signal.PROVEN_ABORTED}


def test_every_state_can_be_reached_and_every_job_can_end() -> None:
    def reach(start: State) -> set[State]:
        seen, todo = {start}, [start]
        while todo:
            for state in TRANSITIONS[todo.pop()].values():
                if state not in seen:
                    seen.add(state)
                    todo.append(state)
        return seen

    assert reach(State.QUEUED) == set(State)
    assert all(reach(state) >= TERMINAL for state in set(State) - TERMINAL)


def test_contact_can_be_lost_wherever_a_daemon_may_be_asked() -> None:
    assert {state for state in State if Signal.LOST in TRANSITIONS[state]} == HOLDS_SLOT


def test_the_diagram_has_a_row_for_each_transition() -> None:
    rows = diagram().splitlines()[2:]
    assert len(rows) == sum(len(legal(state)) for state in State)
    assert "| running | stepped | waiting |" in rows
