"""Jobs that become ready, on the host in memory: how they begin, stand still at a call, and what their ends must show."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobs.errors import JobError
from jobs.model import Completion, FileId, Holder, Job, Need, Operation, Revocation, State, TargetState
from tests.unit.jobs.agent_in_memory import Agent
from tests.unit.jobs.fake_images import Daemon

EXPORT = Holder("export", "e1")
WORKS: dict[str, dict[str, Any]] = {
    "copy": {"operation": Operation.COPY, "dest": "/dest"},
    "over": {"operation": Operation.COPY, "dest": "/there", "reuse_external": True},
    "commit": {"operation": Operation.COMMIT},
}
FINISH, PIVOT = Completion.FINISH, Completion.PIVOT

each_work = pytest.mark.parametrize("work", WORKS)
each_end = pytest.mark.parametrize("end", list(Completion))


def refusal(code: str) -> pytest.RaisesExc[JobError]:
    return pytest.RaisesExc(JobError, check=lambda error: error.code == code)


async def begin(agent: Agent, work: str, **values: Any) -> Job:
    """A job on a chain of three that an export shares."""
    agent.driver.image("/top", depth=3)
    image = agent.driver.images["/top"]
    image.users, image.prepared, image.daemon = {EXPORT}, True, Daemon()
    if work == "over":
        agent.driver.file("/there")
    return await agent.pull("/top", **{**WORKS[work], **values})


async def hold(agent: Agent, job: Job, call: str) -> None:
    """Until the job stands before this call, and no further."""
    await agent.until(job, lambda now: (call, job.id) in agent.driver.calls)


def gate(agent: Agent, call: str) -> None:
    agent.driver.gates[call] = asyncio.Event()


def open_gates(agent: Agent) -> None:
    for event in agent.driver.gates.values():
        event.set()
    agent.driver.gates.clear()


def assert_completed(agent: Agent, job: Job, end: Completion) -> None:
    assert (job.state, job.error, job.completion) == (State.COMPLETED, None, end)
    assert job.cursor.cur == job.cursor.end > 0
    (_, change) = agent.store.finishes[0]
    assert job.holder in change.release
    if end is FINISH:
        assert (job.after, job.revocation) == (job.before, Revocation.NONE)
        assert (change.forget, change.gains) == ((), ())
    else:
        assert job.revocation is Revocation.DONE
        assert set(change.forget) == {layer.file for layer in job.dropped}
        top = job.after.top
        images = {Holder("image", job.before.top.path), Holder("image", top.path)}
        assert change.sharers == (EXPORT, *sorted(images))
        new = top.file not in {layer.file for layer in job.before.layers}
        assert change.gains == (((EXPORT, Need(top, "r", f"copy {job.id} put it on top")),) if new else ())
    if job.target is not None:
        assert job.target.state is TargetState.COMPLETE
    assert agent.driver.serving("/top").users == {EXPORT}
    assert agent.driver.serving("/top").chain.top.file == job.after.top.file


def assert_not_completed(agent: Agent, job: Job, state: State, code: str) -> None:
    assert job.error is not None
    assert (job.state, job.error.code, job.revocation) == (state, code, Revocation.NONE)
    (_, change) = agent.store.finishes[0]
    assert change.forget == ()
    image = Holder("image", "/top")
    below: set[FileId] = {layer.file for layer in job.before.layers[1:]}
    assert {(holder, need.layer.file, need.mode) for holder, need in change.gains} == {
        (image, file, "r") for file in below
    }
    if job.target is not None:
        begun = ("start", job.id) in agent.driver.calls
        over = {TargetState.UNUSABLE} if begun else {TargetState.UNUSABLE, TargetState.UNTOUCHED}
        assert job.target.state in ({TargetState.DELETED} if job.target.made else over)
    assert not any(image.daemon.blocks for image in agent.driver.images.values() if image.daemon)
