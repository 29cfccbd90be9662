"""What a copy of a guest's disk may ask for, and one of an image may not."""

from __future__ import annotations

from typing import Any

import pytest

from hostagent.api.requests import job_spec
from jobs.errors import JobError

GUESTS: dict[str, Any] = {"operation": "copy", "target": "web1/vda", "dest": "/images/copy", "synchronous_writes": True}


def refused(**changed: Any) -> JobError:
    with pytest.raises(JobError) as error:
        job_spec({**GUESTS, **changed}, anywhere=True)
    assert error.value.code == "invalid" and error.value.field == "synchronous_writes" and error.value.remedy
    return error.value


def test_writes_of_a_guest_may_wait_for_its_copy() -> None:
    assert job_spec(GUESTS, anywhere=True).synchronous_writes
    assert not job_spec({**GUESTS, "synchronous_writes": False}, anywhere=True).synchronous_writes
    assert not job_spec(
        {**GUESTS, "target": "/images/a", "synchronous_writes": False}, anywhere=True
    ).synchronous_writes


def test_nobody_writes_an_image_while_it_is_copied() -> None:
    assert "nobody writes an image" in refused(target="/images/a").message


@pytest.mark.parametrize("operation", ["pull", "commit"])
def test_only_a_copy_can_be_waited_for(operation: str) -> None:
    assert operation in refused(operation=operation, dest=None).message
