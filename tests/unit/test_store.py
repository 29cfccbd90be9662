from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from events.model import HostEvent, HostEventKind, Record
from hostagent.records import AccessFile, ExportRecord, Label, Use
from hostagent.schema import MIGRATIONS
from hostagent.store import Store
from jobs.errors import JobError
from jobs.model import Chain, FileId, Holder, Job, JobSpec, Layer, Need, Operation, Revocation, State
from jobs.outcome import END_EVENTS, access_change, job_event
from jobs.ports import AccessChange

THEN = datetime(2026, 1, 1, tzinfo=UTC)
NOW = datetime.now(UTC)
HUGE = FileId(1 << 20, (1 << 64) - 7)
"""An inode number that only fits an unsigned integer (as XFS and network file systems have them)."""


def layer(name: str, file: FileId) -> Layer:
    return Layer(f"/images/{name}", "qcow2", file, 100, 100)


TOP, BASE = layer("top", FileId(1, 10)), layer("base", HUGE)
JOB = Job(
    "j1",
    JobSpec(Operation.PULL, "/images/top"),
    State.QUEUED,
    THEN,
    THEN,
    Chain((TOP, BASE)),
    Chain((TOP,)),
    started=THEN,
)
NEEDS = [Need(TOP, "rw", "writes"), Need(BASE, "r", "reads")]
IMAGE = Holder("image", "/images/top")


def host_event(text: str) -> HostEvent:
    return HostEvent(HostEventKind.CONNECTED, text)


def ended(state: State, **values: Any) -> Job:
    return replace(JOB, state=state, finished=NOW, **values)


