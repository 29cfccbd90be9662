"""One job's writer: the only task that changes it.

The actor sits in the handler of the job's present state until the state changes; each handler begins as if the agent
had just been restarted in that state, so recovery is not a second code path. Requests of users and hints of the driver
come through one bounded inbox. A hint has no content that is believed: it makes the actor look (`observe`), and a lost
one costs at most a progress interval.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from events.model import JobEvent, JobEventKind, Status
from jobs import pull
from jobs.errors import JobError
from jobs.machine import HOLDS_SLOT, Signal, step
from jobs.model import Cursor, Failure, Holder, Job, Kept, Need, Revocation, State
from jobs.ports import Access, AccessChange, AccessVerdict, BlockDriver, Clock, Contact, JobStore, Observer, Phase
from jobs.progress import Progress, View, advance
from jobs.settle import classify, decide

log = logging.getLogger(__name__)

INBOX = 64
"""Requests and hints that may wait for one job; a hint that finds it full is dropped (the poll finds what it told)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The engine's bounds; seconds and bytes. See the `jobs` section of the configuration."""

    width: int = 4
    queue: int = 1000
    progress_interval: float = 0.5
    abort_timeout: float = 30.0
    settle_retry: float = 1.0
    settle_retry_max: float = 30.0
    request_timeout: float = 30.0


class Ask(StrEnum):
    LOOK = "look"
    ABORT = "abort"
    FORCE = "force"
    PAUSE = "pause"
    RESUME = "resume"
    NEXT = "next"
    SPEED = "speed"


@dataclass(slots=True)
class Message:
    ask: Ask
    value: Any = None
    reply: asyncio.Future[Job] | None = None

    def answer(self, job: Job) -> None:
        if self.reply is not None and not self.reply.done():
            self.reply.set_result(job)

    def refuse(self, error: JobError) -> None:
        if self.reply is not None and not self.reply.done():
            self.reply.set_exception(error)


class Slots:
    """How many jobs may run at once; first come, first served. A job that runs already takes one without asking."""

    def __init__(self, width: int) -> None:
        self._free = width
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        if self._free > 0 and not self._waiting:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()
            raise

    def occupy(self) -> None:
        self._free -= 1

    def give(self) -> None:
        self._free += 1
        while self._free > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                self._free -= 1
                turn.set_result(None)


@dataclass(slots=True)
class World:
    """What every actor shares."""

    driver: BlockDriver
    store: JobStore
    access: Access
    clock: Clock
    observer: Observer
    limits: Limits
    slots: Slots
    changed: Callable[[Job], None] = field(default=lambda job: None)


