"""Lists, labels and counts: right, and not dearer with every job that ends."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hostagent import selection
from hostagent.records import encode
from hostagent.schema import MIGRATIONS
from jobs.model import Chain, Group, Job, State
from jobs.ports import AccessChange
from tests.unit.test_store import BASE, JOB, NOW, THEN, Opened, ended, export, pruned, run


def labelled(job_id: str, state: State = State.COMPLETED, **labels: str) -> Job:
    return replace(JOB, id=job_id, state=state, spec=replace(JOB.spec, labels=labels), finished=NOW)


FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "state": {"state": "running"},
    "ended state": {"state": "completed"},
    "path": {"path": "/images/top"},
    "group": {"group": "g1"},
    "label": {"labels": {"vm": "web1"}},
    "labels": {"labels": {"rack": "r1", "vm": "web1"}},
    "state and label": {"state": "completed", "labels": {"rack": "r1"}},
    "active state and label": {"state": "running", "labels": {"rack": "r1"}},
    "path and state": {"state": "completed", "path": "/images/top"},
}


async def plan(it: Opened, **asked: Any) -> list[str]:
    """How SQLite goes about a list."""
    heard: list[str] = []
    await it.store._db.run(lambda db: db.set_trace_callback(heard.append))
    await it.store.jobs(**asked)
    await it.store._db.run(lambda db: db.set_trace_callback(None))
    (query,) = [sql for sql in heard if sql.startswith("SELECT jobs.body")]
    steps = await it.store._db.run(lambda db: db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall())
    return [step[3] for step in steps]


@pytest.mark.parametrize("after", [None, "5"], ids=["first page", "later page"])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("few", [0, 1000])
def test_no_list_reads_all_jobs_or_sorts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filters: dict[str, Any], after: str | None, few: int
) -> None:
    monkeypatch.setattr(selection, "FEW", few)

    async def scenario(it: Opened) -> None:
        await it.store.save(labelled("5"))
        steps = await plan(it, **filters, after=after)
        assert not [step for step in steps if "TEMP B-TREE" in step], steps
        scans = [step for step in steps if step.startswith("SCAN")]
        assert scans in ([], ["SCAN jobs USING INDEX jobs_by_created"]), steps
        assert not (filters and scans), steps

    run(tmp_path, scenario)


@pytest.mark.parametrize("few", [0, 1000])
def test_labels_are_found_page_by_page_with_every_other_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(selection, "FEW", few)

    async def scenario(it: Opened) -> None:
        for n in range(20):
            job = labelled(f"{n:02}", rack="r1", vm=f"web{n % 4}")
            await it.store.save(replace(job, created=THEN + timedelta(seconds=n // 5)))
        await it.store.save(replace(labelled("x", State.FAILED, rack="r1", vm="web1"), before=Chain((BASE,))))

        async def found(**filters: Any) -> list[str]:
            shown: list[Job] = []
            while page := await it.store.jobs(**filters, limit=2, after=shown[-1].id if shown else None):
                shown += page
            return [job.id for job in shown]

        web1 = ["17", "13", "09", "05", "x", "01"]
        assert await found(labels={"vm": "web1"}) == await found(labels={"rack": "r1", "vm": "web1"}) == web1
        assert await found(labels={"vm": "web1"}, state="completed") == ["17", "13", "09", "05", "01"]
        assert await found(labels={"vm": "web1"}, state="failed") == ["x"]
        assert await found(labels={"vm": "web1"}, path="/images/base") == ["x"]
        assert await found(labels={"vm": "web1", "rack": "r2"}) == await found(labels={"vm": "1"}) == []
        await it.store.delete("13")
        assert await found(labels={"vm": "web1"}) == ["17", "09", "05", "x", "01"]

    run(tmp_path, scenario)


def test_several_jobs_are_stored_together_or_not_at_all(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        members = [replace(JOB, id=f"{n}", group=Group("g1", ("0", "1", "2"))) for n in range(3)]
        with pytest.raises(TypeError):
            await it.store.save_all([*members[:2], _unstorable(members[2])])
        assert await it.store.counts() == {}
        await it.store.save_all(members)
        await it.store.save(replace(JOB, id="other"))
        assert {job.id for job in await it.store.jobs(group="g1")} == {"0", "1", "2"}
        assert await it.store.jobs(group="g1", state="failed") == await it.store.jobs(group="g2") == []

    run(tmp_path, scenario)


def _unstorable(job: Job) -> Job:
    return replace(job, warnings=(object(),))  # type: ignore[arg-type]


def test_counts_follow_every_change_and_no_change_that_failed(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        for n in range(5):
            await it.store.save(replace(JOB, id=f"{n}"))
        await it.store.save(replace(JOB, id="0", state=State.RUNNING))
        await it.store.save(replace(JOB, id="0", state=State.RUNNING, revision=9))
        await it.store.finish(replace(ended(State.FAILED), id="1"), [], no_change())
        assert await it.store.counts() == {"queued": 3, "running": 1, "failed": 1}
        with pytest.raises(LookupError):
            await it.store.save(replace(JOB, id="0", state=State.ABORTED), [object()])  # type: ignore[list-item]
        await it.store.delete("2")
        await it.store.delete("2")
        assert await it.store.counts() == {"queued": 2, "running": 1, "failed": 1}
        await pruned(it, days=0, count=0)
        assert await it.store.counts() == {"queued": 2, "running": 1}

    run(tmp_path, scenario)


def no_change() -> AccessChange:
    return AccessChange(release=())


def test_exports_are_listed_as_jobs_are(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        for n in range(6):
            one = export(f"{n}", NOW if n % 2 else None)
            one = replace(one, path=f"/real/{n // 2}", image=f"/named/{n}", labels={"vm": f"web{n % 3}"})
            await it.store.put_export(one)

        async def found(**filters: Any) -> list[str]:
            return [one.id for one in await it.store.exports(**filters)]

        assert await found() == ["5", "4", "3", "2", "1", "0"]
        assert await found(limit=2) == ["5", "4"]
        assert await found(limit=2, after="4") == ["3", "2"]
        assert await found(state="stopped") == await found(active=False) == ["5", "3", "1"]
        assert await found(image="/real/1") == ["3", "2"]
        assert await found(image="/named/3") == ["3"]
        assert await found(labels={"vm": "web2"}, state="running") == ["2"]
        assert await found(after="gone") == []

    run(tmp_path, scenario)


def test_an_older_store_gets_its_labels_and_counts(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "hostagent.db")) as db:
        db.executescript(f"BEGIN; {MIGRATIONS[0]} PRAGMA user_version=1; COMMIT;")
        for job in (labelled("a", vm="web1"), labelled("b", State.RUNNING, vm="web2"), labelled("c", vm="web1")):
            values = (job.id, job.state, "/images/top", "agent", job.created.isoformat(), job.revocation)
            db.execute(
                "INSERT INTO jobs (id, state, path, origin, created, revocation, body) VALUES (?,?,?,?,?,?,?)",
                (*values, json.dumps(encode(job))),
            )
        db.commit()

    async def scenario(it: Opened) -> None:
        assert [job.id for job in await it.store.jobs(labels={"vm": "web1"})] == ["c", "a"]
        assert await it.store.counts() == {"completed": 2, "running": 1}
        await it.store.save(replace(labelled("b", vm="web2")))
        assert await it.store.counts() == {"completed": 3}

    run(tmp_path, scenario)
