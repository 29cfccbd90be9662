"""qemu-img, run as an unprivileged user and under limits: the only place where an image's tables are walked.

The image reaches it as an inherited O_PATH descriptor, opened through /proc/self/fd: so the folders above need not let
that user in, while the file's own permissions count (the caller gives the grant first), and no path is looked up again.
The image is named by a `json:` description with `backing: null`, so nothing that its header names is opened.

QEMU's image locks stay on: an image that somebody writes is `busy`, not checked against tables that move. Our own
leases are read locks and do not stand in the way. CPU time and memory are bounded by prlimit(1), the wait by a timeout
and a kill, the output by a cut; a child that is killed has nothing to lose, for it only reads.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from dataclasses import dataclass
from typing import Any

from hostagent.images.chain import OpenChain
from jobs.errors import JobError
from jobs.model import Layer

_CLEAN, _CORRUPT, _LEAKS, _NOT_SUPPORTED = 0, 2, 3, 63  # exit statuses in qemu-img(1)
_SKIP = "or say --check never"


@dataclass(frozen=True, slots=True)
class RunAs:
    """The user that a child process runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @property
    def options(self) -> list[str]:
        """For setpriv(1)."""
        groups = f"--groups={','.join(map(str, self.groups))}" if self.groups else "--clear-groups"
        return [f"--reuid={self.uid}", f"--regid={self.gid}", groups]


@dataclass(frozen=True, slots=True)
class ToolLimits:
    """Bounds of one run; images.check_timeout, images.tool_cpu and images.tool_memory in the configuration.

    The check keeps two bytes for each cluster: 1 GiB is enough for 16 TiB in clusters of 64 KiB.
    """

    timeout: float = 300.0
    cpu: int = 300
    memory: int = 1 << 30
    output: int = 1 << 20
    reap_timeout: float = 5.0


@dataclass(frozen=True, slots=True)
class CheckResult:
    """An image without corruption. `supported` is False for raw, which has nothing to check."""

    path: str
    leaks: int = 0
    supported: bool = True
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class _Finished:
    status: int
    stdout: bytes
    stderr: bytes


