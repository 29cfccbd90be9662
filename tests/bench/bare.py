"""The peers: the same work by QEMU's own programs, with nothing around it.

A storage daemon that is driven by a QMP script of a few lines, and qemu-nbd. Both are started before the clock where
starting is not what is measured, and are ended by their own process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WAIT = 60.0  # seconds for any answer; the longest job here takes a few


class Qmp:
    """A monitor, blocking: one command, one answer; events are kept until they are asked for."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._socket.settimeout(WAIT)
        self._lines = self._socket.makefile("rb")
        self._events: list[dict[str, Any]] = []
        self._receive()  # the greeting
        self.call("qmp_capabilities")

    def call(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = self._receive()
            if "error" in message:
                raise AssertionError(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
            self._events.append(message)

    def until(self, name: str, **data: Any) -> dict[str, Any]:
        """The next event of that name whose data has these values."""
        while True:
            event = self._events.pop(0) if self._events else self._receive()
            found: dict[str, Any] = event.get("data", {})
            if event.get("event") == name and data.items() <= found.items():
                return found

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def _receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise AssertionError("the storage daemon closed its monitor")
        message: dict[str, Any] = json.loads(line)
        return message


def stream(overlay: Path, base: Path, *, speed: int, flush: bool) -> float:
    """Seconds from the block-stream command to BLOCK_JOB_COMPLETED.

    `flush`: as the agent does it, everything that was copied is made durable before the header forgets the base.
    """
    top = [_node("f0", "file", filename=str(overlay)), _node("l0", "qcow2", file="f0", backing="l1")]
    below = [_node("f1", "file", filename=str(base)), _node("l1", "raw", file="f1")]
    with _storage_daemon([*({**node, "read-only": True} for node in below), *top]) as monitor:
        began = time.perf_counter()
        options = {"job-id": "pull", "device": "l0", "speed": speed, "auto-finalize": not flush}
        monitor.call("block-stream", **options)
        if flush:
            monitor.until("JOB_STATUS_CHANGE", id="pull", status="pending")
            monitor.call("blockdev-reopen", options=top)
            monitor.call("job-finalize", id="pull")
        ended = monitor.until("BLOCK_JOB_COMPLETED", device="pull")
        seconds = time.perf_counter() - began
    if "error" in ended:
        raise AssertionError(f"block-stream: {ended['error']}")
    return seconds


def mirror(source: Path, target: Path, *, size: int, speed: int) -> float:
    """Seconds from the making of the target to its last flush: a raw image, copied into a new qcow2 image."""
    target.touch()
    nodes = [
        _node("f0", "file", filename=str(source), **{"read-only": True}),
        _node("l0", "raw", file="f0", **{"read-only": True}),
        _node("ft", "file", filename=str(target)),
    ]
    with _storage_daemon(nodes) as monitor:
        began = time.perf_counter()
        monitor.call(
            "blockdev-create", **{"job-id": "create", "options": {"driver": "qcow2", "file": "ft", "size": size}}
        )
        monitor.until("JOB_STATUS_CHANGE", id="create", status="concluded")
        lt = _node("lt", "qcow2", file="ft")
        monitor.call("blockdev-add", **lt)
        options = {"job-id": "copy", "device": "l0", "target": "lt", "sync": "full", "speed": speed}
        monitor.call("blockdev-mirror", **options)
        monitor.until("BLOCK_JOB_READY", device="copy")
        monitor.call("block-job-cancel", device="copy")
        ended = monitor.until("BLOCK_JOB_COMPLETED", device="copy")
        monitor.call("blockdev-reopen", options=[lt])
        _sync(target)
        seconds = time.perf_counter() - began
    if "error" in ended:
        raise AssertionError(f"blockdev-mirror: {ended['error']}")
    return seconds


def commit(overlay: Path, base: Path, *, speed: int) -> float:
    """Seconds of an active block-commit into a raw base, to its last flush."""
    l1 = _node("l1", "raw", file="f1")
    nodes = [_node("f1", "file", filename=str(base)), l1]
    nodes += [_node("f0", "file", filename=str(overlay)), _node("l0", "qcow2", file="f0", backing="l1")]
    with _storage_daemon(nodes) as monitor:
        began = time.perf_counter()
        monitor.call("block-commit", **{"job-id": "commit", "device": "l0", "base-node": "l1", "speed": speed})
        monitor.until("BLOCK_JOB_READY", device="commit")
        monitor.call("block-job-complete", device="commit")
        ended = monitor.until("BLOCK_JOB_COMPLETED", device="commit")
        monitor.call("blockdev-reopen", options=[l1])
        _sync(base)
        seconds = time.perf_counter() - began
    if "error" in ended:
        raise AssertionError(f"block-commit: {ended['error']}")
    return seconds


def convert(source: Path, target: Path, *, speed: int) -> float:
    """Seconds of `qemu-img convert` of a raw image into a new qcow2 image, and its last flush."""
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-r", str(speed), str(source), str(target)]
    began = time.perf_counter()
    subprocess.run(command, check=True, timeout=WAIT)
    _sync(target)
    return time.perf_counter() - began


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _node(name: str, driver: str, **options: Any) -> dict[str, Any]:
    return {"node-name": name, "driver": driver, **options}


@contextlib.contextmanager
def _storage_daemon(nodes: list[dict[str, Any]]) -> Iterator[Qmp]:
    """With a monitor that is connected: one that listens may never answer who comes as it starts (QEMU 7.2, 2 of 100)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    chardev = f"socket,id=m,fd={theirs.fileno()},server=off"
    command = ["qemu-storage-daemon", "--chardev", chardev, "--monitor", "m"]
    with theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
    try:
        with contextlib.closing(Qmp(ours)) as monitor:
            for node in nodes:
                monitor.call("blockdev-add", **node)
            yield monitor
    finally:
        process.terminate()
        _reap(process)


def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(WAIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def nbd_server(image: Path, socket_path: Path) -> Iterator[None]:
    """`qemu-nbd --fork`: it returns when clients may connect. Ended when the block ends."""
    pid_file = socket_path.with_suffix(".pid")
    command = ["qemu-nbd", "--fork", "--persistent", "--read-only", "--format=qcow2"]
    command += [f"--socket={socket_path}", f"--pid-file={pid_file}", str(image)]
    # No pipe for its output: the child that stays would hold it open.
    subprocess.run(command, check=True, timeout=WAIT, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        _end(int(pid_file.read_text()))


def _end(pid: int) -> None:
    """SIGTERM to a process that is not our child, and wait until it is gone."""
    watch = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(watch, signal.SIGTERM)
        select.select([watch], [], [], WAIT)  # a pidfd is readable when its process has ended, reaped or not
    finally:
        os.close(watch)