class Actor:
    def __init__(self, world: World, job: Job) -> None:
        self._w = world
        self.job = job
        self._inbox: asyncio.Queue[Message] = asyncio.Queue(maxsize=INBOX)
        self._has_slot = False
        self._failure: Failure | None = None
        self._end_seen: float | None = None
        self._progress = Progress(world.clock.monotonic(), job.cursor)
        self.settled = asyncio.Event()

    # What others may call

    def hint(self) -> None:
        """Something may have happened: look."""
        if not self._inbox.full():
            self._inbox.put_nowait(Message(Ask.LOOK))

    async def ask(self, ask: Ask, value: Any = None) -> Job:
        """Put a request and wait until it is carried out or refused."""
        if self._inbox.full():
            raise JobError("limit", f"job {self.job.id} has {INBOX} requests waiting", remedy="try again later")
        reply: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait(Message(ask, value, reply))
        try:
            return await asyncio.wait_for(reply, self._w.limits.request_timeout)
        except TimeoutError:
            raise JobError(
                "timeout",
                f"job {self.job.id} did not take up {ask} within {self._w.limits.request_timeout:g} s",
                remedy="look at `hostagent status`: its storage daemon may not answer",
            ) from None

    @property
    def view(self) -> View:
        return self._progress.view(self._w.clock.monotonic())

    # The life of the job

    async def run(self) -> None:
        try:
            while not self.job.state.terminal:
                await self._live()
            await self._settle_access()
        finally:
            self._give_slot()
            self.settled.set()
            gone = JobError("conflict", f"job {self.job.id} is {self.job.state}", state=self.job.state.value)
            while not self._inbox.empty():
                self._inbox.get_nowait().refuse(gone)

    async def _live(self) -> None:
        """One stay in one state. What a handler raises is the job's failure, or lost contact."""
        state = self.job.state
        if state in HOLDS_SLOT and not self._has_slot:
            self._w.slots.occupy()
            self._has_slot = True
        try:
            await self._handlers[state](self)
        except JobError as error:
            if self.job.state is not state:
                raise
            if error.code == "unresponsive" and state is not State.QUEUED:
                await self._lost(error)
            elif state in (State.COMPLETING, State.ABORTING, State.UNKNOWN):
                await self._pause_before_retry(error)
            else:
                self._failure = _failure(error)
                await self._move(Signal.ENDED)

    async def _queued(self) -> None:
        admitted = asyncio.ensure_future(self._w.slots.take())
        try:
            while not admitted.done():
                message = await self._message_or(admitted)
                if message is not None:
                    await self._request(message)
                    if self.job.state is not State.QUEUED:
                        return
            self._has_slot = True
            await self._move(Signal.ADMIT)
        finally:
            if not self._has_slot and not admitted.cancel() and admitted.done() and not admitted.cancelled():
                self._w.slots.give()

    async def _starting(self) -> None:
        driver = self._w.driver
        await driver.prepare(self.job)
        if self.job.cursor.cur == 0 and self.job.started is None:
            warnings = await self._interruptible(driver.check(self.job))
            if warnings is None:
                return
            if warnings:
                self.job = replace(self.job, warnings=(*self.job.warnings, *warnings))
        if not self.job.incremental:
            await driver.start(self.job)
        first = self.job.started is None
        started = self.job.started or self._w.clock.now()
        self._progress = Progress(self._w.clock.monotonic(), self.job.cursor)
        await self._move(Signal.STARTED, kind=JobEventKind.STARTED if first else None, started=started)

    async def _running(self) -> None:
        if self._agent_driven:
            await self._w.driver.prepare(self.job)
            await self._step()
            return
        seen = await self._w.driver.observe(self.job)
        if seen.contact is Contact.ALIVE:
            await self._w.driver.prepare(self.job)
            await self._w.driver.start(self.job)
        await self._look()
        await self._stream()

    async def _stream(self) -> None:
        """A block job runs in the hypervisor: follow it until it is not running any more."""
        while self.job.state is State.RUNNING:
            message = await self._message(self._w.limits.progress_interval)
            if message is not None and message.ask is not Ask.LOOK:
                await self._request(message)
            else:
                await self._look()

    async def _look(self) -> None:
        seen = await self._w.driver.observe(self.job)
        if seen.cursor is not None:
            self._report(seen.cursor)
        if seen.contact is Contact.UNRESPONSIVE:
            await self._move(Signal.LOST)
        elif seen.contact is Contact.DEAD or seen.phase in (Phase.CONCLUDED, Phase.ABSENT):
            self._seen_end()
            await self._move(Signal.ENDED)
        elif seen.phase is Phase.PENDING:
            self._seen_end()
            await self._w.driver.finalize(self.job)

    async def _step(self) -> None:
        """An increment, slice by slice; each slice's cursor is stored when its data is durable."""
        upto = self.job.upto if self.job.upto is not None else pull.goal(self.job)
        while self.job.state is State.RUNNING and self.job.cursor.cur < upto:
            stop = asyncio.Event()
            slice_ = asyncio.ensure_future(self._w.driver.advance(replace(self.job, upto=upto), stop))
            message: Message | None = None
            while not slice_.done() and message is None:
                message = await self._message_or(slice_)
                if message is not None and message.ask is Ask.LOOK:
                    message = None
            if message is not None:
                stop.set()
            cur = await slice_
            cursor = advance(self.job.cursor, Cursor(cur, self.job.cursor.end))
            self._progress.update(self._w.clock.monotonic(), cursor)
            await self._save(replace(self.job, cursor=cursor, revision=self.job.revision + 1))
            if message is not None:
                await self._request(message)
        if self.job.state is State.RUNNING and self.job.cursor.cur < self.job.cursor.end:
            await self._move(Signal.STEPPED, upto=None)

    async def _paused(self) -> None:
        await self._look_while_paused()
        while self.job.state is State.PAUSED:
            message = await self._message(None)
            assert message is not None
            if message.ask is Ask.LOOK:
                await self._look_while_paused()
            else:
                await self._request(message)

    async def _look_while_paused(self) -> None:
        if self._agent_driven:
            return  # nothing runs: it goes on from its cursor whatever became of the daemon
        seen = await self._w.driver.observe(self.job)
        if seen.contact is Contact.UNRESPONSIVE:
            await self._move(Signal.LOST)
        elif seen.contact is Contact.DEAD or seen.phase in (Phase.CONCLUDED, Phase.ABSENT):
            self._seen_end()
            await self._move(Signal.ENDED)

    async def _waiting(self) -> None:
        await self._w.driver.rest(self.job)
        self._give_slot()
        while self.job.state is State.WAITING:
            message = await self._message(None)
            assert message is not None
            if message.ask is not Ask.LOOK:
                await self._request(message)

    async def _ending(self) -> None:
        """Completing or aborting: ask for the end where that is our part, then settle."""
        if self.job.state is State.ABORTING or self._failure is not None:
            await self._w.driver.cancel(self.job)
        deadline = self._w.clock.monotonic() + self._w.limits.abort_timeout
        while not self.job.state.terminal:
            seen = await self._w.driver.observe(self.job)
            verdict = decide(self.job, seen, self._failure)
            if verdict.signal is Signal.LOST:
                await self._move(Signal.LOST)
                return
            if verdict.signal is not None:
                self._seen_end()
                await self._record(verdict.signal, verdict.failure, seen.cursor)
                return
            if self.job.state is State.COMPLETING and self._failure is None:
                await self._move(Signal.STARTED)
                return
            await self._wait_for_end(deadline)

    async def _wait_for_end(self, deadline: float) -> None:
        message = await self._message(self._w.limits.progress_interval)
        late = self._w.clock.monotonic() > deadline
        if message is None or message.ask is Ask.LOOK:
            return
        if message.ask is Ask.FORCE and not late:
            left = deadline - self._w.clock.monotonic()
            message.refuse(
                JobError("busy", f"the abort has {left:.0f} s left to end by itself", remedy="then use --force again")
            )
            return
        await self._request(message)

    async def _unknown(self) -> None:
        """Contact is lost. A look may find it again; there is no deadline."""
        delay = self._w.limits.settle_retry
        while self.job.state is State.UNKNOWN:
            message = await self._message(delay)
            delay = min(delay * 2, self._w.limits.settle_retry_max)
            if message is not None and message.ask is not Ask.LOOK:
                await self._request(message)
                continue
            seen = await self._w.driver.observe(self.job)
            if seen.contact is Contact.UNRESPONSIVE:
                continue
            if self.job.intent == "abort":
                await self._move(Signal.ABORT)
            elif seen.phase in (Phase.RUNNING, Phase.PENDING):
                await self._move(Signal.STARTED)
            elif seen.phase is Phase.PAUSED:
                await self._move(Signal.PAUSED)
            elif self._agent_driven and seen.contact is Contact.ALIVE:
                await self._move(Signal.STARTED)
            else:
                self._seen_end()
                await self._move(Signal.ENDED)

    _handlers: dict[State, Callable[[Actor], Awaitable[None]]] = {  # noqa: RUF012 - a constant table
        State.QUEUED: _queued,
        State.STARTING: _starting,
        State.RUNNING: _running,
        State.PAUSED: _paused,
        State.WAITING: _waiting,
        State.READY: _running,
        State.COMPLETING: _ending,
        State.ABORTING: _ending,
        State.UNKNOWN: _unknown,
    }

    # Requests

    async def _request(self, message: Message) -> None:
        try:
            await self._carry_out(message)
            message.answer(self.job)
        except JobError as error:
            message.refuse(error)
            if error.code == "unresponsive" and self.job.state in (State.RUNNING, State.PAUSED):
                await self._lost(error)

    async def _carry_out(self, message: Message) -> None:
        driver, job = self._w.driver, self.job
        match message.ask:
            case Ask.ABORT | Ask.FORCE:
                await self._abort(force=message.ask is Ask.FORCE)
            case Ask.NEXT:
                if job.state is State.WAITING:
                    await self._move(Signal.NEXT, upto=pull.goal(job))
            case Ask.PAUSE:
                step(job, Signal.PAUSED, self._w.clock.now())
                if not self._agent_driven:
                    await driver.pause(job)
                await self._move(Signal.PAUSED)
            case Ask.RESUME:
                if job.state is not State.PAUSED:
                    raise JobError("conflict", f"job {job.id} is {job.state}, not paused", state=job.state.value)
                if not self._agent_driven:
                    await driver.resume(job)
                await self._move(Signal.RESUMED)
            case Ask.SPEED:
                if job.state in (State.RUNNING, State.PAUSED) and not self._agent_driven:
                    await driver.set_speed(job, message.value)
                await self._save(replace(job, bandwidth=message.value, revision=job.revision + 1))

    @property
    def _agent_driven(self) -> bool:
        """Between the first byte and the last step of an incremental pull no block job runs: the agent pulls."""
        return self.job.incremental and self.job.cursor.cur < self.job.cursor.end

    async def _abort(self, *, force: bool) -> None:
        if force and self.job.state in (State.ABORTING, State.UNKNOWN):
            await self._w.driver.cancel(self.job, force=True)
        if self.job.state is State.UNKNOWN:
            await self._save(replace(self.job, intent="abort", revision=self.job.revision + 1))
        elif self.job.state is not State.ABORTING:
            await self._move(Signal.ABORT, intent="abort")

    # Changes

    async def _move(self, signal: Signal, *, kind: JobEventKind | None = None, **changes: Any) -> None:
        before = self.job.state
        job = step(self.job, signal, self._w.clock.now(), **changes)
        await self._save(job, kind)
        fields = {"job": job.id, "path": job.before.top.path, "from": before, "to": job.state, "cur": job.cursor.cur}
        log.info("job %s", job.state, extra={"fields": fields})

    async def _save(self, job: Job, kind: JobEventKind | None = None) -> None:
        """Persist, then believe. A store that cannot be written stops this job here, and loses nothing."""
        delay = self._w.limits.settle_retry
        while True:
            try:
                await self._w.store.save(job, [job_event(job, kind)] if kind else [])
                break
            except JobError as error:
                if error.code != "store_full":
                    raise
                log.error("the store cannot be written", extra={"fields": {"job": job.id, "error": error.message}})
                await asyncio.sleep(delay)
                delay = min(delay * 2, self._w.limits.settle_retry_max)
        self.job = job
        self._w.changed(job)

    async def _record(self, signal: Signal, failure: Failure | None, seen: Cursor | None) -> None:
        """The outcome, in one transaction with what it does to access; then everything that follows from it."""
        now = self._w.clock.now()
        completed = signal is Signal.PROVEN_COMPLETED
        cursor = advance(self.job.cursor, seen) if seen else self.job.cursor
        if completed:
            cursor = Cursor(cursor.end, cursor.end)
        pending = Revocation.PENDING if completed and self.job.dropped else Revocation.NONE
        job = step(self.job, signal, now, finished=now, error=failure, cursor=cursor, revocation=pending, upto=None)

        async def record(sharers: tuple[Holder, ...]) -> Job:
            await self._finish(job, sharers)
            return job

        try:
            await self._w.driver.conclude(self.job, record)
        except JobError as error:
            if not self.job.state.terminal:
                raise
            log.warning("the job's files are not closed yet", extra={"fields": {"job": job.id, "error": str(error)}})
        if self._end_seen is not None:
            self._w.observer.event_lag(self._w.clock.monotonic() - self._end_seen)
        seconds = (now - (job.started or job.created)).total_seconds()
        self._w.observer.job_finished(job.spec.operation, job.state, seconds)

    async def _finish(self, job: Job, sharers: tuple[Holder, ...]) -> None:
        delay = self._w.limits.settle_retry
        while True:
            try:
                await self._w.store.finish(job, [job_event(job, END_EVENTS[job.state])], access_change(job, sharers))
                break
            except JobError as error:
                if error.code != "store_full":
                    raise
                log.error("the outcome cannot be stored", extra={"fields": {"job": job.id, "error": error.message}})
                await asyncio.sleep(delay)
                delay = min(delay * 2, self._w.limits.settle_retry_max)
        self.job = job
        self._w.changed(job)
        fields = {"job": job.id, "path": job.before.top.path, "outcome": job.state, "cur": job.cursor.cur}
        if job.error is not None:
            fields |= {"code": job.error.code, "error": job.error.message}
        log.info("job %s", job.state, extra={"fields": fields})

    async def _settle_access(self) -> None:
        """Make files match the ledger after the end; again and again until what the job dropped is settled."""
        delay = self._w.limits.settle_retry
        while True:
            try:
                await self._w.driver.drop(self.job)
                if await self._settle_dropped():
                    await self._w.driver.leave(self.job)
                    settled = self.job.dropped if self.job.state is State.COMPLETED else ()
                    others = [layer.file for layer in self.job.before.layers if layer not in settled]
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
        found = await self._w.access.converge([layer.file for layer in job.dropped], trigger=job.spec.operation)
        results = [found[layer.file] for layer in job.dropped]
        if any(result.verdict is AccessVerdict.PENDING for result in results):
            return False
        revoked = tuple(r.path for r in results if r.verdict is AccessVerdict.REVOKED)
        kept = tuple(
            Kept(r.path, r.reason or "still needed", r.holders)
            for r in results
            if r.verdict in (AccessVerdict.KEPT, AccessVerdict.GRANTED)
        )
        state = Revocation.KEPT if kept else Revocation.DONE
        if self._end_seen is not None:
            self._w.observer.revocation_lag(self._w.clock.monotonic() - self._end_seen)
        await self._save(replace(job, revocation=state, revoked=revoked, kept=kept, revision=job.revision + 1))
        return True

    # Small things

    def _report(self, cursor: Cursor) -> None:
        cursor = advance(self.job.cursor, cursor)
        self._progress.update(self._w.clock.monotonic(), cursor)
        if cursor != self.job.cursor:
            self.job = replace(self.job, cursor=cursor, revision=self.job.revision + 1)
            self._w.changed(self.job)

    def _seen_end(self) -> None:
        if self._end_seen is None:
            self._end_seen = self._w.clock.monotonic()

    async def _lost(self, error: JobError) -> None:
        log.warning("contact lost", extra={"fields": {"job": self.job.id, "error": error.message}})
        if self.job.state is not State.UNKNOWN:
            await self._move(Signal.LOST)

    async def _pause_before_retry(self, error: JobError) -> None:
        log.warning("settling failed, trying again", extra={"fields": {"job": self.job.id, "error": error.message}})
        await self._message(self._w.limits.settle_retry)

    async def _message(self, timeout: float | None) -> Message | None:
        try:
            return await asyncio.wait_for(self._inbox.get(), timeout)
        except TimeoutError:
            return None

    async def _message_or(self, other: asyncio.Future[Any]) -> Message | None:
        """The next message, or None when `other` is done first."""
        getter = asyncio.ensure_future(self._inbox.get())
        try:
            await asyncio.wait({getter, other}, return_when=asyncio.FIRST_COMPLETED)
            return getter.result() if getter.done() else None
        finally:
            getter.cancel()

    async def _interruptible(self, work: Awaitable[tuple[str, ...]]) -> tuple[str, ...] | None:
        """The result of `work`, or None when a request changed the job's state meanwhile (`work` is cancelled)."""
        state = self.job.state
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                message = await self._message_or(task)
                if message is not None and message.ask is not Ask.LOOK:
                    await self._request(message)
                    if self.job.state is not state:
                        return None
            return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=self._w.limits.abort_timeout)

    def _give_slot(self) -> None:
        if self._has_slot:
            self._has_slot = False
            self._w.slots.give()


