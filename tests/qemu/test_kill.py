"""The agent is killed at random moments of a pull, and nothing is lost, wrong or left behind.

A round makes a pull, kills the agent at a moment that the seed decides, starts it again, brings the job to its end,
and looks at everything that may be left. TEST_SEED repeats the moments of a run that failed.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, check_clean, reachable, same_content, sound
from tests.qemu.faults import ROOT, Pair, Reader, eventually, permissions, send, storage_daemons
from tests.qemu.kills import (
    SEED,
    SETTINGS,
    Client,
    Moment,
    assert_nothing_left,
    left_in_store,
    noted,
    settled,
    start_and_kill,
)

pytestmark = pytest.mark.qemu

SIZE = 24 * MIB
BANDWIDTH = 48 * MIB
"""Bytes a second: a pull takes 0.5 s, and the moments are spread over that and what comes before and after."""
INCREMENT = 5 * MIB


@dataclass(frozen=True)
class Case:
    """What a round does. `twice` kills again while the agent recovers; `daemon` kills the storage daemon as well,
    with `alone` nobody else."""

    incremental: bool
    export: bool
    twice: bool = False
    daemon: bool = False
    alone: bool = False

    def __str__(self) -> str:
        words = ["incremental" if self.incremental else "continuous"]
        words += [word for word in ("export", "twice", "daemon", "alone") if getattr(self, word)]
        return "-".join(words)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """What rounds pull, one of them each: three whole pulls to one that stops at a base."""
    folder = tmp_path_factory.mktemp("models")
    whole = Pair(folder / "whole", SIZE)
    return [whole, whole, whole, Pair(folder / "partial", SIZE, middle=True)]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with reachable(tmp_path), AgentProcess(tmp_path, SETTINGS) as process:
        yield process


COMMON = [Case(incremental, export) for incremental in (False, True) for export in (False, True)]
TWICE = [Case(incremental, export, twice=True) for incremental in (False, True) for export in (True, False)]
WITH_DAEMON = [Case(incremental, export, daemon=True) for incremental in (False, True) for export in (False, True)]


DAEMON_ALONE = [replace(case, alone=True) for case in WITH_DAEMON]


@pytest.mark.parametrize("case", COMMON, ids=str)
def test_a_pull_ends_right_whenever_the_agent_is_killed(agent: AgentProcess, models: list[Pair], case: Case) -> None:
    _rounds(agent, models, case, 10)


@pytest.mark.parametrize("case", TWICE[::3], ids=str)
def test_a_pull_ends_right_when_the_agent_is_killed_again_while_it_recovers(
    agent: AgentProcess, models: list[Pair], case: Case
) -> None:
    _rounds(agent, models, case, 2)


@pytest.mark.parametrize("case", WITH_DAEMON[::3], ids=str)
def test_no_byte_is_lost_when_the_storage_daemon_is_killed_with_the_agent(
    agent: AgentProcess, models: list[Pair], case: Case
) -> None:
    _rounds(agent, models, case, 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", COMMON + TWICE + WITH_DAEMON + DAEMON_ALONE, ids=str)
def test_the_long_kill_matrix(agent: AgentProcess, models: list[Pair], case: Case) -> None:
    _rounds(agent, models, case, 40 if case.alone else 25, first=1000)


def _rounds(agent: AgentProcess, models: list[Pair], case: Case, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        dice = random.Random(f"{SEED} {case} {number}")
        moment = Moment.chosen(dice)
        folder = agent.folder / f"round{number}"
        with noted(agent, f"{case}, round {number}, killed {moment}"):
            _round(agent, dice.choice(models).copy(folder), case, moment, dice)
        shutil.rmtree(folder)  # the rounds of a long matrix would fill a disk
    agent.stop()
    assert left_in_store(agent) == {}


def _round(agent: AgentProcess, images: Pair, case: Case, moment: Moment, dice: random.Random) -> None:
    before = {path: permissions(path) for path in images.files}
    with contextlib.ExitStack() as stack:
        reader = None
        if case.export:
            export = agent.export(images.top)
            reader = stack.enter_context(Reader(export["uri"], images.truth))
        request = {**images.request, "id": str(uuid.uuid4()), "bandwidth": BANDWIDTH}
        client = Client(agent, {**request, "increment": INCREMENT} if case.incremental else request)
        moment.wait(images.pulled)
        _kill(agent, case, dice)
        client.join()
        if not case.alone:
            agent.start()
        job = settled(agent, client)
        if case.daemon and job["state"] == "failed":
            assert job["error"]["code"] == "storage_daemon_died", job
            _assert_whole(images, case, pulled=False)
            again = {**client.request, "id": str(uuid.uuid4())}
            job = settled(agent, Client(agent, again))
            _take_back_what_a_failure_left(agent, images)
        assert job["state"] == "completed", job
        assert job["cursor"] == {"cur": SIZE, "end": SIZE}
        assert job["revocation"] == ("done" if ROOT else "kept"), job
        if reader is not None:
            _end_export(agent, export["id"], reader, case)
    _assert_whole(images, case, pulled=True)
    assert_nothing_left(agent, images.files, before)


def _kill(agent: AgentProcess, case: Case, dice: random.Random) -> None:
    """SIGKILL; also, where the case says so, a storage daemon before or after it, or an agent that recovers."""
    if case.alone:
        send(signal.SIGKILL, *storage_daemons(agent))
        return
    daemon_first = dice.random() < 0.5
    if case.daemon and daemon_first:
        send(signal.SIGKILL, *storage_daemons(agent))
    agent.kill()
    if case.daemon:
        send(signal.SIGKILL, *storage_daemons(agent))
    for _ in range(dice.randint(1, 2) if case.twice else 0):
        start_and_kill(agent, dice.uniform(0.3, 0.9))


def _end_export(agent: AgentProcess, export_id: str, reader: Reader, case: Case) -> None:
    if case.alone:
        assert eventually(lambda: agent.get(f"/v1/exports/{export_id}")["state"] == "lost")
    export = agent.get(f"/v1/exports/{export_id}")
    if case.daemon and export["state"] == "lost":
        assert reader.cut_off()
        return
    assert export["state"] == "running", export
    assert reader.stop() > 0
    assert eventually(lambda: not agent.get(f"/v1/exports/{export_id}")["clients"])
    agent.delete(f"/v1/exports/{export_id}")


def _take_back_what_a_failure_left(agent: AgentProcess, images: Pair) -> None:
    """A failed pull leaves the image its backing files; a later one up to a base gives back all but that base."""
    for grant in agent.get("/v1/grants")["items"]:
        if grant["holder"]["kind"] == "image":
            assert images.middle and grant["path"] == str(images.base), grant
            agent.delete(f"/v1/grants/{grant['id']}")


def _assert_whole(images: Pair, case: Case, *, pulled: bool) -> None:
    assert sound(images.top) if case.daemon else check_clean(images.top)
    assert images.pulled() or not pulled
    assert same_content(images.top, images.truth)
