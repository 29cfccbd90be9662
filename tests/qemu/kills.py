"""Rounds in which something is killed, and what must hold after each: what the kill matrices of all operations share.

The seed decides the moments; TEST_SEED repeats those of a run that failed.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.harness import AgentProcess, ApiError, Json
from tests.qemu.faults import PATIENCE, ROOT, eventually, open_below, permissions, storage_daemons, writable_for_qemu

SEED = os.environ.get("TEST_SEED") or str(random.SystemRandom().randrange(1 << 32))
SETTINGS = {"JOBS_PROGRESS_INTERVAL": "0.1", "JOBS_SETTLE_RETRY": "0.1", "QSD_STOP_TIMEOUT": "5"}


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after the request was sent, or after the end could be seen."""

    after: str
    delay: float

    @classmethod
    def chosen(cls, dice: random.Random) -> Moment:
        kind = dice.randrange(4)
        if kind == 0:  # before the answer to the request, or just after it
            return cls("request", dice.uniform(0, 0.012))
        if kind == 1:  # leases, grants, the storage daemon's start
            return cls("request", dice.uniform(0.01, 0.2))
        if kind == 2:  # anywhere in the job, its end included
            return cls("request", dice.uniform(0.1, 0.9))
        return cls("end", dice.uniform(0, 0.05))  # proof, record, revocation, closing

    def wait(self, ended: Callable[[], bool]) -> None:
        if self.after == "end":
            deadline = time.monotonic() + PATIENCE
            while not ended() and time.monotonic() < deadline:
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


@contextlib.contextmanager
def noted(agent: AgentProcess, what: str) -> Iterator[None]:
    """A failure says how to have it again."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"TEST_SEED={SEED}, {what}")
        error.add_note(f"the agent's log ends: {agent.log.read_text()[-4000:]}")
        raise


def start_and_kill(agent: AgentProcess, delay: float) -> None:
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


def settled(agent: AgentProcess, client: Client) -> Json:
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


Permissions = dict[Path, tuple[int, bytes | None]]


def assert_nothing_left(agent: AgentProcess, files: dict[Path, str], before: Permissions) -> None:
    """`files`, with their formats, are nobody's again. Writes to them: the last look at a round."""
    assert eventually(lambda: storage_daemons(agent) == []), "a storage daemon is left"
    assert eventually(lambda: agent.get("/v1/host")["storage_daemons"] == [])
    assert eventually(lambda: agent.get("/v1/host")["revocations"]["pending"] == 0)
    assert agent.get("/v1/host")["orphans"] == []
    assert eventually(lambda: list((agent.runtime / "qsd").iterdir()) == [])
    assert eventually(lambda: list((agent.runtime / "nbd").iterdir()) == [])
    if ROOT:
        assert eventually(lambda: agent.get("/v1/grants")["items"] == [])
    assert eventually(lambda: {path: permissions(path) for path in before} == before)
    assert agent.process is not None
    folder = next(iter(files)).parent
    pid = agent.process.pid
    assert eventually(lambda: open_below(pid, folder) == []), f"the agent has {open_below(pid, folder)} open"
    assert list(folder.glob(".hostagent*")) == []
    locked = [path for path, format in files.items() if not writable_for_qemu(path, format)]
    assert locked == []


def left_in_store(agent: AgentProcess) -> dict[str, int]:
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
