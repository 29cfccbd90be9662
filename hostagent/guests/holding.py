"""What domains need, kept in the ledger: so that what libvirt leaves open is closed when the last of them is done.

Of each disk of each domain, running or defined, the ledger has a holder with the files of its chain. It is read anew
when libvirt tells of the domain, after each new connection, before and after a job on it, and now and then. While it is
not known of every domain what it needs (no connection, one that was just defined, one that cannot be read), nothing is
given back whose owner libvirt has changed: `know_domains` says so to the ledger before anything else is done.

What is not there any more, and what cannot be read, is no reason to need less: then the disk keeps what it had. And
what its chain has lost its image keeps, until it is proven that it does not need it: by the job that took it out, or
by unseen.py. For QEMU writes a header before the data that it relies on, and libvirt believes QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from events.model import DiskJobEvent, DomainEvent, DomainEventKind, HypervisorEvent
from hostagent.drivers.hypervisor import Hypervisor
from hostagent.drivers.libvirt import DomainRef
from hostagent.guests.disks import drive_of, ref_of
from hostagent.guests.needs import DiskNeeds
from hostagent.guests.reading import Reading, Settings
from hostagent.guests.strands import layer_of
from hostagent.locks import Locks
from hostagent.records import AccessFile, AccessRow, Use
from jobs.errors import JobError
from jobs.model import Drive, FileId, Holder, Job, Layer, Need, State
from jobs.ports import AccessResult, AccessVerdict

log = logging.getLogger(__name__)
Found = tuple[DomainRef, tuple[DiskNeeds, ...]]

KIND = "domain"

WIDTH = 4
"""Domains that are looked at together, of the 32 threads for all files."""
AGAIN = 10.0
"""Seconds until a domain that could not be read is looked at again."""

AFTER_JOB = 0.5
"""Seconds from a block job's end until its domain is looked at here: whoever follows the job does that at once."""

FRESH = 0.25
"""Seconds for which what was read of a domain when its job was seen to be done is as good as what is read later."""

NEW = (DomainEventKind.DEFINED, DomainEventKind.STARTED)
"""After these a domain may need more than is known of it."""


class Access(Protocol):
    def know_domains(self, known: bool, named: Mapping[FileId, str] | None = None) -> None: ...

    async def hold(
        self, holder: Holder, uses: Sequence[Use], *, name: str, trigger: str
    ) -> dict[FileId, AccessResult]: ...

    async def share(self, holder: Holder, uses: Sequence[Use], *, trigger: str) -> None: ...

    async def lose(
        self, image: Holder, uses: Sequence[Use], *, name: str, trigger: str, file: FileId | None = None
    ) -> None: ...

    async def forget(self, holder: Holder, files: Sequence[FileId], *, trigger: str) -> None: ...

    async def release(self, holder: Holder, *, trigger: str) -> None: ...

    async def converge(self, files: Sequence[FileId], *, trigger: str) -> dict[FileId, AccessResult]: ...


class Rows(Protocol):
    async def access_rows(self, files: Sequence[FileId] | None = None) -> list[AccessRow]: ...

    async def access_files(self, files: Sequence[FileId] | None = None) -> list[AccessFile]: ...


