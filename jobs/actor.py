"""One job's writer: the only task that changes it.

The actor sits in the handler of the job's present state until the state changes; each handler begins as if the agent
had just been restarted in that state, so recovery is not a second code path. Requests of users and hints of the driver
come through one bounded inbox. A hint has no content that is believed: it makes the actor look (`observe`), and a lost
one costs at most a progress interval.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from events.model import JobEventKind
from jobs import pull
from jobs.errors import JobError
from jobs.group import Together
from jobs.inbox import Ask, Inbox, Message
from jobs.keeper import Keeper
from jobs.machine import HOLDS_SLOT, Signal, accepts, step
from jobs.model import Completion, Failure, Job, State
from jobs.outcome import failure_of
from jobs.ports import Contact, Observation, Phase
from jobs.progress import View
from jobs.settle import PIVOT_REFUSED, again, decide, pivot_refused
from jobs.world import World

log = logging.getLogger(__name__)
T = TypeVar("T")

CANNOT_END = "it cannot end yet"
"""Begins a warning; `hostagent status` looks for it."""
PENDING = 0.005
"""Seconds until the next look at what awaits its data only, which come soon or late: as much more after each."""


class Actor:
    def __init__(self, world: World, job: Job, group: Together | None = None) -> None:
        self._w = world
        self._group = group
        self._inbox = Inbox()
        believed = group.look if group else lambda: None
        self._keeper = Keeper(world, job, held=self._inbox.hold, believed=believed)
        self._has_slot = False
        self._refused = 0  # times that the end of a decided member was
        self._end: Observation | None = None  # the look that found the job ended, until it is judged
        self._pending = 0  # looks, the last ones, that found that only its data are awaited

    @property
    def job(self) -> Job:
        return self._keeper.job

    @property
    def keeper(self) -> Keeper:
        return self._keeper

    @property
    def view(self) -> View:
        return self._keeper.view

    def hint(self) -> None:
        """Something may have happened: look."""
        self._inbox.hint()

    def order(self, ask: Ask, value: Any = None) -> None:
        """What the job's group makes it do."""
        self._inbox.order(ask, value)

    async def ask(self, ask: Ask, value: Any = None) -> Job:
        """Put a request and wait until it is carried out or refused."""
        return await self._inbox.ask(ask, value, self._w.limits.request_timeout, self.job.id)

    # The life of the job

    async def run(self) -> None:
        try:
            while not self.job.state.terminal:
                await self._live()
            self._let_go()  # before its access is settled, which may take as long as somebody's storage hangs
            await self._keeper.settle_access()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._give_slot()
        self._inbox.refuse_all(
            JobError("conflict", f"job {self.job.id} is {self.job.state}", state=self.job.state.value)
        )

    async def _live(self) -> None:
        """One stay in one state. What a handler raises is the job's failure, or lost contact."""
        state = self.job.state
        if state in HOLDS_SLOT and not self._has_slot and not self.job.external:
            self._w.slots.occupy()
            self._has_slot = True
        try:
            await self._handlers[state](self)
        except JobError as error:
            if self.job.state is not state:
                raise
            if error.code == "unresponsive" and accepts(self.job, Signal.LOST):
                await self._lost(error)
            elif state in (State.WAITING, State.COMPLETING, State.ABORTING, State.UNKNOWN):
                await self._pause_before_retry(error)
            else:
                await self._fail(failure_of(self.job, error))
        except Exception as error:
            if self.job.state is not state or not accepts(self.job, Signal.ENDED):
                raise
            log.exception("a fault of the agent", extra={"fields": {"job": self.job.id}})
            await self._fail(
                Failure("internal", f"a fault of the agent: {error!r}", "see the agent's log; " + again(self.job))
            )

    async def _fail(self, failure: Failure) -> None:
        """The job cannot go on. What became of it is still for the image to say."""
        await self._keeper.move(Signal.ENDED, error=failure)

    async def _queued(self) -> None:
        admitted = asyncio.ensure_future(self._admitted())
        try:
            while not admitted.done():
                message = await self._inbox.next_or(admitted)
                if message is not None:
                    await self._request(message)
                    if self.job.state is not State.QUEUED:
                        return
            self._has_slot = True
            await self._keeper.move(Signal.ADMIT)
        finally:
            if not self._has_slot and not admitted.cancel() and admitted.done() and not admitted.cancelled():
                self._w.slots.give()

    async def _admitted(self) -> None:
        await self._w.driver.turn(self.job)
        await (self._group.slot(self.job.id) if self._group else self._w.slots.take())

    async def _starting(self) -> None:
        driver = self._w.driver
        try:
            await self._prepare()
        except JobError as error:
            if error.code != "busy":
                raise
            cleared = await self._interruptible(self._w.cleared(self.job))
            if self.job.state is not State.STARTING:
                return
            if not cleared:
                raise
            await self._prepare()
        if self.job.cursor.cur == 0 and self.job.started is None:
            warnings = await self._interruptible(driver.check(self.job))
            if warnings is None:
                return
            await self._keeper.warn(warnings)
        if not self.job.incremental:
            await self._keeper.writes()
            await driver.start(self.job)
        await self._keeper.started()

    async def _running(self) -> None:
        if self._agent_driven:
            await self._prepare()
            await self._step()
            return
        seen = await self._w.driver.observe(self.job)
        if seen.contact is Contact.ALIVE:
            await self._prepare()
            await self._w.driver.start(self.job)
            if seen.phase is Phase.PAUSED:  # a pause that was not recorded any more
                await self._w.driver.resume(self.job)
            if self.job.bandwidth != self.job.spec.bandwidth and not self.job.incremental:
                await self._w.driver.set_speed(self.job, self.job.bandwidth)  # perhaps asked while it was unknown
        await self._look()
        await self._stream()

    async def _prepare(self) -> None:
        while changes := await self._w.driver.prepare(self.job):
            await self._keeper.change(**changes)

    async def _stream(self) -> None:
        """A block job runs in the hypervisor: follow it until it is not running any more."""
        while self.job.state is State.RUNNING:
            message = await self._inbox.next(self._interval)
            if message is not None and message.ask is not Ask.LOOK:
                await self._request(message)
            else:
                await self._look()

    async def _look(self) -> None:
        seen = await self._w.driver.observe(self.job)
        self._pending = self._pending + 1 if seen.phase is Phase.PENDING else 0
        if seen.cursor is not None:
            self._keeper.report(seen.cursor)
            await self._keeper.remember()
        if seen.contact is Contact.UNRESPONSIVE:
            await self._keeper.lost()
        elif seen.contact is Contact.DEAD or seen.phase in (Phase.CONCLUDED, Phase.ABSENT):
            self._keeper.seen_end()
            await self._keeper.move(Signal.ENDED)
            self._end = seen
        elif seen.phase is Phase.PENDING:
            await self._audit()
            await self._w.driver.finalize(self.job)
        elif seen.phase is Phase.PAUSED and self.job.drive is not None:  # a pause that was given up came through
            await self._w.driver.resume(self.job)
        elif seen.phase is Phase.READY and self.job.state is State.RUNNING:
            first = self.job.ready is None  # not again when only contact was lost meanwhile
            kind = JobEventKind.READY if first else None
            await self._keeper.move(Signal.IN_SYNC, kind=kind, ready=self.job.ready or self._w.clock.now())

    async def _ready(self) -> None:
        """In sync: it ends when its end is asked for, with the job or later."""
        if self.job.spec.completion is None:
            await self._warn_early()
        while self.job.state is State.READY:
            await self._look()
            if self.job.state is not State.READY:
                return
            completion = self._group.end_asked() if self._group else self.job.spec.completion
            if completion is not None:
                await self._complete(completion)
                return
            message = await self._inbox.next(self._interval)
            if message is not None and message.ask is not Ask.LOOK:
                await self._request(message)

    async def _complete(self, completion: Completion) -> None:
        """Decided and stored before it is asked for: what ends well after this may not be called aborted."""
        await self._audit(completion)
        if self._group is not None:  # all of it is decided together, when each result is safe
            await self._w.driver.harden(self.job)
            await self._keeper.move(Signal.ENDED, sealed=completion)
            return
        after = self.job.before if completion is Completion.FINISH else self.job.after
        await self._keeper.move(Signal.ENDED, completion=completion, after=after)

    async def _audit(self, completion: Completion | None = None) -> None:
        """Before the end is asked for, while it can still be refused: QEMU takes what a file has lost for zeros."""
        await self._keeper.warn(await self._w.driver.audit(replace(self.job, completion=completion)))

    async def _warn_early(self) -> None:
        """What would stand in the way of its end its user can still clear away."""
        try:
            await self._audit()
        except JobError as error:
            if error.code in ("unresponsive", "storage_daemon_died"):
                raise
            await self._keeper.warn([error.message])

    async def _step(self) -> None:
        """An increment, slice by slice; each slice's cursor is stored when its data is durable."""
        upto = self.job.upto if self.job.upto is not None else pull.goal(self.job)
        while self.job.state is State.RUNNING and self.job.cursor.cur < upto:
            stop = asyncio.Event()
            slice_ = asyncio.ensure_future(self._w.driver.advance(replace(self.job, upto=upto), stop))
            message: Message | None = None
            try:
                while not slice_.done() and message is None:
                    message = await self._inbox.next_or(slice_)
                    if message is not None and message.ask is Ask.LOOK:
                        message = None
                stop.set()
                await self._keeper.reached(await slice_)
            except BaseException:
                if message is not None:
                    self._inbox.put_back(message)
                raise
            finally:
                if not slice_.done():
                    slice_.cancel()
                    await asyncio.wait({slice_}, timeout=self._w.limits.abort_timeout)
            if message is not None:
                await self._request(message)
        if self.job.state is State.RUNNING and self.job.cursor.cur < self.job.cursor.end:
            await self._w.driver.rest(self.job)  # who sees `waiting` finds the image closed and unlocked
            await self._keeper.move(Signal.STEPPED, upto=None)

    async def _paused(self) -> None:
        await self._look_while_paused()
        while self.job.state is State.PAUSED:
            message = await self._inbox.next(None if self._agent_driven else self._interval)
            if message is None or message.ask is Ask.LOOK:
                await self._look_while_paused()
            else:
                await self._request(message)

    async def _look_while_paused(self) -> None:
        if self._agent_driven:
            return  # nothing runs: it goes on from its cursor whatever became of the daemon
        seen = await self._w.driver.observe(self.job)
        if seen.contact is Contact.UNRESPONSIVE:
            await self._keeper.lost()
        elif seen.contact is Contact.DEAD or seen.phase in (Phase.CONCLUDED, Phase.ABSENT):
            self._keeper.seen_end()
            await self._keeper.move(Signal.ENDED)

    async def _waiting(self) -> None:
        await self._w.driver.rest(self.job)
        self._give_slot()
        while self.job.state is State.WAITING:
            message = await self._inbox.next(None)
            assert message is not None
            if message.ask is not Ask.LOOK:
                await self._request(message)

    async def _ending(self) -> None:
        """Completing or aborting: ask for the end where that is our part, then settle."""
        to_cancel = self.job.state is State.ABORTING or self.job.error is not None
        if to_cancel:
            await self._w.driver.cancel(self.job)
        elif self._group is not None and self.job.sealed is not None and not self.job.decided:
            await self._until_decided(self._group)
            return
        elif self.job.completion is not None and not await self._ask_for_the_end():
            return
        while not self.job.state.terminal:
            seen = await self._sealed(self._end or await self._w.driver.observe(self.job))
            self._end = None
            if seen.after is not None and seen.after != self.job.after:
                await self._keeper.change(after=seen.after)
            verdict = decide(self.job, seen, self.job.error)
            if verdict.signal is Signal.LOST:
                await self._keeper.lost()
                return
            if verdict.signal is not None:
                self._keeper.seen_end()
                await self._keeper.record(verdict.signal, verdict.failure, seen.cursor)
                return
            if self.job.state is State.COMPLETING and self.job.error is None and self.job.completion is None:
                await self._keeper.started()
                return
            message = await self._inbox.next(self._w.limits.progress_interval)
            if message is not None and message.ask is not Ask.LOOK:
                await self._request(message)
                if (self.job.state is State.ABORTING or message.ask is Ask.FAIL) and not to_cancel:
                    return  # and in again, to ask for that
            elif seen.phase is Phase.READY and not to_cancel and not await self._ask_for_the_end():
                return  # it was asked again, for it may not have listened

    async def _until_decided(self, group: Together) -> None:
        """Sealed: it gets its name when all are, and waits until all have theirs. Until then it can be taken back."""
        self._end, named = None, False
        try:
            while self.job.state is State.COMPLETING and self.job.error is None and not self.job.decided:
                if not named and group.all_sealed():
                    if not await self._named():
                        return
                    named = True
                    group.has_name(self.job.id)
                async with group.turn:
                    if self.job.decided or (named and await group.decide()):
                        return
                message = await self._inbox.next(self._w.limits.progress_interval)
                if message is not None and message.ask is not Ask.LOOK:
                    async with group.turn:
                        await self._request(message)
        finally:
            group.leaves(self.job.id)

    async def _named(self) -> bool:
        try:
            await self._w.driver.name(self.job)
        except JobError as error:
            await self._keeper.change(error=failure_of(self.job, error))
            return False
        return True

    async def _ask_for_the_end(self) -> bool:
        """False when it is to be cancelled instead: where the driver gives up, which it says by pivot_refused, and of a
        decided member, which is whole. Of any other job nobody else depends on its end, and it is asked until somebody
        aborts it."""
        try:
            await self._w.driver.complete(self.job)
        except JobError as error:
            if error.code == "storage_daemon_died":  # that is an end, too, and judged as any other
                return True
            if error.code == PIVOT_REFUSED and not self.job.decided:
                await self._keeper.change(error=failure_of(self.job, error))
                return False
            self._refused += error.code != "unresponsive"
            if not self.job.decided or self._refused <= self._w.limits.end_retries:
                raise
            log.error("QEMU refuses the end", extra={"fields": {"job": self.job.id, "error": error.message}})
            if self.job.completion is Completion.PIVOT:
                await self._keeper.change(error=pivot_refused(self.job, error.message))
                return False
            await self._w.driver.cancel(self.job)
        return True

    async def _sealed(self, seen: Observation) -> Observation:
        """Make sure of a result that nothing but the hypervisor's word says, once it has said it."""
        if self.job.completion is None or self.job.error is not None or not seen.done:
            return seen
        if seen.proven and not self.job.decided:
            return seen
        try:
            await self._w.driver.seal(self.job)
        except JobError as error:
            if self.job.decided and error.code == "storage_daemon_died":
                return seen
            if self.job.completion is Completion.PIVOT or self.job.decided or error.code == "unresponsive":
                raise  # clients may read from the target already: it is tried until it is done
            await self._keeper.change(error=failure_of(self.job, error))
            return seen
        return replace(seen, proven=True)

    async def _unknown(self) -> None:
        """Contact is lost. A look may find it again; there is no deadline."""
        delay = self._w.limits.settle_retry
        while self.job.state is State.UNKNOWN:
            message = await self._inbox.next(delay)
            delay = min(delay * 2, self._w.limits.settle_retry_max)
            if message is not None and message.ask is not Ask.LOOK:
                await self._request(message)
                continue
            seen = await self._w.driver.observe(self.job)
            if seen.contact is Contact.UNRESPONSIVE:
                continue
            if self.job.intent == "abort":
                await self._keeper.move(Signal.ABORT)
            elif self.job.error is not None:
                await self._keeper.move(Signal.ENDED)
            elif seen.phase in (Phase.RUNNING, Phase.PENDING, Phase.READY) and self.job.completion is None:
                await self._keeper.started()
            elif seen.phase is Phase.PAUSED and self.job.completion is None:
                await self._keeper.move(Signal.PAUSED)
            elif self._agent_driven and seen.contact is Contact.ALIVE:
                await self._keeper.started()
            else:
                self._keeper.seen_end()
                await self._keeper.move(Signal.ENDED)

    _handlers: dict[State, Callable[[Actor], Awaitable[None]]] = {  # noqa: RUF012 - a constant table
        State.QUEUED: _queued,
        State.STARTING: _starting,
        State.RUNNING: _running,
        State.PAUSED: _paused,
        State.WAITING: _waiting,
        State.READY: _ready,
        State.COMPLETING: _ending,
        State.ABORTING: _ending,
        State.UNKNOWN: _unknown,
    }

    # Requests

    async def _request(self, message: Message) -> None:
        if message.given_up:
            return
        try:
            await self._carry_out(message)
            message.answer(self.job)
        except JobError as error:
            message.refuse(error)
            if error.code == "unresponsive" and self.job.state in (State.RUNNING, State.PAUSED):
                await self._lost(error)
        except asyncio.CancelledError:
            message.refuse(JobError("unavailable", "the agent is stopping", remedy="ask again when it is back"))
            raise
        except BaseException:
            message.refuse(JobError("internal", "a fault of the agent", remedy="see the agent's log"))
            raise

    async def _carry_out(self, message: Message) -> None:
        driver, job = self._w.driver, self.job
        match message.ask:
            case Ask.ABORT | Ask.FORCE:
                await self._abort(force=message.ask is Ask.FORCE)
            case Ask.NEXT:
                if message.value is None and job.state is not State.WAITING:
                    remedy = "wait until it is waiting, or say from which cursor on: that may be repeated"
                    raise JobError("conflict", f"job {job.id} is {job.state}, not waiting", remedy=remedy)
                if job.state is State.WAITING and message.value in (None, job.cursor.cur):
                    await self._keeper.move(Signal.NEXT, upto=pull.goal(job))
            case Ask.PAUSE:
                step(job, Signal.PAUSED, self._w.clock.now())
                if not self._agent_driven:
                    await driver.pause(job)
                await self._keeper.move(Signal.PAUSED)
            case Ask.RESUME:
                if job.state is not State.PAUSED:
                    waits = job.state is State.WAITING
                    then = f"begin its next increment: hostagent job next {job.id}" if waits else None
                    why = f"job {job.id} is {job.state}, not paused"
                    raise JobError("conflict", why, remedy=then, state=job.state.value)
                if not self._agent_driven:
                    await driver.resume(job)
                await self._keeper.move(Signal.RESUMED)
            case Ask.COMPLETE:
                await self._complete_when_asked(message.value)
            case Ask.FAIL:
                await self._fail_with_the_others(message.value)
            case Ask.SPEED:
                if job.state in (State.RUNNING, State.PAUSED) and not self._agent_driven:
                    await driver.set_speed(job, message.value)
                await self._keeper.change(bandwidth=message.value)

    @property
    def _agent_driven(self) -> bool:
        """Between the first byte and the last step of an incremental pull no block job runs: the agent pulls."""
        return self.job.incremental and self.job.cursor.cur < self.job.cursor.end

    async def _complete_when_asked(self, completion: Completion) -> None:
        late = self._group.lagging() if self._group else None
        if self.job.state is not State.READY or late is not None:
            which = self.job if self.job.state is not State.READY or late is None else late
            remedy = "wait until it is ready (`hostagent job watch`)"
            raise JobError("conflict", f"job {which.id} is {which.state}, not ready", remedy=remedy)
        if self._group is not None and (asked := self._group.end_asked()) not in (None, completion):
            raise JobError("conflict", f"its group was asked to {asked}", remedy="wait for it")
        await self._complete(completion)

    async def _fail_with_the_others(self, failure: Failure) -> None:
        if self.job.decided or self.job.error is not None or self.job.intent is not None:
            return
        if self.job.state is State.COMPLETING:
            await self._keeper.change(error=failure)
        else:
            await self._fail(failure)

    async def _abort(self, *, force: bool) -> None:
        if self.job.decided:
            message = f"job {self.job.id} completes with its group, which is decided"
            raise JobError("conflict", message, remedy="wait for it", state=self.job.state.value)
        if force and self.job.state in (State.ABORTING, State.UNKNOWN):
            self._refuse_haste()
            await self._w.driver.cancel(self.job, force=True)
        if self.job.state is State.UNKNOWN:
            await self._keeper.change(intent="abort")
        elif self.job.state is not State.ABORTING:
            await self._keeper.move(Signal.ABORT, intent="abort")

    # Small things

    @property
    def _interval(self) -> float:
        """Until the next look at what runs. libvirt tells of the end of a guest's job, but not of its data's."""
        limits = self._w.limits
        if self._pending:
            return min(limits.progress_interval, PENDING * self._pending)
        return limits.progress_interval if self.job.drive is None else limits.live_interval

    def _refuse_haste(self) -> None:
        """Killing loses what was not written: first the job has its time to end, or to be heard of again."""
        left = self._w.limits.abort_timeout - (self._w.clock.now() - self.job.since).total_seconds()
        if left > 0:
            message = f"job {self.job.id} has {left:.0f} s left to end by itself (jobs.abort_timeout)"
            raise JobError("busy", message, remedy="then use --force again")

    async def _lost(self, error: JobError) -> None:
        log.warning("contact lost", extra={"fields": {"job": self.job.id, "error": error.message}})
        if self.job.state is not State.UNKNOWN:
            await self._keeper.lost()

    async def _pause_before_retry(self, error: JobError) -> None:
        log.warning("settling failed, trying again", extra={"fields": {"job": self.job.id, "error": error.message}})
        if self.job.state in (State.COMPLETING, State.ABORTING):  # until somebody clears away what is in its way
            await self._keeper.warn([f"{CANNOT_END}: {error.message}"])
        message = await self._inbox.next(self._w.limits.settle_retry)
        if message is not None and message.ask is not Ask.LOOK:
            await self._request(message)

    async def _interruptible(self, work: Awaitable[T]) -> T | None:
        """The result of `work`, or None when a request changed the job's state meanwhile (`work` is cancelled)."""
        state = self.job.state
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                message = await self._inbox.next_or(task)
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
