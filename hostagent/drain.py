"""Draining: the host takes no new work, what runs comes to its end or to rest, and that stays so over a restart.

Jobs that have begun go on, or are paused where that was asked; queued ones wait in their places. Exports are not
touched: whoever started one ends it. What was paused here, and nothing else, is resumed when draining is lifted; the
list is stored before a job is paused, and emptied after they were resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from hostagent.records import DrainRecord, encode
from hostagent.records import drain as decode
from jobs.errors import JobError
from jobs.model import Job, State
from jobs.ports import Clock

log = logging.getLogger(__name__)

FACT = "drain"


class Facts(Protocol):
    async def fact(self, name: str) -> str | None: ...

    async def set_fact(self, name: str, value: str) -> None: ...


class Jobs(Protocol):
    """The engine, as far as draining needs it."""

    def active(self) -> list[Job]: ...

    def admit(self, *, jobs: bool) -> None: ...

    async def pause(self, job_id: str) -> Job: ...

    async def resume(self, job_id: str) -> Job: ...


class Drain:
    """`later` runs a coroutine beside: who begins a drain need not wait until hundreds of jobs are paused."""

    def __init__(
        self, store: Facts, jobs: Jobs, clock: Clock, later: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._clock = clock
        self._later = later
        self._lock = asyncio.Lock()
        self._unpausable: set[str] = set()
        self.record = DrainRecord()
        self.beginning = 0
        """Requests that were let in and whose job or export is not there yet."""

    @property
    def on(self) -> bool:
        return self.record.since is not None

    async def load(self) -> None:
        """What was in force when the agent stopped. Before any job is taken up."""
        if stored := await self._store.fact(FACT):
            self.record = decode(json.loads(stored))
        self._jobs.admit(jobs=not self.on)

    async def begin(self, *, pause: bool) -> None:
        """Take no new work; with `pause`, asked for now or before, what runs is paused."""
        async with self._lock:
            since = self.record.since or self._clock.now()
            await self._save(replace(self.record, since=since, pause=pause or (self.on and self.record.pause)))
            self._jobs.admit(jobs=False)
        self._later(self.settle())
        log.info("draining", extra={"fields": {"pause": self.record.pause}})

    async def lift(self) -> None:
        """Take new work again, and resume what was paused."""
        async with self._lock:
            await self._save(replace(self.record, since=None, pause=False))
            self._jobs.admit(jobs=True)
        self._later(self.settle())
        log.info("draining is lifted", extra={"fields": {"paused": len(self.record.paused)}})

    async def settle(self) -> None:
        """Pause what runs, or resume what was paused, as the record says. Idempotent."""
        async with self._lock:
            if self.record.pause:
                await self._pause()
            elif not self.on and self.record.paused:
                await self._each(self._jobs.resume, self.record.paused)
                left = {job.id for job in self._jobs.active() if job.state in (State.PAUSED, State.UNKNOWN)}
                await self._save(replace(self.record, paused=tuple(one for one in self.record.paused if one in left)))

    def job_changed(self, job: Job) -> None:
        """One that runs while jobs are to be paused, or one that could not be resumed when that was lifted."""
        owed = not self.on and job.state is State.PAUSED and job.id in self.record.paused
        if (owed or self._wants(job)) and not self._lock.locked():
            self._later(self.settle())

    def _wants(self, job: Job) -> bool:
        running = job.state is State.RUNNING and not job.external
        return self.record.pause and running and job.id not in self._unpausable

    async def _pause(self) -> None:
        """What can never be paused is asked once, and waited for as if nobody paused."""
        active = self._jobs.active()
        self._unpausable &= {job.id for job in active}
        running = [job.id for job in active if self._wants(job)]
        if new := [job_id for job_id in running if job_id not in self.record.paused]:
            await self._save(replace(self.record, paused=(*self.record.paused, *new)))
        refused = await self._each(self._jobs.pause, running)
        if never := {job_id for job_id, error in refused.items() if error.code == "not_supported"}:
            self._unpausable |= never
            await self._save(replace(self.record, paused=tuple(one for one in self.record.paused if one not in never)))

    async def _each(self, ask: Callable[[str], Awaitable[Job]], job_ids: Sequence[str]) -> dict[str, JobError]:
        """One that cannot be asked now, or has ended meanwhile, keeps no other from it: what each of these said."""
        replies = await asyncio.gather(*(ask(job_id) for job_id in job_ids), return_exceptions=True)
        refused = {}
        for job_id, reply in zip(job_ids, replies, strict=True):
            if isinstance(reply, JobError):
                refused[job_id] = reply
                log.warning("draining could not change a job", extra={"fields": {"job": job_id, "why": reply.message}})
            elif isinstance(reply, BaseException):
                raise reply
        return refused

    async def _save(self, record: DrainRecord) -> None:
        await self._store.set_fact(FACT, json.dumps(encode(record)))
        self.record = record

    # What is refused, and what holds

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Around what starts something new. Raises JobError draining."""
        self.refuse("new work")
        self.beginning += 1
        try:
            yield
        finally:
            self.beginning -= 1

    def refuse(self, what: str) -> None:
        if self.on:
            raise JobError(
                "draining",
                f"this host is being drained: {what} is not taken",
                remedy="use another host, or `hostagent drain --undo`",
            )

    def holding(self) -> list[Job]:
        """The jobs that have begun and are not at rest. A paused one is at rest where draining pauses."""
        rest = {State.QUEUED, State.WAITING, *([State.PAUSED] if self.record.pause else [])}
        return [job for job in self._jobs.active() if job.state not in rest]