class Holding:
    """`run` is a task for as long as the agent lives; `event`, `resync` and `lost` are for whoever hears libvirt."""

    def __init__(self, hypervisor: Hypervisor, ledger: Access, rows: Rows, settings: Settings) -> None:
        self._hypervisor = hypervisor
        self._ledger = ledger
        self._rows = rows
        self._settings = settings
        self._reading = Reading(hypervisor, settings)
        self._all = True
        self._stale: set[str] = set()
        self._seen: dict[str, tuple[DiskNeeds, ...]] = {}
        self._named: dict[str, dict[FileId, str]] = {}
        self._troubles: dict[str, JobError] = {}
        self._foreseen: dict[str, tuple[float, asyncio.Task[Found]]] = {}
        self._turns = Locks()
        self._wake = asyncio.Event()
        self._known = asyncio.Event()

    # What libvirt tells

    def event(self, event: HypervisorEvent) -> None:
        if isinstance(event, DiskJobEvent):
            asyncio.get_running_loop().call_later(AFTER_JOB, self._note, event.domain)
        elif isinstance(event, DomainEvent):
            self._foreseen.pop(event.domain, None)
            if event.kind in NEW:
                self._unknow()
            self._note(event.domain)

    def _note(self, domain: str) -> None:
        self._stale.add(domain)
        self._wake.set()

    def resync(self) -> None:
        """A new connection, or events were lost."""
        self._unknow()
        self._foreseen.clear()
        self._all = True
        self._reading.anew()
        self._seen.clear()
        self._wake.set()

    def lost(self) -> None:
        """There is no connection."""
        self._unknow()

    def _unknow(self) -> None:
        self._known.clear()
        self._ledger.know_domains(False)

    # What is said of it

    def check(self) -> dict[str, Any]:
        """For /readyz: it keeps nobody from working."""
        if self._known.is_set():
            disks = sum(len(one) for one in self._seen.values())
            return {"ok": True, "detail": f"of {len(self._seen)}, with {disks} disks, it is known what they need"}
        detail = "what they need is not known: nothing is given back that libvirt has made the hypervisor user's"
        if not self._hypervisor.status.connected or not self._troubles:
            return {"ok": True, "detail": detail}
        error = next(iter(self._troubles.values()))
        return {"ok": True, "detail": f"{detail}; {error.message}", "remedy": error.remedy or "see the agent's log"}

    # Reading

    async def renew(self, drive: Drive, *, proven: Collection[FileId] = ()) -> DomainRef | None:
        """Read one domain anew; None when it is there no more. A JobError where it cannot be said what it needs; then
        it keeps what it had. `proven`: what the chain of this disk has lost of these is in the files that stay."""
        with self._waking():
            return await self._read(ref_of(drive), anew=True, proven={drive.target: frozenset(proven)})

    @contextlib.contextmanager
    def _waking(self) -> Iterator[None]:
        """What this domain needs may have been the last that was not known."""
        try:
            yield
        finally:
            if not self._known.is_set():
                self._wake.set()

    async def begin(self, job: Job) -> None:
        """A job is to work on the disk. libvirt's chain loses a layer before what it held is on the file: so until its
        end is proven the job itself needs them all."""
        with contextlib.suppress(JobError):  # said by the ledger, and by `doctor`
            await self.renew(drive_of(job))
        await self.share(holder_of(drive_of(job)), job.holder, job.before.layers)

    async def end(self, job: Job) -> None:
        """Whether the disk needs no more what a completed job took from its chain says libvirt, asked anew: a guest's
        definition can still name it. A JobError where it cannot be said."""
        if job.state is State.COMPLETED:
            await self.renew(drive_of(job), proven=_proven_by(job))

    def foresee(self, drive: Drive) -> None:
        """A job on the disk is done, but for the proof: begin to ask what `conclude`, which may be next, will ask. One
        reading at a time."""
        before = self._foreseen.get(drive.uuid)
        if before is not None and not before[1].done():
            return
        self._foreseen[drive.uuid] = asyncio.get_running_loop().time(), self._begin_needs(drive)

    def _begin_needs(self, drive: Drive) -> asyncio.Task[Found]:
        needs = asyncio.create_task(self._reading.needs(ref_of(drive)), name=f"needs of {drive}")
        needs.add_done_callback(lambda task: task.cancelled() or task.exception())  # perhaps nobody awaits it
        return needs

    def _needs_of(self, drive: Drive) -> asyncio.Task[Found]:
        since, needs = self._foreseen.pop(drive.uuid, (0.0, None))
        if needs is not None and asyncio.get_running_loop().time() - since <= FRESH:
            return needs
        return self._begin_needs(drive)

    async def conclude(self, job: Job, record: Callable[[], Awaitable[object]]) -> None:
        """`record` the job's end, and then as `end`: libvirt is asked meanwhile. What is recorded waits for nothing."""
        drive = drive_of(job)
        if job.state is not State.COMPLETED or self._turns.taken(drive.uuid):
            await record()
            await self.end(job)
            return
        async with self._turns.alone(drive.uuid):
            needs = self._needs_of(drive)
            try:
                await record()
            except BaseException:
                needs.cancel()
                await asyncio.gather(needs, return_exceptions=True)
                raise
            with self._waking():
                await self._take_in(ref_of(drive), needs, anew=True, proven={drive.target: _proven_by(job)})

    async def share(self, source: Holder, holder: Holder, layers: Sequence[Layer]) -> None:
        """Also `holder` needs from now on what `source` does of these."""
        uses = [_as_before(row) for row in await self._rows_of(source, layers)]
        await self._ledger.share(holder, uses, trigger=KIND)

    async def leave_unproven(self, job: Job, layers: Sequence[Layer]) -> None:
        """The image of its disk needs from now on what the job does of these, which left it broken, perhaps."""
        await self._lose(job.before.top, drive_of(job), await self._rows_of(job.holder, layers))

    async def _rows_of(self, holder: Holder, layers: Sequence[Layer]) -> list[AccessRow]:
        rows = await self._rows.access_rows([layer.file for layer in layers])
        return [row for row in rows if row.holder == holder]

    async def run(self) -> None:
        """Read what became stale, everything now and then, and what could not be read again."""
        try:
            await self._run()
        finally:
            self._unknow()  # nobody follows any more

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._settings.refresh
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(due, loop.time() + AGAIN) if self._owes else due):
                    await self._wake.wait()
            self._wake.clear()
            if loop.time() >= due:
                self._all, due = True, loop.time() + self._settings.refresh
            try:
                await self._round()
            except JobError as error:
                log.info("domains could not be read", extra={"fields": {"error": error.message}})

    @property
    def _owes(self) -> bool:
        return self._all or bool(self._stale or self._troubles)

    async def _round(self) -> None:
        if not self._hypervisor.status.connected:
            return
        everything, stale = self._all, self._stale | set(self._troubles)
        self._all, self._stale = False, set()
        try:
            domains = await self._hypervisor.call("domains", lambda session: session.domains())
            there = {domain.uuid for domain in domains}
            await self._gone(there)
        except JobError:
            self._all, self._stale = self._all or everything, self._stale | stale
            raise
        due = [domain for domain in domains if everything or domain.uuid in stale or domain.uuid not in self._seen]
        width = asyncio.Semaphore(WIDTH)

        async def read(domain: DomainRef) -> None:
            async with width:
                try:
                    await self._read(domain, anew=domain.uuid in stale)
                except JobError as error:
                    fields = {"domain": domain.name, "error": error.message}
                    log.warning("it is not known what a domain needs", extra={"fields": fields})

        await asyncio.gather(*map(read, due))
        await self._settle()

    async def _gone(self, there: set[str]) -> None:
        """Domains that libvirt has no more need nothing."""
        rows = await self._rows.access_rows()
        held = {row.holder.id.partition("/")[0] for row in rows if row.holder.kind == KIND}
        for known in (self._seen, self._troubles):
            for uuid in set(known) - there:
                known.pop(uuid)
        for uuid in set(self._named) - there:
            await self._name(uuid, {})
        await self._release(held - there, set())

    async def _settle(self) -> None:
        """All is known, if it is; then what waited for that is settled."""
        if self._owes or not self._hypervisor.status.connected or self._known.is_set():
            return
        self._ledger.know_domains(True, self._all_named())
        self._known.set()
        owed = [file.file for file in await self._rows.access_files() if file.verdict == AccessVerdict.PENDING]
        await self._ledger.converge(owed, trigger="domains")

    def _all_named(self) -> dict[FileId, str]:
        return {file: disk for named in self._named.values() for file, disk in named.items()}

    def _names_of(self, domain: DomainRef, found: tuple[DiskNeeds, ...]) -> dict[FileId, str]:
        names: dict[FileId, str] = {}
        for needs in found:
            disk = f"{holder_of(Drive(domain.uuid, domain.name, needs.target))} ({domain.name}/{needs.target})"
            if needs.missing or needs.unknown:  # then it keeps what it had
                names |= {file: one for file, one in self._named.get(domain.uuid, {}).items() if one == disk}
            names |= dict.fromkeys(needs.names, disk)
        return names

    async def _name(self, uuid: str, named: dict[FileId, str]) -> None:
        """What a domain's images name, and no row has."""
        if named == self._named.get(uuid, {}):
            return
        before = self._all_named()
        self._named[uuid] = named
        if not named:
            del self._named[uuid]
        now = self._all_named()
        if self._known.is_set():
            self._ledger.know_domains(True, now)
        await self._ledger.converge(sorted(before.keys() - now.keys()), trigger=KIND)

    async def _read(
        self, domain: DomainRef, *, anew: bool, proven: Mapping[str, frozenset[FileId]] | None = None
    ) -> DomainRef | None:
        """One domain into the ledger; `anew` also when it needs what it did; `proven` by disk. None when it is there no
        more; a JobError, which is remembered, where something of it is not known."""
        async with self._turns.alone(domain.uuid):
            return await self._take_in(domain, self._reading.needs(domain), anew=anew, proven=proven or {})

    async def _take_in(
        self,
        domain: DomainRef,
        needs: Awaitable[Found],
        *,
        anew: bool,
        proven: Mapping[str, frozenset[FileId]],
    ) -> DomainRef | None:
        """In the domain's turn."""
        self._foreseen.pop(domain.uuid, None)  # it may be older by now than what is known
        try:
            domain, found = await needs
            if anew or self._seen.get(domain.uuid) != found:
                await self._hold(domain, found, proven)
        except JobError as error:
            if error.code == "not_found":  # undefined meanwhile
                await self._release({domain.uuid}, set())
                return None
            self._unknow()
            self._troubles[domain.uuid] = error
            raise
        self._troubles.pop(domain.uuid, None)
        return domain

    async def _hold(
        self, domain: DomainRef, found: tuple[DiskNeeds, ...], proven: Mapping[str, frozenset[FileId]]
    ) -> None:
        self._seen.pop(domain.uuid, None)
        names = self._names_of(domain, found)
        await self._name(
            domain.uuid, self._named.get(domain.uuid, {}) | names
        )  # what gets a row keeps its name till then
        rows = await self._rows.access_rows()
        for needs in found:
            drive = Drive(domain.uuid, domain.name, needs.target)
            had = [row for row in rows if row.holder == holder_of(drive)]
            uses = {use.need.layer.file: use for use in needs.uses}
            shown = frozenset[FileId]()
            if needs.missing or needs.unknown:
                uses = {row.file: _as_before(row) for row in had} | uses
            else:
                shown = proven.get(needs.target, shown)
                await self._keep_lost(drive, needs.uses, had, shown)
            await self._ledger.hold(holder_of(drive), list(uses.values()), name=str(drive), trigger=KIND)
            if shown and (top := _written(needs.uses)) is not None:
                await self._ledger.forget(image_of(top), sorted(shown), trigger=KIND)
        await self._name(domain.uuid, names)
        await self._release({domain.uuid}, {needs.target for needs in found})
        if (trouble := next((needs.unknown for needs in found if needs.unknown), None)) is not None:
            raise JobError("unavailable", f"domain {domain.name}: {trouble.message}", remedy=trouble.remedy)
        self._seen[domain.uuid] = found

    # What a chain has lost

    async def _keep_lost(
        self, drive: Drive, uses: Sequence[Use], had: Sequence[AccessRow], proven: frozenset[FileId]
    ) -> None:
        """What the disk had and has no more goes to the image that it writes now; and to the one that it wrote before,
        if that has lost something itself."""
        needed = {use.need.layer.file for use in uses}
        lost = [row for row in had if row.file not in needed and row.file not in proven]
        stands = await self._stand(drive, had, lost)
        top = _written(uses)
        if top is not None:
            new = all(row.file != top.file for row in had if row.mode == "rw")
            below = {row.file for row in lost if row.mode == "r"}
            # Beside an image that was written before, another is the target of a copy; or what the disk went over from.
            chain = [row for row in lost if row.mode == "r" or new or below & (stands[row.file] or set())]
            await self._lose(top, drive, chain)
        await self._keep_unproven(drive, lost, stands)

    async def _keep_unproven(
        self, drive: Drive, lost: Sequence[AccessRow], stands: Mapping[FileId, set[FileId] | None]
    ) -> None:
        """Of what the disk has no more, what was below its image is that image's unless its own header names it: then
        nobody took anything from it."""
        named = {file for files in stands.values() for file in files or ()}
        for top in lost:
            if stands.get(top.file):  # one that was deleted needs nothing
                below = [row for row in lost if row.mode == "r" and row.file not in named]
                await self._lose(layer_of(top), drive, below)

    async def _stand(
        self, drive: Drive, had: Sequence[AccessRow], lost: Sequence[AccessRow]
    ) -> dict[FileId, set[FileId] | None]:
        """What the images that the disk wrote, and has no more, stand on by their headers: on themselves, where that
        cannot be seen; None for one that was deleted."""
        found: dict[FileId, set[FileId] | None] = {}
        for top in lost:
            if top.mode == "rw":
                try:
                    found[top.file] = await self._reading.stands_on(drive, top, had)
                except JobError as error:
                    log.info("it cannot be seen what an image stands on", extra={"fields": {"error": error.message}})
                    found[top.file] = {top.file}
        return found

    async def _lose(self, image: Layer, drive: Drive, lost: Sequence[AccessRow]) -> None:
        if lost:
            uses = [_lost(row, drive) for row in lost]
            await self._ledger.lose(image_of(image), uses, name=str(drive), trigger=KIND, file=image.file)

    async def _release(self, domains: set[str], disks: set[str]) -> None:
        """These domains need nothing any more, but for these disks."""
        rows = await self._rows.access_rows()
        for holder in sorted({row.holder for row in rows if row.holder.kind == KIND}):
            uuid, _, target = holder.id.partition("/")
            if uuid in domains and target not in disks:
                had = [row for row in rows if row.holder == holder]
                name = next((row.name.partition("/")[0] for row in had if row.name), uuid)
                drive = Drive(uuid, name, target)
                await self._keep_unproven(drive, had, await self._stand(drive, had, had))
                await self._ledger.release(holder, trigger=KIND)


def holder_of(drive: Drive) -> Holder:
    return Holder(KIND, f"{drive.uuid}/{drive.target}")


def _proven_by(job: Job) -> frozenset[FileId]:
    target = [job.target.file] if job.target is not None and job.target.file is not None else []
    return frozenset([*target, *(layer.file for layer in job.dropped)])


def image_of(layer: Layer) -> Holder:
    return Holder("image", layer.path)


def _written(uses: Sequence[Use]) -> Layer | None:
    """The image that the disk writes, if that can stand on others: raw has nothing but what is written."""
    top = uses[0].need if uses else None
    return top.layer if top is not None and top.mode == "rw" and top.layer.format != "raw" else None


def _lost(row: AccessRow, drive: Drive) -> Use:
    reason = f"{drive} stood on it; that its image does not need it is not proven yet"
    return Use(Need(layer_of(row), row.mode, reason), row.label)


def _as_before(row: AccessRow) -> Use:
    return Use(Need(layer_of(row), row.mode, row.reason), row.label)
