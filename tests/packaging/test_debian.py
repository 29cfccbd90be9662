"""What the Debian package is made from fits the project: its dependencies, units, scripts and profile."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.packaging.source import REPOSITORY

UNITS = REPOSITORY / "units"
DEBIAN = UNITS / "debian"
CONTROL = (DEBIAN / "control").read_text()
PROFILE = UNITS / "apparmor/libvirt-qemu"
PARSER = shutil.which("apparmor_parser", path=f"{sys.prefix}/bin:{os.environ['PATH']}:/usr/sbin:/sbin")
SCRIPTS = sorted(DEBIAN.glob("hostagent.p[ro]*"))


def pinned() -> dict[str, Version]:
    """What goes into the private environment."""
    lines = re.findall(r"^([\w.-]+)==(\S+) \\$", (DEBIAN / "requirements.txt").read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in lines}


def distributed() -> dict[str, Version]:
    """What Debian 12 has, in at least the version that control asks for."""
    depends = re.search(r"^Depends:\n((?: .*\n)+)", CONTROL, re.MULTILINE)
    assert depends
    found = re.findall(r"^ python3-([\w.-]+) \(>= ([0-9.]+)\),$", depends[1], re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in found}


def met(requirement: str) -> bool:
    """In the environment: by a package of it, or by one of Debian's. Those of other systems and extras are none."""
    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return True
    name = canonicalize_name(wanted.name)
    version = pinned().get(name) or distributed().get(name)
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def test_all_that_the_project_needs_is_in_the_environment() -> None:
    needs = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(needs) > 5
    assert [need for need in needs if not met(need)] == []
    assert not met("requests") and not met("fastapi<0.1")


def test_what_these_need_is_there_as_well() -> None:
    """As far as the versions that are installed here are those of the package."""
    looked = 0
    for name, version in pinned().items():
        found = importlib.metadata.distribution(name)
        if Version(found.version) == version:
            looked += 1
            assert [need for need in found.requires or () if not met(need)] == [], name
    if not looked:
        pytest.skip("none of the package's versions is installed here")


def test_each_pin_has_its_hash() -> None:
    text = (DEBIAN / "requirements.txt").read_text()
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}", text)) == len(pinned()) + 1, "pydantic-core: two architectures"


def test_a_removal_stops_every_unit_that_runs() -> None:
    prerm = (DEBIAN / "hostagent.prerm").read_text()
    named = (DEBIAN / "rules").read_text().partition("override_dh_installsystemd:")[2]
    units = [path.name for path in UNITS.iterdir() if path.suffix in (".service", ".socket")]
    assert len(units) == 7
    for unit in units:
        assert re.search(rf"\b{re.escape(unit)}\b", prerm) and re.search(rf"\b{re.escape(unit)}\b", named), unit


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.suffix)
def test_a_maintainer_script_is_understood_and_has_its_place_for_debhelper(script: Path) -> None:
    assert len(SCRIPTS) == 4
    subprocess.run(["sh", "-n", str(script)], check=True, timeout=60)
    text = script.read_text()
    assert "\n#DEBHELPER#\n" in text and text.startswith("#!/bin/sh\n") and "\nset -e\n" in text


QSD = b"qemu-storage-daemon\0--chardev\0socket,id=hostagent-a356251107a9,fd=820,server=off\0"
DATA = b"/usr/bin/python3\0-I\0-m\0hostagent.cli.main\0data\0"
TALKS = b"grep\0see socket,id=hostagent-a356251107a9,fd=820 or hostagent.cli.main\0"
SESSION = "/user.slice/user-1000.slice/session-1.scope"
PROCESSES = {
    1: (QSD, 64055, "/system.slice/cron.service"),  # Debian's number for libvirt-qemu
    2: (QSD, 998, SESSION),
    3: (QSD, 1000, "/hostagent.slice/hostagent-qsd.slice/hostagent-1.scope"),
    4: (QSD, 1000, SESSION),
    5: (QSD, 165536, "/user.slice/user-1000.slice/user@1000.service/hostagent.slice"),
    6: (DATA, 65534, "/"),
    7: (DATA, 59999, "/system.slice/hostagent.service"),
    8: (DATA, 1000, "/system.slice/other-hostagent.service"),
    9: (DATA, 0, SESSION),
    10: (TALKS, 0, "/system.slice/hostagent.service"),
    11: (DATA, 65536, SESSION),
    12: (b"sudo\0" + QSD.replace(b"qemu-storage-daemon", b"hostagent.cli.main"), 0, SESSION),
}


@pytest.mark.parametrize(("script", "found"), [("prerm", "1 2 3 6 7 9"), ("postrm", "1 2 3")])
def test_no_user_holds_up_a_removal_by_words_in_his_command_line(tmp_path: Path, script: str, found: str) -> None:
    for pid, (words, uid, group) in PROCESSES.items():
        (process := tmp_path / str(pid)).mkdir()
        (process / "cmdline").write_bytes(words)
        (process / "status").write_text(f"Name:\tx\nUid:\t{uid}\t0\t0\t0\nGid:\t0\t0\t0\t0\n")
        (process / "cgroup").write_text(f"0::{group}\n")
        (process / "exe").touch()
        (process / "exe").chmod(0o4755 if words.startswith(b"sudo") else 0o755)
    text = re.search(r"^running\(\) {\n.*?^}\n", (DEBIAN / f"hostagent.{script}").read_text(), re.MULTILINE | re.DOTALL)
    assert text
    command = f"set -e\n{text[0].replace('/proc/', f'{tmp_path}/')}running\n"
    # The test's folder may have digits in its name: its processes' names are the last part.
    command = command.replace("tr -dc", f"sed 's,{tmp_path}/,,' | tr -dc")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert sorted(done.stdout.split(), key=int) == found.split(), done.stderr


def test_the_profile_opens_the_sockets_of_exports_and_says_that_it_is_untested() -> None:
    rules = [line for line in PROFILE.read_text().splitlines() if line and not line.startswith("#")]
    assert rules == ["/run/hostagent/nbd/*.sock rw,"]
    assert "ntested" in PROFILE.read_text()


@pytest.mark.skipif(PARSER is None, reason="apparmor_parser is not there (tools/setup.sh develop)")
def test_apparmor_understands_the_profile(tmp_path: Path) -> None:
    """Parsed and compiled, not loaded."""

    def parsed(text: str) -> subprocess.CompletedProcess[str]:
        profile = tmp_path / "profile"
        profile.write_text(f"profile guest {{\n{text}\n}}\n")
        command = [str(PARSER), "--skip-kernel-load", "--skip-cache", "--config-file=/dev/null", str(profile)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    good = parsed(PROFILE.read_text())
    assert good.returncode == 0, good.stderr
    assert parsed("/run/hostagent/nbd/*.sock no such rule,").returncode != 0