class Opened:
    """A store and what it published."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.heard: list[Record] = []
        self.store = Store(folder, host="h", publish=self.heard.append, **settings)


@contextlib.asynccontextmanager
async def opened(folder: Path, **settings: Any) -> AsyncIterator[Opened]:
    it = Opened(folder, **settings)
    await it.store.open()
    try:
        yield it
    finally:
        await it.store.close()


def run(folder: Path, scenario: Callable[[Opened], Coroutine[Any, Any, None]], **settings: Any) -> None:
    async def play() -> None:
        async with opened(folder, **settings) as it:
            await asyncio.wait_for(scenario(it), 30)

    asyncio.run(play())


async def pruned(
    it: Opened, *, days: float = 7, count: int = 100, exports: int = 100, events: int = 1000, most: int = 10_000
) -> bool:
    return await it.store.prune(NOW, days=days, count=count, exports=exports, events=events, most=most)


def refused(code: str) -> pytest.RaisesExc[JobError]:
    return pytest.RaisesExc(JobError, check=lambda error: error.code == code)


# Transactions


def test_a_change_and_its_event_are_there_together_after_a_crash(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.save(JOB, [job_event(JOB, END_EVENTS[State.FAILED])])
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in tmp_path.glob("hostagent.db*"):  # as a kill leaves them: the write-ahead log is not folded in
            shutil.copy(file, copy)
        async with opened(copy) as other:
            assert await other.store.get("j1") == JOB
            records = await other.store.events_since(0, 10)
            assert records is not None
            assert [record.seq for record in records] == [1]

    run(tmp_path, scenario)


def test_an_event_that_cannot_be_stored_takes_its_change_with_it(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        with pytest.raises(LookupError):
            await it.store.save(JOB, [object()])  # type: ignore[list-item]
        assert await it.store.get("j1") is None
        assert it.heard == []
        await it.store.save(JOB, [host_event("one")])
        assert it.store.last_seq() == it.heard[0].seq

    run(tmp_path, scenario)


def test_events_are_published_after_they_are_durable_and_in_order(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        await asyncio.gather(*(it.store.record([host_event(str(n)), host_event(f"{n}b")]) for n in range(10)))
        assert [record.seq for record in it.heard] == list(range(1, 21))
        assert await it.store.events_since(0, 100) == it.heard

    run(tmp_path, scenario)


def test_a_caller_that_is_cancelled_keeps_no_event_from_the_subscribers(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        task = asyncio.create_task(it.store.save(JOB, [host_event("one")]))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        async with asyncio.timeout(5):
            while not it.heard:
                await asyncio.sleep(0.001)
        assert await it.store.get("j1") == JOB

    run(tmp_path, scenario)


def test_an_outcome_changes_the_ledger_in_its_own_transaction(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        export = Holder("export", "e")
        await it.store.add_needs(JOB.holder, NEEDS)
        await it.store.add_needs(export, [Need(TOP, "r", "serves"), Need(BASE, "r", "serves")])
        await it.store.add_needs(IMAGE, [Need(BASE, "r", "an earlier failure")])
        await it.store.add_needs(Holder("export", "elsewhere"), [Need(BASE, "r", "its own")])
        done = ended(State.COMPLETED, revocation=Revocation.PENDING)
        await it.store.finish(done, [job_event(done, END_EVENTS[State.COMPLETED])], access_change(done, (export,)))
        left = {(row.file, str(row.holder)) for row in await it.store.access_rows()}
        assert left == {(TOP.file, "export:e"), (HUGE, "export:elsewhere")}
        assert await it.store.unsettled() == [done]

    run(tmp_path, scenario)


def test_a_domain_opens_a_new_top_in_the_manner_of_its_chain(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        domain, new = Holder("domain", "6d1a/vda"), layer("new", FileId(8, 99))
        await it.store.replace_needs(domain, [Use(Need(BASE, "rw", "runs"), Label(64055, 108))], name="web1/vda")
        gains = ((domain, Need(new, "rw", "copied")), (IMAGE, Need(new, "r", "copied")))
        change = AccessChange((JOB.holder,), forget=(BASE.file,), sharers=(domain,), gains=gains)
        await it.store.finish(ended(State.COMPLETED), [], change)
        found = {(row.holder, row.file, row.label, row.name) for row in await it.store.access_rows()}
        assert found == {(domain, new.file, Label(64055, 108), "web1/vda"), (IMAGE, new.file, None, "")}

    run(tmp_path, scenario)


def test_what_a_holder_needs_is_replaced_in_one_step_and_says_what_left(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        domain = Holder("domain", "6d1a/vda")
        top, base = Use(Need(TOP, "rw", "runs"), Label(5, 6)), Use(Need(BASE, "r", "runs"), None)
        assert await it.store.replace_needs(domain, [top, base], name="web1/vda") == []
        await it.store.add_needs(IMAGE, [Need(BASE, "r", "its own")])
        kept = (await it.store.access_rows([TOP.file]))[0].id
        assert await it.store.replace_needs(domain, [top], name="web2/vda") == [HUGE]
        rows = {row.holder: row for row in await it.store.access_rows()}
        assert (rows[domain].id, rows[domain].name, rows[domain].label) == (kept, "web2/vda", Label(5, 6))
        assert (rows[IMAGE].file, len(rows)) == (HUGE, 2)

    run(tmp_path, scenario)


@pytest.mark.parametrize("state", [State.FAILED, State.ABORTED])
def test_a_job_that_did_not_complete_leaves_its_backing_files_to_the_image(tmp_path: Path, state: State) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.add_needs(JOB.holder, NEEDS)
        for _ in range(2):  # again, as after a crash just behind the commit
            await it.store.finish(ended(state), [], access_change(ended(state), ()))
        (row,) = await it.store.access_rows()
        assert (row.file, row.holder, row.mode, row.image) == (HUGE, IMAGE, "r", TOP.file)
        assert state.value in row.reason
        assert await it.store.unsettled() == []

    run(tmp_path, scenario)


def test_an_inherited_row_does_not_lower_one_that_stands(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.add_needs(IMAGE, [Need(BASE, "rw", "written by hand")])
        change = AccessChange((JOB.holder,), gains=((IMAGE, Need(BASE, "r", "later")),))
        await it.store.finish(ended(State.FAILED), [], change)
        (row,) = await it.store.access_rows([HUGE])
        assert (row.mode, row.reason) == ("rw", "written by hand")

    run(tmp_path, scenario)


# Events


def test_events_are_read_from_any_place_in_pages(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.record([host_event(str(n)) for n in range(5)])
        assert await it.store.events_since(2, 2) == it.heard[2:4]
        assert await it.store.events_since(5, 10) == []

    run(tmp_path, scenario)


def test_who_asks_for_what_is_no_longer_or_not_yet_there_must_start_anew(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        assert await it.store.events_since(0, 10) == []
        await it.store.record([host_event(str(n)) for n in range(30)])
        assert await it.store.events_since(31, 10) is None
        await pruned(it, events=10)
        assert await it.store.events_since(0, 100) is None
        assert await it.store.events_since(19, 100) is None
        assert await it.store.events_since(20, 100) == it.heard[20:]

    run(tmp_path, scenario)


def test_sequence_numbers_are_never_used_again_even_when_all_events_are_gone(tmp_path: Path) -> None:
    async def first(it: Opened) -> None:
        await it.store.record([host_event(str(n)) for n in range(5)])
        await pruned(it, events=0)
        assert await it.store.events_since(4, 10) is None

    async def second(it: Opened) -> None:
        assert it.store.last_seq() == 5
        assert await it.store.events_since(4, 10) is None
        assert await it.store.events_since(5, 10) == []
        await it.store.record([host_event("next")])
        assert it.heard[0].seq == 6

    run(tmp_path, first)
    run(tmp_path, second)


# Retention


def test_retention_forgets_old_ends_and_never_an_owed_revocation(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        old = NOW - timedelta(days=10)
        keep = {
            "running": replace(JOB, id="running", state=State.RUNNING, created=old),
            "owed": replace(JOB, id="owed", state=State.COMPLETED, finished=old, revocation=Revocation.PENDING),
            "recent": replace(JOB, id="recent", state=State.FAILED, finished=NOW),
        }
        for job in [*keep.values(), replace(JOB, id="old", state=State.COMPLETED, finished=old)]:
            await it.store.save(job)
        await pruned(it)
        assert {job.id for job in await it.store.jobs()} == set(keep)

    run(tmp_path, scenario)


def test_of_too_many_ends_the_newest_are_kept(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        for n in range(10):
            revocation = Revocation.PENDING if n == 0 else Revocation.DONE
            finished = NOW - timedelta(seconds=100 - n)
            await it.store.save(replace(JOB, id=f"{n}", state=State.ABORTED, finished=finished, revocation=revocation))
        await pruned(it, count=3, exports=100)
        assert {job.id for job in await it.store.jobs()} == {"0", "7", "8", "9"}

    run(tmp_path, scenario)


def export(name: str, stopped: datetime | None) -> ExportRecord:
    state = "stopped" if stopped else "running"
    return ExportRecord(name, "/i", "/i", FileId(1, 2), "raw", state, THEN, stopped=stopped)


def test_of_stopped_exports_the_newest_are_kept_and_running_ones_always(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.put_export(export("runs", None))
        for n in range(5):
            await it.store.put_export(export(f"{n}", NOW + timedelta(seconds=n)))
        await pruned(it, count=1, exports=2)
        assert {one.id for one in await it.store.exports()} == {"runs", "3", "4"}
        assert [one.id for one in await it.store.exports(active=True)] == ["runs"]
        assert {one.id for one in await it.store.exports(active=False)} == {"3", "4"}

    run(tmp_path, scenario)


def entry(file: FileId, verdict: str, *, mode: str = "", since: datetime = NOW) -> AccessFile:
    return AccessFile(file, f"/{file}", "acl", mode, verdict, since, 1000)


def test_what_was_taken_back_is_forgotten_when_nobody_can_ask_for_it(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        old = NOW - timedelta(days=10)
        needed = FileId(1, 4)
        entries = {
            "revoked": entry(FileId(1, 1), "revoked"),
            "old kept": entry(FileId(1, 2), "kept", since=old),
            "ours kept": entry(FileId(1, 3), "kept", mode="r", since=old),
            "needed": entry(needed, "kept", since=old),
            "new kept": entry(FileId(1, 5), "kept"),
            "pending": entry(FileId(1, 6), "pending", since=old),
        }
        for one in entries.values():
            await it.store.put_access_file(one)
        await it.store.add_needs(IMAGE, [Need(layer("x", needed), "r", "")])
        await it.store.save(ended(State.COMPLETED, revocation=Revocation.PENDING))
        await pruned(it, count=10, exports=10)
        assert len(await it.store.access_files()) == len(entries)
        await it.store.save(ended(State.COMPLETED, revocation=Revocation.DONE))
        await pruned(it, count=10, exports=10)
        left = {one.file for one in await it.store.access_files()}
        assert left == {entries[name].file for name in ("ours kept", "needed", "new kept", "pending")}

    run(tmp_path, scenario)


def test_a_file_whose_last_row_has_gone_is_owed_before_anybody_looked_at_it(tmp_path: Path) -> None:
    """A host that says between the two that nothing is to be taken back would be switched off too soon."""

    async def scenario(it: Opened) -> None:
        verdicts = ("granted", "granted", "pending", "kept", "revoked")
        files = [entry(FileId(1, n), verdict, since=THEN) for n, verdict in enumerate(verdicts)]
        for one in files:
            await it.store.put_access_file(one)
        await it.store.add_needs(IMAGE, [Need(layer("x", files[0].file), "r", "")])
        assert await it.store.owed_files() == files[1:3]
        await it.store.release(IMAGE)
        assert await it.store.owed_files() == files[:3]
        assert await it.store.access_gauges() == (3, THEN, {})

    run(tmp_path, scenario)


# Lists


def test_pages_show_every_job_once_newest_first_though_times_are_equal(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        for n in range(25):
            await it.store.save(replace(JOB, id=f"{n:02}", created=THEN + timedelta(seconds=n // 10)))
        shown: list[Job] = []
        while page := await it.store.jobs(after=shown[-1].id if shown else None, limit=7):
            assert len(page) <= 7
            shown += page
        assert len(shown) == len({job.id for job in shown}) == 25
        assert [(job.created, job.id) for job in shown] == sorted(((j.created, j.id) for j in shown), reverse=True)

    run(tmp_path, scenario)


def test_a_page_after_a_job_that_was_deleted_is_empty(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.save(JOB)
        assert await it.store.jobs(after="gone") == []

    run(tmp_path, scenario)


def test_lists_are_filtered_by_state_path_origin_and_labels(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        labelled = replace(JOB.spec, labels={"vm": "web1", "it's": 'a "b"'})
        jobs = [
            replace(JOB, id="a", spec=labelled),
            replace(JOB, id="b", state=State.RUNNING, origin="external"),
            replace(JOB, id="c", before=Chain((BASE,))),
        ]
        for job in jobs:
            await it.store.save(job)

        async def found(**filters: Any) -> set[str]:
            return {job.id for job in await it.store.jobs(**filters)}

        assert await found() == {"a", "b", "c"}
        assert await found(state="running") == await found(origin="external") == {"b"}
        assert await found(path="/images/base") == {"c"}
        assert await found(labels={"vm": "web1", "it's": 'a "b"'}) == {"a"}
        assert await found(labels={"vm": "web2"}) == await found(labels={"v' OR 1": "1"}) == set()
        assert await it.store.counts() == {"queued": 2, "running": 1}

    run(tmp_path, scenario)


def test_unsettled_jobs_come_oldest_first(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        for n, job_id in enumerate("cab"):
            await it.store.save(replace(JOB, id=job_id, created=THEN + timedelta(seconds=n)))
        await it.store.save(replace(ended(State.COMPLETED), id="x"))
        assert [job.id for job in await it.store.unsettled()] == ["c", "a", "b"]
        await it.store.delete("a")
        assert [job.id for job in await it.store.unsettled()] == ["c", "b"]

    run(tmp_path, scenario)


def test_ten_thousand_jobs_stay_quick_to_list_and_to_start_from(tmp_path: Path) -> None:
    """The bounds are an order of magnitude above what was measured; a scan of the whole table would break them."""

    async def scenario(it: Opened) -> None:
        await it.store.save(JOB)
        db = it.store._db._db
        insert = (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000) INSERT INTO jobs "
            "SELECT printf('%05d', i), 'completed', path, origin, created, ?, 'done', body FROM jobs, n"
        )
        await it.store._db.run(lambda _: db.execute(insert, (NOW.isoformat(),)))
        begin = time.perf_counter()
        assert len(await it.store.jobs(limit=100)) == 100
        assert len(await it.store.jobs(after="05000", limit=100)) == 100
        assert [job.id for job in await it.store.unsettled()] == ["j1"]
        assert (await it.store.counts())["completed"] == 10_000
        await it.store.save(replace(JOB, id="another"))
        assert time.perf_counter() - begin < 0.5
        begin = time.perf_counter()
        await pruned(it, count=5000, exports=10)
        assert (await it.store.counts())["completed"] == 5000
        assert time.perf_counter() - begin < 2

    run(tmp_path, scenario)


# The ledger


def test_inode_numbers_may_have_all_their_64_bits(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.add_needs(JOB.holder, NEEDS)
        await it.store.put_access_file(entry(HUGE, "granted"))
        assert [row.file for row in await it.store.access_rows([HUGE])] == [HUGE]
        assert [one.file for one in await it.store.access_files([HUGE])] == [HUGE]
        assert set(await it.store.release(JOB.holder)) == {TOP.file, HUGE}
        assert await it.store.access_rows() == []

    run(tmp_path, scenario)


def test_a_need_that_is_said_again_changes_its_mode_and_keeps_its_row(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.add_needs(JOB.holder, [Need(BASE, "r", "first")])
        (before,) = await it.store.access_rows()
        await it.store.add_needs(JOB.holder, [Need(BASE, "rw", "second")])
        (after,) = await it.store.access_rows()
        assert (after.id, after.since) == (before.id, before.since)
        assert (after.mode, after.reason) == ("rw", "second")

    run(tmp_path, scenario)


def test_files_follow_a_file_system_that_got_another_device_number(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        new = FileId(99, HUGE.ino)
        await it.store.add_needs(JOB.holder, [Need(BASE, "r", "")])
        await it.store.put_access_file(entry(HUGE, "granted"))
        await it.store.rekey({HUGE: new})
        assert [row.file for row in await it.store.access_rows()] == [new]
        assert [one.file for one in await it.store.access_files([new])] == [new]
        assert await it.store.access_files([HUGE]) == []
        await it.store.rekey({FileId(5, 5): FileId(6, 6)})

    run(tmp_path, scenario)


def test_an_export_that_ends_takes_its_rows_with_it(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        one = export("e", None)
        await it.store.put_export(one)
        await it.store.add_needs(one.holder, NEEDS)
        await it.store.put_export(replace(one, state="stopped", stopped=NOW), [host_event("x")], end=one.holder)
        assert await it.store.access_rows() == []
        await it.store.put_export(one)
        await it.store.add_needs(one.holder, NEEDS)
        await it.store.forget_export(one)
        assert await it.store.export("e") is None
        assert await it.store.access_rows() == []

    run(tmp_path, scenario)


# The file


def test_a_state_folder_belongs_to_one_agent(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.save(JOB)
        with refused("busy"):
            await Opened(tmp_path).store.open()
        assert await it.store.get("j1") == JOB

    run(tmp_path, scenario)
    run(tmp_path, lambda it: it.store.record([]))


def test_the_database_is_the_owners_alone(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.save(JOB)
        assert {file.stat().st_mode & 0o077 for file in tmp_path.iterdir()} == {0}

    run(tmp_path, scenario)


def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path, lambda it: it.store.save(JOB))
    with contextlib.closing(sqlite3.connect(tmp_path / "hostagent.db")) as db:
        db.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    before = (tmp_path / "hostagent.db").read_bytes()
    with refused("conflict"):
        run(tmp_path, lambda it: it.store.save(JOB))
    assert (tmp_path / "hostagent.db").read_bytes() == before


@pytest.mark.parametrize("damage", [b"not a database" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_store_is_said_to_be_damaged(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "hostagent.db").write_bytes(damage)
    with refused("unavailable"):
        run(tmp_path, lambda it: it.store.save(JOB))
    assert (tmp_path / "hostagent.db").read_bytes() == damage
    (tmp_path / "hostagent.db").unlink()
    run(tmp_path, lambda it: it.store.save(JOB))  # and the folder is free again


def test_an_empty_file_is_brought_to_the_present_schema(tmp_path: Path) -> None:
    (tmp_path / "hostagent.db").touch()
    run(tmp_path, lambda it: it.store.save(JOB))
    with contextlib.closing(sqlite3.connect(tmp_path / "hostagent.db")) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_facts_are_single_values(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        assert await it.store.fact("boot") is None
        for value in ("one", "two"):
            await it.store.set_fact("boot", value)
        assert await it.store.fact("boot") == "two"

    run(tmp_path, scenario)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_a_full_file_system_is_said_and_loses_nothing(small: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.save(JOB, [host_event("first")])
        (small / "ballast").write_bytes(bytes(1 << 20))
        stored = ["j1"]
        with refused("store_full") as full:
            for n in range(1000):
                await it.store.save(replace(JOB, id=f"{n}", warnings=("w" * 2000,)), [host_event(str(n))])
                stored.append(f"{n}")
        assert full.value.remedy
        assert len(stored) > 10
        seen = [record.seq for record in it.heard]
        assert seen == list(range(1, len(stored) + 1))
        assert await it.store.get("j1") == JOB
        (small / "ballast").unlink()
        await it.store.save(replace(JOB, id="after"), [host_event("after")])
        assert {job.id for job in await it.store.jobs(limit=2000)} == {*stored, "after"}
        assert await it.store.events_since(0, 2000) == it.heard

    run(small, scenario)
    run(small, lambda it: it.store.save(JOB))
