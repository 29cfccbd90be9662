"""Whatever is asked, lost, killed and restarted, in whatever order: the promises that every job keeps."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobs.machine import TRANSITIONS
from jobs.model import Completion, Holder, Job, Operation, Revocation, State
from tests.unit.jobs.agent_in_memory import QUICK, Agent, run
from tests.unit.jobs.fake_driver import MIB
from tests.unit.jobs.stories import FAULTS, Step, Story

WIDTH = 2
IMAGES = ("/a", "/b", "/c")
ALLOWED = {"conflict", "busy", "limit", "timeout", "unresponsive", "store_full"}  # the engine's own refusals
CHANGED = {"invalid"}  # a plan for a chain that another job changed meanwhile
PASSED_ON = {"storage_daemon_died", "job_failed", "io_error"}  # what the driver said to a request
KINDS = ("pull", "step", "copy", "copy pivot", "copy finish", "over pivot", "commit", "commit pivot", "commit finish")
KINDS += ("below",)
ENDS = {"pivot": Completion.PIVOT, "finish": Completion.FINISH}
ASKS = ("abort", "force", "pause", "resume", "speed", "next", "pivot", "finish", "retry")
ON_IMAGE = (*KINDS, *ASKS, "silence", "heal", "die")
ON_AGENT = ("crash", "fill", "empty", "hints lost", "hints found", "hint all", "sleep")

CALLS = ("prepare", "start", "start done", "advance", "advance done", "rest", "finalize", "finalize done", "cancel")
CALLS += ("complete", "complete done", "seal", "seal done", "discard", "discard done")
ENDING_CALLS = ("conclude", "drop", "drop done", "leave", "observe", "pause", "resume")

on_image = st.tuples(st.sampled_from(ON_IMAGE), st.sampled_from(IMAGES), st.integers(0, 3))
on_agent = st.tuples(st.sampled_from(ON_AGENT), st.just(""), st.integers(0, 3))
fault = st.tuples(
    st.sampled_from([f"{what} in {call}" for what in FAULTS for call in CALLS + ENDING_CALLS]),
    st.sampled_from(IMAGES),
    st.integers(0, 3),
)
sequences = st.lists(st.one_of(on_image, on_image, on_agent, fault), min_size=3, max_size=30)


class JobStory(Story):
    """Single jobs on a few images."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(agent)
        self.chains = {path: agent.driver.image(path, depth=3) for path in IMAGES}
        self.jobs: dict[str, Job] = {}
        self.lives: list[dict[str, list[Job]]] = []

    def allowed(self, what: str) -> set[str]:
        return ALLOWED | PASSED_ON | (CHANGED if what in KINDS else set())

    async def act(self, what: str, path: str) -> None:
        if what == "crash":
            self.lives.append(self.agent.seen)
        await super().act(what, path)

    async def request(self, what: str, path: str) -> None:
        agent, engine = self.agent, self.agent.engine
        job = self.jobs.get(path)
        if what in KINDS:
            self.jobs[path] = await agent.pull(path, **self.asked(what, path))
        elif what == "retry" and job:
            same, created = await engine.create(job.spec, job.id)
            assert (same.id, created) == (job.id, False)
        elif what == "hint all":
            thrice = list(self.jobs.values()) * 3
            for one in random.Random(1).sample(thrice, k=len(thrice)):  # again and out of order
                engine.hint(one.id)
        elif job is not None:
            await self.ask(what, job)

    def asked(self, kind: str, path: str) -> dict[str, Any]:
        """What a job of this kind is asked to do."""
        operation, _, end = kind.partition(" ")
        spec: dict[str, Any] = {"completion": ENDS.get(end)}
        if operation in ("copy", "over"):
            spec |= {"operation": Operation.COPY, "dest": f"{path}.copy{next(self.numbers)}"}
            if operation == "over":
                self.agent.driver.file(spec["dest"])
                spec["reuse_external"] = True
        elif operation in ("commit", "below"):
            spec["operation"] = Operation.COMMIT
            if operation == "below":
                spec["top"] = f"{path}.1"
        else:
            spec["increment"] = 24 * MIB if kind == "step" else None
            if len(path) % 2 and self.agent.driver.images[path].backing == f"{path}.1":
                spec["base"] = f"{path}.2"
        return spec

    async def ask(self, what: str, job: Job) -> None:
        engine = self.agent.engine
        if what == "next":
            now = await engine.get(job.id)
            if now.incremental:
                await engine.next(job.id, now.cursor.cur)
        elif what in ("abort", "force"):
            await engine.abort(job.id, force=what == "force")
        elif what == "speed":
            await engine.set_speed(job.id, 5)
        elif what in ENDS:
            await engine.complete(job.id, ENDS[what])
        else:
            await getattr(engine, what)(job.id)

    async def come_right(self) -> None:
        await super().come_right()
        self.lives.append(self.agent.seen)

    async def judge(self) -> None:
        store = self.agent.store
        for job in store.jobs.values():
            self.judge_outcome(job)
            self.judge_access(job)
        for life in self.lives:
            for values in life.values():
                judge_life(values)
        assert len(self.agent.counts.finished) <= len(store.jobs)
        self.judge_rest()
        await self.judge_slots()

    def judge_outcome(self, job: Job) -> None:
        kinds = self.agent.store.kinds(job.id)
        ends = [kind for kind in kinds if kind not in ("started", "ready")]
        assert job.state.terminal
        assert ends == [{"completed": "completed", "failed": "failed", "aborted": "cancelled"}[job.state]]
        assert kinds.count("started") <= 1
        assert kinds[-1] == ends[0]
        if job.state is State.COMPLETED:
            assert job.cursor.cur == job.cursor.end
            assert job.error is None
        else:
            assert job.error is not None
        if job.state is State.ABORTED:
            assert job.intent == "abort"

    def judge_access(self, job: Job) -> None:
        (change,) = [change for ended, change in self.agent.store.finishes if ended.id == job.id]
        image = Holder("image", job.before.top.path)
        assert job.holder in change.release
        asked = [file for files, _ in self.agent.access.asked for file in files]
        assert set(asked) >= {layer.file for layer in job.before.layers}
        if job.state is State.COMPLETED:
            assert set(change.forget) == {layer.file for layer in job.dropped}
            images = {image, Holder("image", job.after.top.path)}
            assert (change.sharers, change.gains) == (tuple(sorted(images)) if job.dropped else (), ())
            assert set(change.release) == ({job.holder, image} if job.dropped else {job.holder})
            assert job.revocation is (Revocation.DONE if job.dropped else Revocation.NONE)
        else:
            assert change.forget == ()
            assert job.revocation is Revocation.NONE
            assert {holder for holder, _ in change.gains} <= {image}
            below = {layer.file for layer in job.before.layers[1:]}
            if job.started or job.cursor.cur:
                assert {need.layer.file for _, need in change.gains} == below
            assert all(need.mode == "r" for _, need in change.gains)

    async def judge_slots(self) -> None:
        """As many jobs run at once as ever, and not one more."""
        self.agent.driver.pace = 0
        driver, jobs = self.agent.driver, []
        for n in range(2 * WIDTH):
            driver.image(f"/new{n}")
            jobs.append(await self.agent.pull(f"/new{n}"))
        await self.agent.until(jobs[1], lambda job: driver.running() == WIDTH)
        await asyncio.sleep(0.005)
        states = [(await self.agent.engine.get(job.id)).state for job in jobs]
        assert states == [State.RUNNING] * WIDTH + [State.QUEUED] * WIDTH


