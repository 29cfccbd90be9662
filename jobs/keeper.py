"""The one copy of a job that is believed: what the store has, and the progress since.

Persist, then believe, then tell. A store that cannot be written holds the job here, and loses nothing: what runs in the
hypervisor goes on, and is recorded as soon as there is room.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from events.model import JobEventKind
from jobs import copy
from jobs.errors import JobError
from jobs.machine import Signal, step
from jobs.model import Cursor, Drive, Failure, FileId, Holder, Job, Kept, Revocation, State, TargetState
from jobs.outcome import END_EVENTS, access_change, job_event
from jobs.ports import AccessResult, AccessVerdict, Deletion, JobStore
from jobs.progress import Progress, View, advance
from jobs.world import World

log = logging.getLogger(__name__)


MAX_WARNINGS = 100

UNSEEN = "it was not seen before the job ended whose it is, and who needs it"
"""Why a guest's former backing file is not closed, of which the ledger knows nothing."""

REMEMBER = 10.0
"""Seconds between two stores of a cursor that only the hypervisor moves."""


class Keeper:
    def __init__(
        self,
        world: World,
        job: Job,
        *,
        held: Callable[[JobError | None], None],
        believed: Callable[[], None] = lambda: None,
    ) -> None:
        """`believed` is called when another value of the job is stored; `held` while one cannot be, with the reason,
        and with None when that is over."""
        self.job = job
        self._held = held
        self._believed = believed
        self._w = world
        self._end_seen: float | None = None
        self._closed = False  # what the job had open is closed, so far as the driver could say
        self._released: list[FileId] = []  # with what the image had kept, which may lie in no chain of this job
        self._deleted: set[FileId] = set()
        self._reported = False
        self._stored = world.clock.monotonic()
        self._progress = Progress(world.clock.monotonic(), job.cursor)

    @property
    def view(self) -> View:
        return self._progress.view(self._w.clock.monotonic())

    # Changes

    async def move(self, signal: Signal, *, kind: JobEventKind | None = None, **changes: Any) -> None:
        before = self.job.state
        job = step(self.job, signal, self._w.clock.now(), **changes)
        await self._save(job, kind)
        fields = {"job": job.id, "path": job.before.top.path, "from": before, "to": job.state, "cur": job.cursor.cur}
        log.info("job %s", job.state, extra={"fields": fields})

    async def writes(self) -> None:
        """The target may be written from now on; stored before it is."""
        target = self.job.target
        if target is not None and target.state is TargetState.UNTOUCHED:
            await self.change(target=replace(target, state=TargetState.WRITING))

    async def started(self) -> None:
        """The job runs; the first time that is an event."""
        first = self.job.started is None
        if first:
            self._progress = Progress(self._w.clock.monotonic(), self.job.cursor)
        kind = JobEventKind.STARTED if first else None
        await self.move(Signal.STARTED, kind=kind, started=self.job.started or self._w.clock.now(), error=None)

    async def lost(self) -> None:
        """No answer. A job that was just being started may run by now, and counts as started."""
        if self.job.state is State.STARTING and self.job.started is None:
            await self.move(Signal.LOST, kind=JobEventKind.STARTED, started=self._w.clock.now())
        else:
            await self.move(Signal.LOST)

    async def change(self, **changes: Any) -> None:
        """Other fields of the job, in the same state."""
        await self._save(replace(self.job, revision=self.job.revision + 1, **changes), None)

    async def warn(self, warnings: Sequence[str]) -> None:
        """What its user must know of the job; each once."""
        told = self._told(warnings)
        if told != self.job.warnings:
            await self.change(warnings=told)

    def _told(self, warnings: Sequence[str]) -> tuple[str, ...]:
        new = tuple(one for one in warnings if one not in self.job.warnings)
        return (*self.job.warnings, *new)[:MAX_WARNINGS]

    async def reached(self, cur: int) -> None:
        """An increment is durable up to here."""
        cursor = advance(self.job.cursor, Cursor(cur, self.job.cursor.end))
        self._progress.update(self._w.clock.monotonic(), cursor)
        await self.change(cursor=cursor)

    def report(self, cursor: Cursor) -> None:
        """The hypervisor's cursor: shown, not stored; after a restart the hypervisor says it again."""
        cursor = advance(self.job.cursor, cursor)
        if not self._reported:  # a stored or skipped stretch is no speed
            self._reported = True
            self._progress = Progress(self._w.clock.monotonic(), cursor)
        self._progress.update(self._w.clock.monotonic(), cursor)
        if cursor != self.job.cursor:
            self.job = replace(self.job, cursor=cursor, revision=self.job.revision + 1)
            self._w.changed(self.job)

    async def remember(self) -> None:
        """Store the shown cursor now and then, so that a restart does not show it going far back."""
        if self._w.clock.monotonic() - self._stored > REMEMBER:
            await self.change()

    def seen_end(self) -> None:
        """The end was seen now, for the first time."""
        if self._end_seen is None:
            self._end_seen = self._w.clock.monotonic()

    async def _save(self, job: Job, kind: JobEventKind | None) -> None:
        await self._until_written(lambda: self._w.store.save(job, [job_event(job, kind)] if kind else []))
        self.believe(job)

    async def write(self, write: Callable[[JobStore], Awaitable[None]]) -> None:
        await self._until_written(lambda: write(self._w.store))

    async def _until_written(self, write: Callable[[], Awaitable[None]]) -> None:
        delay = self._w.limits.settle_retry
        try:
            while True:
                try:
                    await write()
                    return
                except JobError as error:
                    if error.code != "store_full" or self.job.state.terminal:
                        raise
                    self._held(self._standstill(error))
                    fields = {"job": self.job.id, "error": error.message}
                    log.error("the store cannot be written", extra={"fields": fields})
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, self._w.limits.settle_retry_max)
        finally:
            self._held(None)

    def _standstill(self, error: JobError) -> JobError:
        remedy = "make space on its file system: the job goes on then, and an abort is carried out"
        return JobError(error.code, f"job {self.job.id} cannot be recorded: {error.message}", remedy=remedy)

    def believe(self, job: Job) -> None:
        self.job = job
        self._stored = self._w.clock.monotonic()
        self._w.changed(job)
        self._believed()

    # The end

    async def record(self, signal: Signal, failure: Failure | None, seen: Cursor | None) -> None:
        """The outcome, in one transaction with what it does to access; then what the job had open is closed."""
        now = self._w.clock.now()
        completed = signal is Signal.PROVEN_COMPLETED
        cursor = advance(self.job.cursor, seen) if seen else self.job.cursor
        if completed:
            cursor = Cursor(cursor.end, cursor.end)
        pending = Revocation.PENDING if completed and self.job.dropped else Revocation.NONE
        target = self.job.target
        if target is not None:
            deleted = not completed and await self._w.driver.discard(self.job)
            target = replace(target, state=copy.ended(self.job, completed=completed, deleted=deleted))
        changes = {"error": failure, "cursor": cursor, "revocation": pending, "upto": None, "target": target}
        job = step(self.job, signal, now, finished=now, **changes)

        async def record(sharers: tuple[Holder, ...]) -> Job:
            end = job_event(job, END_EVENTS[job.state])
            self._released = await self._w.store.finish(job, [end], access_change(job, sharers))
            self.believe(job)
            _log_outcome(job)
            return job

        try:
            # A store that is full is told to `conclude`, which lets go of the chain before the next try.
            await self._until_written(lambda: self._w.driver.conclude(job, record))
            self._closed = True
        except JobError as error:
            if not self.job.state.terminal:
                raise
            log.warning("the job's files are not closed yet", extra={"fields": {"job": job.id, "error": str(error)}})
        if self._end_seen is not None:
            self._w.observer.event_lag(self._w.clock.monotonic() - self._end_seen)
        seconds = (now - (job.started or job.created)).total_seconds()
        self._w.observer.job_finished(job.spec.operation, job.state, seconds)

    async def settle_access(self) -> None:
        """Make files match the ledger after the end; again and again until what the job dropped is settled."""
        delay = self._w.limits.settle_retry
        while True:
            try:
                if not self._closed:
                    await self._w.driver.drop(self.job)
                self._closed = False  # should access not settle, the retry makes sure of the files again
                done = await self._settle_dropped()
                await self._w.driver.leave(self.job)  # what is owed now does not need the storage daemon
                if done:
                    settled = self.job.dropped if self.job.state is State.COMPLETED else ()
                    others = [layer.file for layer in self.job.before.layers if layer not in settled]
                    others += sorted(set(self._released) - {layer.file for layer in self.job.before.layers})
                    if self.job.target is not None and self.job.target.file is not None:
                        others.append(self.job.target.file)
                    await self._w.access.converge(others, trigger=self.job.spec.operation)
                    return
            except JobError as error:
                log.warning("access is not settled yet", extra={"fields": {"job": self.job.id, "error": str(error)}})
            await asyncio.sleep(delay)
            delay = min(delay * 2, self._w.limits.settle_retry_max)

    async def _settle_dropped(self) -> bool:
        """Take back the files that the chain lost; False while that is still owed."""
        job = self.job
        if job.revocation is not Revocation.PENDING:
            return True
        at = {layer.file: layer.path for layer in job.dropped}
        found = await self._w.access.converge(list(at), trigger=job.spec.operation, at=at)
        results = [(layer.path, found[layer.file]) for layer in job.dropped]
        if any(result.verdict is AccessVerdict.PENDING for _, result in results):
            return False
        revoked = tuple(path for path, result in results if result.verdict is AccessVerdict.REVOKED)
        still_open = {AccessVerdict.KEPT, AccessVerdict.GRANTED}
        if job.drive is not None:  # libvirt opened it, and may have left it so
            still_open.add(AccessVerdict.UNCHANGED)
        kept = tuple(
            Kept(path, result.reason or _needed(job, result), result.holders)
            for path, result in results
            if result.verdict in still_open
        )
        needed = [layer.file for layer in job.dropped if found[layer.file].verdict is AccessVerdict.GRANTED]
        deletion = await self._w.driver.delete_dropped(job, needed) if job.spec.delete else Deletion()
        self._deleted |= deletion.files  # what follows may have to be done again
        deleted = {at[file] for file in self._deleted}
        kept = tuple(one for one in kept if one.path not in deleted)
        granted = {path for path, result in results if result.verdict is AccessVerdict.GRANTED}
        warnings = (*deletion.warnings, *still_named(job, [one for one in kept if one.path in granted]))
        state = Revocation.KEPT if kept else Revocation.DONE
        if self._end_seen is not None:
            self._w.observer.revocation_lag(self._w.clock.monotonic() - self._end_seen)
        # In one change: who waited for the revocation has heard all.
        await self.change(revocation=state, revoked=revoked, kept=kept, warnings=self._told(warnings))
        return True


