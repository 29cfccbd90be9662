from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from hostagent.api.changes import Changes
from hostagent.api.peer import Peer
from hostagent.api.service import AgentService
from hostagent.drain import FACT, Drain
from jobs.errors import JobError
from jobs.model import Job, State
from jobs.ports import SystemClock
from tests.unit.test_store import JOB


class Host:
    """A store of facts that survives, and jobs that obey at once."""

    def __init__(self, **jobs: State) -> None:
        self.facts: dict[str, str] = {}
        self.jobs = {name: replace(JOB, id=name, state=state) for name, state in jobs.items()}
        self.admits = True
        self.stubborn: set[str] = set()
        self.steady: set[str] = set()
        self.seen: list[str] = []
        self.drain = self.restarted()

    def restarted(self) -> Drain:
        self.tasks: list[asyncio.Task[None]] = []
        self.drain = Drain(self, self, SystemClock(), lambda work: self.tasks.append(asyncio.create_task(work)))
        return self.drain

    async def settled(self) -> None:
        while self.tasks:
            await self.tasks.pop()

    def states(self) -> dict[str, str]:
        return {name: job.state.value for name, job in self.jobs.items()}

    async def fact(self, name: str) -> str | None:
        return self.facts.get(name)

    async def set_fact(self, name: str, value: str) -> None:
        self.facts[name] = value

    def active(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.state.terminal]

    def admit(self, *, jobs: bool) -> None:
        self.admits = jobs

    async def pause(self, job_id: str) -> Job:
        assert job_id in json.loads(self.facts[FACT])["paused"], "it was not stored before it was done"
        if job_id in self.steady:
            self.seen.append(job_id)
            raise JobError("not_supported", "libvirt cannot pause a copy")
        return self._move(job_id, State.PAUSED)

    async def resume(self, job_id: str) -> Job:
        return self._move(job_id, State.RUNNING)

    def _move(self, job_id: str, state: State) -> Job:
        self.seen.append(job_id)
        if job_id in self.stubborn:
            raise JobError("unresponsive", "no answer")
        if self.jobs[job_id].state.terminal:
            raise JobError("conflict", "it has ended")
        self.jobs[job_id] = replace(self.jobs[job_id], state=state)
        return self.jobs[job_id]


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_new_work_is_refused_with_its_remedy_and_what_was_let_in_before_still_holds() -> None:
    async def scenario() -> None:
        host = Host(q=State.QUEUED, w=State.WAITING, r=State.RUNNING, p=State.PAUSED, s=State.STARTING)
        with host.drain.work():
            await host.drain.begin(pause=False)
            assert host.drain.beginning == 1
        assert host.drain.beginning == 0
        assert not host.admits
        with pytest.raises(JobError) as refused, host.drain.work():
            pass
        assert refused.value.code == "draining"
        assert "--undo" in str(refused.value.remedy)
        assert host.drain.beginning == 0
        await host.settled()
        assert [job.id for job in host.drain.holding()] == ["r", "p", "s"]
        assert host.seen == []

    run(scenario)


def test_only_what_draining_has_paused_is_resumed_when_it_is_lifted() -> None:
    async def scenario() -> None:
        host = Host(theirs=State.PAUSED, a=State.RUNNING, b=State.RUNNING, q=State.QUEUED)
        await host.drain.begin(pause=True)
        await host.settled()
        assert host.states() == {"theirs": "paused", "a": "paused", "b": "paused", "q": "queued"}
        assert host.drain.holding() == []
        await host.drain.lift()
        assert host.admits
        await host.settled()
        assert host.states() == {"theirs": "paused", "a": "running", "b": "running", "q": "queued"}
        assert json.loads(host.facts[FACT]) == {"since": None, "pause": False, "paused": []}

    run(scenario)


def test_a_job_that_cannot_be_paused_is_asked_once_and_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        host = Host(a=State.RUNNING, copy=State.RUNNING)
        host.steady = {"copy"}
        await host.drain.begin(pause=True)
        await host.settled()
        for _ in range(3):
            host.drain.job_changed(host.jobs["copy"])
            await host.settled()
        await host.drain.settle()
        assert host.states() == {"a": "paused", "copy": "running"}
        assert host.seen.count("copy") == 1 and len(caplog.records) == 1
        assert [job.id for job in host.drain.holding()] == ["copy"]
        assert host.drain.record.paused == ("a",), "of which the list is for those that were"
        host.jobs["copy"] = replace(host.jobs["copy"], state=State.COMPLETED)
        await host.drain.settle()
        host.jobs["copy"] = replace(host.jobs["copy"], state=State.RUNNING)  # another one
        await host.drain.settle()
        assert host.seen.count("copy") == 2

    run(scenario)


