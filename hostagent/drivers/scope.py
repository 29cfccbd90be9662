"""A unit of its own for each storage daemon, where the agent is a unit itself: `systemctl status` shows it, its
resources are counted and bounded by `hostagent-qsd.slice`, and a stop of the agent finds nothing that is not its own.

A scope takes in a process that runs already (org.freedesktop.systemd1(5), StartTransientUnit with PIDs=), so a start
waits for none of this. Where the bus is away the daemon stays in the agent's own cgroup, and KillMode=process leaves it
alone there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path

log = logging.getLogger(__name__)

BOOTED = Path("/run/systemd/system")
"""There where systemd is the service manager (sd_booted(3))."""
SLICE = "hostagent-qsd.slice"
TIMEOUT = 10.0
"""Seconds for systemd's answer."""


def wanted() -> bool:
    """Whether this agent is a unit of the system's manager."""
    return os.geteuid() == 0 and "INVOCATION_ID" in os.environ and BOOTED.is_dir()


async def take_in(pid: int, name: str, what: str) -> None:
    """Move a process into the scope `NAME.scope`; `what` it is, for people. What goes wrong is logged."""
    properties = {
        "Description": ("s", what),
        "Slice": ("s", SLICE),
        "CollectMode": ("s", "inactive-or-failed"),
        "PIDs": ("au", "1", str(pid)),
    }
    words = [word for key, value in properties.items() for word in (key, *value)]
    command = [
        *("busctl", "--system", "--quiet", f"--timeout={TIMEOUT:g}", "call"),
        *("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"),
        *("StartTransientUnit", "ssa(sv)a(sa(sv))", f"{name}.scope", "fail", str(len(properties)), *words, "0"),
    ]
    said = await _run(command)
    if said is not None:
        log.warning("a storage daemon has no unit of its own", extra={"fields": {"pid": pid, "reason": said}})


async def _run(command: list[str]) -> str | None:
    """Why it failed."""
    pipe = asyncio.subprocess.PIPE
    try:
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL, stderr=pipe)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    try:
        async with asyncio.timeout(TIMEOUT + 1):
            _, errors = await child.communicate()
    except TimeoutError:
        return f"no answer for {TIMEOUT:g} s"
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGKILL)
    return None if child.returncode == 0 else errors.decode(errors="replace").strip()[:500]
