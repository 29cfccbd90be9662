"""Groups and single jobs beside them, with whatever is asked, lost, killed and restarted in whatever order: all of a
group complete or none, it is never said of one too early, and in the end nothing is left over."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobs.model import Completion, Job, JobSpec, Operation, State
from tests.unit.jobs.agent_in_memory import QUICK, Agent, run
from tests.unit.jobs.fake_driver import MIB
from tests.unit.jobs.groups import judge
from tests.unit.jobs.stories import FAULTS, Step, Story

WIDTH = 3
DISKS = ("/a", "/b", "/c")
CALLS = ("prepare", "start", "start done", "harden", "harden done", "name", "name done", "complete", "complete done")
CALLS += ("seal", "seal done", "discard", "discard done", "conclude", "drop", "cancel", "leave")
ASKS = ("abort", "force", "pause", "resume", "pivot", "finish", "delete", "silence", "heal", "die", "take name")
ON_AGENT = ("crash", "crash", "fill", "empty", "hints lost", "hints found", "retry", "sleep", "single")
KINDS = ("new pivot", "new finish", "new", "over pivot", "over finish")
ALLOWED = {"conflict", "busy", "limit", "timeout", "unresponsive", "store_full", "not_found"}
ALLOWED |= {"storage_daemon_died", "job_failed", "io_error", "image_changed"}

on_disk = st.tuples(st.sampled_from(ASKS), st.sampled_from(DISKS), st.integers(0, 3))
on_agent = st.tuples(st.sampled_from(ON_AGENT), st.just(""), st.integers(0, 3))
fault = st.tuples(
    st.sampled_from([f"{what} in {call}" for what in FAULTS for call in CALLS]),
    st.sampled_from(DISKS),
    st.integers(0, 3),
)
group = st.tuples(st.sampled_from(KINDS), st.just(""), st.integers(0, 6))
acts = st.tuples(st.lists(fault, max_size=2), group, st.lists(st.one_of(on_disk, on_disk, on_agent, fault), max_size=8))
sequences = st.lists(acts, min_size=1, max_size=4).map(
    lambda found: [step for before, begun, after in found for step in (*before, begun, *after)]
)


class GroupStory(Story):
    """Groups of copies, and a single job beside them."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(agent)
        for path in (*DISKS, "/single"):
            agent.driver.image(path, depth=2)
        self.groups: list[tuple[list[JobSpec], list[Job]]] = []
        self.deleted: dict[str, Job] = {}
        judged = agent.store.recorded

        def recorded(job: Job) -> None:
            judged(job)
            if job.state is State.COMPLETED and job.group is not None:
                self.judge_decided(job)

        agent.store.recorded = recorded

    def judge_decided(self, job: Job) -> None:
        """When one is said to be completed, all are sure to be."""
        assert job.group is not None
        for one in job.group.jobs:
            other = self.agent.store.jobs.get(one) or self.deleted[one]
            if not other.decided:
                self.agent.broken.append(f"{job.id} is completed, and {one} is {other.state} and undecided")

    def allowed(self, what: str) -> set[str]:
        return ALLOWED

    async def request(self, what: str, path: str) -> None:
        agent, engine = self.agent, self.agent.engine
        job = self.job_on(path)
        if what in KINDS:
            await self.begin(what)
        elif what == "single":
            await agent.pull("/single")
        elif what == "retry" and self.groups:
            specs, jobs = self.groups[-1]
            if not self.deleted:
                assert not (await engine.create_group(specs, jobs[0].group and jobs[0].group.id))[1]
        elif job is not None:
            await self.ask(what, job)

    def job_on(self, path: str) -> Job | None:
        if not self.groups or not path:
            return None
        _, jobs = self.groups[-1]
        found = next((job for job in jobs if job.spec.target == path), None)
        return None if found is None or found.id in self.deleted else found

    async def begin(self, kind: str) -> None:
        over, _, end = kind.partition(" ")
        n = next(self.numbers)
        tops = {path: self.agent.driver.serving(path).chain.top.path for path in DISKS}
        asked = [
            JobSpec(
                Operation.COPY,
                tops[path],
                dest=f"{path}.copy{n}",
                completion=Completion(end) if end else None,
                reuse_external=over == "over",
            )
            for path in DISKS[: 2 + n % 2]
        ]
        if over == "over":
            for spec in asked:
                assert spec.dest is not None
                self.agent.driver.file(spec.dest)
        jobs, _ = await self.agent.engine.create_group(asked)
        self.groups.append((asked, jobs))

    async def ask(self, what: str, job: Job) -> None:
        engine = self.agent.engine
        if what in ("abort", "force"):
            await engine.abort(job.id, force=what == "force")
        elif what in ("pivot", "finish"):
            await engine.complete(job.id, Completion(what))
        elif what == "delete":
            known = await engine.get(job.id)
            await engine.delete(job.id)
            self.deleted[job.id] = known
        elif what == "take name":
            assert job.spec.dest is not None
            self.agent.driver.names.setdefault(job.spec.dest, self.agent.driver.file(f"/foreign{next(self.numbers)}"))
        else:
            await getattr(engine, what)(job.id)

    def judge(self) -> None:
        store = self.agent.store
        ids = {job.group.id for job in store.jobs.values() if job.group}
        for one in ids:
            jobs = [job for job in (*store.jobs.values(), *self.deleted.values()) if job.group and job.group.id == one]
            judge(self.agent, jobs)
            assert len(jobs) == len(jobs[0].group.jobs if jobs[0].group else ())
        self.judge_rest()
        assert self.agent.engine._groups == {}

    async def judge_slots(self) -> None:
        """As many as ever may run at once, and a group that needs them all gets them."""
        asked = []
        for n in range(WIDTH):
            self.agent.driver.image(f"/new{n}")
            asked.append(JobSpec(Operation.COPY, f"/new{n}", dest=f"/new{n}.copy", completion=Completion.FINISH))
        jobs, _ = await self.agent.engine.create_group(asked)
        done = [await self.agent.until_cleared(job) for job in jobs]
        assert [job.state for job in done] == [State.COMPLETED] * WIDTH


def tell(steps: list[Step]) -> None:
    async def scenario(agent: Agent) -> None:
        agent.driver.pace = 12 * MIB
        story = GroupStory(agent)
        await story.play(steps)
        await story.come_right()
        story.judge()
        await story.judge_slots()

    run(scenario, replace(QUICK, width=WIDTH, abort_timeout=0.005), size=48 * MIB)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@example([("new pivot", "", 3), ("unresponsive in harden", "/b", 0), ("crash", "", 0), ("die", "/b", 0)])
@example([("new finish", "", 6), ("io_error in name", "/a", 0), ("crash", "", 1), ("die", "/b", 0), ("crash", "", 0)])
@example([("new", "", 6), ("finish", "/b", 0), ("crash", "", 0), ("abort", "/a", 0)])
@given(sequences)
def test_a_group_keeps_its_promises(steps: list[Step]) -> None:
    tell(steps)


@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_one_in_any_call_is_survived_by_all(what: str, call: str, kind: str) -> None:
    tell([(f"{what} in {call}", "/b", 0), (kind, "", 3), ("crash", "", 1), ("pivot", "/a", 1)])
