"""What a scrape shows is what was looked at before, and of each job what it means for it to stand still."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hostagent import gauges
from hostagent.gauges import Gauges
from hostagent.metrics import Room
from jobs.errors import JobError
from jobs.model import Cursor, Operation, State
from jobs.progress import View

STOOD = 700.0


class Store:
    def __init__(self) -> None:
        self.reads = 0
        self.fails = False

    async def access_gauges(self) -> tuple[int, datetime, dict[str, int]]:
        self.reads += 1
        if self.fails:
            raise JobError("unavailable", "the store is gone")
        return self.reads, datetime(2024, 5, 1, tzinfo=UTC), {"r": 1}


def make(folder: Path, *, store: Any = None, jobs: tuple[Any, ...] = (), orphans: tuple[Any, ...] = ()) -> Gauges:
    async def forget() -> None:
        chains.orphans = []

    chains = SimpleNamespace(all=list, orphans=list(orphans), forget_ended_orphans=forget)
    view = View(rate=0.0, eta=None, stalled=STOOD)
    parts: dict[str, Any] = {
        "store": store or Store(),
        "engine": SimpleNamespace(active=lambda: jobs, view=lambda _: view),
        "chains": chains,
        "exports": SimpleNamespace(active=list),
        "watch": SimpleNamespace(found=[]),
        "live": SimpleNamespace(
            status=SimpleNamespace(connected=False), version="", wanted=True, hypervisor=SimpleNamespace(dropped=0)
        ),
        "bus": SimpleNamespace(dropped={}),
        "projection": SimpleNamespace(state=SimpleNamespace(connected=False), dropped=0),
    }
    return Gauges(**parts, folder=folder, min_free=16, interval=0.01)


def job(state: State) -> Any:
    before = SimpleNamespace(top=SimpleNamespace(path="/a"))
    spec = SimpleNamespace(operation=Operation.PULL)
    return SimpleNamespace(
        id="j", state=state, drive=None, before=before, spec=spec, cursor=Cursor(1, 2), bandwidth=0
    )


@pytest.mark.parametrize("state", [state for state in State if not state.terminal])
def test_only_a_job_that_should_move_is_stalled(tmp_path: Path, state: State) -> None:
    (shown,) = make(tmp_path, jobs=(job(state),)).snapshot().jobs
    assert shown.stalled == (STOOD if state in ("starting", "running", "completing", "aborting") else 0.0)


def test_a_snapshot_looks_at_nothing(tmp_path: Path) -> None:
    store = Store()
    found = make(tmp_path / "not there", store=store).snapshot()
    assert (store.reads, found.store, found.min_free, found.libvirt_configured) == (0, None, 16, True)


def test_what_no_event_tells_is_looked_at_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostagent.db").write_bytes(b"x" * 5000)
    (tmp_path / "another").write_bytes(b"x" * 50000)
    store = Store()
    shown = make(tmp_path, store=store, orphans=(SimpleNamespace(exports=("a", "b")),))
    assert shown.snapshot().orphaned_exports == 2

    async def look(until: Any) -> None:
        running = asyncio.create_task(shown.run())
        async with asyncio.timeout(10):
            while not until():
                await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(look(lambda: shown.snapshot().store is not None))
    found = shown.snapshot()
    assert found.store is not None
    assert 5000 <= found.store.used < 50000 and found.store.free > 0
    assert (found.orphaned_exports, found.daemons["orphan"]) == (0, 0)

    monkeypatch.setattr(gauges, "room", _dead)
    store.fails = True
    asyncio.run(look(lambda: shown.snapshot().store is None))
    monkeypatch.setattr(gauges, "room", lambda _: Room(1, 2))
    asyncio.run(look(lambda: shown.snapshot().store == Room(1, 2)))


def _dead(_: Path) -> Room:
    raise OSError("it hangs")
