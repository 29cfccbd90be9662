from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hostagent import retention
from hostagent.retention import Retention
from jobs.errors import JobError
from jobs.model import FileId, Revocation, State
from tests.unit.test_store import JOB, NOW, Opened, ended, entry, export, host_event, pruned, run

KEPT = Retention(days=14, jobs=1000, exports=1000, events=1000, rows=10, interval=3600)


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return 0.0


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "PAUSE", 0)


async def jobs_left(it: Opened) -> set[str]:
    return {job.id for job in await it.store.jobs(limit=1000)}


def test_a_finished_job_goes_when_its_days_are_over_and_not_while_it_owes_a_revocation(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        time = Time()
        owed = replace(ended(State.COMPLETED, revocation=Revocation.PENDING), id="owed")
        for job in (replace(JOB, state=State.RUNNING), owed, replace(ended(State.FAILED), id="failed")):
            await it.store.save(job)
        await it.store.put_access_file(entry(FileId(1, 1), "revoked"))
        time.at = NOW + timedelta(days=13, hours=23)
        await retention.prune(it.store, KEPT, time)
        assert await jobs_left(it) == {"j1", "owed", "failed"}
        time.at = NOW + timedelta(days=14, hours=1)
        await retention.prune(it.store, KEPT, time)
        assert await jobs_left(it) == {"j1", "owed"}
        assert len(await it.store.access_files()) == 1  # the pending revocation may still ask for it
        await it.store.save(replace(owed, revocation=Revocation.DONE))
        await retention.prune(it.store, KEPT, time)
        assert await jobs_left(it) == {"j1"}
        assert await it.store.access_files() == []
        assert await it.store.counts() == {"running": 1}

    run(tmp_path, scenario)


def test_a_round_is_bounded_and_others_use_the_store_between_two(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        for n in range(35):
            await it.store.save(replace(ended(State.COMPLETED), id=f"{n:02}", finished=NOW + timedelta(seconds=n)))
            await it.store.put_export(export(f"{n:02}", NOW + timedelta(seconds=n)))
        left = []

        class Watched:
            async def prune(self, at: datetime, **kept: Any) -> bool:
                more = await it.store.prune(at, **kept)
                left.append((len(await jobs_left(it)), len(await it.store.exports())))
                return more

        await retention.prune(Watched(), replace(KEPT, jobs=3, exports=20), Time())
        assert left == [(25, 25), (15, 20), (5, 20), (3, 20)]
        assert await jobs_left(it) == {"32", "33", "34"}

    run(tmp_path, scenario)


def test_the_event_log_ends_where_the_rounds_have_come_to_and_never_has_a_gap(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.record([host_event(str(n)) for n in range(50)])
        assert await pruned(it, events=15, most=20)
        assert await it.store.events_since(19, 100) is None
        assert await it.store.events_since(20, 100) == it.heard[20:]
        assert not await pruned(it, events=15, most=20)
        assert await it.store.events_since(34, 100) is None
        assert await it.store.events_since(35, 100) == it.heard[35:]
        assert not await pruned(it, events=15, most=20)
        assert await it.store.events_since(35, 100) == it.heard[35:]

    async def after_a_restart(it: Opened) -> None:
        found = [await it.store.events_since(seq, 100) for seq in (34, 35)]
        assert found[0] is None
        assert [record.seq for record in found[1] or []] == list(range(36, 51))

    run(tmp_path, scenario)
    run(tmp_path, after_a_restart)


def test_who_reads_events_while_they_are_pruned_hears_that_some_are_gone(tmp_path: Path) -> None:
    """The request was there before the pruning was done: what is no longer there must not just be left out."""

    async def scenario(it: Opened) -> None:
        await it.store.record([host_event(str(n)) for n in range(30)])
        _, read = await asyncio.gather(pruned(it, events=10), it.store.events_since(5, 100))
        assert read is None

    run(tmp_path, scenario)


def test_a_store_that_cannot_be_pruned_now_is_tried_again(tmp_path: Path) -> None:
    class Full:
        tries = 0

        async def prune(self, at: datetime, **kept: Any) -> bool:
            self.tries += 1
            raise JobError("store_full", "no room")

    async def scenario(it: Opened) -> None:
        full = Full()
        house = asyncio.create_task(retention.keep_house(full, replace(KEPT, interval=0), Time()))
        async with asyncio.timeout(5):
            while full.tries < 3:
                await asyncio.sleep(0)
        house.cancel()
        await asyncio.wait({house})

    run(tmp_path, scenario)
