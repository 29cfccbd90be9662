"""The host daemon in README: it starts a pull and follows it to its end, by the library's own client."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dbus.bus import Caller, PrivateBus
from tests.harness import MIB, AgentProcess, overlay, raw_image, same_content

EXAMPLE = Path(__file__).with_name("follow_pull.py")
README = Path(__file__).resolve().parents[2] / "README.md"


def follow(bus: PrivateBus, image: Path) -> tuple[int, list[str]]:
    environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": bus.address}
    command = [sys.executable, str(EXAMPLE), str(image)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert not done.stderr or done.returncode, done.stderr
    return done.returncode, (done.stdout or done.stderr).splitlines()


@pytest.mark.qemu
def test_it_follows_a_pull_to_its_end(agent: AgentProcess, bus: PrivateBus, caller: Caller, folder: Path) -> None:
    base = raw_image(folder / "base.raw", 64 * MIB)
    top = overlay(folder / "top.qcow2", base)
    status, said = follow(bus, top)
    assert (status, said[-1].split()) == (0, ["completed"])
    assert all(re.fullmatch(r"\d+%", line) for line in said[:-1])
    assert same_content(top, base, running=True)


@pytest.mark.qemu
def test_what_cannot_be_started_has_a_name_and_a_remedy(agent: AgentProcess, bus: PrivateBus, caller: Caller) -> None:
    status, said = follow(bus, Path("disk.qcow2"))
    assert status == 1
    assert "give an absolute path" in said[-1]


def test_readme_shows_this_very_program() -> None:
    (shown,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert shown == EXAMPLE.read_text()
