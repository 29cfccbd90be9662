"""Looks at the files of all open chains from time to time: an export has no end at which it could be found out that its
base was cut meanwhile. What is found is told once, and stays in `found` for as long as it is true.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from hostagent.images.drift import Drift, find_drift
from hostagent.nbd.chains import Chains
from hostagent.nbd.prepared import PreparedChain

log = logging.getLogger(__name__)


class Watch:
    def __init__(self, chains: Chains, *, interval: float, tell: Callable[[Drift], None]) -> None:
        """`interval` in seconds: images.watch_interval."""
        self._chains = chains
        self._interval = interval
        self._tell = tell
        # A thread of its own: when it hangs on dead storage, it is waited for, and no other is begun. Nothing is looked
        # at until it comes back; the storage daemons on that storage are `unresponsive` then.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="watch")
        self.found: list[Drift] = []
        """What is true now; each was told when it was new."""

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self.look()

    async def look(self) -> None:
        now: dict[Drift, None] = {}
        for chain in self._chains.all():
            for drift in await self._look_at(chain):
                now[drift] = None
        for drift in now:
            if drift not in self.found:
                log.warning("a file changed", extra={"fields": {"path": drift.path, "what": drift.what}})
                self._tell(drift)
        self.found = list(now)

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _look_at(self, chain: PreparedChain) -> list[Drift]:
        layers = tuple(chain.layers)
        files = [layer for layer in layers if not layer.file.network]
        # Growth is no sign here: each layer was perhaps written by a job or a client of ours since it was opened.
        look = partial(find_drift, files, chain.descriptor, written=[layer.file for layer in layers])
        found: list[Drift] = []
        with contextlib.suppress(OSError, ValueError):  # a chain that was closed in this moment
            found = await asyncio.get_running_loop().run_in_executor(self._thread, look)
        # What a job of ours took from the chain meanwhile may have been deleted by right.
        return found if tuple(chain.layers) == layers and chain in self._chains.all() else []
