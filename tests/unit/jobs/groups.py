"""Groups of copies on the host in memory: how they begin, and what must hold of them in the end."""

from __future__ import annotations

from typing import Any

from jobs.model import Completion, FileId, Holder, Job, JobSpec, Operation, State, TargetState
from tests.unit.jobs.agent_in_memory import Agent
from tests.unit.jobs.fake_images import Daemon, part_of

DISKS = ("/a", "/b", "/c")
GROUP = "00000000-0000-4000-8000-00000000000a"
EXPORT = Holder("export", "e1")


def specs(*paths: str, **values: Any) -> list[JobSpec]:
    values = {"completion": Completion.FINISH, **values}
    return [JobSpec(Operation.COPY, path, dest=f"{path}.copy", **values) for path in paths or DISKS]


async def begin(agent: Agent, *paths: str, group_id: str | None = GROUP, **values: Any) -> list[Job]:
    """Copies of disks that an export of each shares."""
    for path in paths or DISKS:
        agent.driver.image(path, depth=3)
        image = agent.driver.images[path]
        image.users, image.prepared, image.daemon = {EXPORT}, True, Daemon()
        if values.get("reuse_external"):
            agent.driver.file(f"{path}.copy")
    jobs, created = await agent.engine.create_group(specs(*paths, **values), group_id)
    assert created
    return jobs


async def ended(agent: Agent, jobs: list[Job]) -> list[Job]:
    found = [await agent.until_cleared(job) for job in jobs]
    judge(agent, found)
    judge_chains(agent, found)
    return found


def judge(agent: Agent, jobs: list[Job]) -> None:
    """Together or not at all; no name stays of what did not complete."""
    names, done = agent.driver.names, [job.state is State.COMPLETED for job in jobs]
    assert all(done) or not any(done), [(job.id, job.state, job.error) for job in jobs]
    for job in jobs:
        assert job.target is not None and job.state.terminal
        ends = [kind for kind in agent.store.kinds(job.id) if kind in ("completed", "failed", "cancelled")]
        assert ends == [{"completed": "completed", "failed": "failed", "aborted": "cancelled"}[job.state]]
        assert part_of(job) not in names
        if all(done):
            assert names[job.target.path] == job.target.file
            assert job.target.state is TargetState.COMPLETE
        else:
            assert job.error is not None
            file = job.target.file
            assert file is None or not job.target.made or names.get(job.target.path) != file


def judge_chains(agent: Agent, jobs: list[Job]) -> None:
    """Who stands on the images stands on the targets when the group pivoted, and else where he stood."""
    for job in jobs:
        image = agent.driver.serving(job.before.top.path)
        if job.state is not State.COMPLETED:
            assert agent.driver.images[job.before.top.path].moved is None
            assert image.chain == job.before
        elif image.prepared:
            assert image.chain.top.file == job.after.top.file


def targets(agent: Agent, jobs: list[Job]) -> list[FileId | None]:
    return [agent.driver.names.get(f"{job.before.top.path}.copy") for job in jobs]