def test_a_job_that_begins_to_run_later_is_paused_then() -> None:
    async def scenario() -> None:
        host = Host(s=State.STARTING)
        await host.drain.begin(pause=True)
        await host.settled()
        assert [job.id for job in host.drain.holding()] == ["s"]
        host.drain.job_changed(await host.resume("s"))
        await host.settled()
        assert host.states() == {"s": "paused"}
        host.drain.job_changed(host.jobs["s"])
        assert host.tasks == []

    run(scenario)


def test_it_lasts_over_a_restart_and_what_a_crash_left_half_done_is_done() -> None:
    async def scenario() -> None:
        host = Host(a=State.RUNNING)
        await host.drain.begin(pause=True)
        for task in host.tasks:
            task.cancel()  # the agent is killed before it could pause anything
        begun = host.drain.record.since
        drain = host.restarted()
        await drain.load()
        assert (drain.on, drain.record.since, host.admits) == (True, begun, False)
        await drain.settle()
        assert host.states() == {"a": "paused"}
        await drain.lift()
        for task in host.tasks:
            task.cancel()  # and again before it could resume
        drain = host.restarted()
        await drain.load()
        assert (drain.on, host.admits) == (False, True)
        await drain.settle()
        assert host.states() == {"a": "running"}
        assert drain.record.paused == ()

    run(scenario)


def test_a_job_that_cannot_be_paused_keeps_no_other_from_it_and_holds() -> None:
    async def scenario() -> None:
        host = Host(a=State.RUNNING, b=State.RUNNING)
        host.stubborn = {"a"}
        await host.drain.begin(pause=True)
        await host.settled()
        assert host.states() == {"a": "running", "b": "paused"}
        assert [job.id for job in host.drain.holding()] == ["a"]
        host.stubborn = set()
        host.drain.job_changed(host.jobs["a"])
        await host.settled()
        assert host.drain.holding() == []

    run(scenario)


def test_a_job_that_cannot_be_resumed_is_not_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        host = Host(a=State.RUNNING, b=State.RUNNING, c=State.RUNNING)
        await host.drain.begin(pause=True)
        await host.settled()
        host.stubborn = {"a"}
        host.jobs["c"] = replace(host.jobs["c"], state=State.ABORTED)
        await host.drain.lift()
        await host.settled()
        assert host.states() == {"a": "paused", "b": "running", "c": "aborted"}
        assert host.drain.record.paused == ("a",)
        assert "could not change" in caplog.text
        host.stubborn = set()
        host.drain.job_changed(host.jobs["a"])  # it was found again
        await host.settled()
        assert (host.states()["a"], host.drain.record.paused) == ("running", ())

    run(scenario)


def test_to_ask_again_adds_the_pause_and_never_takes_it_back() -> None:
    async def scenario() -> None:
        host = Host(a=State.RUNNING)
        await host.drain.begin(pause=False)
        since = host.drain.record.since
        await host.drain.begin(pause=True)
        await host.drain.begin(pause=False)
        await host.settled()
        assert (host.drain.record.pause, host.drain.record.since) == (True, since)
        assert host.states() == {"a": "paused"}
        await host.drain.lift()
        await host.drain.begin(pause=False)
        assert host.drain.record.pause is False

    run(scenario)


def test_only_root_and_the_agents_own_user_drain_the_host() -> None:
    async def scenario() -> None:
        host = Host()
        names = (
            "engine",
            "exports",
            "bitmaps",
            "chains",
            "ledger",
            "store",
            "subject",
            "facts",
            "watch",
            "live",
            "holding",
        )
        parts: dict[str, Any] = dict.fromkeys(names)
        service = AgentService(**parts, changes=Changes(), drain=host.drain, dbus=dict)
        member = Peer(1, 4242, 4242)
        for ask in (service.drain(False, peer=member), service.lift_drain(peer=member)):
            with pytest.raises(JobError) as refused:
                await ask
            assert refused.value.code == "denied"
        assert host.facts == {}

    run(scenario)


def test_somebody_elses_job_is_not_paused() -> None:
    async def story() -> None:
        host = Host(ours=State.RUNNING, theirs=State.RUNNING)
        host.jobs["theirs"] = replace(host.jobs["theirs"], origin="external")
        await host.drain.begin(pause=True)
        await host.settled()
        assert host.states() == {"ours": "paused", "theirs": "running"}
        assert host.drain.record.paused == ("ours",)
        assert [job.id for job in host.drain.holding()] == ["theirs"]

    asyncio.run(story())
