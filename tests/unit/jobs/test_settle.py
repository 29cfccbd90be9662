from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent.errors import CODES
from jobs.machine import Signal
from jobs.model import Chain, Completion, Cursor, Drive, Failure, FileId, Group, Job, JobSpec, Layer, Operation, State
from jobs.ports import Contact, Observation, Phase
from jobs.settle import again, classify, decide, explain

THEN = datetime(2026, 1, 1, tzinfo=UTC)
TOP = Layer("/top", "qcow2", FileId(1, 1), 100, 100, "base")
BASE = Layer("/base", "qcow2", FileId(1, 2), 100, 100)
JOB = Job(
    "j", JobSpec(Operation.PULL, "/top"), State.COMPLETING, THEN, THEN, Chain((TOP, BASE)), Chain((TOP,)), started=THEN
)
DENIED = Failure("denied", "no")
ENDED = (Phase.ABSENT, Phase.CONCLUDED)
BUSY = (Phase.RUNNING, Phase.PAUSED, Phase.READY, Phase.PENDING)

observations = st.builds(
    Observation,
    st.sampled_from(Contact),
    st.sampled_from(Phase),
    st.none() | st.builds(Cursor, st.integers(0, 100), st.just(100)),
    st.none() | st.text(max_size=30),
    st.booleans(),
)
jobs_ = st.builds(lambda intent: replace(JOB, intent=intent), st.sampled_from([None, "abort"]))
failures = st.none() | st.builds(Failure, st.sampled_from(sorted(CODES)), st.text(max_size=10))


@pytest.mark.parametrize(("phase", "intent", "proven"), list(product(Phase, (None, "abort"), (False, True))))
def test_a_daemon_that_does_not_answer_proves_nothing(phase: Phase, intent: str | None, proven: bool) -> None:
    seen = Observation(Contact.UNRESPONSIVE, phase, proven=proven)
    assert decide(replace(JOB, intent=intent), seen).signal is Signal.LOST
    assert decide(replace(JOB, intent=intent), seen, DENIED).signal is Signal.LOST


@pytest.mark.parametrize(("phase", "intent"), list(product(BUSY, (None, "abort"))))
def test_a_job_that_still_runs_has_not_ended(phase: Phase, intent: str | None) -> None:
    assert decide(replace(JOB, intent=intent), Observation(Contact.ALIVE, phase)).signal is None
    assert decide(replace(JOB, intent=intent), Observation(Contact.ALIVE, phase), DENIED).signal is None


@pytest.mark.parametrize("phase", Phase)
def test_what_a_dead_daemon_last_said_does_not_matter(phase: Phase) -> None:
    assert decide(JOB, Observation(Contact.DEAD, phase, proven=True)).signal is Signal.PROVEN_COMPLETED
    verdict = decide(JOB, Observation(Contact.DEAD, phase))
    assert verdict.signal is Signal.PROVEN_FAILED
    assert verdict.failure is not None
    assert verdict.failure.code == "storage_daemon_died"


@pytest.mark.parametrize(("contact", "phase"), list(product((Contact.ALIVE, Contact.DEAD), ENDED)))
@pytest.mark.parametrize("intent", [None, "abort"])
def test_the_header_wins_over_an_abort_and_over_an_error(contact: Contact, phase: Phase, intent: str | None) -> None:
    seen = Observation(contact, phase, error="Input/output error", proven=True)
    verdict = decide(replace(JOB, intent=intent), seen)
    assert (verdict.signal, verdict.failure) == (Signal.PROVEN_COMPLETED, None)


@pytest.mark.parametrize(("contact", "phase"), list(product((Contact.ALIVE, Contact.DEAD), ENDED)))
def test_an_aborted_job_without_proof_is_aborted(contact: Contact, phase: Phase) -> None:
    verdict = decide(replace(JOB, intent="abort"), Observation(contact, phase, error="Operation canceled"), DENIED)
    assert verdict.signal is Signal.PROVEN_ABORTED
    assert verdict.failure is not None
    assert verdict.failure.code == "cancelled"
    assert verdict.failure.remedy


@pytest.mark.parametrize(("contact", "phase"), list(product((Contact.ALIVE, Contact.DEAD), ENDED)))
def test_what_the_agent_knows_of_a_failure_is_told_rather_than_what_was_seen(contact: Contact, phase: Phase) -> None:
    verdict = decide(JOB, Observation(contact, phase, error="Input/output error"), DENIED)
    assert (verdict.signal, verdict.failure) == (Signal.PROVEN_FAILED, DENIED)


@pytest.mark.parametrize(("contact", "phase"), list(product((Contact.ALIVE, Contact.DEAD), ENDED)))
def test_a_job_whose_chain_shows_its_end_is_completed_even_when_the_end_was_not_answered(
    contact: Contact, phase: Phase
) -> None:
    died = Failure("storage_daemon_died", "killed while it answered job-finalize")
    assert decide(JOB, Observation(contact, phase, proven=True), died).signal is Signal.PROVEN_COMPLETED


