"""The agent, or the storage daemon, is killed at random moments of copies and commits, and nothing is lost or left.

A job whose agent was killed completes. One whose storage daemon was killed completes or fails: then the image reads as
before, a target that was ours is gone, and the same job started again completes. Images beside the chain, one standing
on it among them, hold what they held. TEST_SEED repeats the moments of a run that failed.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import (
    MIB,
    AgentProcess,
    ApiError,
    Json,
    backing_of,
    check_clean,
    overlay,
    reachable,
    same_content,
    sound,
)
from tests.qemu.faults import ROOT, Pair, Reader, backing_name, eventually, permissions, send, storage_daemons
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

SIZE = 32 * MIB
BANDWIDTH = 32 * MIB
"""Bytes a second. QEMU's mirror, which is also an active commit, takes no notice of it for its first 16 MiB, so that a
copy takes 0.5 s, and a commit of the 24 MiB that lie above the base half of that."""


@dataclass(frozen=True)
class Work:
    """A job to kill: `spec` is what is asked, `{middle}` and `{base}` stand for the layers."""

    name: str
    operation: str
    completion: str | None = None
    below: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def copies(self) -> bool:
        return self.operation == "copy"

    @property
    def pivots(self) -> bool:
        return self.completion == "pivot"


WORKS = [
    Work("copy-finish", "copy", "finish"),
    Work("copy-pivot", "copy", "pivot"),
    Work("commit-pivot", "commit", "pivot"),
    Work("commit-keep", "commit", "finish"),
    Work("commit-below", "commit", below=True),
]


class Scene:
    """top ← middle ← base in a folder of their own, what stands beside them, and the job that is done to them."""

    def __init__(self, model: Pair, folder: Path, work: Work) -> None:
        self.images, self.work = model.copy(folder), work
        assert self.images.middle is not None
        self.top, self.middle, self.base = self.images.top, self.images.middle, self.images.base
        self.dest = folder / "dest.qcow2"
        on, format = (self.base, "raw") if work.copies else (self.top, "qcow2")  # a base is written by commits
        self.sibling = overlay(folder / "sibling.qcow2", on, format)
        _write(self.sibling)
        self.sibling_truth = folder.parent / "sibling.truth"
        _convert(self.sibling, self.sibling_truth)
        self.files = {**self.images.files, self.sibling: "qcow2"}
        self.before = {path: permissions(path) for path in self.files}
        self.names = {path.name for path in folder.iterdir()}

    def request(self) -> Json:
        wanted: Json = {"operation": self.work.operation, "target": str(self.top), "bandwidth": BANDWIDTH}
        wanted["id"] = str(uuid.uuid4())
        if self.work.completion:
            wanted["completion"] = self.work.completion
        if self.work.copies:
            wanted["dest"] = str(self.dest)
        if self.work.below:
            wanted |= {"top": str(self.middle), "base": str(self.base)}
        return wanted

    @property
    def result(self) -> Path:
        """What shows the image's content by the job alone, when it completed."""
        return self.dest if self.work.copies else self.top if self.work.below else self.base

    @property
    def stands_on(self) -> Path:
        """The top of the chain after the job: what exports of it show."""
        return self.result if self.work.pivots else self.top

    def assert_completed(self, job: Json) -> None:
        assert (job["state"], job["error"], job["revocation"]) == ("completed", None, self._revocation), job
        assert job["cursor"]["cur"] == job["cursor"]["end"]
        assert same_content(self.result, self.images.truth, first="raw" if self.result == self.base else None)
        assert same_content(self.top, self.images.truth)
        if self.work.copies:
            assert job["dest"]["state"] == "complete"
            assert check_clean(self.dest)
            assert backing_of(self.dest) is None
        if self.work.below:
            assert backing_name(self.top) == self.base.name
        self._assert_beside({self.dest.name} if self.work.copies else set())

    @property
    def _revocation(self) -> str:
        if not self.work.pivots and not self.work.below:
            return "none"
        return "done" if ROOT else "kept"

    def assert_failed(self, job: Json) -> None:
        assert (job["state"], job["error"]["code"]) == ("failed", "storage_daemon_died"), job
        assert job["chain"]["revoked"] == []
        assert backing_name(self.top) == self.middle.name
        assert same_content(self.top, self.images.truth)
        if self.work.copies:
            assert job["dest"]["state"] == "deleted"
        self._assert_beside(set())

    def _assert_beside(self, new: set[str]) -> None:
        assert {path.name for path in self.images.folder.iterdir()} == self.names | new
        assert all(sound(path) for path in (self.top, self.middle, self.sibling))
        assert same_content(self.sibling, self.sibling_truth)


def _write(image: Path) -> None:
    command = ["qemu-io", "-c", "write -q -P 7 1M 256k", "-c", "write -q -P 8 20M 256k", str(image)]
    subprocess.run(command, check=True)


