"""Exports and jobs while the store has no space: what is told is true, and nothing is lost or left open."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, stand_still, user_can_read
from tests.qemu.faults import HASTE, ROOT, Pair, Reader, Tmpfs, daemon_of, eventually, send

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.root,
    pytest.mark.skipif(not ROOT, reason="needs root: it mounts a file system"),
]
SETTINGS = HASTE | {"STORE_MIN_FREE": "0", "QMP_CALL_TIMEOUT": "60"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Tmpfs]:
    (tmp_path / "agent").mkdir()
    with Tmpfs(tmp_path / "agent" / "state", 8 * MIB) as disk:
        yield disk


@pytest.fixture
def agent(tmp_path: Path, disk: Tmpfs) -> Iterator[AgentProcess]:
    with AgentProcess(tmp_path / "agent", SETTINGS) as agent:
        yield agent


@pytest.fixture
def images(folder: Path) -> Pair:
    return Pair(folder / "pair", MIB)


def is_served(export: Json, images: Pair) -> bool:
    command = ["qemu-img", "compare", "-f", "raw", "-F", "raw", export["uri"], str(images.truth)]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def state(agent: AgentProcess, export: Json) -> str:
    return str(agent.get(f"/v1/exports/{export['id']}")["state"])


def status(agent: AgentProcess) -> str:
    command = [sys.executable, "-m", "hostagent.cli.main", "--socket", str(agent.socket), "status"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def told(agent: AgentProcess, export: Json) -> list[str]:
    return [event["type"].split(".")[3] for event in agent.events() if event["subject"] == export["id"]]


def assert_stopped(agent: AgentProcess, export: Json, images: Pair) -> None:
    assert eventually(lambda: state(agent, export) == "stopped"), agent.get(f"/v1/exports/{export['id']}")
    assert eventually(lambda: agent.user and not user_can_read(images.base, agent.user))
    assert agent.get("/v1/host")["storage_daemons"] == []
    assert told(agent, export) == ["started", "stopped"]


@pytest.mark.parametrize("force", ["", "?force=true"], ids=["gentle", "force"])
def test_an_export_whose_stop_cannot_be_recorded_goes_on(
    agent: AgentProcess, disk: Tmpfs, images: Pair, force: str
) -> None:
    export = agent.export(images.top)
    filler = disk.fill()
    with pytest.raises(ApiError) as refused:
        agent.delete(f"/v1/exports/{export['id']}{force}")
    assert refused.value.code == "store_full"
    assert state(agent, export) == "running"
    assert is_served(export, images)
    agent.kill()
    filler.unlink()
    agent.start()
    assert state(agent, export) == "running"
    agent.delete(f"/v1/exports/{export['id']}{force}")
    assert_stopped(agent, export, images)


@pytest.mark.parametrize("killed", [False, True], ids=["alive", "killed"])
@pytest.mark.parametrize("writable", [False, True], ids=["read", "write"])
def test_a_store_that_fills_up_during_a_stop_is_told_and_the_end_is_recorded_when_there_is_space(
    agent: AgentProcess, disk: Tmpfs, images: Pair, writable: bool, killed: bool
) -> None:
    export = agent.export(images.top, writable=writable)
    daemon = daemon_of(agent, images.top)
    refused: list[ApiError] = []

    def stop() -> None:
        try:
            agent.delete(f"/v1/exports/{export['id']}?force=true")
        except ApiError as error:
            refused.append(error)

    stand_still(daemon)
    stopping = threading.Thread(target=stop)
    stopping.start()
    assert eventually(lambda: state(agent, export) == "stopping")
    filler = disk.fill()
    send(signal.SIGCONT, daemon)
    stopping.join(30)
    assert [error.code for error in refused] == ["store_full"]
    shown = agent.get(f"/v1/exports/{export['id']}")
    assert shown["state"] == "stopping"
    assert "not served any more" in shown["reason"]
    assert agent.user and user_can_read(images.base, agent.user), "revoked before it was recorded"
    assert "stopping" in status(agent)
    if killed:
        agent.kill()
    filler.unlink()
    if killed:
        agent.start()
    assert_stopped(agent, export, images)


@pytest.mark.parametrize("writable", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("used", [False, True], ids=["idle", "used"])
def test_a_stop_that_was_recorded_before_a_kill_is_finished_unless_a_client_uses_it(
    agent: AgentProcess, disk: Tmpfs, images: Pair, writable: bool, used: bool
) -> None:
    export = agent.export(images.top, writable=writable)
    agent.kill()
    record_stop(disk.folder, export)
    if not used:
        agent.start()
        assert_stopped(agent, export, images)
        return
    with Reader(export["uri"], images.truth) as reader:
        agent.start()
        assert eventually(lambda: state(agent, export) == "running")
        reader.stop()
    agent.delete(f"/v1/exports/{export['id']}")
    assert_stopped(agent, export, images)


@pytest.mark.parametrize("moment", ["queued", "starting", "running", "dead"])
def test_an_agent_starts_with_a_full_store_and_serves_what_is_there(
    tmp_path: Path, disk: Tmpfs, images: Pair, folder: Path, moment: str
) -> None:
    pulled, third = Pair(folder / "pulled", 4 * MIB), Pair(folder / "third", MIB)
    with AgentProcess(tmp_path / "agent", SETTINGS | {"JOBS_WIDTH": "1", "STORE_MIN_FREE": "64KiB"}) as agent:
        served, lost = agent.export(images.top), agent.export(third.top)
        job = agent.pull(pulled.top, bandwidth=MIB)
        if moment != "starting":
            agent.until(job["id"], lambda job: job["state"] == "running")
        if moment == "queued":
            agent.pull(third.top)
        daemons = [daemon_of(agent, third.top)] + ([daemon_of(agent, pulled.top)] if moment == "dead" else [])
        filler = disk.fill()
        agent.kill()
        send(signal.SIGKILL, *daemons)
        agent.start()
        assert agent.call("GET", "/readyz")[0] == 503
        assert "no new work is taken" in status(agent)
        assert (state(agent, served), state(agent, lost)) == ("running", "lost")
        assert agent.job(job["id"])["state"] not in ("completed", "failed", "aborted")
        with pytest.raises(ApiError) as refused:
            agent.export(third.top)
        assert refused.value.code == "store_full"
        assert is_served(served, images)
        filler.unlink()
        ended = agent.until_ended(job["id"])
        if moment == "starting" and ended["error"]:  # what cannot be granted for want of space is not begun
            assert (ended["state"], ended["error"]["code"]) == ("failed", "store_full"), ended
        else:
            assert ended["state"] == ("failed" if moment == "dead" else "completed"), ended
        assert eventually(lambda: told(agent, lost) == ["started", "lost"]), told(agent, lost)
        agent.delete(f"/v1/exports/{served['id']}")


def test_an_agent_with_a_full_store_ends_when_it_is_asked_to(agent: AgentProcess, disk: Tmpfs, images: Pair) -> None:
    export = agent.export(images.top)
    filler = disk.fill()
    send(signal.SIGKILL, daemon_of(agent, images.top))
    assert eventually(lambda: "a lost export cannot be stored" in agent.log.read_text())
    assert agent.stop() == 0
    filler.unlink()
    agent.start()
    assert state(agent, export) == "lost"


def test_who_aborts_a_job_while_the_store_is_full_is_told_so_and_it_is_aborted_when_there_is_space(
    agent: AgentProcess, disk: Tmpfs, folder: Path
) -> None:
    job = agent.pull(Pair(folder / "pulled", 16 * MIB).top, bandwidth=MIB)
    agent.until(job["id"], lambda job: job["state"] == "running")
    filler = disk.fill()
    began = time.monotonic()
    with pytest.raises(ApiError) as refused:
        agent.post(f"/v1/jobs/{job['id']}/abort")
    assert (refused.value.code, time.monotonic() - began < 15) == ("store_full", True)  # of jobs.start_timeout's 30 s
    assert "make space" in refused.value.body["remedy"]
    assert agent.job(job["id"])["state"] == "running"
    filler.unlink()
    assert agent.until_ended(job["id"])["state"] == "aborted"


def record_stop(folder: Path, export: Json) -> None:
    """What an agent leaves behind that is killed between the record and the act."""
    with sqlite3.connect(folder / "hostagent.db") as db:
        (body,) = db.execute("SELECT body FROM exports WHERE id=?", (export["id"],)).fetchone()
        record = json.loads(body) | {"state": "stopping", "ending": ["stopped by request", False, ""]}
        db.execute("UPDATE exports SET state='stopping', body=? WHERE id=?", (json.dumps(record), export["id"]))
    db.close()
