"""`image check` and `doctor` work by the settings of the agent that runs, not by those that stand around them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, overlay, raw_image, reachable

pytestmark = pytest.mark.qemu


def asked(agent: AgentProcess, *words: object) -> tuple[Any, str]:
    """The command's JSON, and what it says to a person; nothing of the agent's settings is in its environment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HOSTAGENT_")}
    command = [sys.executable, "-m", "hostagent.cli.main", "--socket", str(agent.socket), *map(str, words), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout), done.stderr


def test_the_running_agents_settings_are_those_that_count(tmp_path: Path) -> None:
    program = tmp_path / "img"
    program.write_text('#!/bin/sh\n[ "$1" = --version ] && exec qemu-img --version\necho the agents own >&2\nexit 1\n')
    program.chmod(0o755)
    top = overlay(tmp_path / "top.qcow2", raw_image(tmp_path / "base.raw", MIB))
    settings = {"IMAGES_QEMU_IMG": str(program), "IMAGES_POOLS": str(tmp_path / "nowhere")}
    with reachable(tmp_path), AgentProcess(tmp_path, settings) as agent:
        checks = {check["name"]: check for check in asked(agent, "doctor")[0]["checks"]}
        assert str(agent.socket) in checks["judged by"]["message"]
        assert checks["img"]["message"].startswith(str(program))
        assert str(agent.state) in checks["state folder"]["message"]
        if agent.user:
            assert agent.user in checks["hypervisor user"]["message"]
            assert str(tmp_path / "nowhere") in checks["access control"]["message"]
        found, said = asked(agent, "image", "check", top)
        assert found["settings"] == "agent" and str(agent.socket) in said
        assert "the agents own" in found["layers"][0]["detail"]
        agent.stop()
        found, said = asked(agent, "image", "inspect", top)
        assert [layer["path"] for layer in found["layers"]] == [str(top), str(tmp_path / "base.raw")]
