"""A store, an access converger and a counter in memory: they write down what they were asked, for a test to judge it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from events.model import Event, JobEvent
from jobs.errors import JobError
from jobs.model import FileId, Job, Revocation
from jobs.ports import AccessChange, AccessResult, AccessVerdict


class MemoryStore:
    """jobs.ports.JobStore. While `full`, nothing can be written."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.events: list[JobEvent] = []
        self.finishes: list[tuple[Job, AccessChange]] = []
        self.full = False
        self.refused = 0
        self.recorded: Callable[[Job], None] = lambda job: None
        """Told of each outcome in the moment in which it is recorded."""
        self.gate: asyncio.Event | None = None
        """What writes jobs waits for it when they are stored, before that is answered."""

    def _write(self, job: Job, events: Sequence[Event]) -> None:
        if self.full:
            self.refused += 1
            raise JobError("store_full", "no space left")
        self.jobs[job.id] = job
        self.events += [event for event in events if isinstance(event, JobEvent)]

    async def save(self, job: Job, events: Sequence[Event] = ()) -> None:
        await asyncio.sleep(0)
        self._write(job, events)
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)

    async def save_all(self, jobs: Sequence[Job]) -> None:
        await asyncio.sleep(0)
        for job in jobs:
            self._write(job, ())
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)

    async def finish(self, job: Job, events: Sequence[Event], change: AccessChange) -> list[FileId]:
        await asyncio.sleep(0)
        self._write(job, events)
        self.finishes.append((job, change))
        self.recorded(job)
        await asyncio.sleep(0)
        return []

    async def get(self, job_id: str) -> Job | None:
        return self.jobs.get(job_id)

    async def delete(self, job_id: str) -> None:
        self.jobs.pop(job_id, None)

    async def unsettled(self) -> list[Job]:
        owed = [job for job in self.jobs.values() if job.finished is None or job.revocation is Revocation.PENDING]
        return sorted(owed, key=lambda job: (job.created, job.id))

    def kinds(self, job_id: str) -> list[str]:
        return [event.kind.value for event in self.events if event.job == job_id]


class FakeAccess:
    """jobs.ports.Access: every file is revoked, unless `verdicts` says otherwise."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[FileId, ...], str]] = []
        self.found_at: dict[FileId, str] = {}
        self.verdicts: dict[FileId, AccessVerdict] = {}

    async def converge(
        self, files: Sequence[FileId], *, trigger: str, at: Mapping[FileId, str] | None = None
    ) -> dict[FileId, AccessResult]:
        self.asked.append((tuple(files), trigger))
        self.found_at |= at or {}
        await asyncio.sleep(0)
        return {file: AccessResult(str(file), self.verdicts.get(file, AccessVerdict.REVOKED)) for file in files}


class Counts:
    """jobs.ports.Observer."""

    def __init__(self) -> None:
        self.finished: list[tuple[str, str]] = []
        self.reconciles: list[str] = []

    def job_finished(self, operation: str, outcome: str, seconds: float) -> None:
        assert seconds >= 0
        self.finished.append((operation, outcome))

    def event_lag(self, seconds: float) -> None:
        assert seconds >= 0

    def reconcile(self, result: str) -> None:
        self.reconciles.append(result)

    def revocation_lag(self, seconds: float) -> None:
        assert seconds >= 0