END_EVENTS = {
    State.COMPLETED: JobEventKind.COMPLETED,
    State.FAILED: JobEventKind.FAILED,
    State.ABORTED: JobEventKind.CANCELLED,
}


def job_event(job: Job, kind: JobEventKind) -> JobEvent:
    status = None
    if kind is JobEventKind.COMPLETED:
        status = Status.COMPLETED
    elif kind in (JobEventKind.FAILED, JobEventKind.CANCELLED):
        status = Status.FAILED
    error = job.error
    return JobEvent(
        kind=kind,
        job=job.id,
        operation=job.spec.operation,
        path=job.before.top.path,
        state=job.state,
        cur=job.cursor.cur,
        end=job.cursor.end,
        status=status,
        reason=error.code if error else None,
        error={"code": error.code, "message": error.message, "remedy": error.remedy} if error else None,
        origin=job.origin,
        labels=job.spec.labels,
    )


def access_change(job: Job, sharers: tuple[Holder, ...]) -> AccessChange:
    """What the ledger loses with the job. A job that did not complete leaves its backing chain to the image."""
    image = Holder("image", job.before.top.path)
    if job.state is State.COMPLETED:
        return AccessChange(
            release=job.holder, forget=tuple(layer.file for layer in job.dropped), sharers=(*sharers, image)
        )
    reason = f"job {job.id} is {job.state}: the image still depends on it"
    inherit = tuple(Need(layer, "r", reason) for layer in job.before.layers[1:]) if job.started else ()
    return AccessChange(release=job.holder, inherit=inherit, heir=image)


def _failure(error: JobError) -> Failure:
    if error.code == "job_failed":
        return classify(error.message)
    return Failure(error.code, error.message, error.remedy)
