"""A fresh Debian 12 in a folder, by debootstrap from wherever apt here gets its packages."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SUITE = "bookworm"
WAIT = 1200.0
BEGIN = "systemd,systemd-sysv,dbus,libnbd-bin,acl,procps"
"""Beside what makes a system: what the test itself asks with."""


def missing() -> str | None:
    if os.geteuid() != 0:
        return "only root can make a system"
    absent = [name for name in ("debootstrap", "dpkg-buildpackage", "dh") if shutil.which(name) is None]
    if absent:
        return f"{absent[0]} is not installed (tools/setup.sh develop)"
    return None if mirror() else f"apt here has no source for {SUITE}"


def mirror() -> str | None:
    """Of the suite, as apt here has it."""
    command = ["apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=WAIT).stdout
    found = [line.split()[2] for line in listed.splitlines() if line.split()[:2] == [SUITE, "main"]]
    return found[0] if found else None


def made(root: Path, depends: str) -> None:
    """A system with all that a package `depends` on, and without what is only recommended."""
    source = mirror()
    assert source is not None
    run("debootstrap", "--variant=minbase", f"--include={BEGIN}", SUITE, str(root), source)
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    # It is thrown away: nothing of it need be durable.
    (root / "etc/dpkg/dpkg.cfg.d/quick").write_text("force-unsafe-io\n")
    run("chroot", str(root), "apt-get", "satisfy", "-qq", "-y", "--no-install-recommends", depends)
    run("chroot", str(root), "apt-get", "clean")
    policy.unlink()


def run(*command: str) -> str:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, env=env)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
