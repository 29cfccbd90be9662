"""What tests of jobs on guests' disks share: their agent, and how they look at a job from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hostagent.drivers import domain_xml
from tests.harness import MIB, AgentProcess, ApiError, Json
from tests.libvirt.guest import Guest


def write(image: Path, pattern: int, offset: int, length: int) -> None:
    command = ["qemu-io", "-c", f"write -q -P {pattern} {offset} {length}", str(image)]
    subprocess.run(command, check=True, capture_output=True)


def terminal_events(agent: AgentProcess, job: Json) -> list[Json]:
    names = ("completed", "failed", "cancelled")
    types = {f"org.hostagent.job.{name}.v1" for name in names}
    return [event for event in agent.events() if event["type"] in types and event["data"]["job"] == job["id"]]


def command(agent: AgentProcess, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "hostagent.cli.main", *words, "--socket", str(agent.socket)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def error_of(agent: AgentProcess, target: str = "web1/vda", **spec: object) -> Json:
    with pytest.raises(ApiError) as refused:
        agent.post("/v1/jobs", {"operation": "pull", "target": target, **spec})
    return refused.value.body


def block_job(guest: Guest) -> Json | None:
    with guest.domain() as domain:
        found: Json = domain.blockJobInfo("vda", 1)
        return found or None


def abort(guest: Guest) -> None:
    with guest.domain() as domain:
        domain.blockJobAbort("vda")


def pivot(guest: Guest) -> None:
    with guest.domain() as domain:
        domain.blockJobAbort("vda", 2)


def speed_up(guest: Guest) -> None:
    with guest.domain() as domain:
        domain.blockJobSetSpeed("vda", 0)


def index_of(guest: Guest, path: Path) -> int:
    with guest.domain() as domain:
        described = domain_xml.parse(domain.XMLDesc(), size=MIB)
    (disk,) = described.disks
    (index,) = [layer.index for layer in disk.layers if layer.path == str(path)]
    assert index is not None
    return index


def live_paths(guest: Guest) -> list[str | None]:
    """The chain of vda as libvirt has it now."""
    with guest.domain() as domain:
        described = domain_xml.parse(domain.XMLDesc(), size=MIB)
    return [layer.path for layer in described.disks[0].layers]
