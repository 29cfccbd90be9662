"""What the engine needs of the world, as protocols. The adapters live in `hostagent`; daemon.py joins them.

Every method that touches a hypervisor, a file or the store is a coroutine with a bound of its own; a method that is
said to be idempotent may be called again after a crash between it and the next record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from events.model import Event
from jobs.model import Chain, Cursor, FileId, Holder, Job, JobSpec, Need, Plan


class Contact(StrEnum):
    """What is known of the process that runs the job."""

    ALIVE = "alive"
    DEAD = "dead"
    UNRESPONSIVE = "unresponsive"


class Phase(StrEnum):
    """What the hypervisor says of the job."""

    ABSENT = "absent"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    PENDING = "pending"
    CONCLUDED = "concluded"


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at a job: the process, the hypervisor's word, and the proof that the image's header gives.

    Of an external job `after` is its chain once it has ended, which nobody knew before, and `cancelled` says that
    somebody aborted it.
    """

    contact: Contact
    phase: Phase = Phase.ABSENT
    cursor: Cursor | None = None
    error: str | None = None
    proven: bool = False
    after: Chain | None = None
    cancelled: bool = False

    @property
    def done(self) -> bool:
        """It ended, and the hypervisor says that it ended well. For a copy nothing else can say so."""
        return self.contact is Contact.ALIVE and self.phase is Phase.CONCLUDED and self.error is None


@dataclass(frozen=True, slots=True)
class AccessChange:
    """What a job's end does to the ledger, in the transaction that records it.

    `release` lose all their rows. `forget` (the files that the chain lost) is dropped from every one of `sharers`, and
    so are single `rows`, by their ids. `gains` is what holders need from now on: sharers the new top of their chain, or
    the image itself what it still depends on.
    """

    release: tuple[Holder, ...]
    forget: tuple[FileId, ...] = ()
    sharers: tuple[Holder, ...] = ()
    gains: tuple[tuple[Holder, Need], ...] = ()
    rows: tuple[str, ...] = ()


class AccessVerdict(StrEnum):
    GRANTED = "granted"
    REVOKED = "revoked"
    KEPT = "kept"
    PENDING = "pending"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class AccessResult:
    """What the converger found or did for one file."""

    path: str
    verdict: AccessVerdict
    reason: str | None = None
    holders: tuple[str, ...] = ()


class Deletion(NamedTuple):
    """`files` are no more, by any name: a file that was moved, or has another name, is not among them. `warnings` say
    what stays, and why."""

    files: frozenset[FileId] = frozenset()
    warnings: tuple[str, ...] = ()


