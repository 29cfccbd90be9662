"""Starts jobs, keeps one actor for each, and answers for those that have ended."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

from events.model import JobEventKind
from jobs import pull
from jobs.actor import Actor
from jobs.errors import JobError
from jobs.group import Together
from jobs.grouping import group_of, refuse_overlap, refuse_unlike
from jobs.inbox import Ask
from jobs.model import Completion, Cursor, FileId, Group, Job, JobSpec, Operation, Plan, Revocation, State
from jobs.outcome import END_EVENTS, job_event
from jobs.ports import Access, AccessChange, BlockDriver, Clock, JobStore, Observer
from jobs.progress import View
from jobs.slots import Slots
from jobs.world import Limits, World

log = logging.getLogger(__name__)


UNSTORED = 1_000_000
"""More revisions than a job has between two stores."""


class Engine:
    """All jobs of the host. Not thread-safe: everything runs on one event loop."""

    def __init__(
        self,
        driver: BlockDriver,
        store: JobStore,
        access: Access,
        *,
        clock: Clock,
        observer: Observer,
        limits: Limits,
        changed: Callable[[Job], None],
    ) -> None:
        slots = Slots(limits.width)
        self._world = World(driver, store, access, clock, observer, limits, slots, changed, self._others_cleared)
        self._actors: dict[str, Actor] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._groups: dict[str, Together] = {}
        self._creating = asyncio.Lock()

    async def recover(self) -> int:
        """Take up every job that has not ended, and every end whose revocation is pending. How many."""
        jobs = await self._world.store.unsettled()
        for job in jobs:
            await self._regroup(job)
        for job in jobs:
            # Revisions grow with the shown progress too, which was not stored: none may come twice.
            self._spawn(replace(job, revision=job.revision + UNSTORED))
        for group in self._groups.values():
            group.look()
        return len(jobs)

    async def _regroup(self, job: Job) -> None:
        """What a group has to know of those of its jobs that need no writer any more."""
        if job.group is not None and job.group.id not in self._groups:
            found = [await self._world.store.get(one) for one in job.group.jobs]
            self._groups[job.group.id] = Together(self._world, job.group, {one.id: one for one in found if one})

    async def stop(self) -> None:
        """Let go of the jobs; what runs in storage daemons goes on, and is taken up at the next start."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # Reading

    def active(self) -> list[Job]:
        return [actor.job for actor in self._actors.values() if not actor.job.state.terminal]

    def view(self, job_id: str) -> View | None:
        actor = self._actors.get(job_id)
        return actor.view if actor else None

    async def get(self, job_id: str) -> Job:
        actor = self._actors.get(job_id)
        job = actor.job if actor else await self._world.store.get(job_id)
        if job is None:
            raise JobError("not_found", f"no job {job_id}", field="id", value=job_id, remedy="see `hostagent job list`")
        return job

    def settling(self) -> list[Job]:
        """Jobs that have ended and whose files are still being closed, or taken back."""
        return [actor.job for actor in self._actors.values() if actor.job.state.terminal]

    def on_file(self, file: FileId) -> Job | None:
        """The active job whose chain has this file on top."""
        return next((job for job in self.active() if job.before.top.file == file), None)

    # Doing

    async def plan(self, spec: JobSpec) -> Plan:
        return await self._planned(spec, preview=True)

    async def create(self, spec: JobSpec, job_id: str | None = None) -> tuple[Job, bool]:
        """The new job; or, when `job_id` was used with the same request before, that one, and False."""
        if known := await self._same_request(spec, job_id):
            return known, False
        plan = await self._planned(spec)  # not under the lock: one hung image must not hold up the others
        if await self._until_cleared(plan.before.top.file):
            plan = await self._planned(spec)
        async with self._creating:
            if known := await self._same_request(spec, job_id):
                return known, False
            self._refuse_when_full([spec])
            self._refuse_when_busy(spec, plan)
            job = self._new(spec, plan, job_id or str(uuid.uuid4()))
            # Shielded: a caller who leaves must not leave a stored job without its writer.
            await asyncio.shield(asyncio.ensure_future(self._save_and_spawn(job)))
        self._world.changed(job)
        log.info("job queued", extra={"fields": {"job": job.id, "path": job.before.top.path}})
        return job, True

    async def _planned(self, spec: JobSpec, *, preview: bool = False) -> Plan:
        try:
            return await self._world.driver.plan(spec, preview=preview)
        except JobError as error:
            if error.code == "not_found" and spec.reuse_external and error.value == spec.dest:
                error.field, error.remedy = "dest", "leave out --reuse-external: then the copy makes it"
            raise

    async def adopt(self, job: Job) -> None:
        """Follow an external job, which runs: to its end, and to that of the access that ends with it."""
        async with self._creating:
            await asyncio.shield(asyncio.ensure_future(self._save_and_spawn(job, JobEventKind.STARTED)))
        self._world.changed(job)
        log.info("job of somebody else's", extra={"fields": {"job": job.id, "target": job.spec.target}})

    async def record(self, job: Job, rows: tuple[str, ...]) -> None:
        """An external job that was over when it was found, and these rows of the ledger that go with its proof, in one
        transaction; then access ends with it as with any."""
        async with self._creating:
            await asyncio.shield(asyncio.ensure_future(self._finish_and_spawn(job, rows)))
        self._world.changed(job)
        log.info("job of somebody else's, which is over", extra={"fields": {"job": job.id, "target": job.spec.target}})

    async def create_group(self, specs: Sequence[JobSpec], group_id: str | None = None) -> tuple[list[Job], bool]:
        """Copies that complete together or not at all; all of them are stored, or none. With a `group_id` that was
        used for the same request before, those, and False."""
        refuse_unlike(specs, self._world.limits)
        group = group_of(group_id, len(specs))
        if known := await self._same_group(specs, group):
            return known, False
        plans = await self._plans(specs)
        if any([await self._until_cleared(plan.before.top.file) for plan in plans]):
            plans = await self._plans(specs)
        async with self._creating:
            if known := await self._same_group(specs, group):
                return known, False
            self._refuse_when_full(specs)
            for spec, plan in zip(specs, plans, strict=True):
                self._refuse_when_busy(spec, plan)
            jobs = [
                replace(self._new(spec, plan, job_id), group=group)
                for spec, plan, job_id in zip(specs, plans, group.jobs, strict=True)
            ]
            await asyncio.shield(asyncio.ensure_future(self._save_and_spawn_group(group, jobs)))
        for job in jobs:
            self._world.changed(job)
            fields = {"job": job.id, "path": job.before.top.path, "group": group.id}
            log.info("job queued", extra={"fields": fields})
        return jobs, True

    async def plan_group(self, specs: Sequence[JobSpec]) -> list[Plan]:
        """What `create_group` would do, with all that it would refuse of the request itself."""
        refuse_unlike(specs, self._world.limits)
        return await self._plans(specs, preview=True)

    async def _plans(self, specs: Sequence[JobSpec], *, preview: bool = False) -> list[Plan]:
        plans = [await self._planned(spec, preview=preview) for spec in specs]
        refuse_overlap(specs, plans)
        return plans

    def admit(self, *, jobs: bool) -> None:
        """Whether queued jobs may begin. Those that have begun go on."""
        if jobs:
            self._world.slots.open()
        else:
            self._world.slots.close()

    async def next(self, job_id: str, cursor: int | None) -> Job:
        job = await self.get(job_id)
        if not job.incremental:
            raise JobError("conflict", f"job {job_id} is continuous: it needs no next", remedy="watch it instead")
        if cursor is not None and cursor > job.cursor.cur:
            raise JobError(
                "conflict",
                f"cursor {cursor} is ahead of the job's ({job.cursor.cur})",
                field="cursor",
                value=cursor,
                remedy="pass the cursor that the job shows",
            )
        if cursor is not None and (job.cursor.cur > cursor or job.state.terminal or job.upto is not None):
            return job
        return await self._actor(job).ask(Ask.NEXT, cursor)

    async def abort(self, job_id: str, *, force: bool = False) -> Job:
        job = await self.get(job_id)
        if job.state is State.ABORTED or (job.intent == "abort" and not force and not job.state.terminal):
            return job
        try:
            return await self._actor(job).ask(Ask.FORCE if force else Ask.ABORT)
        except JobError as error:
            job = await self.get(job_id)
            if error.code == "conflict" and job.state is State.ABORTED:
                return job  # another's request, or ours before, came to its end meanwhile
            raise

    async def pause(self, job_id: str) -> Job:
        job = await self.get(job_id)
        return job if job.state is State.PAUSED else await self._actor(job).ask(Ask.PAUSE)

    async def resume(self, job_id: str) -> Job:
        job = await self.get(job_id)
        return job if job.state is State.RUNNING else await self._actor(job).ask(Ask.RESUME)

    async def complete(self, job_id: str, completion: Completion | None) -> Job:
        """End a job that is ready: pivot or finish. One that is ending so already only answers."""
        job = await self.get(job_id)
        if (asked := job.completion or job.sealed) is not None and completion in (None, asked):
            return job
        if job.spec.operation is Operation.PULL:
            message = f"job {job_id} is a pull, which completes by itself"
            raise JobError("conflict", message, remedy="wait for it (`hostagent job watch`)", state=job.state.value)
        actor, completion = self._actor(job), completion or job.spec.completion
        if completion is None:
            raise JobError(
                "invalid",
                f"job {job_id} can pivot or finish",
                field="completion",
                remedy="say which: --pivot (the disk goes over) or --finish (it stays)",
            )
        if completion is Completion.PIVOT and job.target is not None and job.target.network:
            message = f"job {job_id} fills an NBD export, and nothing goes over to that"
            raise JobError("invalid", message, field="completion", value="pivot", remedy="end it with --finish")
        return await actor.ask(Ask.COMPLETE, completion)

    async def set_speed(self, job_id: str, bandwidth: int) -> Job:
        return await self._actor(await self.get(job_id)).ask(Ask.SPEED, bandwidth)

    async def delete(self, job_id: str) -> None:
        """Forget an ended job. One that has not ended, or still owes a revocation, is kept."""
        job = await self.get(job_id)
        if not job.state.terminal or job.revocation is Revocation.PENDING or job_id in self._actors:
            what = "still owes a revocation" if job.state.terminal else f"is {job.state}"
            raise JobError("conflict", f"job {job_id} {what}", remedy=f"`hostagent job abort {job_id}` first, or wait")
        await self._world.store.delete(job_id)

    def hint(self, job_id: str) -> None:
        """The driver saw something that concerns this job."""
        if actor := self._actors.get(job_id):
            actor.hint()

    # Inside

    async def _same_request(self, spec: JobSpec, job_id: str | None) -> Job | None:
        """The job that this id and request made before."""
        if job_id is None:
            return None
        actor = self._actors.get(job_id)
        known = actor.job if actor else await self._world.store.get(job_id)
        if known is None or known.spec == spec:
            return known
        raise JobError(
            "conflict",
            f"job {job_id} exists with another request",
            field="id",
            value=job_id,
            remedy="choose another id, or leave it out",
        )

    async def _same_group(self, specs: Sequence[JobSpec], group: Group) -> list[Job]:
        """The jobs that this id and request made before, but for those that were deleted."""
        found = [await self._same_request(spec, one) for spec, one in zip(specs, group.jobs, strict=True)]
        jobs = [job for job in found if job is not None]
        if any(job.group != group for job in jobs):
            message = f"group {group.id} exists with another request"
            raise JobError("conflict", message, field="id", value=group.id, remedy="choose another id")
        return jobs

    async def _until_cleared(self, file: FileId) -> bool:
        """Wait for the job before on this image, when it has ended and only its access is still being settled.

        Whether there was one: a pull may follow an abort at once.
        """
        ended = [actor.job for actor in self._actors.values() if actor.job.state.terminal]
        tasks = {self._tasks[job.id] for job in ended if job.before.top.file == file and job.id in self._tasks}
        if tasks:
            await asyncio.wait(tasks, timeout=self._world.limits.request_timeout)
        return bool(tasks)

    async def _others_cleared(self, job: Job) -> bool:
        """See World. Another image of the same chain is no reason to refuse a job, but its job's leases are."""
        files = _files(job)
        others = [actor.job for actor in self._actors.values() if actor.job.id != job.id]
        ending = [other for other in others if other.state.terminal or other.intent == "abort"]
        tasks = {self._tasks[other.id] for other in ending if other.id in self._tasks and files & _files(other)}
        if tasks:
            await asyncio.wait(tasks, timeout=self._world.limits.request_timeout)
        return bool(tasks)

    def _refuse_when_full(self, specs: Sequence[JobSpec]) -> None:
        """The last tenth of the places is for who may name any image: none of the others shuts out the host's own."""
        most = self._world.limits.queue
        if not all(spec.anywhere for spec in specs):
            most -= most // 10
        ours = sum(not job.external for job in self.active())
        if ours + len(specs) > most:
            raise JobError(
                "limit", f"{ours} jobs wait or run already", remedy="wait for some to end, or raise jobs.queue"
            )

    def _refuse_when_busy(self, spec: JobSpec, plan: Plan) -> None:
        """One job per chain, and per target; also not while the end of the chain's job before is being cleared away."""
        for actor in self._actors.values():
            other = actor.job
            if other.before.top.file == plan.before.top.file:
                wait = "wait for it" if other.external else f"wait for it, or `hostagent job abort {other.id}`"
                ended = "wait: its access is still being settled (`hostagent status`)"
                raise JobError(
                    "busy",
                    f"job {other.id} ({other.spec.operation}, {other.state}) works on {plan.before.top.path!r}",
                    field="target",
                    value=spec.target,
                    remedy=ended if other.state.terminal else wait,
                    holders=[str(other.holder)],
                )

            if _same_target(other, plan):
                assert plan.target is not None
                raise JobError(
                    "busy",
                    f"{plan.target.path!r} is the target of job {other.id} ({other.state})",
                    field="dest",
                    value=spec.dest,
                    remedy=f"copy somewhere else, or `hostagent job abort {other.id}`",
                    holders=[str(other.holder)],
                )

    def _new(self, spec: JobSpec, plan: Plan, job_id: str) -> Job:
        now = self._world.clock.now()
        job = Job(
            id=job_id,
            spec=spec,
            state=State.QUEUED,
            created=now,
            since=now,
            before=plan.before,
            after=plan.after,
            cursor=Cursor(0, plan.size),
            bandwidth=spec.bandwidth,
            warnings=plan.warnings,
            target=plan.target,
            drive=plan.drive,
        )
        return replace(job, upto=pull.goal(job)) if job.incremental else job

    def _actor(self, job: Job) -> Actor:
        actor = self._actors.get(job.id)
        if actor is None or actor.job.state.terminal:
            raise JobError("conflict", f"job {job.id} is {job.state}", state=job.state.value)
        if job.external:
            message = f"job {job.id} is somebody else's: it is followed, and not interfered with"
            disk = f"{job.drive.name} {job.drive.target}" if job.drive else "DOMAIN DISK"
            remedy = f"ask who started it; `virsh blockjob {disk} --abort` ends it"
            raise JobError("conflict", message, remedy=remedy, state=job.state.value)
        return actor

    async def _save_and_spawn(self, job: Job, told: JobEventKind | None = None) -> None:
        await self._world.store.save(job, [job_event(job, told)] if told else [])
        self._spawn(job)

    async def _finish_and_spawn(self, job: Job, rows: tuple[str, ...]) -> None:
        await self._world.store.finish(job, [job_event(job, END_EVENTS[job.state])], AccessChange((), rows=rows))
        self._world.observer.job_finished(job.spec.operation, job.state, 0.0)
        self._spawn(job)

    async def _save_and_spawn_group(self, group: Group, jobs: Sequence[Job]) -> None:
        await self._world.store.save_all(jobs)
        self._groups[group.id] = Together(self._world, group, {})
        for job in jobs:
            self._spawn(job)

    def _spawn(self, job: Job) -> None:
        group = self._groups[job.group.id] if job.group else None
        actor = Actor(self._world, job, group)
        if group is not None:
            group.join(actor)
        self._actors[job.id] = actor
        self._tasks[job.id] = asyncio.create_task(self._run(actor), name=f"job {job.id}")

    async def _run(self, actor: Actor) -> None:
        """Run the writer; one that fails itself begins again where the job stands, ever more slowly."""
        limits = self._world.limits
        delay = limits.settle_retry
        while True:
            try:
                await actor.run()
                break
            except Exception:  # a task root
                log.exception("the writer of a job failed", extra={"fields": {"job": actor.job.id}})
                self._world.observer.reconcile("writer_failed")
                await asyncio.sleep(delay)
                delay = min(delay * 2, limits.settle_retry_max)
        self._actors.pop(actor.job.id, None)
        self._tasks.pop(actor.job.id, None)
        if (of := actor.job.group) is not None and not self._groups[of.id].among(self._actors):
            del self._groups[of.id]


def _files(job: Job) -> set[FileId]:
    """All that the job has leased."""
    layers = {layer.file for layer in job.before.layers}
    return layers | ({job.target.file} if job.target and job.target.file else set())


def _same_target(job: Job, plan: Plan) -> bool:
    """Whether the job, which has not ended, writes the copy's target, or makes a file of that name."""
    if job.state.terminal or job.target is None or plan.target is None:
        return False
    same = job.target.file is not None and job.target.file == plan.target.file
    return same or job.target.path == plan.target.path
