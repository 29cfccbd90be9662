"""The service manager's watchdog, fed only while the agent works (sd_notify(3), WATCHDOG=1).

Fed by a task of the event loop, after the store has answered and libvirt's thread has run: a loop that is blocked, a
store that hangs, or a thread of libvirt's that does, stops the feeding, and the agent is started anew. Storage daemons
go on meanwhile. A libvirtd that is away or hangs is no reason: everything else works, and no restart mends it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable

from hostagent import sdnotify
from jobs.errors import JobError

log = logging.getLogger(__name__)


def interval() -> float | None:
    """Seconds in which the manager wants to hear of this process; None where it does not."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(os.environ["WATCHDOG_USEC"]) / 1e6
    except (KeyError, ValueError):
        return None


async def feed(patience: float, store: Callable[[], Awaitable[object]], beat: Callable[[], float | None]) -> None:
    """Until cancelled. `store` returns when the store has answered; `beat` is when libvirt's thread last ran
    (time.monotonic()), None where there is none. `patience` is the manager's interval."""
    well = True
    while True:
        why = await _ill(patience / 2, store, beat)
        if why is None:
            sdnotify.notify("WATCHDOG=1")
        elif well:
            log.error("the watchdog is not fed", extra={"fields": {"reason": why}})
        well = why is None
        await asyncio.sleep(patience / 4)


async def _ill(patience: float, store: Callable[[], Awaitable[object]], beat: Callable[[], float | None]) -> str | None:
    try:
        async with asyncio.timeout(patience):
            await store()
    except TimeoutError:
        return f"the store has not answered for {patience:g} s"
    except JobError as error:
        log.warning("the store does not answer well", extra={"fields": {"error": error.message}})  # no restart mends it
    last = beat()
    if last is not None and (silent := time.monotonic() - last) > patience:
        return f"libvirt's thread has not run for {silent:.0f} s"
    return None
