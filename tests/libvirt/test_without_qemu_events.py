"""An agent that hears libvirt, and not QEMU: what needs QEMU's own word for its proof is refused, and it is said why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import AgentProcess, ApiError, Json, reachable, same_content
from tests.libvirt.guest import Guest
from tests.libvirt.jobs import command, error_of, live_paths
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.test_guest_copy import Disk, copy, ready
from tests.qemu.faults import HASTE


@pytest.fixture
def agent(tmp_path: Path, libvirt: PrivateLibvirt, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentProcess]:
    (tmp_path / "libvirt_qemu.py").write_text("raise ImportError('not packaged')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with reachable(tmp_path), AgentProcess(tmp_path, {**HASTE, "LIBVIRT_URI": libvirt.uri}) as agent:
        until(lambda: agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
        yield agent


@pytest.fixture
def disk(folder: Path) -> Disk:
    return Disk(folder)


@pytest.fixture
def paused(libvirt: PrivateLibvirt, disk: Disk) -> Guest:
    guest = libvirt.guest("web1", disk.top)
    guest.start(paused=True)
    return guest


def finding(agent: AgentProcess, name: str) -> Json:
    (found,) = [one for one in json.loads(command(agent, "doctor", "--json").stdout)["checks"] if one["name"] == name]
    return dict(found)


def test_a_finish_is_refused_up_front_and_all_else_works(agent: AgentProcess, disk: Disk, paused: Guest) -> None:
    error = error_of(agent, operation="copy", dest=str(disk.copy), completion="finish")
    assert (error["code"], error["field"]) == ("not_supported", "completion")
    assert "libvirt_qemu" in error["detail"] and "python3-libvirt" in error["remedy"]
    error = error_of(agent, operation="commit", completion="finish")
    assert error["code"] == "not_supported"
    assert not disk.copy.exists() and live_paths(paused)[0] == str(disk.top)
    job = ready(agent, copy(agent, disk.copy))
    with pytest.raises(ApiError) as refused:
        agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
    assert refused.value.code == "not_supported"
    assert agent.job(job["id"])["state"] == "ready", "nothing was changed"
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "pivot"})
    assert agent.until_ended(job["id"])["state"] == "completed"
    paused.destroy()
    assert same_content(disk.copy, disk.truth, first="qcow2")


def test_the_doctor_and_the_agent_say_what_is_missing(agent: AgentProcess) -> None:
    for name in ("libvirt", "agent: libvirt"):
        found = finding(agent, name)
        assert found["result"] == "warn" and "libvirt_qemu" in found["message"], found
        assert "python3-libvirt" in found["remedy"]
