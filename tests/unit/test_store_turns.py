"""Changes that come at the same time share a commit, and nothing else."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hostagent.turns import TOGETHER
from jobs.errors import JobError
from jobs.model import State
from tests.unit.test_store import JOB, Opened, host_event, run, small

__all__ = ["small"]


async def commits(it: Opened, during: Callable[[], Any]) -> int:
    """How many commits there were."""
    heard: list[str] = []
    await it.store._db.run(lambda db: db.set_trace_callback(heard.append))
    heard.clear()
    await during()
    await it.store._db.run(lambda db: db.set_trace_callback(None))
    return heard.count("COMMIT")


def test_what_comes_while_the_disk_is_busy_is_made_durable_at_once(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        async def many() -> None:
            saves = [it.store.save(replace(JOB, id=f"{n}"), [host_event(str(n))]) for n in range(2 * TOGETHER)]
            await asyncio.gather(*saves)

        assert await commits(it, many) <= 5
        assert await it.store.counts() == {"queued": 2 * TOGETHER}
        assert [record.seq for record in it.heard] == list(range(1, 2 * TOGETHER + 1))
        assert [record.event for record in it.heard] == [host_event(str(n)) for n in range(2 * TOGETHER)]

    run(tmp_path, scenario)


def test_one_that_fails_takes_no_other_along(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        works: list[Any] = [it.store.save(replace(JOB, id=f"{n}"), [host_event(str(n))]) for n in range(5)]
        works[2:2] = [it.store.save(replace(JOB, id="bad"), [host_event("bad"), object()])]  # type: ignore[list-item]
        done = await asyncio.gather(*works, return_exceptions=True)
        assert [type(one) for one in done] == [type(None), type(None), KeyError, *[type(None)] * 3]
        assert await it.store.counts() == {"queued": 5}
        assert await it.store.get("bad") is None
        assert [record.event for record in it.heard] == [host_event(str(n)) for n in range(5)]
        assert await it.store.events_since(0, 10) == it.heard

    run(tmp_path, scenario)


def test_a_transaction_that_fails_as_a_whole_is_tried_again_one_by_one(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        def disk_error(db: sqlite3.Connection) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        works = [it.store.save(replace(JOB, id="a")), it.store._db.run(disk_error), it.store.save(replace(JOB, id="b"))]
        done = await asyncio.gather(*works, return_exceptions=True)
        assert [getattr(one, "code", one) for one in done] == [None, "store_full", None]
        assert await it.store.counts() == {"queued": 2}

    run(tmp_path, scenario)


def test_what_is_cancelled_before_its_turn_is_not_done_and_keeps_no_other_from_its_own(tmp_path: Path) -> None:
    async def scenario(it: Opened) -> None:
        first = asyncio.create_task(it.store.save(JOB))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gone = asyncio.create_task(it.store.set_fact("gone", "1"))
        kept = asyncio.create_task(it.store.set_fact("kept", "1"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait({first, gone, kept})
        assert (await it.store.fact("gone"), await it.store.fact("kept")) == (None, "1")

    run(tmp_path, scenario)


def test_the_store_closes_after_what_was_asked_of_it(tmp_path: Path) -> None:
    async def first(it: Opened) -> None:
        for n in range(TOGETHER + 10):
            asyncio.create_task(it.store.save(replace(JOB, id=f"{n}")))  # noqa: RUF006 - nobody waits for them
        await asyncio.sleep(0)

    async def second(it: Opened) -> None:
        assert await it.store.counts() == {"queued": TOGETHER + 10}

    run(tmp_path, first)
    run(tmp_path, second)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_readers_do_not_suffer_from_a_full_file_system(small: Path) -> None:
    async def scenario(it: Opened) -> None:
        await it.store.save(JOB)
        with (small / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError):
            while True:
                ballast.write(bytes(1 << 16))
        large = [replace(JOB, id=f"{n}", state=State.RUNNING, warnings=("w" * 50_000,)) for n in range(3)]
        *writes, seen = await asyncio.gather(
            *(it.store.save(job, [host_event("x")]) for job in large), it.store.get("j1"), return_exceptions=True
        )
        assert [one.code for one in writes if isinstance(one, JobError)] == ["store_full"] * 3
        assert seen == JOB
        assert it.heard == []
        (small / "ballast").unlink()
        await it.store.save(large[0], [host_event("x")])
        assert await it.store.events_since(0, 10) == it.heard

    run(small, scenario)
