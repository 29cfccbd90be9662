"""The smoke test of vagrant/: with an agent of its own, and when something is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vagrant import FOLDER, provision, smoke

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can try what another user may open"),
]


@pytest.fixture
def bin(tmp_path: Path) -> Path:
    """Where `hostagent` is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "hostagent").symlink_to(Path(sys.executable).with_name("hostagent"))
    return folder


def stub(folder: Path, name: str, text: str) -> str:
    """A program in place of another; the folder for PATH."""
    folder.mkdir()
    program = folder / name
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    return str(folder)


def test_without_an_agent_it_starts_its_own(bin: Path) -> None:
    done = smoke(bin, "offline", HOSTAGENT_SOCKET="", LIBVIRT_DEFAULT_URI="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    commands = ("serve", "export start", "job pull", "job next", "job copy", "job commit", "grant revoke", "checksum")
    assert all(f"$ hostagent {command} " in done.stdout for command in commands)
    assert done.stdout.endswith("all held\n")
    assert not list((bin.parent / "images").iterdir())


def test_a_byte_that_is_wrong_fails_it_and_nothing_is_left(bin: Path) -> None:
    real = shutil.which("qemu-img")
    path = stub(bin.parent / "stub", "qemu-img", f'[ "$1" != compare ] || exit 1\nexec {real} "$@"')
    done = smoke(bin, "offline", path=path, HOSTAGENT_SOCKET="", LIBVIRT_DEFAULT_URI="")
    assert done.returncode == 1
    assert "FAILED: it ended with 1" in done.stderr and "all held" not in done.stdout
    assert done.stdout.rpartition("\n$ ")[2].startswith("qemu-img compare ")
    images = bin.parent / "images"
    assert not list(images.iterdir())
    assert str(images) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_a_part_that_there_is_not_is_refused(bin: Path) -> None:
    done = smoke(bin, "alive")
    assert done.returncode == 2 and "offline, live" in done.stderr


def test_a_package_that_is_given_is_installed_and_nothing_else(tmp_path: Path) -> None:
    path = stub(tmp_path / "stub", "apt-get", f'echo "$@" >>{tmp_path}/said')
    package = tmp_path / "hostagent_1_all.deb"
    assert provision(tmp_path / "bin", package=str(package), path=path).returncode == 1
    assert not (tmp_path / "said").exists()
    package.write_text("")
    done = provision(tmp_path / "bin", package=str(package), path=path)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["update -qq", f"install -y -qq --no-install-recommends {package}"]
    assert not (tmp_path / "bin").exists()


def test_the_newest_package_that_was_built_is_installed(tmp_path: Path) -> None:
    path = stub(tmp_path / "stub", "apt-get", f'echo "$@" >>{tmp_path}/said')
    there = tmp_path / "checkout"
    (there / "dist").mkdir(parents=True)
    shutil.copytree(FOLDER, there / "vagrant")
    for age, name in enumerate(("hostagent_2_all.deb", "hostagent_3_all.deb", "hostagent_1_all.deb")):
        package = there / "dist" / name
        package.write_text("")
        os.utime(package, (1e9 - age, 1e9 - age))
    done = provision(tmp_path / "bin", package="", path=path, folder=there / "vagrant")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "said").read_text().splitlines()[-1].endswith(f" {there}/dist/hostagent_2_all.deb")


def test_the_settings_of_the_machine_are_those_of_its_manual() -> None:
    text = (FOLDER / "Vagrantfile").read_text()
    manual = {word.strip(",.:") for line in text.splitlines() if line.startswith("#") for word in line.split()}
    used = {part.split('"')[0] for part in text.replace('ENV["', 'ENV.fetch("').split('ENV.fetch("')[1:]}
    assert used == {name.partition("=")[0] for name in manual if name.startswith("HOSTAGENT_")}
