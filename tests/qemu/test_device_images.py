"""What looks at an image, and what changes its bitmaps, does so on a block device as in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, overlay, raw_image, reachable
from tests.qemu.faults import HASTE, ROOT
from tests.qemu.test_device_exports import loop, node

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.root,
    pytest.mark.skipif(not ROOT, reason="loop devices need root"),
]


@pytest.fixture
def agent(tmp_path: Path, folder: Path) -> Iterator[AgentProcess]:
    home = tmp_path / "agent"
    home.mkdir()
    with reachable(home), AgentProcess(home, {**HASTE, "IMAGES_POOLS": str(folder)}) as agent:
        yield agent


@pytest.fixture
def device(folder: Path) -> Iterator[Path]:
    """A qcow2 image on a device, over a file."""
    base = raw_image(folder / "base.raw", 8 * MIB, data=2 * MIB)
    whole = folder / "disk"
    whole.write_bytes(bytes(16 * MIB))
    with loop(whole) as device:
        made = overlay(folder / "top.qcow2", base)
        subprocess.run(["qemu-io", "-c", "write -q -P 7 3M 1M", str(made)], check=True)
        subprocess.run(["qemu-img", "rebase", "-q", "-u", "-F", "raw", "-b", str(base), str(made)], check=True)
        with device.open("r+b", buffering=0) as disk:
            disk.write(made.read_bytes())
            os.fsync(disk.fileno())
        yield device


def image(agent: AgentProcess, *words: str) -> Any:
    command = [sys.executable, "-m", "hostagent.cli.main", "image", *words, "--json", "--socket", str(agent.socket)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_image_on_it_is_inspected_checked_and_mapped(agent: AgentProcess, device: Path, folder: Path) -> None:
    before = node(device)
    inspected = image(agent, "inspect", str(device))
    assert [(layer["path"], layer["format"]) for layer in inspected["layers"]] == [
        (str(device), "qcow2"), (str(folder / "base.raw"), "raw"),
    ]  # fmt: skip
    assert agent.get(f"/v1/images/inspect?path={device}")["chain"][0]["virtual_size"] == 8 * MIB
    subprocess.run(["setfacl", "-m", f"u:{agent.user}:r", str(device), str(folder / "base.raw")], check=True)
    assert image(agent, "check", str(device))["layers"][0]["result"] == "ok"
    extents = image(agent, "map", str(device))["extents"]
    assert [one for one in extents if one["path"] == str(device)] == [
        {"start": 3 * MIB, "length": MIB, "depth": 0, "data": True, "zero": False, "path": str(device)}
    ]
    subprocess.run(["setfacl", "--remove-all", str(device)], check=True)
    assert node(device) == before


def test_its_bitmaps_are_added_listed_merged_and_removed(agent: AgentProcess, device: Path) -> None:
    before = node(device)
    path = f"/v1/images/bitmaps?path={device}"
    agent.post(path, {"name": "monday"})
    agent.post(path, {"name": "week", "disabled": True})
    assert [one["name"] for one in agent.get(path)["items"]] == ["monday", "week"]
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(device)], check=True)
    agent.post(f"/v1/images/bitmaps/merge?path={device}", {"name": "week", "source_name": "monday"})
    agent.delete(f"{path}&name=monday")
    assert [one["name"] for one in agent.get(path)["items"]] == ["week"]
    assert node(device) == before