class QemuImg:
    """Runs qemu-img as `user`; None is the user that we are."""

    def __init__(self, *, user: RunAs | None, limits: ToolLimits, binary: str = "qemu-img") -> None:
        self._user = user
        self._limits = limits
        self._binary = binary

    async def check(self, opened: OpenChain, *, layer: int = 0) -> CheckResult:
        """Check one layer, alone. Leaked clusters are a warning; corruption is `image_corrupt`."""
        image = opened.chain.layers[layer]
        if image.format == "raw":
            return CheckResult(image.path, supported=False)
        handle = os.open(f"/proc/self/fd/{opened.fds[layer]}", os.O_PATH | os.O_CLOEXEC)
        try:
            finished = await self._run(["check", "--output=json", _alone(image, handle)], handle, image)
        finally:
            os.close(handle)
        return self._judge(finished, image, f"/proc/self/fd/{handle}")

    async def _run(self, arguments: list[str], handle: int, image: Layer) -> _Finished:
        process = await self._spawn(arguments, handle)
        try:
            async with asyncio.timeout(self._limits.timeout):
                return await self._finish(process)
        except TimeoutError:
            raise JobError(
                "timeout",
                f"the check of {image.path} took longer than images.check_timeout ({self._limits.timeout:g} s)",
                remedy=f"raise images.check_timeout, {_SKIP}",
                value=image.path,
            ) from None
        finally:
            await self._end(process)

    async def _spawn(self, arguments: list[str], handle: int) -> asyncio.subprocess.Process:
        limits = [f"--cpu={self._limits.cpu}", f"--as={self._limits.memory}", "--core=0"]
        command = [_found("prlimit", "util-linux"), *limits, "--", _found(self._binary, "qemu-utils"), *arguments]
        user = self._user
        if user is not None:  # setpriv(1), not Popen's `user=`: that forks, which stops the agent for milliseconds
            command = [_found("setpriv", "util-linux"), *user.options, "--", *command]
        try:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(handle,),
                cwd="/",
                env={"PATH": os.defpath, "LC_ALL": "C"},  # messages are read below, so not in the host's language
                start_new_session=True,
            )
        except OSError as error:
            remedy = "run the agent as root, or with its own user for the storage daemons"
            message = f"{self._binary} cannot be started as {user or 'this user'}: {error.strerror}"
            raise JobError("unavailable", message, remedy=remedy) from error

    async def _finish(self, process: asyncio.subprocess.Process) -> _Finished:
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.TaskGroup() as readers:
            stdout = readers.create_task(_read(process.stdout, self._limits.output))
            stderr = readers.create_task(_read(process.stderr, self._limits.output))
        return _Finished(await process.wait(), stdout.result(), stderr.result())

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Kill what still runs. A child stuck in the kernel (a dead NFS server) is left to be reaped when it can."""
        if process.returncode is None:
            process.kill()
            try:
                await asyncio.wait_for(process.wait(), self._limits.reap_timeout)
            except TimeoutError:
                return

    def _judge(self, finished: _Finished, image: Layer, handle: str) -> CheckResult:
        if finished.status == _NOT_SUPPORTED:
            return CheckResult(image.path, supported=False)
        if finished.status < 0:
            raise self._killed(finished.status, image)
        said = finished.stderr.decode("utf-8", "backslashreplace").strip().replace(handle, image.path)
        report = _report(finished.stdout)
        if finished.status == _CORRUPT:
            count = report.get("corruptions", "some")
            remedy = f"restore it from a copy, or try qemu-img check -r all on one; {_SKIP} at your own risk"
            raise JobError("image_corrupt", f"{image.path} has {count} corruptions", remedy=remedy, value=image.path)
        if finished.status == _LEAKS:
            leaks = int(report.get("leaks", 0))
            return CheckResult(image.path, leaks=leaks, warning=f"{image.path} has {leaks} leaked clusters (harmless)")
        if finished.status != _CLEAN:
            raise _failed(image, said)
        return CheckResult(image.path)

    def _killed(self, status: int, image: Layer) -> JobError:
        name = signal.Signals(-status).name
        message = f"the check of {image.path} was ended by {name}: it needs more than its limits, or it crashed"
        remedy = f"raise images.tool_cpu ({self._limits.cpu} s) or images.tool_memory ({self._limits.memory}), {_SKIP}"
        return JobError("limit", message, remedy=remedy, value=image.path)


def _alone(image: Layer, handle: int) -> str:
    """The image as QEMU's options: the inherited descriptor, the known format, and no backing file."""
    file = {"driver": "file", "filename": f"/proc/self/fd/{handle}"}
    return "json:" + json.dumps({"driver": image.format, "read-only": True, "backing": None, "file": file})


def _found(program: str, package: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise JobError("unavailable", f"{program} is not installed", remedy=f"install {package}")
    return path


async def _read(stream: asyncio.StreamReader, limit: int) -> bytes:
    """The first `limit` bytes of a stream; the rest is read and dropped, so that its writer never blocks."""
    kept = bytearray()
    while chunk := await stream.read(65536):
        kept += chunk[: limit - len(kept)]
    return bytes(kept)


def _report(stdout: bytes) -> dict[str, Any]:
    try:
        report = json.loads(stdout)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def _failed(image: Layer, said: str) -> JobError:
    """The check did not come to an end; find out why from what it said."""
    last = said.splitlines()[-1][:500] if said else "qemu-img gave no reason"
    for words, code, remedy in _REASONS:
        if words in said:
            return JobError(code, f"{image.path} cannot be checked: {last}", remedy=remedy, value=image.path)
    message = f"{image.path} cannot be checked: {last}"
    return JobError("image_invalid", message, remedy="restore it from a copy", value=image.path)


_REASONS = (
    ("setpriv: ", "unavailable", "run the agent as root, or with its own user for the storage daemons"),
    ("prlimit: ", "unavailable", "lower images.tool_cpu and images.tool_memory to what the agent itself may use"),
    ('Failed to get "', "busy", "end the program that has it open for writing"),
    ('Failed to get shared "', "busy", "end the program that has it open for writing"),
    ("Permission denied", "denied", "let the storage daemon's user read the file"),
    ("Input/output error", "io_error", "see the kernel's log for the storage below it"),
    ("Cannot allocate memory", "limit", f"raise images.tool_memory, {_SKIP}"),
)
