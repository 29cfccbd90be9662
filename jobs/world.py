"""What every actor shares: the ports, the bounds, the slots."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from jobs.model import Job
from jobs.ports import Access, BlockDriver, Clock, JobStore, Observer
from jobs.slots import Slots


@dataclass(frozen=True, slots=True)
class Limits:
    """The engine's bounds; seconds and bytes. See the `jobs` section of the configuration.

    `live_interval` is the `progress_interval` of guests' disks, whose hypervisor tells of a job's end.
    """

    width: int = 4
    queue: int = 1000
    group: int = 16
    progress_interval: float = 0.5
    abort_timeout: float = 30.0
    settle_retry: float = 1.0
    settle_retry_max: float = 30.0
    end_retries: int = 3
    request_timeout: float = 30.0
    live_interval: float = 2.0


async def _nobody(job: Job) -> bool:
    return False


@dataclass(slots=True)
class World:
    """`changed` is told of each new value of a job, progress too; it must not block. `cleared` waits, for
    `limits.request_timeout`, until the jobs have let go that ended on this one's files, or were told to; whether there
    were any."""

    driver: BlockDriver
    store: JobStore
    access: Access
    clock: Clock
    observer: Observer
    limits: Limits
    slots: Slots
    changed: Callable[[Job], None] = field(default=lambda job: None)
    cleared: Callable[[Job], Awaitable[bool]] = field(default=_nobody)
