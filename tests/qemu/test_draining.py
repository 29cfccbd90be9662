"""A real agent is drained: nothing new begins, what runs comes to its end or to rest, and a restart changes nothing."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, check_clean, reachable, same_content
from tests.qemu.faults import PATIENCE, Pair, Reader, eventually

pytestmark = pytest.mark.qemu

SIZE = 8 * MIB
SLOW = 256 * 1024
SETTINGS = {"JOBS_PROGRESS_INTERVAL": "0.1", "JOBS_SETTLE_RETRY": "0.1", "JOBS_SLICE": "1MiB"}
OK, TIMEOUT, BUSY = 0, 5, 6


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with reachable(tmp_path), AgentProcess(tmp_path, SETTINGS) as process:
        yield process


@pytest.fixture
def images(tmp_path: Path) -> Pair:
    return Pair(tmp_path / "pair", SIZE)


def cli(agent: AgentProcess, *words: str, status: int = OK) -> str:
    command = [sys.executable, "-m", "hostagent.cli.main", "--socket", str(agent.socket), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout


def drained(agent: AgentProcess) -> bool:
    found: Json = agent.get("/v1/host/drain")
    return bool(found["drained"])


@contextlib.contextmanager
def refused() -> Iterator[None]:
    with pytest.raises(ApiError) as error:
        yield
    assert (error.value.status, error.value.code) == (503, "draining")
    assert "--undo" in error.value.body["remedy"]


def until_running(agent: AgentProcess, job: Json) -> Json:
    return agent.until(job["id"], lambda now: now["state"] == "running" and now["cursor"]["cur"] > 0)


def test_nothing_new_begins_and_what_holds_is_named_until_it_is_gone(agent: AgentProcess, images: Pair) -> None:
    other = images.copy(images.folder.parent / "other")
    export = agent.export(images.top)
    request = {**images.request, "bandwidth": SLOW, "id": str(uuid.uuid4())}
    job = until_running(agent, agent.post("/v1/jobs", request))
    with Reader(export["uri"], images.truth) as reader:
        told = agent.post("/v1/host/drain")
        assert (told["draining"], told["drained"], told["revocations"]) == (True, False, 0)
        assert [(one["id"], one["state"]) for one in told["jobs"]] == [(job["id"], "running")]
        assert [(one["id"], one["clients"][0]["pid"]) for one in told["exports"]] == [
            (export["id"], reader.process.pid)
        ]
        with refused():
            agent.pull(other.top)
        with refused():
            agent.export(other.top)
        assert agent.post("/v1/jobs", request)["id"] == job["id"]  # it was obeyed before
        agent.kill()
        agent.start()
        with refused():
            agent.pull(other.top)
        status, _, ready = agent.call("GET", "/readyz")
        assert (status, ready["checks"]["drain"]["ok"], ready["checks"]["store"]["ok"]) == (503, False, True)
        assert agent.get("/v1/host")["drain"]["draining"]
        agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
        assert agent.until_ended(job["id"])["state"] == "completed"
        assert not drained(agent)
        assert reader.stop() > 0
    agent.delete(f"/v1/exports/{export['id']}?force=true")
    eventually(lambda: drained(agent))
    assert not agent.daemons()
    assert not agent.delete("/v1/host/drain")["draining"]
    assert agent.call("GET", "/readyz")[0] == 200
    assert agent.until_ended(agent.pull(other.top)["id"])["state"] == "completed"
    for pair in (images, other):
        assert check_clean(pair.top)
        assert same_content(pair.top, pair.truth)


def test_paused_jobs_rest_over_a_restart_and_go_on_when_it_is_lifted(tmp_path: Path, images: Pair) -> None:
    step, theirs, waits = (images.copy(tmp_path / name) for name in ("step", "theirs", "waits"))
    with reachable(tmp_path), AgentProcess(tmp_path, {**SETTINGS, "JOBS_WIDTH": "3"}) as agent:
        streaming = until_running(agent, agent.pull(images.top, bandwidth=SLOW))
        stepping = until_running(agent, agent.pull(step.top, bandwidth=MIB, increment=SIZE))
        by_user = until_running(agent, agent.pull(theirs.top, bandwidth=SLOW))
        agent.post(f"/v1/jobs/{by_user['id']}/pause")
        queued = agent.pull(waits.top)
        agent.post("/v1/host/drain", {"pause": True})
        eventually(lambda: drained(agent))
        states = {job["id"]: agent.job(job["id"])["state"] for job in (streaming, stepping, by_user, queued)}
        assert list(states.values()) == ["paused", "paused", "paused", "queued"]
        with refused():
            agent.post(f"/v1/jobs/{streaming['id']}/resume")
        agent.kill()
        agent.start()
        assert drained(agent)
        assert {job_id: agent.job(job_id)["state"] for job_id in states} == states
        assert set(agent.get("/v1/host/drain")["paused"]) == {streaming["id"], stepping["id"]}
        for job in (streaming, stepping, by_user):
            agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
        agent.delete("/v1/host/drain")
        for job in (streaming, stepping, queued):
            assert agent.until_ended(job["id"])["state"] == "completed"
        assert agent.job(by_user["id"])["state"] == "paused"
        agent.post(f"/v1/jobs/{by_user['id']}/resume")
        assert agent.until_ended(by_user["id"])["state"] == "completed"
    for pair in (images, step, theirs, waits):
        assert check_clean(pair.top)
        assert same_content(pair.top, pair.truth)


def test_an_increment_ends_and_the_next_one_is_not_taken(agent: AgentProcess, images: Pair) -> None:
    job = agent.pull(images.top, bandwidth=SLOW, increment=4 * MIB)
    agent.until(job["id"], lambda now: now["state"] == "running")
    assert [one["id"] for one in agent.post("/v1/host/drain")["jobs"]] == [job["id"]]
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    rests = agent.until(job["id"], lambda now: now["state"] == "waiting")
    eventually(lambda: drained(agent))
    assert not agent.daemons()
    with refused():
        agent.post(f"/v1/jobs/{job['id']}/next")
    assert agent.post(f"/v1/jobs/{job['id']}/next", {"cursor": 0})["cursor"] == rests["cursor"]  # a retry of before
    agent.delete("/v1/host/drain")
    agent.post(f"/v1/jobs/{job['id']}/next")
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert same_content(images.top, images.truth)


def test_the_command_waits_until_nothing_holds(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top)
    assert export["id"] in cli(agent, "drain", "--wait", "--timeout", "0.2", status=TIMEOUT)
    assert "no new work is taken" in cli(agent, "status")
    found: dict[str, Any] = json.loads(cli(agent, "drain", "--json"))
    assert [one["id"] for one in found["exports"]] == [export["id"]]
    cli(agent, "job", "pull", str(images.top), status=BUSY)
    command = [sys.executable, "-m", "hostagent.cli.main", "--socket", str(agent.socket), "drain", "--wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        assert "1 export" in waiting.stderr.readline()
        cli(agent, "export", "stop", export["id"])
        out, _ = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == OK
    assert "drained" in out
    cli(agent, "drain", "--undo")
    assert not json.loads(cli(agent, "status", "--json"))["host"]["drain"]["draining"]
