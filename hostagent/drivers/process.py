"""Processes that outlive the agent: started as another user, watched by pidfd, known again after a restart.

A pid alone names nothing: pids are used again. pid + start time + boot id do, and that is what identity means here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import resource
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class User:
    """Who a child runs as. `name` is for people."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def named(cls, name: str) -> User:
        """Raises KeyError when there is no such user."""
        entry = pwd.getpwnam(name)
        return cls(name, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(name, entry.pw_gid)))

    @classmethod
    def current(cls) -> User:
        uid, gid = os.geteuid(), os.getegid()
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            name = str(uid)
        return cls(name, uid, gid, tuple(os.getgroups()))

    @property
    def is_us(self) -> bool:
        return self.uid == os.geteuid()


def start_time(pid: int) -> int | None:
    """Clock ticks since boot at which the process began (proc(5), field 22); None when there is none (any more)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def launch(
    argv: Sequence[str],
    *,
    user: User,
    pass_fds: Sequence[int],
    log_path: Path | None,
    open_files: int,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[bytes]:
    """Start a child in its own session, so that neither our end nor our terminal's ends it. Blocks for milliseconds.
    What it says is appended to `log_path`; without one it goes where our own log does. `environment`: what it gets
    where our own says nothing.

    setpriv(1) changes the user, not Popen: with `user=` Python must fork, which stops the whole agent while the kernel
    copies its page tables (8 ms seen); without, it takes vfork. And prlimit(1) sets the limits, not we: of a process of
    another user only who has CAP_SYS_RESOURCE can.
    """
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log_path.open("ab")) if log_path is not None else None
        child = subprocess.Popen(
            [*_bounded(open_files), *_become(user), *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            env={**environment, **_environment()},
            umask=0o117,
            cwd="/",
        )
    return child


def _bounded(open_files: int) -> list[str]:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = open_files if most == resource.RLIM_INFINITY else min(open_files, most)
    return ["prlimit", f"--nofile={files}:{files}", "--core=0:0", "--"]


def _environment() -> dict[str, str]:
    """Ours, without what the service manager says to us alone (sd_notify(3), sd_watchdog_enabled(3))."""
    ours = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    return {name: value for name, value in os.environ.items() if name not in ours}


def _become(user: User) -> list[str]:
    if user.is_us:
        return []
    groups = f"--groups={','.join(map(str, user.groups))}" if user.groups else "--clear-groups"
    return ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", groups, "--"]


class Watch:
    """Calls `on_exit` once on the event loop when the process is gone. No polling, no signal races: a pidfd."""

    def __init__(self, pid: int, on_exit: Callable[[], None], child: subprocess.Popen[bytes] | None = None) -> None:
        self._fd = os.pidfd_open(pid)
        self._child = child
        self._on_exit = on_exit
        self.how: str | None = None  # only the parent hears it, not who adopted
        self.killed = False
        """Whether a signal ended it; as far as we hear."""
        self._gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._exited)

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    def _exited(self) -> None:
        self.close()
        if self._child is not None and (status := self._child.poll()) is not None:
            self.killed = status < 0
            self.how = f"killed by {signal.Signals(-status).name}" if self.killed else f"exit status {status}"
        self._gone.set()
        self._on_exit()

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, OSError):
            signal.pidfd_send_signal(self._fd, number)

    async def wait(self, timeout: float) -> bool:
        try:
            await asyncio.wait_for(self._gone.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
