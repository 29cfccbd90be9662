from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import pull
from jobs.errors import JobError
from jobs.model import Chain, Cursor, FileId, Job, JobSpec, Layer, Operation, State

THEN = datetime(2026, 1, 1, tzinfo=UTC)
CHAIN = Chain(
    (
        Layer("/i/top", "qcow2", FileId(1, 1), 100, 10, "mid"),
        Layer("/i/mid", "qcow2", FileId(1, 2), 100, 10, "base"),
        Layer("/i/base", "raw", FileId(1, 3), 100, 10),
    )
)


def job(base: str | None = None, increment: int | None = None, cursor: Cursor = Cursor(0, 100)) -> Job:
    after = pull.after(CHAIN, pull.resolve_base(CHAIN, base))
    spec = JobSpec(Operation.PULL, "/i/top", base=base, increment=increment)
    return Job("j", spec, State.RUNNING, THEN, THEN, CHAIN, after, cursor=cursor)


def test_a_whole_pull_leaves_the_top_alone() -> None:
    assert job().after.paths() == ["/i/top"]
    assert [layer.path for layer in job().dropped] == ["/i/mid", "/i/base"]


def test_a_pull_to_a_base_takes_what_lies_between() -> None:
    assert job("/i/base").after.paths() == ["/i/top", "/i/base"]
    assert [layer.path for layer in job("/i/base").dropped] == ["/i/mid"]


def test_a_pull_to_the_backing_file_takes_nothing() -> None:
    assert job("/i/mid").after == CHAIN
    assert job("/i/mid").dropped == ()


@pytest.mark.parametrize("base", ["/i/top", "base", "/elsewhere", ""])
def test_a_base_that_is_not_below_the_top_is_refused_with_the_members(base: str) -> None:
    with pytest.raises(JobError) as refused:
        pull.resolve_base(CHAIN, base)
    error = refused.value
    assert (error.code, error.field, error.value) == ("invalid", "base", base)
    assert error.remedy is not None
    assert "/i/mid" in error.remedy
    assert "/i/base" in error.remedy


def test_an_image_without_backing_file_has_no_base_to_name() -> None:
    with pytest.raises(JobError, match="not below") as refused:
        pull.resolve_base(Chain(CHAIN.layers[2:]), "/x")
    assert refused.value.remedy is not None
    assert "no backing file" in refused.value.remedy


def test_a_whole_pull_is_proven_by_a_header_without_backing_file() -> None:
    assert pull.proven(job(), None, None)
    assert not pull.proven(job(), "mid", "/i/mid")


def test_a_pull_to_a_base_is_proven_by_a_header_that_names_just_that() -> None:
    assert pull.proven(job("/i/base"), "base", "/i/base")
    assert not pull.proven(job("/i/base"), "mid", "/i/mid")
    assert not pull.proven(job("/i/base"), None, None)
    assert not pull.proven(job("/i/base"), "base", "/other/base")


@given(st.integers(1, 300), st.integers(0, 100))
def test_an_increment_ends_where_it_should_or_at_the_end(increment: int, cur: int) -> None:
    goal = pull.goal(job(increment=increment, cursor=Cursor(cur, 100)))
    assert goal == min(cur + increment, 100)
    assert pull.goal(job(increment=increment), cur) == goal