def _convert(image: Path, raw: Path) -> None:
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A chain most of whose data lies in the middle."""
    pair = Pair(tmp_path_factory.mktemp("model") / "pair", SIZE, middle=True)
    assert pair.middle is not None
    command = ["qemu-io", *(word for n in range(22) for word in ("-c", f"write -q -P {n + 33} {n + 8}M 1M"))]
    subprocess.run([*command, str(pair.middle)], check=True)
    _convert(pair.top, pair.truth)
    return pair


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with reachable(tmp_path), AgentProcess(tmp_path, SETTINGS) as process:
        yield process


@pytest.mark.parametrize("work", WORKS, ids=str)
@pytest.mark.parametrize("victim", ["agent", "daemon"])
def test_nothing_is_lost_whenever_something_is_killed(
    agent: AgentProcess, model: Pair, work: Work, victim: str
) -> None:
    _rounds(agent, model, work, victim, range(5))


@pytest.mark.parametrize("work", [WORKS[1], WORKS[3]], ids=str)
def test_nothing_is_lost_when_the_agent_is_killed_again_while_it_recovers(
    agent: AgentProcess, model: Pair, work: Work
) -> None:
    _rounds(agent, model, work, "agent-twice", range(2))


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS, ids=str)
@pytest.mark.parametrize("victim", ["agent", "daemon", "agent-twice"])
def test_the_long_kill_matrix_of_copies_and_commits(agent: AgentProcess, model: Pair, work: Work, victim: str) -> None:
    _rounds(agent, model, work, victim, range(1000, 1040))


def _rounds(agent: AgentProcess, model: Pair, work: Work, victim: str, numbers: range) -> None:
    print(f"TEST_SEED={SEED}")
    for number in numbers:
        dice = random.Random(f"{SEED} {work} {victim} {number}")
        moment, exported = Moment.chosen(dice), number % 2 == 1
        what = f"{work}, round {number}, {victim} killed {moment}, {'with' if exported else 'without'} an export"
        folder = agent.folder / f"round{number}"
        with noted(agent, what):
            _round(agent, Scene(model, folder, work), victim, moment, dice, exported=exported)
        shutil.rmtree(folder)  # forty rounds would take more than 4 GB
    agent.stop()
    assert left_in_store(agent) == {}


def _round(
    agent: AgentProcess, scene: Scene, victim: str, moment: Moment, dice: random.Random, *, exported: bool
) -> None:
    with contextlib.ExitStack() as stack:
        export, reader = None, None
        if exported:
            export = agent.export(scene.top)
            reader = stack.enter_context(Reader(export["uri"], scene.images.truth))
        client = Client(agent, scene.request())
        moment.wait(lambda: _ending(agent, client))
        _kill(agent, victim, dice)
        job = settled(agent, client)
        if export is not None and reader is not None:
            _end_export(agent, scene, export, reader, victim)
    if victim == "daemon" and job["state"] == "failed":
        scene.assert_failed(job)
        job = settled(agent, Client(agent, scene.request()))
        _take_back_what_a_failure_left(agent, scene)
    scene.assert_completed(job)
    files = {**scene.files, scene.dest: "qcow2"} if scene.work.copies else scene.files
    assert_nothing_left(agent, files, scene.before)


def _ending(agent: AgentProcess, client: Client) -> bool:
    """Whether the job's end was asked for, or seen."""
    try:
        state = agent.job(client.request["id"])["state"]
    except (ApiError, OSError, http.client.HTTPException):
        return False
    return state in ("completing", "completed", "failed")


def _kill(agent: AgentProcess, victim: str, dice: random.Random) -> None:
    """SIGKILL, and the agent started again where it was the one."""
    if victim == "daemon":
        send(signal.SIGKILL, *storage_daemons(agent))
        return
    agent.kill()
    if victim == "agent-twice":
        start_and_kill(agent, dice.uniform(0.3, 0.9))
    agent.start()


def _end_export(agent: AgentProcess, scene: Scene, export: Json, reader: Reader, victim: str) -> None:
    path = f"/v1/exports/{export['id']}"
    if victim == "daemon":
        assert eventually(lambda: agent.get(path)["state"] == "lost"), agent.get(path)
        assert reader.cut_off()
        return
    assert agent.get(path)["state"] == "running"
    assert agent.get(path)["path"] == str(scene.stands_on)
    format = {"format": "raw"} if scene.stands_on == scene.base else {}
    another = agent.export(scene.stands_on, **format)  # who joins the chain now finds it whole
    assert another["pid"] == export["pid"]
    agent.delete(f"/v1/exports/{another['id']}")
    assert reader.stop() > 0
    assert eventually(lambda: not agent.get(path)["clients"])
    agent.delete(path)


def _take_back_what_a_failure_left(agent: AgentProcess, scene: Scene) -> None:
    """A job that failed leaves the image what it stands on; one that completed later gives back what the chain lost."""
    for grant in agent.get("/v1/grants")["items"]:
        if grant["holder"]["kind"] == "image":
            assert grant["path"] in (str(scene.middle), str(scene.base)), grant
            agent.delete(f"/v1/grants/{grant['id']}")