class BlockDriver(Protocol):
    """Runs jobs on one kind of target. All but `plan` take a job that is already in the store."""

    async def plan(self, spec: JobSpec, *, preview: bool = False) -> Plan:
        """Look at the image and say what the job would do. Changes nothing. A `preview` is for people: it may take
        longer to tell how much the job needs, where a job that is to begin only asks whether there is enough."""

    async def turn(self, job: Job) -> None:
        """Wait until no other job works where one may at a time, and have that place until `leave`. Without bound, for
        the other may be long; may be cancelled. Idempotent."""

    async def prepare(self, job: Job) -> Mapping[str, Any]:
        """Leases, grants, the target's file: all that comes before the image is opened for the job. Idempotent.

        Returns what of the job is only known now, as changes to its fields: they are to be stored, and then it is to
        be called again for what depends on them.
        """

    async def check(self, job: Job) -> tuple[str, ...]:
        """Check the image as `job.spec.check` says; warnings. May be cancelled."""

    async def start(self, job: Job) -> None:
        """Open the image for writing and start the block job, or join it where it runs already. Idempotent."""

    async def advance(self, job: Job, stop: asyncio.Event) -> int:
        """Make one slice of an increment local and durable; the new cursor. `stop` ends it early and safely."""

    async def rest(self, job: Job) -> None:
        """Give back what is not needed between two increments. Idempotent."""

    async def observe(self, job: Job) -> Observation:
        """Look at the job and the image; never raises for what it sees."""

    async def audit(self, job: Job) -> tuple[str, ...]:
        """Whether the files that the job works on are what they were when it was planned, its target can have its name,
        and it can end as `job.completion` says, which is about to be asked for, or not decided yet (None): warnings
        where its result is right all the same, a JobError where it is not."""

    async def finalize(self, job: Job) -> None:
        """Make all data durable, then let a pending job end. Idempotent."""

    async def complete(self, job: Job) -> None:
        """Ask a ready job for its end. Idempotent; without effect on one that is not ready."""

    async def seal(self, job: Job) -> None:
        """Make the result of a job that is `done` durable, and give a target that we made its name. Idempotent."""

    async def harden(self, job: Job) -> None:
        """Make the target of a ready copy durable where it lies, before its group is decided. Idempotent."""

    async def name(self, job: Job) -> None:
        """Give the target of a group's member its name, which `discard` takes back; its storage daemon may have ended
        after `harden`. Idempotent."""

    async def discard(self, job: Job) -> bool:
        """Close the target of a job that did not complete, and delete it if we made it, unless its group decided that
        it stays, or a guest may have gone over to it: whether it is gone. Idempotent."""

    async def delete_dropped(self, job: Job, needed: Collection[FileId]) -> Deletion:
        """Delete the files that a completed job took out of the chain, as `job.spec.delete` says, but for those that
        others need by now, in the ledger (`needed`) or in any other way. Idempotent."""

    async def cancel(self, job: Job, *, force: bool = False) -> None: ...

    async def pause(self, job: Job) -> None: ...

    async def resume(self, job: Job) -> None: ...

    async def set_speed(self, job: Job, bandwidth: int) -> None: ...

    async def conclude(self, job: Job, record: Callable[[tuple[Holder, ...]], Awaitable[Job]]) -> None:
        """Call `record` with the holders that share the chain, then drop the ended job that it returns. `job` is as it
        will be recorded.

        Nobody can join the chain between the two: who joined before is among the holders, who joins later sees the
        chain as it is then.
        """

    async def drop(self, job: Job) -> None:
        """Close what only the ended job had open, above all the files that the chain lost. Idempotent."""

    async def leave(self, job: Job) -> None:
        """The job needs the chain no more; the last user's leaving closes it. Idempotent."""


class JobStore(Protocol):
    async def save(self, job: Job, events: Sequence[Event] = ()) -> None:
        """One transaction, durable when it returns; the events are published after it."""

    async def save_all(self, jobs: Sequence[Job]) -> None:
        """Several jobs in one transaction: all of it, or nothing, is there after a crash."""

    async def finish(self, job: Job, events: Sequence[Event], change: AccessChange) -> list[FileId]:
        """The outcome, its events and what it does to the ledger, in one transaction; the files that were released."""

    async def get(self, job_id: str) -> Job | None: ...

    async def delete(self, job_id: str) -> None: ...

    async def unsettled(self) -> list[Job]:
        """Jobs that have not ended, and ended ones whose revocation is pending; oldest first."""


class Access(Protocol):
    async def converge(
        self, files: Sequence[FileId], *, trigger: str, at: Mapping[FileId, str] | None = None
    ) -> dict[FileId, AccessResult]:
        """`at` is where the files were found, for a file of which nothing else is known."""


class Clock(Protocol):
    def now(self) -> datetime: ...

    def monotonic(self) -> float: ...


class SystemClock:
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


class Observer(Protocol):
    """Hears of what metrics want to know; must not block."""

    def job_finished(self, operation: str, outcome: str, seconds: float) -> None: ...

    def event_lag(self, seconds: float) -> None: ...

    def reconcile(self, result: str) -> None: ...

    def revocation_lag(self, seconds: float) -> None: ...
