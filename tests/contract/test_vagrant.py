"""Vagrant understands the Vagrantfile, settings of the libvirt provider included."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.vagrant import FOLDER

pytestmark = pytest.mark.skipif(shutil.which("vagrant") is None, reason="vagrant is not installed")


def validate(folder: Path, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "VAGRANT_HOME": str(home),
        "VAGRANT_DOTFILE_PATH": str(home / "dot"),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
        "VAGRANT_DEFAULT_PROVIDER": "libvirt",
    }
    command = ["vagrant", "validate"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("nested", ["0", "1"])
def test_the_machine_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: str) -> None:
    monkeypatch.setenv("HOSTAGENT_NESTED", nested)
    done = validate(FOLDER, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_setting_that_there_is_not_is_refused(tmp_path: Path) -> None:
    text = (FOLDER / "Vagrantfile").read_text()
    (tmp_path / "Vagrantfile").write_text(text.replace("libvirt.memory", "libvirt.memroy"))
    done = validate(tmp_path, tmp_path / "home")
    assert done.returncode != 0 and "memroy" in done.stdout + done.stderr
