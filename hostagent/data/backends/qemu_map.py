"""qemu-img map of layers that are open: an untrusted reader of untrusted tables, so in a process of its own, under
limits of time, memory and output, and without a name to follow."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hostagent.data.backends.lists import OBJECT_MOST, READ, objects
from hostagent.data.backends.mapping import Unmappable

_TICK_MS = 50
_REAP = 5.0


@dataclass(frozen=True, slots=True)
class MapLimits:
    """`timeout` (data.map_timeout) in seconds, `extents` (data.map_extents), `cpu` in seconds, `memory` in bytes;
    `hold`: seconds for which locks are held in one go, before what still runs goes on by NBD."""

    timeout: float = 30.0
    extents: int = 1_000_000
    cpu: int = 60
    memory: int = 1 << 30
    hold: float = 600.0
    qemu_img: str = "qemu-img"


def entries(
    described: Callable[[Sequence[int]], str], fds: Sequence[int], limits: MapLimits, check: Callable[[], None]
) -> Iterator[Mapping[str, Any]]:
    """What it says, as it says it. `described` gives the image as QEMU's options, for descriptors in the child. `check`
    raises when nobody waits any more. Unmappable when it fails."""
    with contextlib.ExitStack() as stack:
        try:
            process = _started(stack, described, fds, limits)
        except OSError as error:  # no descriptor left, no memory, no process: NBD may still do
            raise Unmappable(f"qemu-img map cannot be started: {error.strerror}", lasting=False) from error
        yield from parsed(_output(process, limits, check))


def _started(
    stack: contextlib.ExitStack, described: Callable[[Sequence[int]], str], fds: Sequence[int], limits: MapLimits
) -> subprocess.Popen[bytes]:
    """What it has open and runs ends with `stack`."""
    handles = []
    for fd in fds:
        # O_PATH: what a child inherits would keep our locks until its end.
        handles.append(os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC))
        stack.callback(os.close, handles[-1])
    bounds = [f"--cpu={limits.cpu}", f"--as={limits.memory}", "--core=0"]
    command = [_found("prlimit"), *bounds, "--", _found(limits.qemu_img)]
    command += ["map", "--output=json", "--", described(handles)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=handles,
        cwd="/",
        env={"PATH": os.defpath, "LC_ALL": "C"},
        start_new_session=True,
    )
    stack.callback(_end, process)
    return process


def parsed(blocks: Iterator[bytes]) -> Iterator[Mapping[str, Any]]:
    """Its JSON. Unmappable when it is none."""
    try:
        yield from objects(blocks)
    except ValueError as error:
        raise Unmappable(f"its map cannot be read: {error}") from error


def _output(process: subprocess.Popen[bytes], limits: MapLimits, check: Callable[[], None]) -> Iterator[bytes]:
    assert process.stdout is not None
    assert process.stderr is not None
    out, errors = process.stdout.fileno(), process.stderr.fileno()
    deadline, most, said = time.monotonic() + limits.timeout, limits.extents * OBJECT_MOST, b""
    poll = select.poll()
    waiting = {out, errors}
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting:
        check()
        if time.monotonic() > deadline:
            raise Unmappable(f"its map took longer than {limits.timeout:g} s (data.map_timeout)")
        for fd, _ in poll.poll(_TICK_MS):
            block = os.read(fd, READ)
            if not block:
                poll.unregister(fd)
                waiting.discard(fd)
            elif fd == errors:
                said = (said + block)[-4096:]
            else:
                most -= len(block)
                if most < 0:
                    raise Unmappable(f"its map is longer than {limits.extents} extents (data.map_extents)")
                yield block
    try:
        status = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise Unmappable("qemu-img map does not end") from None
    if status != 0:
        last = said.decode("utf-8", "backslashreplace").strip().splitlines()[-1:] or [f"status {status}"]
        raise Unmappable(f"qemu-img map failed: {last[0][-300:]}", lasting=False)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that is stuck in the kernel is reaped when it can be
        process.wait(_REAP)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise Unmappable(f"{program} is not installed")
    return path
