"""The stage of the demonstration: a folder, a user, an agent, and the certainty that nothing of it stays.

Each command that is shown is run exactly as it is shown, by a shell that stands in the folder. Every one has a
deadline. `close` may be called at any moment, also when the agent was killed: it ends the clients, the agent, the
storage daemons (by SIGTERM) and removes the folder, and the user if it was made here.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hostagent.cli.client import Client, CliError, Json, quoted
from hostagent.cli.demo_images import READER, Reading, reading

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

USER = "hostagent-demo"
PROGRAMS = {
    "hostagent": "",
    "qemu-storage-daemon": "qemu-system-common",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "curl": "curl",
    "ps": "procps",
}
"""Program → its Debian package."""
ROOT_PROGRAMS = {"getfacl": "acl", "runuser": "util-linux", "useradd": "passwd"}
COMMAND_TIMEOUT = 180.0  # seconds; a slow disk takes a minute for a gigabyte
END_TIMEOUT = 15.0  # seconds for a process to end after SIGTERM; the agent and QEMU flush first
START_TIMEOUT = 20.0  # seconds until the agent answers
GRACE = 0.05  # seconds between two looks


class Stage:
    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self.user = USER if os.geteuid() == 0 else None
        self.socket = folder / "run" / "hostagent.sock"
        self.client = Client(self.socket)
        self.agent: subprocess.Popen[bytes] | None = None
        self._console = console
        self._reader: subprocess.Popen[bytes] | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self.made_user = False
        self._bar = False
        self._environment = {**_clean_environment(), "HOSTAGENT_SOCKET": str(self.socket)}

    # What is said

    def heading(self, text: str) -> None:
        self._console.print()
        self._console.rule(text, align="left", style="cyan")

    def say(self, text: str, style: str = "") -> None:
        """While another process draws a bar, a line takes the bar's place, and the bar comes again below it."""
        if self._bar:
            self._console.file.write("\r\x1b[2K")
        self._console.print(text, style=style, soft_wrap=True)
        self._console.file.flush()

    def held(self, truth: bool, claim: str) -> None:
        """Say a claim that has been tried, or end the demonstration because it is false."""
        if not truth:
            raise CliError("internal", f"this did not hold: {claim}")
        self.proved(claim)

    def proved(self, claim: str) -> None:
        """Say what the commands before have proved: each ended as it was expected to."""
        self.say(f"✓ {claim}", "green")

    # Commands

    def name(self, variable: str, value: str) -> None:
        """A variable for the commands that follow."""
        self._environment[variable] = value
        self._echo(f"{variable}='{value}'")

    def value(self, variable: str) -> str:
        return self._environment[variable]

    def run(self, command: str, *, status: int = 0) -> None:
        """Show a command and run it; another exit status than the expected one ends the demonstration."""
        if self._bar:
            self.output(command, status=status)
        else:
            self._finish(command, self._spawn(command), status)

    def output(self, command: str, *, status: int = 0) -> str:
        """The same, and what it printed."""
        child = self._spawn(command, stdout=subprocess.PIPE)
        text = self._finish(command, child, status).decode(errors="replace").rstrip()
        self.say(text)
        return text

    def follow(self, command: str) -> Callable[[int], None]:
        """Show a command that draws a bar and leave it running; the answer waits for its end with that status."""
        child = self._spawn(command)
        self._bar = sys.stderr.isatty()

        def ended(status: int) -> None:
            self._bar = False
            self._finish(command, child, status)

        return ended

    def _spawn(self, command: str, *, stdout: int | None = None) -> subprocess.Popen[bytes]:
        self._echo(command)
        child = subprocess.Popen(
            ["sh", "-c", command],
            cwd=self.folder,
            env=self._environment,
            stdout=stdout,
            stdin=subprocess.DEVNULL,
            process_group=0,  # so that what a shell started ends with it
        )
        self._children.append(child)
        return child

    def _finish(self, command: str, child: subprocess.Popen[bytes], status: int) -> bytes:
        try:
            text, _ = child.communicate(timeout=COMMAND_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise CliError("timeout", f"`{command}` has not ended after {COMMAND_TIMEOUT:g} s") from None
        self._children.remove(child)
        if child.returncode != status:
            raise CliError("internal", f"`{command}` ended with {child.returncode} and not with {status}")
        return text or b""

    def _echo(self, command: str) -> None:
        self.say(f"$ {command}", "bold")

    def until(self, what: str, look: Callable[[], T | None], timeout: float) -> T:
        """The first thing that `look` finds."""
        deadline = time.monotonic() + timeout
        while (found := look()) is None:
            if time.monotonic() > deadline:
                raise CliError("timeout", f"{what}: not within {timeout:g} s")
            time.sleep(GRACE)
        return found

    # Folder and user

    def prepare(self) -> None:
        self._look_for_programs()
        (self.folder / "reader.py").write_text(READER)
        # A file of its own, because this machine may have settings for another agent.
        settings = '[logs]\nlevel = "info"\nformat = "text"\n[data]\nport = -1\n'
        if self.user:  # the data daemon needs no image's permissions, but a way to the exports
            settings += f'user = "{self.user}"\n[api]\nsocket_group = "{self.user}"\n'
        (self.folder / "hostagent.toml").write_text(settings)
        if self.user:
            self._make_user(self.user)
            # Storage daemons get their files as descriptors. Only whoever tries a path as that user must pass here.
            os.chown(self.folder, 0, pwd.getpwnam(self.user).pw_gid)
            self.folder.chmod(0o710)

    def _look_for_programs(self) -> None:
        wanted = {**PROGRAMS, **(ROOT_PROGRAMS if self.user else {})}
        missing = [name for name in wanted if shutil.which(name, path=self._environment["PATH"]) is None]
        if missing:
            packages = sorted({wanted[name] for name in missing} - {""})
            remedy = f"make setup, or as root: apt install {' '.join(packages)}" if packages else "make setup"
            raise CliError("unavailable", f"the demonstration needs {', '.join(missing)}", remedy=remedy)

    def _make_user(self, name: str) -> None:
        try:
            pwd.getpwnam(name)
        except KeyError:
            self.made_user = True
            self.run(f"useradd --system --no-create-home --shell /usr/sbin/nologin {name}")

    # Agent

    def start_agent(self) -> None:
        as_user = f" --hypervisor-user {self.user}" if self.user else ""
        command = f"hostagent serve --config ./hostagent.toml --state-dir ./state --runtime-dir ./run{as_user}"
        self._echo(f"{command} 2>>agent.log &")
        with (self.folder / "agent.log").open("ab") as log:
            self.agent = subprocess.Popen(
                command.split(),
                cwd=self.folder,
                env={name: value for name, value in self._environment.items() if name != "HOSTAGENT_SOCKET"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demonstration, which ends the agent in its own order
            )
        self.until("the agent is ready", self._ready, START_TIMEOUT)

    def _ready(self) -> bool | None:
        if self.agent is not None and self.agent.poll() is not None:
            raise CliError("unavailable", "the agent ended while it started")
        try:
            return True if self.client.get("/readyz").data["ready"] else None
        except CliError:
            return None

    def kill_agent(self) -> None:
        """SIGKILL, as a crash does it."""
        assert self.agent is not None
        self.agent.kill()
        self.agent.wait(END_TIMEOUT)
        self.agent = None

    def last_words(self) -> None:
        """The end of the agent's log, for whoever has to find out what went wrong."""
        with contextlib.suppress(OSError):
            for line in (self.folder / "agent.log").read_text(errors="replace").splitlines()[-10:]:
                self.say(f"agent.log: {line}", "dim")

    # The client that reads all the time

    def start_reader(self) -> None:
        command = 'python3 reader.py "$URI" copy.raw >reader.log'
        self._echo(f"{command} &")
        (self.folder / "reader.log").touch()
        self._reader = subprocess.Popen(
            ["sh", "-c", f"exec {command}"], cwd=self.folder, env=self._environment, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self.until("the reader reads", lambda: self.reading().total or None, START_TIMEOUT)

    def reading(self) -> Reading:
        assert self._reader is not None
        if (status := self._reader.poll()) is not None:
            raise CliError("internal", f"the export's client ended with {status}")
        return reading(self.folder / "reader.log")

    def stop_reader(self) -> None:
        if self._reader is not None and self._reader.poll() is None:
            self._reader.terminate()
            self._reader.wait(END_TIMEOUT)
        self._reader = None

    # The end

    def close(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # it is ending already, and each step below has a limit
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            _end(child)
        self.stop_reader()
        if self.agent is not None and self.agent.poll() is None:
            self._release_all()
            self.agent.terminate()
            _end(self.agent)
        self._end_data_daemon()
        self._end_storage_daemons()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.made_user:
            subprocess.run(["userdel", USER], capture_output=True, timeout=END_TIMEOUT, check=False)

    def _release_all(self) -> None:
        """What the agent has, it gives back itself; what that leaves is ended by pid."""
        with contextlib.suppress(CliError):
            for export in self.client.items("/v1/exports", {"state": "running"}):
                self.client.delete(f"/v1/exports/{quoted(export['id'])}", {"force": "true"})
            for job in self.active_jobs():
                self.client.post(f"/v1/jobs/{quoted(job['id'])}/abort")
            deadline = time.monotonic() + END_TIMEOUT
            while self.active_jobs() and time.monotonic() < deadline:
                time.sleep(GRACE)

    def active_jobs(self) -> list[Json]:
        ended = ("completed", "failed", "aborted")
        return [job for job in self.client.items("/v1/jobs", {}) if job["state"] not in ended]

    def _end_data_daemon(self) -> None:
        """The agent leaves one that has tickets alone."""
        from hostagent.unix_http import HTTPException, UnixConnection

        connection = UnixConnection(self.folder / "run" / "data-control.sock", timeout=END_TIMEOUT)
        with contextlib.suppress(OSError, HTTPException, ValueError, KeyError):
            connection.request("GET", "/healthz")
            os.kill(int(json.loads(connection.getresponse().read())["pid"]), signal.SIGTERM)
        connection.close()

    def _end_storage_daemons(self) -> None:
        """SIGTERM, and time to flush. Its images go in a moment, so that one which hangs may be killed here."""
        self._signal_storage_daemons(signal.SIGTERM)
        deadline = time.monotonic() + END_TIMEOUT
        while self._storage_daemons() and time.monotonic() < deadline:
            time.sleep(GRACE)
        self._signal_storage_daemons(signal.SIGKILL)

    def _signal_storage_daemons(self, number: signal.Signals) -> None:
        for pid in self._storage_daemons():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _storage_daemons(self) -> list[int]:
        """Pids of this agent's storage daemons: the runtime folder has a folder for each, named like its monitor."""
        names = [entry.name for entry in (self.folder / "run" / "qsd").glob("*")]
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().decode(errors="replace")
                    if any(f"id=hostagent-{name}," in line for name in names):
                        found.append(int(entry.name))
        return found


def _clean_environment() -> dict[str, str]:
    """Without settings for another agent, and with this program's own folder and root's programs in PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOSTAGENT_")}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
    kept["HOSTAGENT_DBUS_ADDRESS"] = "off"
    kept["HOSTAGENT_LIBVIRT_URI"] = ""  # it shows no guests, and the host's are none of its business
    return kept


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        child.kill()
