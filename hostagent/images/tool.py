"""A program of QEMU's, run as an unprivileged user and under limits, with images as inherited descriptors.

An image reaches it as an O_PATH descriptor, opened through /proc/self/fd: so the folders above need not let that user
in, while the file's own permissions count (the caller gives the grant first), and no path is looked up again.

CPU time and memory are bounded by prlimit(1), the output by a cut, the wait by a timeout. One that only reads is killed
then, for it has nothing to lose. One that writes is not: it goes on, until it ends or its processor time is up.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import re
import shlex
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from jobs.errors import JobError


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


_DESCRIBED = re.compile(r"'json:\{.*?\}'", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Finished:
    """A negative status is the signal that ended it. `uid` is that of the user it ran as, None for ourselves."""

    status: int
    stdout: bytes
    stderr: bytes
    uid: int | None = None

    @property
    def said(self) -> str:
        """For people: QEMU repeats the whole description by which it was to open an image."""
        return _DESCRIBED.sub("it", self.stderr.decode("utf-8", "backslashreplace").strip())


class Tool:
    """Runs `binary` as `user`; None is the user that we are."""

    def __init__(self, *, user: RunAs | None, limits: ToolLimits, binary: str) -> None:
        self._user = user
        self._binary = binary
        self.limits = limits

    async def read(self, arguments: Sequence[str], handles: Sequence[int]) -> Finished:
        """A run that only reads: killed when it takes too long (a TimeoutError), or when nobody waits for it."""
        process = await self._spawn(arguments, handles)
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await self._finish(process)
        finally:
            await self._kill(process)

    async def write(self, arguments: Sequence[str], handles: Sequence[int]) -> Finished:
        """A run that writes: nothing but its own limits ends it. Run it in a task of its own."""
        return await self._finish(await self._spawn(arguments, handles))

    async def _spawn(self, arguments: Sequence[str], handles: Sequence[int]) -> asyncio.subprocess.Process:
        limits = [f"--cpu={self.limits.cpu}", f"--as={self.limits.memory}", "--core=0"]
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
                pass_fds=handles,
                cwd="/",
                env={"PATH": os.defpath, "LC_ALL": "C"},  # messages are read, so not in the host's language
                start_new_session=True,
            )
        except OSError as error:
            remedy = "run the agent as root, or with its own user for the storage daemons"
            message = f"{self._binary} cannot be started as {user or 'this user'}: {error.strerror}"
            raise JobError("unavailable", message, remedy=remedy) from error

    async def _finish(self, process: asyncio.subprocess.Process) -> Finished:
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.TaskGroup() as readers:
            stdout = readers.create_task(_read(process.stdout, self.limits.output))
            stderr = readers.create_task(_read(process.stderr, self.limits.output))
        uid = self._user.uid if self._user else None
        return Finished(await process.wait(), stdout.result(), stderr.result(), uid)

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        """Kill what still runs. A child stuck in the kernel (a dead NFS server) is left to be reaped when it can."""
        if process.returncode is None:
            process.kill()
            try:
                await asyncio.wait_for(process.wait(), self.limits.reap_timeout)
            except TimeoutError:
                return


@contextmanager
def grasped(*fds: int) -> Iterator[list[int]]:
    """O_PATH descriptors of the same files, to inherit."""
    handles: list[int] = []
    try:
        for fd in fds:
            handles.append(os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC))
        yield handles
    finally:
        for handle in handles:
            os.close(handle)


def alone(format: str, handle: int, *, writable: bool = False) -> str:
    """An image as QEMU's options: the inherited descriptor, the known format, and no backing file."""
    driver = "host_device" if stat.S_ISBLK(os.fstat(handle).st_mode) else "file"
    file = {"driver": driver, "filename": f"/proc/self/fd/{handle}"}
    return "json:" + json.dumps({"driver": format, "read-only": not writable, "backing": None, "file": file})


def reason(finished: Finished, *paths: str, access: str = "r") -> tuple[str, str] | None:
    """The code and the remedy for what a tool said on stderr when it failed over these images, which it must open for
    `access`; None for what is not known."""
    said = finished.said
    if "Permission denied" in said:
        return "denied", _let(finished.uid, access, shlex.join(paths))
    return next(((code, remedy) for words, code, remedy in _REASONS if words in said), None)


_REASONS = (
    ("setpriv: ", "unavailable", "run the agent as root, or with its own user for the storage daemons"),
    ("prlimit: ", "unavailable", "lower images.tool_cpu and images.tool_memory to what the agent itself may use"),
    ('Failed to get "', "busy", "end the job, export or program that has it open (`hostagent status`)"),
    (
        'Failed to get shared "',
        "busy",
        "end the job, export or program that has it open for writing (`hostagent status`)",
    ),
    ("Input/output error", "io_error", "see the kernel's log for the storage below it"),
    ("No space left", "no_space", "make space beside the image"),
    ("Cannot allocate memory", "limit", "raise images.tool_memory"),
)


def _let(uid: int | None, access: str, files: str) -> str:
    """How the user that it ran as may open them; the folders above need not let him in."""
    verb = "read" if access == "r" else "write"
    if uid is None:
        return f"run it as somebody who may {verb} {files}"
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    give = f"let that user {verb} for the time (`setfacl -m u:{user}:{access} {files}`)"
    take = f"unless a grant stands (`hostagent grant list`), `setfacl -x u:{user} {files}`"
    return f"it runs as {user}, for root too: {give}, and afterwards, {take}"


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