def judge_life(values: list[Job]) -> None:
    """What one agent showed of a job: only steps of the table, a cursor that never goes back, growing revisions."""
    for before, after in itertools.pairwise(values):
        assert after.state is before.state or after.state in TRANSITIONS[before.state].values()
        assert after.cursor.cur >= before.cursor.cur
        assert after.cursor.cur <= after.cursor.end
        assert after.revision > before.revision or after == before
        assert not (before.state.terminal and after.state is not before.state)


def tell(steps: list[Step]) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 6 * MIB
        story = JobStory(agent)
        await story.play(steps)
        await story.come_right()
        await story.judge()

    run(scenario, replace(QUICK, width=WIDTH, abort_timeout=0.005), size=48 * MIB, slice=8 * MIB)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@example([("pull", "/a", 1), ("unresponsive in start done", "/a", 0), ("abort", "/a", 2), ("heal", "/a", 0)])
@example([("step", "/a", 3), ("crash", "", 0), ("die", "/a", 0), ("next", "/a", 1), ("crash", "", 0)])
@example([("copy pivot", "/a", 3), ("unresponsive in seal", "/a", 0), ("crash", "", 0), ("die", "/a", 0)])
@example([("commit", "/a", 3), ("silence", "/a", 1), ("pivot", "/a", 0), ("heal", "/a", 2), ("finish", "/a", 0)])
@given(sequences)
def test_every_job_keeps_its_promises(steps: list[Step]) -> None:
    tell(steps)


@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("call", CALLS + ENDING_CALLS)
@pytest.mark.parametrize("kind", ["pull", "step", "copy pivot", "copy finish", "commit pivot", "below"])
def test_a_fault_in_any_call_is_survived(what: str, call: str, kind: str) -> None:
    tell([(f"{what} in {call}", "/a", 0), (kind, "/a", 3), ("pause", "/a", 1), ("crash", "", 1), ("resume", "/a", 2)])
