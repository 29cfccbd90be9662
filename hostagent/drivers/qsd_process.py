"""A qemu-storage-daemon as a process: started, adopted, spoken to, ended.

It gets the files that it may open as inherited O_PATH descriptors, and two monitors: one that is connected from the
start, and one that listens, for an agent that comes back. What is said to it is qsd.StorageDaemon's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostagent.drivers import descriptors as proc
from hostagent.drivers import scope
from hostagent.drivers.process import User, Watch, command_line, launch
from hostagent.drivers.qmp import Monitor, Refused
from hostagent.drivers.tls import TlsListener
from jobs.errors import JobError
from jobs.model import FileId

MOMENT = 0.5
"""Seconds between a process's closing of its sockets and its end, at most (it is flushing nothing any more then)."""
CHARDEV = "hostagent-"
"""Prefix of the monitor's chardev id, followed by the daemon's id: how a process is known for ours."""

ENVIRONMENT = {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={4 << 20}:glibc.malloc.trim_threshold={8 << 20}"}
"""A storage daemon keeps up to 8 MiB of its heap. As malloc(3) comes, it may give the buffer of each NBD request of
1 MiB back and get new pages for the next, which doubles its processor time (docs/data.md)."""


@dataclass(frozen=True, slots=True)
class Settings:
    binary: str
    user: User
    connect_timeout: float
    call_timeout: float
    start_timeout: float
    stop_timeout: float
    flush_timeout: float
    open_files: int
    max_connections: int


@dataclass(frozen=True, slots=True)
class Places:
    """The daemon's files: `folder` (0700) has the monitor and the log, `socket` is the NBD listener; `opening` is there
    as long as the agent has not heard that its images are open."""

    folder: Path
    monitor: Path
    socket: Path

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def opening(self) -> Path:
        return self.folder / "opening"

    def remove(self) -> None:
        """The files of a process that has ended."""
        for path in (self.socket, self.monitor, self.log, self.opening):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


class DaemonProcess:
    """A running daemon. Callbacks run on the event loop: `on_event(name, data)`, `on_exit()`."""

    def __init__(
        self,
        daemon_id: str,
        places: Places,
        settings: Settings,
        *,
        on_event: Callable[[str, Mapping[str, Any]], None],
        on_exit: Callable[[], None],
        tls: TlsListener | None = None,
    ) -> None:
        """`tls`: it listens there, and not on the unix socket."""
        self.id = daemon_id
        self.places = places
        self._settings = settings
        self._tls = tls
        self.port: int | None = None
        self._on_exit = on_exit
        self._on_event = on_event
        self.pid = 0
        self.inodes: frozenset[int] = frozenset()
        """The inode numbers of what it was given to open. No other file can ever be open in it."""
        self._watch: Watch
        self._monitor: Monitor | None = None
        self._connecting = asyncio.Lock()
        self._moving: asyncio.Task[None] | None = None
        """Into its own unit: nobody waits for it."""

    async def launch(self, descriptors: Sequence[int]) -> None:
        """Start the process. `descriptors` (O_PATH) keep their numbers inside it."""
        self.inodes = frozenset(os.fstat(fd).st_ino for fd in descriptors)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                child = await self._launched(descriptors, theirs)
            self.pid = child.pid
            self._watch = Watch(child.pid, self._on_exit, child)
        except BaseException:
            ours.close()
            raise
        try:
            await self.monitor(ours)
        except BaseException as error:
            died = isinstance(error, JobError) and await self.ended(MOMENT)
            killed = self._watch.killed
            await self.kill()  # nobody has had anything of it yet
            await self.detach()
            if isinstance(error, JobError):
                raise (self.death() if killed else self._no_start(died=died)) from error
            raise
        if scope.wanted():
            what = f"Storage daemon {self.id} of hostagent"
            self._moving = asyncio.create_task(scope.take_in(self.pid, f"hostagent-qsd-{self.id}", what))

    async def _launched(self, descriptors: Sequence[int], first: socket.socket) -> subprocess.Popen[bytes]:
        """The child. The thread that starts it cannot be stopped, and uses our descriptors: a caller that is cancelled
        waits for it, and ends what nobody would know of."""
        launching = asyncio.ensure_future(asyncio.to_thread(self._launch, descriptors, first))
        try:
            return await asyncio.shield(launching)
        except asyncio.CancelledError:
            with contextlib.suppress(JobError):
                child = await launching
                child.kill()
                await asyncio.to_thread(child.wait)
            raise

    def _no_start(self, *, died: bool) -> JobError:
        limit = f"did not answer within {self._settings.start_timeout:g} s (qsd.start_timeout)"
        remedy = "see the machine's load, and that the hypervisor user may execute qsd.binary; then try again"
        if self._tls is not None:
            remedy = f"see that {self._settings.user.name} can read what is in {self._tls.folder}, and that it is valid"
        message = f"a new storage daemon {'ended at once' if died else limit}{self._last_words()}"
        return JobError("unavailable", message, remedy=remedy)

    def _launch(self, descriptors: Sequence[int], first: socket.socket) -> subprocess.Popen[bytes]:
        """Two monitors: one on `first`, which is connected, and one that listens, for an agent that comes back.

        Connecting to the listener of a daemon that is just starting is a race in QEMU (7.2): its main thread and its
        monitor thread may both accept. In 2 of 100 starts it never answered, or greeted twice and lost the handshake.
        """
        if shutil.which(self._settings.binary) is None:
            raise JobError(
                "unavailable",
                f"{self._settings.binary!r} is not installed",
                remedy="install qemu-system-common (Debian), or set qsd.binary; run `hostagent doctor`",
            )
        with (
            _listener(self.places.monitor, 2) as monitor,
            self._nbd_listener() as nbd,
        ):
            argv = [
                self._settings.binary,
                "--chardev",
                f"socket,id=first,fd={first.fileno()},server=off",
                "--monitor",
                "chardev=first",
                "--chardev",
                f"socket,id={CHARDEV}{self.id},fd={monitor.fileno()},server=on,wait=off",
                "--monitor",
                f"chardev={CHARDEV}{self.id}",
                *(self._tls.options() if self._tls else ()),
                "--nbd-server",
                f"addr.type=fd,addr.str={nbd.fileno()},max-connections={self._settings.max_connections}"
                + (self._tls.server_options() if self._tls else ""),
            ]
            try:
                return launch(
                    argv,
                    user=self._settings.user,
                    pass_fds=(first.fileno(), monitor.fileno(), nbd.fileno(), *descriptors),
                    log_path=self.places.log,
                    open_files=self._settings.open_files,
                    environment=ENVIRONMENT,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise JobError(
                    "unavailable",
                    f"{self._settings.binary!r} cannot be started as {self._settings.user.name!r}: {error}",
                    remedy="run `hostagent doctor`",
                ) from error

    @contextlib.contextmanager
    def _nbd_listener(self) -> Iterator[socket.socket]:
        backlog = self._settings.max_connections
        if self._tls is not None:
            with self._tls.bind(backlog) as listener:
                self.port = int(listener.getsockname()[1])
                yield listener
            return
        with _listener(self.places.socket, backlog) as listener:
            yield listener

    async def adopt(self, pid: int) -> None:
        """Take over a process that an earlier agent started. The caller has proven its identity."""
        self.pid = pid
        self._watch = Watch(pid, self._on_exit)
        self.inodes = await asyncio.to_thread(proc.inodes, pid)
        with contextlib.suppress(JobError):  # one that does not answer is adopted all the same: it is ours
            await self.monitor()

    @property
    def alive(self) -> bool:
        return not self._watch.gone

    async def ended(self, within: float) -> bool:
        """Whether the process ends in the next moments: a broken connection is seen before the end of its peer."""
        return await self._watch.wait(within)

    async def monitor(self, first: socket.socket | None = None) -> Monitor:
        """The connection; made anew when it was lost and the process lives. `first` is the one that it starts with."""
        async with self._connecting:
            if self._monitor is None:
                if not self.alive:
                    raise self.death()
                monitor = Monitor(
                    f"storage daemon {self.id}",
                    connect_timeout=self._settings.start_timeout if first else self._settings.connect_timeout,
                    call_timeout=self._settings.call_timeout,
                    on_event=self._on_event,
                    on_close=self._disconnected,
                )
                await monitor.connect(str(self.places.monitor), first)
                self._monitor = monitor
            return self._monitor

    @property
    def connected(self) -> bool:
        return self._monitor is not None

    def _disconnected(self) -> None:
        self._monitor = None

    async def execute(self, command: str, timeout: float | None = None, **arguments: Any) -> Any:
        monitor = await self.monitor()
        try:
            return await monitor.execute(command, timeout, **arguments)
        except JobError as error:
            if isinstance(error, Refused) or not await self.ended(0.0 if monitor.connected else MOMENT):
                raise
            raise self.death() from error

    def death(self) -> JobError:
        return JobError(
            "storage_daemon_died",
            f"storage daemon {self.id} (pid {self.pid}) ended{self._last_words()}",
            remedy="start the job again: it goes on from what is already there",
        )

    async def quit(self) -> bool:
        """SIGTERM: it cancels its job, flushes, closes and ends. True when it has ended within qsd.stop_timeout."""
        if self.alive:
            self._watch.signal(signal.SIGTERM)
            if not await self._watch.wait(self._settings.stop_timeout):
                return False
        await self.detach()
        return True

    async def kill(self) -> None:
        """SIGKILL. What it had not written is lost; only for a daemon that serves nobody but a job."""
        self._watch.signal(signal.SIGKILL)
        if await self._watch.wait(self._settings.stop_timeout):
            await self.detach()

    async def detach(self) -> None:
        """Let go of the process, running or not."""
        if self._monitor is not None:
            await self._monitor.close()
            self._monitor = None
        self._watch.close()

    def _last_words(self) -> str:
        try:
            lines = self.places.log.read_text(errors="replace")[-2000:].strip().splitlines()
        except OSError:
            lines = []
        return "".join(f": {word}" for word in (self._watch.how, lines[-1] if lines else None) if word)

    # What the kernel says

    def sockets(self) -> set[int]:
        """The inode numbers of its sockets. Blocking."""
        return proc.sockets(self.pid)

    def open_modes(self, files: Collection[FileId]) -> dict[FileId, bool]:
        """Which of `files` it has open for data, and whether for writing. Blocking."""
        return proc.open_modes(self.pid, files)


def is_ours(pid: int, daemon_id: str) -> bool:
    """Whether the process says on its command line that it is this daemon."""
    return any(f"id={CHARDEV}{daemon_id}," in word for word in command_line(pid))


def find_ours() -> dict[str, int]:
    """Every storage daemon on this host that some hostagent started: id → pid."""
    found = {}
    for entry in proc.entries(Path("/proc")):
        if entry.isdigit():
            for word in command_line(int(entry)):
                if word.startswith(f"socket,id={CHARDEV}"):
                    found[word.removeprefix(f"socket,id={CHARDEV}").partition(",")[0]] = int(entry)
    return found


@contextlib.contextmanager
def _listener(path: Path, backlog: int) -> Any:
    """A listening unix socket at `path`; a stale file there is ours and is replaced."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            os.fchmod(listener.fileno(), 0o600)  # Linux makes the name with it
            listener.bind(str(path))
        except OSError as error:
            raise JobError(
                "unavailable",
                f"cannot listen on {str(path)!r}: {error}",
                remedy="choose a shorter --runtime-dir (socket names have 107 bytes), writable for the agent",
            ) from error
        listener.setblocking(False)  # a QEMU thread that comes second to accept() must not wait in it for ever
        listener.listen(backlog)
        yield listener