def test_a_failure_before_a_pull_that_would_change_nothing_is_a_failure() -> None:
    """With the immediate backing file as base the chain is proven from the beginning."""
    still = replace(JOB, after=JOB.before)
    assert decide(still, Observation(Contact.DEAD, proven=True), DENIED).signal is Signal.PROVEN_FAILED


@given(jobs_, observations, failures)
def test_a_job_is_completed_only_by_proof(job: Job, seen: Observation, failure: Failure | None) -> None:
    if decide(job, seen, failure).signal is Signal.PROVEN_COMPLETED:
        assert seen.proven
        assert seen.contact is not Contact.UNRESPONSIVE


@given(jobs_, observations, failures)
def test_contact_is_lost_exactly_when_nobody_answers(job: Job, seen: Observation, failure: Failure | None) -> None:
    lost = decide(job, seen, failure).signal is Signal.LOST
    assert lost == (seen.contact is Contact.UNRESPONSIVE)


@given(jobs_, observations)
def test_what_is_proven_is_neither_failed_nor_aborted(job: Job, seen: Observation) -> None:
    if seen.proven:
        assert decide(job, seen).signal not in (Signal.PROVEN_FAILED, Signal.PROVEN_ABORTED)


@given(jobs_, observations, failures)
def test_every_end_that_is_not_completed_says_why(job: Job, seen: Observation, failure: Failure | None) -> None:
    verdict = decide(job, seen, failure)
    if verdict.signal in (Signal.PROVEN_FAILED, Signal.PROVEN_ABORTED):
        assert verdict.failure is not None
        assert verdict.failure.code in CODES
    else:
        assert verdict.failure is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Could not read: No space left on device", "no_space"),
        ("write failed: Disk quota exceeded", "no_space"),
        ("Input/output error", "io_error"),
        ("Software caused connection abort", "io_error"),
        ("Could not open '/x': Permission denied", "denied"),
        ("Something new", "job_failed"),
        ("", "job_failed"),
    ],
)
def test_an_error_text_of_qemu_gets_its_code(text: str, code: str) -> None:
    failure = classify(JOB, text)
    assert failure.code == code
    assert text in failure.message
    assert failure.remedy


def test_a_filter_that_a_guests_qemu_has_kept_is_nothing_that_another_try_mends() -> None:
    guests = replace(JOB, drive=Drive("uuid", "web1", "vda"))
    for job, remedy in ((guests, "shut the guest down"), (JOB, again(JOB))):
        failure = classify(job, "'blockdev-mirror': Need a root block node")
        assert failure.code == "job_failed"
        assert failure.remedy is not None
        assert remedy in failure.remedy


def test_a_concluded_job_without_error_and_proof_is_unproven() -> None:
    assert explain(JOB, Observation(Contact.ALIVE, Phase.CONCLUDED)).code == "unproven"
    assert explain(JOB, Observation(Contact.ALIVE, Phase.ABSENT)).code == "unproven"


@given(observations, failures)
def test_a_member_of_a_group_that_is_decided_completes_whatever_is_seen(
    seen: Observation, failure: Failure | None
) -> None:
    job = replace(JOB, group=Group("g", ("j", "k")), after=JOB.before, completion=Completion.FINISH)
    signal = decide(job, seen, failure).signal
    assert signal in (Signal.PROVEN_COMPLETED, Signal.LOST, None)
    if seen.contact is Contact.DEAD:
        assert signal is Signal.PROVEN_COMPLETED
    pivot = decide(replace(job, completion=Completion.PIVOT), seen, failure)
    known = failure is not None and failure.code == "pivot_refused"
    refused = known or (seen.contact is Contact.ALIVE and seen.error is not None)
    assert (pivot.signal is Signal.PROVEN_FAILED) == (signal is Signal.PROVEN_COMPLETED and refused)
    assert pivot.failure is None or pivot.failure.code == "pivot_refused"
    undecided = replace(job, completion=None)
    assert decide(undecided, replace(seen, proven=False), failure).signal is not Signal.PROVEN_COMPLETED


def test_an_abort_of_somebody_elses_is_no_failure_and_no_success() -> None:
    seen = Observation(Contact.ALIVE, error="aborted by another", cancelled=True)
    verdict = decide(replace(JOB, origin="external"), seen)
    assert verdict.signal is Signal.PROVEN_ABORTED
    assert verdict.failure is not None and (verdict.failure.code, verdict.failure.message) == ("cancelled", seen.error)
    assert decide(JOB, replace(seen, proven=True)).signal is Signal.PROVEN_COMPLETED
    assert decide(JOB, replace(seen, contact=Contact.UNRESPONSIVE)).signal is Signal.LOST
