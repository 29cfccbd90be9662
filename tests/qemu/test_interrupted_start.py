"""A copy whose agent was killed when QEMU had begun to write the target, and the store did not say so yet."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, Json, check_clean, reachable, same_content
from tests.qemu.faults import HASTE, ROOT, Pair, eventually, send, storage_daemons
from tests.qemu.test_device_exports import loop

pytestmark = pytest.mark.qemu

SIZE = 4 * MIB


def interrupted(agent: AgentProcess, job: Json, *, daemon: bool = False) -> None:
    """Kill the agent, or its storage daemon with it, and make the store say what it said before the job ran."""
    agent.until(job["id"], lambda job: job["state"] == "ready")
    agent.kill()
    if daemon:
        send(signal.SIGKILL, *storage_daemons(agent))
        assert eventually(lambda: storage_daemons(agent) == [])
    with contextlib.closing(sqlite3.connect(agent.state / "hostagent.db")) as db:
        ((body,),) = db.execute("SELECT body FROM jobs").fetchall()
        known = json.loads(body) | {"state": "starting", "started": None, "ready": None}
        db.execute("UPDATE jobs SET state = 'starting', body = ?", (json.dumps(known),))
        db.commit()
    agent.start()


def finished(agent: AgentProcess, job: Json) -> Json:
    found = agent.until(job["id"], lambda job: job["state"] in ("ready", "failed"))
    assert found["error"] is None
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
    job = agent.until_ended(job["id"])
    assert eventually(lambda: storage_daemons(agent) == [])
    return job


def begin(agent: AgentProcess, pair: Pair, dest: Path, **spec: object) -> Json:
    job: Json = agent.post("/v1/jobs", {"operation": "copy", "target": str(pair.top), "dest": str(dest), **spec})
    return job


def shallow_target(pair: Pair) -> Path:
    dest = pair.folder / "copy.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", pair.base.name, "-F", "raw", dest.name]
    subprocess.run(command, check=True, cwd=pair.folder)
    return dest


def test_a_shallow_target_that_the_job_began_to_write_is_known_again(tmp_path: Path) -> None:
    with reachable(tmp_path), AgentProcess(tmp_path, HASTE) as agent:
        pair = Pair(tmp_path / "disk", SIZE)
        dest = shallow_target(pair)
        job = begin(agent, pair, dest, shallow=True, reuse_external=True)
        interrupted(agent, job)
        job = finished(agent, job)
        assert (job["state"], job["error"]) == ("completed", None)
        assert same_content(dest, pair.truth)
        assert check_clean(dest)


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="loop devices need root")
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_an_empty_device_that_the_job_began_to_write_is_known_again(tmp_path: Path, format_: str) -> None:
    with reachable(tmp_path), AgentProcess(tmp_path, HASTE) as agent:
        pair = Pair(tmp_path / "disk", SIZE)
        file = tmp_path / "device"
        file.write_bytes(bytes(2 * SIZE))
        file.chmod(0o600)
        with loop(file) as device:
            job = begin(agent, pair, device, format=format_)
            interrupted(agent, job)
            job = finished(agent, job)
            assert (job["state"], job["error"]) == ("completed", None)
            if format_ == "qcow2":
                assert same_content(device, pair.truth)
            else:
                assert device.read_bytes()[:SIZE] == pair.truth.read_bytes()


def test_a_target_whose_daemon_died_too_is_not_taken_for_ours(tmp_path: Path) -> None:
    with reachable(tmp_path), AgentProcess(tmp_path, HASTE) as agent:
        pair = Pair(tmp_path / "disk", SIZE)
        dest = shallow_target(pair)
        job = begin(agent, pair, dest, shallow=True, reuse_external=True)
        interrupted(agent, job, daemon=True)
        job = agent.until_ended(job["id"])
        assert (job["state"], job["error"]["code"]) == ("failed", "invalid")
        assert "interrupted" in job["error"]["remedy"]
