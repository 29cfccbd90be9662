"""An agent on a host that has no libvirt-python: everything else works, and what is missing is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, overlay, raw_image
from tests.qemu.faults import HASTE


@pytest.mark.qemu
def test_without_the_binding_the_rest_works(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libvirt.py").write_text("raise ImportError('no libvirt here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    disk = overlay(folder / "overlay.qcow2", raw_image(folder / "base.raw", MIB))
    with AgentProcess(tmp_path, {**HASTE, "LIBVIRT_URI": "qemu:///system"}) as agent:
        status, _, ready = agent.call("GET", "/readyz")
        assert (status, ready["checks"]["libvirt"]["ok"]) == (200, True)
        assert "libvirt-python is not installed" in ready["checks"]["libvirt"]["detail"]
        assert not agent.get("/v1/host")["libvirt"]["connected"]
        assert agent.until_ended(agent.pull(disk)["id"])["state"] == "completed"
