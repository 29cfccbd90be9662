"""An agent beside a libvirtd that is absent, comes, is killed and comes back; and images that guests use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import AgentProcess, ApiError, Json, overlay, same_content
from tests.libvirt.private import PrivateLibvirt, until
from tests.qemu.faults import HASTE


@pytest.fixture
def agent(module_agent: AgentProcess) -> AgentProcess:
    return module_agent


@pytest.fixture
def connected(agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    until(lambda: facts(agent)["connected"], "the agent is connected")
    return agent


def facts(agent: AgentProcess) -> Json:
    found: Json = agent.get("/v1/host")["libvirt"]
    return found


def host_events(agent: AgentProcess) -> list[str]:
    return [event["type"] for event in agent.events() if event["subject"] == "libvirt"]


def command(agent: AgentProcess, *args: str) -> str:
    line = [sys.executable, "-m", "hostagent.cli.main", *args, "--socket", str(agent.socket)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60).stdout


def check_of(agent: AgentProcess) -> Json:
    status, _, ready = agent.call("GET", "/readyz")
    assert (status, ready["ready"]) == (200, True)
    check: Json = ready["checks"]["libvirt"]
    return check


def metric(agent: AgentProcess, name: str) -> float:
    lines = agent.get("/metrics").splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"hostagent_{name}"))


def refused(agent: AgentProcess, path: str, body: Json) -> Json:
    with pytest.raises(ApiError) as error:
        agent.post(path, body)
    found: Json = error.value.body
    return found


def test_the_agent_works_while_libvirtd_is_away_and_says_so(
    connected: AgentProcess, libvirt: PrivateLibvirt, disk: Path
) -> None:
    version = facts(connected)["version"]
    assert version and facts(connected) == {
        "connected": True, "version": version, "hypervisor": facts(connected)["hypervisor"], "uri": libvirt.uri, "reason": None,
    }  # fmt: skip
    assert metric(connected, "libvirt_connected") == 1
    assert f'libvirt="{version}"' in connected.get("/metrics")
    before = len(host_events(connected))
    libvirt.kill()
    until(lambda: not facts(connected)["connected"], "the agent knows")
    assert metric(connected, "libvirt_connected") == 0
    assert "not connected: " in check_of(connected)["detail"]
    assert "libvirt.uri" in check_of(connected)["remedy"]
    assert "not connected" in command(connected, "status")
    findings = json.loads(command(connected, "doctor", "--json"))["checks"]
    said = {(one["name"], one["result"]) for one in findings if "libvirt" in one["name"]}
    assert said == {("libvirt", "ok"), ("agent: libvirt", "warn")}
    assert connected.until_ended(connected.pull(disk)["id"])["state"] == "completed"
    libvirt.start()
    until(lambda: facts(connected)["connected"], "the agent is connected again")
    kinds = ["org.hostagent.host.disconnected.v1", "org.hostagent.host.connected.v1"]
    assert until(lambda: host_events(connected)[before:], "the events are stored") == kinds
    assert check_of(connected).get("remedy") is None


def test_an_agent_may_be_there_first(tmp_path: Path, libvirt: PrivateLibvirt, disk: Path) -> None:
    libvirt.kill()
    settings = {
        **HASTE,
        "LIBVIRT_URI": libvirt.uri,
        "LIBVIRT_RECONNECT_WAIT": "0.1",
        "LIBVIRT_RECONNECT_WAIT_MAX": "0.5",
    }
    with AgentProcess(tmp_path, settings) as agent:
        assert agent.until_ended(agent.pull(disk)["id"])["state"] == "completed"
        assert host_events(agent) == []  # there was nothing to lose
        libvirt.start()
        until(lambda: facts(agent)["connected"], "the agent is connected")
        until(lambda: host_events(agent) == ["org.hostagent.host.connected.v1"], "the event is stored")


def test_a_guests_image_is_busy_until_it_is_undefined(
    connected: AgentProcess, libvirt: PrivateLibvirt, disk: Path
) -> None:
    guest = libvirt.guest("web1", disk)
    guest.start()
    flushed = guest.until_flushed(3)
    pull = {"operation": "pull", "target": str(disk)}

    def named(error: Json) -> bool:
        return error["code"] == "busy" and error.get("holders") == ["domain:web1"]

    error: Any = until(lambda: next(filter(named, [refused(connected, "/v1/jobs", pull)]), None), "the guest is known")
    assert "web1/vda" in error["detail"] and error["remedy"].startswith("use web1/vda")
    assert error["field"] == "target" and str(disk) in error["value"]
    assert named(refused(connected, "/v1/jobs", {**pull, "dry_run": True}))
    assert named(refused(connected, "/v1/exports", {"image": str(disk), "writable": True}))
    below = refused(
        connected, "/v1/exports", {"image": str(disk.parent / "base.raw"), "format": "raw", "writable": True}
    )
    assert named(below) and below["field"] == "image"
    guest.until_flushed(flushed + 2)
    guest.destroy()

    def off(error: Json) -> bool:
        return "does not run" in error["detail"]

    error = until(lambda: next(filter(off, [refused(connected, "/v1/jobs", pull)]), None), "the guest's end is known")
    assert named(error) and "virsh start --paused web1" in error["remedy"] and "web1/vda" in error["remedy"]
    assert named(refused(connected, "/v1/exports", {"image": str(disk), "writable": True}))
    guest.remove()

    def started() -> Json | None:
        try:
            return connected.pull(disk)
        except ApiError as busy:
            assert busy.code == "busy"
            return None

    job = until(started, "the image is free")
    assert connected.until_ended(job["id"])["state"] == "completed"
    guest.verify()


def test_a_guests_image_is_not_written_over_nor_committed_into(
    connected: AgentProcess, libvirt: PrivateLibvirt, folder: Path
) -> None:
    mine, base, other = (folder / name for name in ("mine.qcow2", "base.qcow2", "other.qcow2"))
    for path in (mine, base, other):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "4M"], check=True)
    above = overlay(folder / "above.qcow2", base, "qcow2")
    for name, path in (("web1", mine), ("web2", base)):
        libvirt.guest(name, path)

    def is_known(name: str, path: Path) -> bool:
        answer = connected.call("POST", "/v1/exports", {"image": str(path), "writable": True})[2]
        return bool(answer.get("holders") == [f"domain:{name}"])

    until(lambda: is_known("web1", mine) and is_known("web2", base), "the guests are known")
    copy = {"operation": "copy", "target": str(other), "dest": str(mine), "reuse_external": True}
    commit = {"operation": "commit", "target": str(above), "base": str(base)}
    before = mine.read_bytes()
    for spec, field, name in ((copy, "dest", "web1"), (commit, "target", "web2")):
        for more in ({"dry_run": True}, {"completion": "finish"}):
            error = refused(connected, "/v1/jobs", {**spec, **more})
            assert (error["code"], error.get("holders"), error["field"]) == ("busy", [f"domain:{name}"], field), error
    assert mine.read_bytes() == before


def test_another_image_is_not_held_up_by_a_guest_that_hangs(
    connected: AgentProcess, libvirt: PrivateLibvirt, disk: Path
) -> None:
    other = overlay(disk.parent / "other.qcow2", disk.parent / "base.raw")
    guest = libvirt.guest("hung", disk)
    guest.start(paused=True)
    with guest.frozen():
        assert connected.until_ended(connected.pull(other)["id"])["state"] == "completed"
        assert facts(connected)["connected"]
    assert same_content(other, disk.parent / "base.raw", first="qcow2")


def test_calls_and_events_are_counted(connected: AgentProcess, libvirt: PrivateLibvirt, disk: Path) -> None:
    libvirt.guest("web1", disk)
    until(lambda: metric(connected, 'events_total{source="libvirt",type="domain.defined"}'), "the event is counted")
    until(lambda: metric(connected, 'libvirt_call_seconds_count{call="describe",result="ok"}'), "the call is counted")
