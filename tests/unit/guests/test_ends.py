"""Whether a guest ends just now, by looks that libvirt may refuse meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from hostagent.guests import disks
from hostagent.guests.disks import Disks
from jobs.errors import JobError
from jobs.model import Drive

DRIVE = Drive("u-u-i-d", "web1", "vda")
REFUSED = JobError("conflict", "domain is not running")


class Looked(Disks):
    """Each look finds the next of `answers`: the guest's run, None for none, or a refusal."""

    def __init__(self, *answers: int | JobError | None) -> None:
        self._answers = list(answers)

    async def look(self, drive: Drive) -> tuple[int | None, None]:
        answer = self._answers.pop(0)
        if isinstance(answer, JobError):
            raise answer
        return answer, None


@pytest.mark.parametrize(
    ("answers", "ends"),
    [((None,), True), ((3, None), True), ((REFUSED, None), True), ((3, 3), False), ((REFUSED, REFUSED), False)],
)
def test_who_runs_at_the_first_look_may_be_gone_at_the_second(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[int | JobError | None, ...], ends: bool
) -> None:
    monkeypatch.setattr(disks, "MOMENT", 0.0)
    assert asyncio.run(Looked(*answers).ends(DRIVE)) is ends
