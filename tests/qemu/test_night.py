"""What an operator sees when things are broken: `status`, `doctor` and the probes say what is wrong, and what helps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, overlay, raw_image, reachable, same_content, stand_still
from tests.qemu.faults import HASTE, ROOT, daemon_of, eventually, send

pytestmark = pytest.mark.qemu


def said(agent: AgentProcess, *words: str) -> str:
    """What a command prints, whatever its exit status."""
    command = [sys.executable, "-m", "hostagent.cli.main", "--socket", str(agent.socket), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def findings(agent: AgentProcess, name: str) -> list[Json]:
    checks = json.loads(said(agent, "doctor", "--json"))["checks"]
    return [check for check in checks if check["name"] == name]


@pytest.fixture
def top(folder: Path) -> Path:
    return overlay(folder / "top.qcow2", raw_image(folder / "base.raw", 4 * MIB))


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[AgentProcess]:
    with (
        reachable(tmp_path),
        AgentProcess(tmp_path, {**HASTE, "QMP_CALL_TIMEOUT": "2", "QSD_FLUSH_TIMEOUT": "2"}) as agent,
    ):
        yield agent


def silenced(agent: AgentProcess, image: Path) -> int:
    """The pid of a storage daemon that is stopped, and known not to answer: the second export asks it something."""
    pid = daemon_of(agent, image)
    stand_still(pid)
    with pytest.raises(ApiError) as caught:
        agent.export(image)
    assert caught.value.code == "unresponsive"
    return pid


def test_a_full_store_is_said_by_status_doctor_and_the_probe_and_no_longer_when_there_is_room(
    tmp_path: Path, top: Path
) -> None:
    with reachable(tmp_path), AgentProcess(tmp_path, {**HASTE, "STORE_MIN_FREE": str(1 << 62)}) as agent:
        with pytest.raises(ApiError) as caught:
            agent.export(top)
        assert caught.value.code == "store_full"
        status, _, ready = agent.call("GET", "/readyz")
        assert (status, ready["ready"], ready["checks"]["store"]["ok"]) == (503, False, False)
        assert "! no new work is taken" in said(agent, "status")
        (found,) = findings(agent, "agent: store")
        assert found["result"] == "fail" and "make space" in found["remedy"]
        agent.stop()
        agent.settings["STORE_MIN_FREE"] = "0"
        agent.start()
        assert agent.call("GET", "/readyz")[0] == 200
        assert "nothing needs attention" in said(agent, "status")
        assert agent.export(top)["state"] == "running"


def test_a_silent_daemon_that_only_serves_readers_may_be_killed_and_nothing_is_lost(
    hasty: AgentProcess, top: Path, folder: Path
) -> None:
    export = hasty.export(top)
    pid = silenced(hasty, top)
    screen = said(hasty, "status")
    assert f"! storage daemon {pid} of {top} is unresponsive for " in screen
    assert f"kill -9 {pid} only cuts its readers off" in screen
    (found,) = findings(hasty, "storage daemons")
    assert found["result"] == "fail" and f"kill -9 {pid}" in found["remedy"]
    assert findings(hasty, "agent: storage_daemons") == []  # it would say `ok` of the same daemon
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: hasty.get(f"/v1/exports/{export['id']}")["state"] == "lost")
    assert eventually(lambda: hasty.get("/v1/host")["storage_daemons"] == [])
    assert eventually(lambda: hasty.get("/v1/host")["revocations"]["pending"] == 0)
    assert same_content(folder / "base.raw", top, first="raw")


def test_of_a_silent_daemon_whose_clients_write_nobody_says_that(hasty: AgentProcess, top: Path) -> None:
    hasty.export(top, writable=True)
    pid = daemon_of(hasty, top)
    stand_still(pid)
    (export,) = hasty.get("/v1/exports?state=running")["items"]
    with pytest.raises(ApiError):
        hasty.delete(f"/v1/exports/{export['id']}")
    assert eventually(lambda: "is unresponsive" in said(hasty, "status"))
    screen = said(hasty, "status")
    assert "killing it loses what its clients have not flushed" in screen and "kill -9" not in screen
    send(signal.SIGCONT, pid)
    assert eventually(lambda: "is unresponsive" not in said(hasty, "status"))


@pytest.mark.skipif(not ROOT, reason="needs root: a file that may not be changed")
def test_a_revocation_that_cannot_be_carried_out_says_why(hasty: AgentProcess, top: Path, folder: Path) -> None:
    base = folder / "base.raw"
    job: Json = hasty.pull(top, bandwidth=256 * 1024)
    hasty.until(job["id"], lambda one: one["state"] == "running" and one["cursor"]["cur"] > 0)
    if subprocess.run(["chattr", "+i", str(base)], capture_output=True).returncode:
        pytest.skip("the file system knows no immutable files")
    try:
        hasty.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
        hasty.until(job["id"], lambda one: one["state"] == "completed")

        def owed() -> Any:
            return hasty.get("/v1/host")["revocations"]["oldest"]

        assert eventually(owed)
        assert owed()["path"] == str(base) and "Operation not permitted" in owed()["reason"]
        for words in (["status"], ["doctor"], ["grant", "list"]):
            assert "Operation not permitted" in said(hasty, *words), words
    finally:
        subprocess.run(["chattr", "-i", str(base)], check=True)
    hasty.stop()
    hasty.start()  # tries again at once
    assert eventually(lambda: hasty.get("/v1/host")["revocations"]["pending"] == 0)
    assert "nothing needs attention" in said(hasty, "status")
