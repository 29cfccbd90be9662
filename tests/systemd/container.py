"""A container of this host's own system that boots systemd, for tests of the units as they are in units/.

Its root is an overlay on the host's, so nothing that it does is seen outside; what it writes goes into memory, and stays
over its reboots. The agent's program is this checkout.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
UNITS = REPOSITORY / "units"
WAIT = 90.0
REBOOTS = 133
PROGRAM = """#!/bin/sh
export PYTHONPATH=/opt/repository:/opt/packages PYTHONDONTWRITEBYTECODE=1
exec /usr/bin/python3 -m hostagent.cli.main "$@"
"""
HIERARCHIES = [Path("/sys/fs/cgroup", name) for name in ("unified", "systemd", "")]
JOINED = 'for group in $CGROUPS; do echo $$ > "$group/cgroup.procs" || exit; done; exec "$@"'
NOT_WANTED = ("libvirtd.service", "libvirtd.socket", "libvirt-guests.service", "virtlogd.service", "nginx.service")


def missing() -> str | None:
    """Why no container boots here; None when one may."""
    if os.geteuid() != 0:
        return "only root can boot a container"
    absent = [name for name in ("systemd-nspawn", "nsenter") if shutil.which(name) is None]
    if absent:
        return f"{absent[0]} is not installed (tools/setup.sh develop)"
    if not Path("/lib/systemd/systemd").exists():
        return "systemd is not installed"
    try:
        with tempfile.TemporaryDirectory(prefix="hc-") as folder, _root(Path(folder)):
            return None
    except subprocess.CalledProcessError:
        return "no overlay can be mounted here"


@contextlib.contextmanager
def _root(folder: Path) -> Iterator[Path]:
    memory, root = folder / "memory", folder / "root"
    memory.mkdir()
    root.mkdir()
    with contextlib.ExitStack() as stack:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2G,mode=755", "none", str(memory)], check=True)
        stack.callback(subprocess.run, ["umount", "-l", str(memory)], check=False)
        for name in ("upper", "work"):
            (memory / name).mkdir()
        layers = f"lowerdir=/,upperdir={memory}/upper,workdir={memory}/work"
        mount = ["mount", "-t", "overlay", "overlay", "-o", layers, str(root)]
        subprocess.run(mount, check=True, stderr=subprocess.DEVNULL)
        stack.callback(subprocess.run, ["umount", "-l", str(root)], check=False)
        yield root


class Unbootable(Exception):
    """systemd-nspawn ended before anything ran in it: this host lets no container boot."""


class Container:
    """`boot` it, then `run` commands in it. `binds` are folders of the host's that it sees, by their names in it."""

    def __init__(self, root: Path, *, name: str = "hostagent-test", binds: dict[str, Path] | None = None) -> None:
        self.root = root
        self.name = name
        self.binds = binds or {}
        self._volumes: dict[str, Path] = {}
        self._nspawn: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextlib.contextmanager
    def made(cls) -> Iterator[Container]:
        with tempfile.TemporaryDirectory(prefix="hc-") as folder, _root(Path(folder)) as root:
            packages = Path(sysconfig.get_path("purelib"))
            container = cls(root, binds={"/opt/repository": REPOSITORY, "/opt/packages": packages})
            container._install()
            try:
                yield container
            finally:
                container.end()

    def _install(self) -> None:
        """As a package does."""
        system = self.root / "etc/systemd/system"
        for unit in UNITS.iterdir():
            if unit.suffix in (".service", ".socket", ".slice"):
                shutil.copy(unit, system)
        shutil.copy(UNITS / "sysusers.conf", self.root / "usr/lib/sysusers.d/hostagent.conf")
        shutil.copy(UNITS / "tmpfiles.conf", self.root / "usr/lib/tmpfiles.d/hostagent.conf")
        for file, folder in (
            ("dbus/org.hostagent1.conf", "dbus-1/system.d"),
            ("dbus/org.hostagent1.service", "dbus-1/system-services"),
            ("polkit/org.hostagent1.policy", "polkit-1/actions"),
            ("polkit/org.hostagent1.rules", "polkit-1/rules.d"),
        ):
            to = self.root / "usr/share" / folder
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(UNITS / file, to)
        (self.root / "usr/lib/sysusers.d/hypervisor.conf").write_text("u libvirt-qemu - - / /usr/sbin/nologin\n")
        program = self.root / "usr/lib/hostagent/bin/hostagent"
        program.parent.mkdir(parents=True)
        program.write_text(PROGRAM)
        program.chmod(0o755)
        self.prepare()
        self.enable("hostagent.service")

    def prepare(self) -> None:
        """A machine of its own, without what no test needs."""
        system = self.root / "etc/systemd/system"
        for name in NOT_WANTED:
            (system / name).unlink(missing_ok=True)
            (system / name).symlink_to("/dev/null")
        machine = self.root / "etc/machine-id"
        machine.unlink(missing_ok=True)
        machine.write_text("")
        for place in self.binds:
            (self.root / place.strip("/")).mkdir(parents=True, exist_ok=True)

    def enable(self, unit: str) -> None:
        subprocess.run(["systemctl", f"--root={self.root}", "-q", "enable", unit], check=True, timeout=WAIT)

    def add_volume(self, place: str) -> None:
        """It has no overlay there, on which a file has another device number than its folder."""
        folder = self.root.parent / "memory" / place.strip("/").replace("/", "-")
        folder.mkdir()
        self._volumes[place] = folder

    def outside(self, path: str) -> Path:
        """Where a file of its is here."""
        for place, folder in self._volumes.items():
            if Path(path).is_relative_to(place):
                return folder / Path(path).relative_to(place)
        return self.root / path.lstrip("/")

    def drop_in(self, unit: str, text: str) -> None:
        folder = self.root / f"etc/systemd/system/{unit}.d"
        folder.mkdir(exist_ok=True)
        (folder / "test.conf").write_text(text)

    # Life

    def boot(self) -> None:
        groups = self._groups()
        for group in groups:
            group.mkdir(exist_ok=True)
        command = [
            *(
                "sh",
                "-c",
                JOINED,
                "sh",
                "systemd-nspawn",
                "--quiet",
                f"--directory={self.root}",
                f"--machine={self.name}",
                "--register=no",
            ),
            *("--keep-unit", "--private-network", "--console=pipe", "--boot"),
            *(f"--bind-ro={path}:{place}" for place, path in self.binds.items()),
            *(f"--bind={path}:{place}" for place, path in self._volumes.items()),
        ]
        said = self.root.parent / "nspawn.log"
        with said.open("wb") as log:
            self._nspawn = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "CGROUPS": " ".join(map(str, groups))},
            )
        self.until(lambda: self._nspawn and (self._nspawn.poll() is not None or self._init()), "it begins")
        if self._nspawn.poll() is not None:
            raise Unbootable(said.read_text(errors="replace")[-500:])
        self.until_up()

    def until_up(self) -> None:
        self.until(lambda: self.run("systemctl", "is-system-running", check=False).strip() == "running", "it is up")

    def reboot(self) -> None:
        """As its operator does. systemd-nspawn ends, and says by its exit status that it is to be started again."""
        assert self._nspawn is not None
        self.run("systemctl", "reboot", check=False)
        assert self._nspawn.wait(WAIT) == REBOOTS
        self.boot()

    def lose_power(self) -> None:
        """All that runs ends where it stands; then it is started again."""
        init = self._init()
        assert self._nspawn is not None and init is not None
        os.kill(init, signal.SIGKILL)  # the kernel ends what else is in its namespace
        self._nspawn.wait(WAIT)
        self.boot()

    def end(self) -> None:
        if self._nspawn is None:
            return
        self._nspawn.terminate()  # it powers the system off
        try:
            self._nspawn.wait(WAIT)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait(WAIT)
        for group in self._groups():
            for folder, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()

    def _groups(self) -> list[Path]:
        """Two that run at a time share no cgroup: systemd would find the other's processes in its units."""
        name = f"{self.name}-{os.getpid()}"
        return [place / name for place in HIERARCHIES if (place / "cgroup.procs").exists()]

    def _init(self) -> int | None:
        assert self._nspawn is not None
        found = subprocess.run(["pgrep", "-P", str(self._nspawn.pid)], capture_output=True, text=True).stdout.split()
        return int(found[0]) if found else None

    # In it

    def command(self, *words: str) -> list[str]:
        return ["nsenter", f"--target={self._init()}", "--all", "--", *words]

    def run(self, *words: str, check: bool = True, timeout: float = WAIT) -> str:
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}{done.stdout}\n{self.log()}"
        return done.stdout

    def hostagent(self, *words: str) -> str:
        return self.run("/usr/lib/hostagent/bin/hostagent", *words)

    def show(self, unit: str, what: str) -> str:
        return self.run("systemctl", "show", "--value", f"--property={what}", unit).strip()

    def log(self, unit: str = "hostagent.service") -> str:
        command = self.command("journalctl", "--no-pager", "--output=cat", "--lines=30", f"--unit={unit}")
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT).stdout

    def until(self, done: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + WAIT
        while not done():
            assert time.monotonic() < deadline, f"{what}: not after {WAIT:g} s\n{self.log()}"
            time.sleep(0.1)
