"""Early write-out of what a job writes. QEMU flushes it at the end, in one piece, and everybody waits for that: of what
the kernel holds back until then, some gigabytes where there is much memory, as much is on its way before.

Nothing depends on it. It says nothing of what is durable, and where storage hangs it is left undone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable

from hostagent.blocks import write_out
from jobs.model import Cursor

STEP = 32 << 20
"""Bytes of a job's cursor from one time to the next."""
AT_ONCE = 2
"""Of the agent's threads, which storage that hangs may keep."""


class WriteOut:
    """For one event loop."""

    def __init__(self) -> None:
        self._working = 0
        self._begun: dict[str, int] = {}
        """How far each job was then."""

    def begin(self, job: str, cursor: Cursor, files: Iterable[int]) -> None:
        """Where the job has come far since the last time. `files` are descriptors, any will do."""
        if cursor.cur - self._begun.get(job, 0) < STEP or self._working == AT_ONCE:
            return
        self._begun[job] = cursor.cur
        names: list[int] = []
        with contextlib.suppress(OSError):  # no more descriptors
            for fd in files:
                names.append(os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC))
        self._working += 1
        asyncio.get_running_loop().run_in_executor(None, _all, names).add_done_callback(self._done)

    def forget(self, job: str) -> None:
        self._begun.pop(job, None)

    def _done(self, _: asyncio.Future[None]) -> None:
        self._working -= 1


def _all(names: Iterable[int]) -> None:
    for name in names:
        try:
            with contextlib.suppress(OSError):
                fd = os.open(f"/proc/self/fd/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    write_out(fd)
                finally:
                    os.close(fd)
        finally:
            os.close(name)
