"""The agent is killed at random moments of a pull, and nothing is lost, wrong or left behind.

A round makes a pull, kills the agent at a moment that the seed decides, starts it again, brings the job to its end,
and looks at everything that may be left. TEST_SEED repeats the moments of a run that failed.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, check_clean, reachable, same_content
from tests.qemu.faults import (
    PATIENCE,
    ROOT,
    Pair,
    Reader,
    eventually,
    open_below,
    permissions,
    send,
    sound,
    storage_daemons,
    writable_for_qemu,
)

pytestmark = pytest.mark.qemu

SEED = os.environ.get("TEST_SEED") or str(random.SystemRandom().randrange(1 << 32))
SIZE = 24 * MIB
BANDWIDTH = 48 * MIB
"""Bytes a second: a pull takes 0.5 s, and the moments are spread over that and what comes before and after."""
INCREMENT = 5 * MIB


@dataclass(frozen=True)
class Case:
    """What a round does. `twice` kills again while the agent recovers; `daemon` kills the storage daemon as well."""

    incremental: bool
    export: bool
    twice: bool = False
    daemon: bool = False

    def __str__(self) -> str:
        words = ["incremental" if self.incremental else "continuous"]
        words += [word for word in ("export", "twice", "daemon") if getattr(self, word)]
        return "-".join(words)


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after the request was sent, or after the overlay's header shows the end."""

    after: str
    delay: float

    @classmethod
    def chosen(cls, dice: random.Random) -> Moment:
        kind = dice.randrange(4)
        if kind == 0:  # before the answer to the request, or just after it
            return cls("request", dice.uniform(0, 0.012))
        if kind == 1:  # leases, grants, the storage daemon's start
            return cls("request", dice.uniform(0.01, 0.2))
        if kind == 2:  # anywhere in the pull, its end included
            return cls("request", dice.uniform(0.1, 0.9))
        return cls("header", dice.uniform(0, 0.05))  # proof, record, revocation, closing

    def wait(self, images: Pair) -> None:
        if self.after == "header":
            deadline = time.monotonic() + PATIENCE
            while not images.pulled() and time.monotonic() < deadline:
                time.sleep(0.0005)
        time.sleep(self.delay)


