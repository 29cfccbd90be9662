"""A qemu-storage-daemon of our own, which knows qcow2: it serves the local image over NBD, to us alone.

It is given the files as descriptors (`/proc/self/fd/N`) and opens no path, it has every format said, and its socket has
no name: only who has a descriptor of it connects. It ends when we end: by SIGTERM from the kernel (PR_SET_PDEATHSIG),
upon which it closes what it has open. Where we are root it runs as another user, who must be able to open the files.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from hostagent.client.layers import Layer, Layers
from hostagent.client.monitor import Monitor
from hostagent.client.options import Storage
from hostagent.errors import AgentError
from hostagent.nbdclient.dial import Server, Waits

EXPORT = "image"
CONNECTIONS = 64
JOB_POLL = 0.01  # seconds
_IF_STILL_OURS = '[ "$PPID" = "$1" ] || exit 1; shift; exec "$@"'
"""Who is told of our end, and looks afterwards whether we are still there, misses no moment."""


class StorageDaemon:
    """A context manager: started with it, and ended with it. It lives no longer than the thread that started it."""

    def __init__(self, options: Storage, descriptors: Sequence[int]) -> None:
        self._options = options
        self._descriptors = tuple(descriptors)
        self._door = -1
        """A descriptor of its socket."""
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: Monitor | None = None

    @property
    def server(self) -> Server:
        return Server(EXPORT, f"/proc/self/fd/{self._door}")

    @property
    def waits(self) -> Waits:
        answer = self._options.answer_timeout
        return Waits(self._options.start_timeout, answer, "storage.start_timeout", "storage.answer_timeout")

    def __enter__(self) -> StorageDaemon:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """What it has not written yet is written: SIGKILL comes only when it takes too long."""
        if self._monitor is not None:
            self._monitor.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(self._options.stop_timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._door >= 0:
            os.close(self._door)
            self._door = -1

    def end(self) -> None:
        """As at the end of the context; AgentError when it did not end well, so that it may not have written all."""
        self.__exit__()
        if self._process is not None and self._process.returncode:
            message = f"the storage daemon ended with status {self._process.returncode}: the image may not be whole"
            raise AgentError("unproven", message, remedy="see the host's log, then run the same again")

    # Images

    def open(self, layers: Layers, *, writable: bool = False) -> None:
        """Serve the chain; its top `writable`."""
        self._serve(self._chain(layers.all, writable=writable), writable=writable)

    def create(self, fd: int, size: int, below: Layers | None) -> None:
        """Make the empty file a qcow2 image of `size` bytes, on the chain `below` or on nothing."""
        monitor = self._asked()
        monitor.execute("blockdev-add", **_file("new", fd, device=False, writable=True))
        image: dict[str, Any] = {"driver": "qcow2", "file": "new", "size": size}
        if below is not None:
            image |= {"backing-file": below.top.path, "backing-fmt": below.top.format}
        monitor.execute("blockdev-create", job_id="create", options=image)
        self._job("create")
        monitor.execute("blockdev-del", node_name="new")

    def open_new(self, fd: int, below: Layers | None) -> None:
        """Serve that image, to be written."""
        backing = self._chain(below.all, writable=False) if below is not None else None
        self._add(_file("new", fd, device=False, writable=True))
        node = {"driver": "qcow2", "node-name": "image", "file": "new", "backing": backing}
        self._add({**node, "discard": "unmap", "detect-zeroes": "unmap"})
        self._serve("image", writable=True)

    def _chain(self, layers: Sequence[Layer], *, writable: bool) -> str:
        below: str | None = None
        for number, layer in reversed(list(enumerate(layers))):
            write = writable and number == 0
            self._add(_file(f"file{number}", layer.fd, device=layer.device, writable=write))
            node: dict[str, Any] = {"driver": layer.format, "node-name": f"layer{number}", "file": f"file{number}"}
            if layer.format == "qcow2":
                node |= {"backing": below}
            self._add({**node, "read-only": not write}, layer)
            below = f"layer{number}"
        return "layer0"

    def _add(self, node: dict[str, Any], layer: Layer | None = None) -> None:
        try:
            self._asked().execute("blockdev-add", **node)
        except AgentError as error:
            if error.code != "denied" or not self._options.user:
                raise
            path = shlex.quote(layer.path if layer else "FILE")
            user = self._options.user
            remedy = f"setfacl -m u:{user}:r {path}, or name another user with --storage-user"
            raise AgentError(error.code, f"{error.message} (as {user})", remedy=remedy) from error

    def _serve(self, node: str, *, writable: bool) -> None:
        name = {"name": EXPORT, "writable": writable, "allocation-depth": True}
        self._asked().execute("block-export-add", id="export", type="nbd", node_name=node, **name)

    def _job(self, name: str) -> None:
        deadline = time.monotonic() + self._options.answer_timeout
        while True:
            job = next((one for one in self._asked().execute("query-jobs") if one["id"] == name), None)
            if job is None or job["status"] == "concluded":
                break
            if time.monotonic() > deadline:
                raise AgentError("timeout", "the storage daemon does not make the new image")
            time.sleep(JOB_POLL)
        if job is not None:
            self._asked().execute("job-dismiss", id=name)
            if job.get("error"):
                raise AgentError("io_error", f"the new image could not be made: {job['error']}")

    # The process

    def _asked(self) -> Monitor:
        assert self._monitor is not None
        return self._monitor

    def _start(self) -> None:
        for program in (self._options.binary, "setpriv"):
            if shutil.which(program) is None:
                remedy = "install qemu-system-common (Debian), or name it with --storage-daemon"
                raise AgentError("unavailable", f"{program!r} is not installed", remedy=remedy)
        ours, theirs = socket.socketpair()
        with theirs, _listener() as (listener, self._door):
            try:
                self._process = self._launched(theirs.fileno(), listener.fileno())
            except BaseException:
                ours.close()
                raise
        self._monitor = Monitor(ours, self._options.answer_timeout)
        self._monitor.greet(self._options.start_timeout)

    def _launched(self, monitor: int, listener: int) -> subprocess.Popen[bytes]:
        daemon = [
            self._options.binary,
            *("--chardev", f"socket,id=monitor,fd={monitor},server=off", "--monitor", "chardev=monitor"),
            *("--nbd-server", f"addr.type=fd,addr.str={listener},max-connections={CONNECTIONS}"),
        ]
        guard = ["sh", "-c", _IF_STILL_OURS, "sh", str(os.getpid())]
        process = subprocess.Popen(
            ["setpriv", *self._user(), "--pdeathsig", "TERM", "--no-new-privs", "--", *guard, *daemon],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(monitor, listener, *self._descriptors),
            start_new_session=True,  # Ctrl-C is ours to hear
            cwd="/",
        )
        with contextlib.suppress(OSError):
            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        return process

    def _user(self) -> list[str]:
        if os.geteuid() != 0 or self._options.user in ("", "root"):
            return []
        found = account(self._options.user)
        groups = os.getgrouplist(found.pw_name, found.pw_gid)
        return [
            f"--reuid={found.pw_uid}",
            f"--regid={found.pw_gid}",
            f"--groups={','.join(map(str, groups))}",
            "--bounding-set=-all",
        ]


def account(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name)
    except KeyError as error:
        message = f"the user {name!r}, as which the storage daemon runs, does not exist"
        remedy = "install the hypervisor's packages, or name another one with --storage-user"
        raise AgentError("unavailable", message, field="storage_user", remedy=remedy) from error


def _file(name: str, fd: int, *, device: bool, writable: bool) -> dict[str, Any]:
    driver = "host_device" if device else "file"
    place = {"driver": driver, "node-name": name, "filename": f"/proc/self/fd/{fd}"}
    return {**place, "read-only": not writable, "discard": "unmap"}


@contextlib.contextmanager
def _listener() -> Iterator[tuple[socket.socket, int]]:
    """A listening unix socket without a name, and a descriptor by which it can be connected to (proc(5), fd)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with tempfile.TemporaryDirectory(prefix="hostagent-client-") as home:
            folder = os.open(home, os.O_PATH | os.O_CLOEXEC)  # TMPDIR may be longer than a socket's name
            try:
                listener.bind(f"/proc/self/fd/{folder}/nbd")
                door = os.open("nbd", os.O_PATH | os.O_CLOEXEC, dir_fd=folder)
            finally:
                os.close(folder)
        listener.setblocking(False)
        listener.listen(CONNECTIONS)
        yield listener, door
