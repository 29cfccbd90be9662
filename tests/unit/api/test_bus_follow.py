"""What the bus is told of what happens: each end once, nothing that did not happen, nothing that is over for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from hostagent.api.projection.follow import GRANTS, Follower, Settings
from hostagent.api.projection.message import Message
from hostagent.api.projection.pending import Pending
from hostagent.api.projection.tree import Tree
from jobs.errors import JobError
from tests.unit.api.fake_service import Json, export_json, job_json

JOB = "/org/hostagent1/job/"


class World:
    """What the use-cases say, and the part of them that is asked."""

    def __init__(self) -> None:
        self.jobs: dict[str, Json] = {}
        self.exports: dict[str, Json] = {}
        self.grants: dict[str, Json] = {}

    def job(self, id: str, state: str = "running", **other: Any) -> None:
        before = self.jobs.get(id) or job_json(id, {"operation": "pull", "target": f"/{id}"})
        ended = {"finished": datetime.now(UTC).isoformat()} if state in ("completed", "failed", "aborted") else {}
        self.jobs[id] = {**before, "state": state, "revision": before["revision"] + 1, **ended, **other}

    def export(self, id: str, **other: Any) -> None:
        self.exports[id] = {**export_json(id, {"image": f"/{id}"}), "path": f"/{id}", "labels": {}, **other}

    def grant(self, id: str, state: str = "granted") -> None:
        holder = {"kind": "job", "id": "1"}
        facts = {"path": "/x", "mode": "r", "since": None, "reason": "", "access": "acl", "detail": None}
        self.grants[id] = {"id": id, "holder": holder, "state": state, **facts}

    async def get_job(self, id: str) -> Json:
        return self._found(self.jobs, id)

    async def get_export(self, id: str) -> Json:
        return self._found(self.exports, id)

    @staticmethod
    def _found(where: dict[str, Json], id: str) -> Json:
        if id not in where:
            raise JobError("not_found", f"no {id}")
        return where[id]

    async def list_jobs(self, *, state: str | None, limit: int, **_: Any) -> Json:
        found = [job for job in self.jobs.values() if state in (None, job["state"])]
        return {"items": found[::-1][:limit], "next": None}

    async def list_exports(self, *, state: str | None, **_: Any) -> Json:
        return {"items": [one for one in self.exports.values() if one["state"] == state], "next": None}

    async def list_grants(self, *, limit: int, **_: Any) -> Json:
        return {"items": list(self.grants.values())[:limit], "next": None}


class Bus:
    """A follower of a world, and all that it says."""

    def __init__(self, *, finished_time: float = 600.0, finished_count: int = 100, most: int = 100) -> None:
        self.world = World()
        self.pending = Pending(1000, 1.0, time.monotonic)
        self.tree = Tree(most, {"Version": "1", "Host": "h"})
        settings = Settings(refresh=60.0, finished_time=finished_time, finished_count=finished_count)
        self.follower = Follower(self.world, self.tree, self.pending, settings)  # type: ignore[arg-type]
        self.told: list[Message] = []

    def touch(self, kind: str, id: str, state: str = "") -> None:
        self.pending.touch((kind, id), state)
        self.follower.touched.set()

    def names(self) -> list[str]:
        said, self.told = [f"{one.member} {one.path.rpartition('/')[2]}" for one in self.told], []
        return said

    async def until(self, good: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not good():
                await asyncio.sleep(0.01)


def follow(scenario: Callable[[Bus], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        bus = Bus(**settings)
        await bus.follower.read_all()

        async def tell(message: Message) -> None:
            bus.told.append(message)

        bus.follower.tell = tell
        running = asyncio.create_task(bus.follower.run())
        await scenario(bus)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_job_that_began_and_ended_unseen_is_told_of_whole() -> None:
    async def scenario(bus: Bus) -> None:
        bus.world.job("a", "completed")
        for state in ("queued", "running", "completed"):
            bus.touch("job", "a", state)
        await bus.until(lambda: len(bus.told) >= 4)
        assert bus.names() == ["InterfacesAdded ", "JobNew hostagent1", "Completed a", "JobRemoved hostagent1"]
        bus.world.job("a", "completed", revocation="done")
        bus.touch("job", "a", "completed")
        await bus.until(lambda: bool(bus.told))
        assert bus.names() == ["PropertiesChanged a"]  # and not another end

    follow(scenario)


def test_what_ended_before_the_bus_was_there_is_shown_and_not_told() -> None:
    async def scenario(bus: Bus) -> None:
        bus.world.job("a", "completed")
        bus.world.job("b", "running")
        bus.world.job("old", "completed", finished="2020-01-01T00:00:00Z")
        await bus.follower.read_all()
        assert bus.names() == ["InterfacesAdded "] * 2
        assert {one.id for one in bus.tree.all("job")} == {"a", "b"}
        bus.world.job("b", "completed")  # its touch is lost
        await bus.follower.read_all()
        assert bus.names() == ["PropertiesChanged b", "Completed b", "JobRemoved hostagent1"]

    follow(scenario)


def test_ended_jobs_go_when_their_time_is_over() -> None:
    async def scenario(bus: Bus) -> None:
        bus.world.job("a", "aborted")
        bus.touch("job", "a", "aborted")
        await bus.until(lambda: bool(bus.tree.all("job")))
        await bus.until(lambda: not bus.tree.all("job"))
        assert bus.names()[-1] == "InterfacesRemoved "
        assert bus.pending.rest() is None

    follow(scenario, finished_time=0.5)


def test_ended_jobs_go_when_they_are_too_many_the_oldest_first() -> None:
    async def scenario(bus: Bus) -> None:
        for id in "abcd":
            bus.world.job(id, "completed")
            bus.touch("job", id, "completed")
            await bus.until(lambda id=id: bool(bus.tree.find(JOB + id)))  # type: ignore[misc]
        await bus.until(lambda: len(bus.tree) == 2)
        assert {one.id for one in bus.tree.all("job")} == {"c", "d"}

    follow(scenario, finished_count=2)


def test_what_is_gone_or_was_forgotten_goes_and_what_moved_between_the_lists_stays() -> None:
    async def scenario(bus: Bus) -> None:
        bus.world.job("a")
        bus.world.job("b")
        bus.world.export("e")
        bus.world.grant("g")
        await bus.follower.read_all()
        bus.names()
        del bus.world.jobs["a"]
        bus.world.job("b", "resuming")  # in no list
        bus.world.export("e", state="stopped")
        del bus.world.grants["g"]
        await bus.follower.read_all()
        assert {one.path for one in bus.tree} == {"/org/hostagent1", JOB + "b"}
        assert bus.names().count("InterfacesRemoved ") == 3

    follow(scenario)


def test_an_older_reading_does_not_undo_a_newer_one() -> None:
    async def scenario(bus: Bus) -> None:
        bus.world.job("a", cursor={"cur": 5, "end": 10}, revision=9)
        await bus.follower.show("job", "a")
        bus.world.job("a", cursor={"cur": 4, "end": 10}, revision=8)
        await bus.follower.show("job", "a")
        shown = bus.tree.find(JOB + "a")
        assert shown is not None
        assert shown["Cursor"] == [5, 10]

    follow(scenario)


def test_grants_are_read_as_one_and_only_what_changed_is_told() -> None:
    async def scenario(bus: Bus) -> None:
        for id in "abc":
            bus.world.grant(id)
        bus.touch(*GRANTS)
        await bus.until(lambda: len(bus.tree) == 3)
        assert bus.names() == ["InterfacesAdded "] * 3
        bus.world.grant("b", "pending")
        del bus.world.grants["c"]
        bus.touch(*GRANTS)
        await bus.until(lambda: len(bus.tree) == 2)
        assert bus.names() == ["PropertiesChanged b", "InterfacesRemoved "]

    follow(scenario)


def test_a_job_says_which_exports_its_image_has() -> None:
    async def scenario(bus: Bus) -> None:
        bus.world.job("a")
        bus.world.export("a")
        await bus.follower.show("job", "a")
        await bus.follower.show("export", "a")

        def exports() -> Any:
            shown = bus.tree.find(JOB + "a")
            return shown and shown["Objects"]

        await bus.until(lambda: exports() == ["/org/hostagent1/export/a"])
        bus.world.export("a", state="lost")
        bus.touch("export", "a", "lost")
        await bus.until(lambda: exports() == [])

    follow(scenario)


def test_progress_is_never_made_up() -> None:
    async def scenario(bus: Bus) -> None:
        async def shown(**values: Any) -> tuple[Any, Any]:
            bus.world.job("a", **values)
            await bus.follower.show("job", "a")
            job = bus.tree.find(JOB + "a")
            assert job is not None
            return job["Progress"], job["ProgressValid"]

        assert await shown(cursor={"cur": 0, "end": 0}) == (0.0, False)
        assert await shown(cursor={"cur": 1, "end": 4}) == (0.25, True)
        full = {"cursor": {"cur": 4, "end": 4}, "operation": "copy"}
        assert await shown(**full) == (1.0, True)
        assert await shown(state="ready", **full) == (0.0, False)
        assert await shown(state="completed", **full) == (1.0, True)

    follow(scenario)
