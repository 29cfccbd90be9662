"""What the store forgets, and when.

A round of pruning is one short transaction, so that a job's next record waits for no more than that; rounds follow each
other while there is more to forget. What has not ended, and what still owes a revocation, is never forgotten.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from jobs.errors import JobError
from jobs.ports import Clock

log = logging.getLogger(__name__)

PAUSE = 0.05
"""Seconds between two rounds: others use the store, too."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Named as in the configuration: [jobs] retention_*, [exports] retention_count, [store] events_kept and prune_*."""

    days: float
    jobs: int
    exports: int
    events: int
    rows: int
    interval: float


class Prunable(Protocol):
    async def prune(self, at: datetime, *, days: float, count: int, exports: int, events: int, most: int) -> bool: ...


async def keep_house(store: Prunable, kept: Retention, clock: Clock) -> None:
    """Prune now, and again after each interval, until cancelled."""
    while True:
        try:
            await prune(store, kept, clock)
        except JobError as error:
            log.warning("the store cannot be pruned", extra={"fields": {"error": error.message}})
        await asyncio.sleep(kept.interval)


async def prune(store: Prunable, kept: Retention, clock: Clock) -> None:
    """Round after round, until nothing is left that retention does not keep."""
    more = True
    while more:
        more = await store.prune(
            clock.now(), days=kept.days, count=kept.jobs, exports=kept.exports, events=kept.events, most=kept.rows
        )
        await asyncio.sleep(PAUSE)