def _needed(job: Job, result: AccessResult) -> str:
    if result.holders:
        return f"still needed by {', '.join(result.holders)}"
    return UNSEEN if job.drive else "still needed"


def still_named(job: Job, kept: Sequence[Kept]) -> list[str]:
    """A libvirtd that is killed at a job's end may never write down that the guest stands on other files now."""
    drive = job.drive
    mine = [] if drive is None else [one for one in kept if any(_is_of(holder, drive) for holder in one.holders)]
    if drive is None or not mine:
        return []
    return [
        f"libvirt still names {mine[0].path} for {drive}, which the guest stands on no more: its definition must name "
        f"{job.after.top.path} ({job.after.top.format}) before it is started again (virsh edit {drive.name})"
    ]


def _is_of(holder: str, drive: Drive) -> bool:
    return holder.startswith(f"domain:{drive.uuid}/{drive.target} ")


async def change_together(keepers: Sequence[Keeper], jobs: Sequence[Job]) -> None:
    """Other values of several jobs, in one transaction; their writers stand still meanwhile."""
    await keepers[0].write(lambda store: store.save_all(jobs))
    for keeper, job in zip(keepers, jobs, strict=True):
        keeper.believe(job)


def _log_outcome(job: Job) -> None:
    fields = {"job": job.id, "path": job.before.top.path, "outcome": job.state, "cur": job.cursor.cur}
    if job.error is not None:
        fields |= {"code": job.error.code, "error": job.error.message}
    log.info("job %s", job.state, extra={"fields": fields})
