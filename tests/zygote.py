"""Processes of ours for tests, without their start: one process that has imported everything, and forks.

Most of the processor time of the tests went into imports of agents. What comes out of here is a process of its own, in
its own session, that is killed, waited for and looked at in /proc like any other; only its command line is this
module's. Figures are measured on agents that begin as users' do (tests/bench does not use this).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_REAP = 0.02  # seconds between two looks for children that ended
_MESSAGE = 1 << 16


class Spawned:
    """As subprocess.Popen, as far as tests use it."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._zygote = zygote

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.status_of(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("hostagent", timeout or 0)
            time.sleep(_REAP / 2)
        return status

    def send_signal(self, number: int) -> None:
        """Its pid is its own until its end was heard of, for only the zygote reaps it and then says so."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """For one process of tests; it ends with that one."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.zygote", str(theirs.fileno())]
            root = Path(__file__).parents[1]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=root, start_new_session=True)
        self._sock = ours
        self._began_with = _of_the_start(os.environ)
        self._lock = threading.Lock()
        self._ended: dict[int, int] = {}

    def began_like(self, environment: Mapping[str, str]) -> bool:
        """Whether a process of this environment would have begun as this one has: what a loader or an interpreter takes
        from it counts at the start alone."""
        return _of_the_start(environment) == self._began_with

    def spawn(self, arguments: Sequence[str], *, environment: Mapping[str, str], log: Path) -> Spawned:
        """`hostagent ARGUMENTS`, with all it says appended to `log`."""
        log.touch()  # readers need not wait for the child to come so far
        with self._lock:
            order = {"arguments": list(arguments), "environment": dict(environment), "log": str(log)}
            self._sock.sendall(json.dumps(order).encode())
            while "began" not in (told := self._told()):
                pass
            return Spawned(self, told["began"])

    def status_of(self, pid: int) -> int | None:
        with self._lock:
            while pid not in self._ended and select.select([self._sock], [], [], 0)[0]:
                self._told()
            return self._ended.get(pid)

    def _told(self) -> dict[str, Any]:
        message = self._sock.recv(_MESSAGE)
        if not message:
            raise AssertionError("the tests' zygote ended")
        told: dict[str, Any] = json.loads(message)
        if "ended" in told:
            self._ended[told["ended"]] = told["status"]
        else:
            self._ended.pop(told["began"], None)  # of another process that had this pid before
        return told


def _of_the_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(("PYTHON", "LD_", "MALLOC_"))}


def main(sock: socket.socket) -> None:
    """Forks until nobody asks any more. A child's status is what Popen calls it: below 0 the signal."""
    import hostagent.cli.main
    import hostagent.daemon
    import hostagent.data.daemon  # noqa: F401

    gc.freeze()  # so that a child's collector does not copy what it shares with us
    children: set[int] = set()
    while True:
        ready, _, _ = select.select([sock], [], [], _REAP if children else None)
        if ready:
            message = sock.recv(_MESSAGE)
            if not message:
                return
            order = json.loads(message)
            pid = os.fork()
            if pid == 0:
                sock.close()
                _become(order)
            children.add(pid)
            sock.sendall(json.dumps({"began": pid}).encode())
        for pid in list(children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                children.discard(pid)
                sock.sendall(json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}).encode())


def _become(order: dict[str, Any]) -> NoReturn:
    status = 1
    try:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for fd, there in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(fd, there)
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv = ["hostagent", *order["arguments"]]
        from hostagent.cli.main import main as hostagent

        status = hostagent(order["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