class Client:
    """Somebody who asks for the pull and drives it, until the agent is gone."""

    def __init__(self, agent: AgentProcess, request: Json) -> None:
        self._agent = agent
        self.request = request
        self.acknowledged = False
        self.cursor = 0
        self._thread = threading.Thread(target=self._try, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def _try(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            self._agent.post("/v1/jobs", self.request)
            self.acknowledged = True
            if "increment" in self.request:
                self.drive()

    def drive(self) -> Json:
        """Bring the job to its end, by `next` where it waits for that."""
        path = f"/v1/jobs/{self.request['id']}"
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            job: Json = self._agent.get(path)
            assert job["cursor"]["cur"] >= self.cursor, f"the cursor went back from {self.cursor}: {job}"
            self.cursor = job["cursor"]["cur"]
            if job["state"] in ("completed", "failed", "aborted") and job["revocation"] != "pending":
                return job
            if job["state"] == "waiting":
                self._agent.post(f"{path}/next", {"cursor": self.cursor})
            time.sleep(0.01)
        raise AssertionError(f"the job stays {job}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """What rounds pull, one of them each: three whole pulls to one that stops at a base."""
    folder = tmp_path_factory.mktemp("models")
    whole = Pair(folder / "whole", SIZE)
    return [whole, whole, whole, Pair(folder / "partial", SIZE, middle=True)]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    settings = {"JOBS_PROGRESS_INTERVAL": "0.1", "JOBS_SETTLE_RETRY": "0.1", "QSD_STOP_TIMEOUT": "5"}
    with reachable(tmp_path), AgentProcess(tmp_path, settings) as process:
        yield process


COMMON = [Case(incremental, export) for incremental in (False, True) for export in (False, True)]
TWICE = [Case(incremental, export, twice=True) for incremental in (False, True) for export in (True, False)]
WITH_DAEMON = [Case(incremental, export, daemon=True) for incremental in (False, True) for export in (False, True)]


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
@pytest.mark.parametrize("case", COMMON + TWICE + WITH_DAEMON, ids=str)
def test_the_long_kill_matrix(agent: AgentProcess, models: list[Pair], case: Case) -> None:
    _rounds(agent, models, case, 25, first=1000)


def _rounds(agent: AgentProcess, models: list[Pair], case: Case, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        dice = random.Random(f"{SEED} {case} {number}")
        moment = Moment.chosen(dice)
        try:
            _round(agent, dice.choice(models).copy(agent.folder / f"round{number}"), case, moment, dice)
        except BaseException as error:
            error.add_note(f"TEST_SEED={SEED}, {case}, round {number}, killed {moment}")
            error.add_note(f"the agent's log ends: {agent.log.read_text()[-4000:]}")
            raise
    agent.stop()
    assert _left_in_store(agent) == {}


def _round(agent: AgentProcess, images: Pair, case: Case, moment: Moment, dice: random.Random) -> None:
    before = {path: permissions(path) for path in images.files}
    with contextlib.ExitStack() as stack:
        reader = None
        if case.export:
            export = agent.export(images.top)
            reader = stack.enter_context(Reader(export["uri"], images.truth))
        request = {**images.request, "id": str(uuid.uuid4()), "bandwidth": BANDWIDTH}
        client = Client(agent, {**request, "increment": INCREMENT} if case.incremental else request)
        moment.wait(images)
        _kill(agent, case, dice)
        client.join()
        agent.start()
        job = _settled(agent, client, case)
        if case.daemon and job["state"] == "failed":
            assert job["error"]["code"] == "storage_daemon_died", job
            _assert_whole(images, case, pulled=False)
            again = {**client.request, "id": str(uuid.uuid4())}
            job = _settled(agent, Client(agent, again), case)
            _take_back_what_a_failure_left(agent, images)
        assert job["state"] == "completed", job
        assert job["cursor"] == {"cur": SIZE, "end": SIZE}
        assert job["revocation"] == ("done" if ROOT else "kept"), job
        if reader is not None:
            _end_export(agent, export["id"], reader, case)
    _assert_whole(images, case, pulled=True)
    _assert_nothing_left(agent, images, before)


def _kill(agent: AgentProcess, case: Case, dice: random.Random) -> None:
    """SIGKILL; also, where the case says so, a storage daemon before or after it, or an agent that recovers."""
    daemon_first = dice.random() < 0.5
    if case.daemon and daemon_first:
        send(signal.SIGKILL, *storage_daemons(agent))
    agent.kill()
    if case.daemon:
        send(signal.SIGKILL, *storage_daemons(agent))
    for _ in range(dice.randint(1, 2) if case.twice else 0):
        _start_and_kill(agent, dice.uniform(0.3, 0.9))


def _start_and_kill(agent: AgentProcess, delay: float) -> None:
    starting = threading.Thread(target=_start_quietly, args=(agent,), daemon=True)
    process = agent.process
    starting.start()
    eventually(lambda: agent.process is not process)
    time.sleep(delay)
    assert agent.process is not None
    agent.process.kill()
    starting.join(PATIENCE)
    agent.process.wait(PATIENCE)
    agent.process = None


def _start_quietly(agent: AgentProcess) -> None:
    with contextlib.suppress(AssertionError):  # it is killed before it is ready
        agent.start()


def _settled(agent: AgentProcess, client: Client, case: Case) -> Json:
    """The job at its end. One that was never acknowledged is not there, or is whole: asked for again, it is the one."""
    client.join()
    path = f"/v1/jobs/{client.request['id']}"
    try:
        agent.get(path)
    except ApiError as error:
        assert error.status == 404
        assert not client.acknowledged, "an acknowledged job is lost"
    job = agent.post("/v1/jobs", client.request)
    assert job["id"] == client.request["id"]
    return client.drive()


def _end_export(agent: AgentProcess, export_id: str, reader: Reader, case: Case) -> None:
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


def _assert_nothing_left(agent: AgentProcess, images: Pair, before: dict[Path, tuple[int, bytes | None]]) -> None:
    assert eventually(lambda: storage_daemons(agent) == []), "a storage daemon is left"
    assert eventually(lambda: agent.get("/v1/host")["storage_daemons"] == [])
    assert eventually(lambda: agent.get("/v1/host")["revocations"]["pending"] == 0)
    assert agent.get("/v1/host")["orphans"] == []
    assert list((agent.runtime / "qsd").iterdir()) == []
    assert list((agent.runtime / "nbd").iterdir()) == []
    if ROOT:
        assert eventually(lambda: agent.get("/v1/grants")["items"] == [])
    assert eventually(lambda: {path: permissions(path) for path in before} == before)
    assert agent.process is not None
    assert open_below(agent.process.pid, images.folder) == []
    locked = [path for path, format in images.files.items() if not writable_for_qemu(path, format)]
    assert locked == []


def _left_in_store(agent: AgentProcess) -> dict[str, int]:
    """Rows that only something unfinished has; the agent must not run."""
    questions = {
        "jobs": "SELECT count(*) FROM jobs WHERE finished IS NULL OR revocation = 'pending'",
        "exports": "SELECT count(*) FROM exports WHERE stopped IS NULL",
        "daemons": "SELECT count(*) FROM daemons",
        "needs": "SELECT count(*) FROM access_rows",
        "files": "SELECT count(*) FROM access_files WHERE verdict NOT IN ('revoked', 'kept')",
    }
    with contextlib.closing(sqlite3.connect(agent.state / "hostagent.db")) as db:
        counts = {name: db.execute(query).fetchone()[0] for name, query in questions.items()}
    return {name: count for name, count in counts.items() if count}
