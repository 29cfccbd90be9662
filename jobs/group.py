"""Copies that complete together or not at all: what the writers of a group's jobs must know of each other.

    ready → sealed → named → decided → completed

A member that is in sync waits until all are. Then each target is made whole and durable where it lies, and that is
stored (`sealed`); when all are, each gets its name; when all have theirs, the completion of all jobs is stored in one
transaction: the decision. Only after it does the hypervisor end a job. Before it, whatever ends one member ends all,
and names are taken back with the targets; after it every result is there, whatever becomes of its storage daemon.
Should QEMU then refuse the pivot of a member whose storage daemon lives, that one alone says so (`failed`,
pivot_refused): its copy stays, and so does who uses its disk, where he was. So a member that has ended undecided, or
that is not in the store any more, did not complete, and nothing else needs to be remembered over a restart.

Each job has its own writer still. Who takes part in the decision stands still for it: what a member that is named
writes, it writes in its `turn`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from jobs.inbox import Ask
from jobs.keeper import Keeper, change_together
from jobs.machine import HOLDS_SLOT
from jobs.model import Completion, Failure, Group, Job, State
from jobs.world import World

FAILED = "group_failed"
"""The code of a job that failed because another of its group did."""


class Member(Protocol):
    """A job's writer, as its group sees it."""

    @property
    def job(self) -> Job: ...

    @property
    def keeper(self) -> Keeper: ...

    def hint(self) -> None: ...

    def order(self, ask: Ask, value: Any = None) -> None: ...


class Together:
    """The members of one group, while any of them has a writer."""

    def __init__(self, world: World, group: Group, ended: Mapping[str, Job]) -> None:
        """`ended` are those that have no writer any more, so far as they are stored."""
        self.turn = asyncio.Lock()
        self._w = world
        self._group = group
        self._ended = ended
        self._members: dict[str, Member] = {}
        self._named: set[str] = set()
        self._turns: dict[str, asyncio.Future[None]] = {}
        self._letting_in: asyncio.Task[None] | None = None

    def join(self, member: Member) -> None:
        self._members[member.job.id] = member

    def among(self, ids: Mapping[str, Any]) -> bool:
        """Whether one of the members is among these."""
        return any(one in ids for one in self._group.jobs)

    @property
    def _jobs(self) -> list[Job | None]:
        """All members in their order; None is one that was deleted."""
        return [self._job(one) for one in self._group.jobs]

    def _job(self, job_id: str) -> Job | None:
        member = self._members.get(job_id)
        return member.job if member else self._ended.get(job_id)

    # What ends one ends all

    def look(self) -> None:
        """Something of a member is stored now: tell the others what it means to them."""
        end = self._end()
        for member in self._members.values():
            job = member.job
            if job.state.terminal:
                continue
            if end is not None and job.intent is None and job.error is None:
                member.order(*end)
            else:
                member.hint()

    def _end(self) -> tuple[Ask, Failure | None] | None:
        """What ends all of them, as the first says that did not end for the others' sake."""
        jobs = self._jobs
        if any(job is not None and job.decided for job in jobs):
            return None
        if any(job is not None and job.intent == "abort" for job in jobs):
            return Ask.ABORT, None
        failed = [job for job in jobs if job is not None and job.error is not None]
        first = next((job for job in failed if job.error and job.error.code != FAILED), None)
        if first is not None and first.error is not None:
            return Ask.FAIL, _failure(f"the copy of {first.before.top.path!r} failed: {first.error.message}")
        if failed or None in jobs:
            return Ask.FAIL, _failure("another of its copies ended")
        return None

    # In sync, sealed, named, decided

    def lagging(self) -> Job | None:
        """A member that is not in sync yet."""
        return next((job for job in self._jobs if job is not None and not _in_sync(job)), None)

    def end_asked(self) -> Completion | None:
        """The end that all were asked for; None before all are in sync."""
        jobs = [job for job in self._jobs if job is not None and _in_sync(job)]
        if len(jobs) < len(self._group.jobs):
            return None
        return next((job.sealed for job in jobs if job.sealed), jobs[0].spec.completion)

    def all_sealed(self) -> bool:
        return all(job is not None and _sealed(job) for job in self._jobs)

    def has_name(self, job_id: str) -> None:
        self._named.add(job_id)
        for member in self._members.values():
            member.hint()

    def leaves(self, job_id: str) -> None:
        """The member does not stand still for the decision any more."""
        self._named.discard(job_id)

    async def decide(self) -> bool:
        """Once all are named, store that all complete. Call it in the turn of one that is."""
        if self._named != set(self._group.jobs) or not self.all_sealed():
            return False
        completion = self.end_asked()
        assert completion is not None
        members = [self._members[one] for one in self._group.jobs]
        jobs = [_decided(member.job, completion) for member in members]
        await change_together([member.keeper for member in members], jobs)
        return True

    # Slots

    async def slot(self, job_id: str) -> None:
        """A slot for this member: all that are queued get theirs in one moment, so that no two groups wait for each
        other with half of what they need. The rest of one that had begun had its slots before a restart."""
        if any(job is not None and _begun(job) for job in self._jobs):
            self._w.slots.occupy()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns[job_id] = turn
        if len(self._turns) == len(self._group.jobs):
            self._letting_in = asyncio.create_task(self._let_in())
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._w.slots.give()
            elif self._letting_in is not None:
                self._letting_in.cancel()
            raise
        finally:
            self._turns.pop(job_id, None)

    async def _let_in(self) -> None:
        wanted, width = len(self._turns), self._w.limits.width
        await self._w.slots.take(min(wanted, width))
        for _ in range(wanted - width):  # the width was made smaller since they were asked for
            self._w.slots.occupy()
        for turn in self._turns.values():
            if turn.done():  # cancelled in this moment
                self._w.slots.give()
            else:
                turn.set_result(None)


def _failure(why: str) -> Failure:
    return Failure(
        FAILED, f"of its group {why}", "see to that, then copy the group again; the images are what they were"
    )


def _in_sync(job: Job) -> bool:
    return job.state is State.READY or _sealed(job)


def _sealed(job: Job) -> bool:
    return job.state is State.COMPLETING and job.sealed is not None and job.error is None


def _begun(job: Job) -> bool:
    return job.started is not None or (job.state in HOLDS_SLOT and job.intent is None and job.error is None)


def _decided(job: Job, completion: Completion) -> Job:
    after = job.before if completion is Completion.FINISH else job.after
    return replace(job, completion=completion, after=after, revision=job.revision + 1)
