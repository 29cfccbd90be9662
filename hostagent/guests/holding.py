"""What domains need, kept in the ledger: so that what libvirt leaves open is closed when the last of them is done.

Of each disk of each domain, running or defined, the ledger has a holder with the files of its chain. It is read anew
when libvirt tells of the domain, after each new connection, before and after a job on it, and now and then. While it is
not known of every domain what it needs (no connection, one that was just defined, one that cannot be read), nothing is
given back whose owner libvirt has changed: `know_domains` says so to the ledger before anything else is done.

What is not there any more, and what cannot be read, is no reason to need less: then the disk keeps what it had.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from events.model import DiskJobEvent, DomainEvent, DomainEventKind, HypervisorEvent
from hostagent.drivers import domain_xml, volumes
from hostagent.drivers.domain_xml import Domain
from hostagent.drivers.hypervisor import Hypervisor
from hostagent.drivers.libvirt import DomainRef, Session
from hostagent.guests import labels
from hostagent.guests.disks import drive_of
from hostagent.guests.labels import Labels
from hostagent.guests.needs import DiskNeeds, read_needs
from hostagent.images.member import ChainLimits
from hostagent.locks import Locks
from hostagent.records import AccessFile, AccessRow, Label, Use
from jobs.errors import JobError
from jobs.model import Drive, FileId, Holder, Job, Layer, Need, State
from jobs.ports import AccessResult, AccessVerdict

log = logging.getLogger(__name__)

KIND = "domain"

WIDTH = 4
"""Domains that are looked at together, of the 32 threads for all files."""
AGAIN = 10.0
"""Seconds until a domain that could not be read is looked at again."""

NEW = (DomainEventKind.DEFINED, DomainEventKind.STARTED)
"""After these a domain may need more than is known of it."""


class Access(Protocol):
    def know_domains(self, known: bool) -> None: ...

    async def hold(
        self, holder: Holder, uses: Sequence[Use], *, name: str, trigger: str
    ) -> dict[FileId, AccessResult]: ...

    async def release(self, holder: Holder, *, trigger: str) -> None: ...

    async def converge(self, files: Sequence[FileId], *, trigger: str) -> dict[FileId, AccessResult]: ...


class Rows(Protocol):
    async def access_rows(self, files: Sequence[FileId] | None = None) -> list[AccessRow]: ...

    async def access_files(self, files: Sequence[FileId] | None = None) -> list[AccessFile]: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """`xml_size` in bytes; `refresh` and `file_timeout` in seconds; `limits` for chains that headers name; `uid` is the
    hypervisor user's; `qemu_conf` says whether libvirt changes owners."""

    xml_size: int
    refresh: float
    file_timeout: float
    limits: ChainLimits
    uid: int
    qemu_conf: Path


class Holding:
    """`run` is a task for as long as the agent lives; `event`, `resync` and `lost` are for whoever hears libvirt."""

    def __init__(self, hypervisor: Hypervisor, ledger: Access, rows: Rows, settings: Settings) -> None:
        self._hypervisor = hypervisor
        self._ledger = ledger
        self._rows = rows
        self._settings = settings
        self._labels: Labels | None = None
        self._all = True
        self._stale: set[str] = set()
        self._seen: dict[str, tuple[DiskNeeds, ...]] = {}
        self._troubles: dict[str, JobError] = {}
        self._hanging: set[str] = set()
        self._turns = Locks()
        self._wake = asyncio.Event()
        self._known = asyncio.Event()

    # What libvirt tells

    def event(self, event: HypervisorEvent) -> None:
        if not isinstance(event, DomainEvent | DiskJobEvent):
            return
        if isinstance(event, DomainEvent) and event.kind in NEW:
            self._unknow()
        self._stale.add(event.domain)
        self._wake.set()

    def resync(self) -> None:
        """A new connection, or events were lost."""
        self._unknow()
        self._all, self._labels = True, None
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

    async def renew(self, drive: Drive, *, proven: bool = False) -> None:
        """Read one domain anew. A JobError where it cannot be said what it needs; then it keeps what it had. `proven`:
        what the chain of this disk has lost is in the files that stay; of its others that is not known."""
        try:
            domain = await self._hypervisor.call("find", lambda session: session.find(drive.uuid))
        except JobError as error:
            if error.code != "not_found":
                raise
            await self._release({drive.uuid}, set())
            return
        try:
            await self._read(domain, anew=True, proven=drive.target if proven else None)
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
            await self.renew(drive_of(job), proven=True)

    async def share(self, source: Holder, holder: Holder, layers: Sequence[Layer]) -> None:
        """Also `holder` needs from now on what `source` does of these: a job that is not proven yet what its disk does,
        an image what the job does that left it broken."""
        files = {layer.file for layer in layers}
        rows = await self._rows.access_rows()
        await self._add(holder, rows, [row for row in rows if row.holder == source and row.file in files])

    async def _add(self, holder: Holder, rows: Sequence[AccessRow], more: Sequence[AccessRow]) -> None:
        """`more` are needed by the holder, too, beside what it has among all `rows`."""
        had = {row.file: _as_before(row) for row in rows if row.holder == holder}
        await self._ledger.hold(
            holder, list(({row.file: _as_before(row) for row in more} | had).values()), name="", trigger=KIND
        )

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
        await self._release(held - there, set())

    async def _settle(self) -> None:
        """All is known, if it is; then what waited for that is settled."""
        if self._owes or not self._hypervisor.status.connected or self._known.is_set():
            return
        self._ledger.know_domains(True)
        self._known.set()
        owed = [file.file for file in await self._rows.access_files() if file.verdict == AccessVerdict.PENDING]
        await self._ledger.converge(owed, trigger="domains")

    async def _read(self, domain: DomainRef, *, anew: bool, proven: str | None = None) -> None:
        """One domain into the ledger; `anew` also when it needs what it did; `proven` is a disk. A JobError, which is
        remembered, where something of it is not known."""
        async with self._turns.alone(domain.uuid):
            try:
                found = await self._needs(domain)
                if anew or self._seen.get(domain.uuid) != found:
                    await self._hold(domain, found, proven)
            except JobError as error:
                if error.code == "not_found":  # undefined meanwhile
                    await self._release({domain.uuid}, set())
                    return
                self._unknow()
                self._troubles[domain.uuid] = error
                raise
            self._troubles.pop(domain.uuid, None)

    async def _needs(self, domain: DomainRef) -> tuple[DiskNeeds, ...]:
        descriptions = await self._describe(domain)
        chosen = await self._label()
        return await self._look(domain, lambda: read_needs(descriptions, chosen, self._settings.limits))

    async def _hold(self, domain: DomainRef, found: tuple[DiskNeeds, ...], proven: str | None) -> None:
        self._seen.pop(domain.uuid, None)
        rows = await self._rows.access_rows()
        for needs in found:
            holder = holder_of(Drive(domain.uuid, domain.name, needs.target))
            uses = {use.need.layer.file: use for use in needs.uses}
            if needs.missing or needs.unknown:
                uses = {row.file: _as_before(row) for row in rows if row.holder == holder} | uses
            elif needs.uses and needs.uses[0].need.mode == "rw":
                image = Holder("image", needs.uses[0].need.layer.path)
                if needs.target == proven:
                    await self._ledger.release(image, trigger=KIND)
                elif domain.active:
                    await self._keep_lost(image, uses, [row for row in rows if row.holder == holder])
            name = f"{domain.name}/{needs.target}"
            await self._ledger.hold(holder, list(uses.values()), name=name, trigger=KIND)
        await self._release({domain.uuid}, {needs.target for needs in found})
        if (trouble := next((needs.unknown for needs in found if needs.unknown), None)) is not None:
            raise JobError("unavailable", f"domain {domain.name}: {trouble.message}", remedy=trouble.remedy)
        self._seen[domain.uuid] = found

    async def _keep_lost(self, image: Holder, uses: Collection[FileId], had: Sequence[AccessRow]) -> None:
        """QEMU writes a header before the data that it relies on, and libvirt believes QEMU. So what a running guest's
        chain lost its image needs, until the job that took it out is proven: ours, or somebody else's."""
        if lost := [row for row in had if row.file not in uses]:
            await self._add(image, await self._rows.access_rows(), lost)

    async def _release(self, domains: set[str], disks: set[str]) -> None:
        """These domains need nothing any more, but for these disks."""
        rows = await self._rows.access_rows()
        holders = {row.holder for row in rows if row.holder.kind == KIND}
        for holder in sorted(holders):
            uuid, _, target = holder.id.partition("/")
            if uuid in domains and target not in disks:
                await self._ledger.release(holder, trigger=KIND)

    # libvirt and files

    async def _describe(self, domain: DomainRef) -> list[Domain]:
        """The live description while it runs, and the definition."""

        def describe(session: Session) -> list[Domain]:
            texts = [session.describe(domain.uuid)]
            if domain.active and (definition := session.definition(domain.uuid)) is not None:
                texts.append(definition)
            parsed = (domain_xml.parse(text, size=self._settings.xml_size) for text in texts)
            return [volumes.resolve(session, one) for one in parsed]

        return await self._hypervisor.call("describe", describe, domain=domain)

    async def _label(self) -> Labels:
        """What libvirt chooses for domains that say nothing; asked once for each connection."""
        if self._labels is None:
            text = await self._hypervisor.call("capabilities", lambda session: session.capabilities())
            said = domain_xml.base_label(text, size=self._settings.xml_size)
            default: Label | None = labels.parse(said) if said else None
            self._labels = Labels(default, self._settings.uid, relabels=await self._relabels())
        return self._labels

    async def _relabels(self) -> bool:
        path, timeout = self._settings.qemu_conf, self._settings.file_timeout
        try:
            return await asyncio.wait_for(asyncio.to_thread(labels.relabels, path), timeout)
        except (OSError, TimeoutError) as error:
            message = f"{path} cannot be read: {error or 'no answer'}"
            raise JobError("io_error", message, remedy="let the agent read it, or set libvirt.qemu_conf") from error

    async def _look(self, domain: DomainRef, look: Callable[[], tuple[DiskNeeds, ...]]) -> tuple[DiskNeeds, ...]:
        """A look at files on dead storage never returns, and keeps its thread: a domain has one, and all have a few."""
        timeout = f"{self._settings.file_timeout:g} s (libvirt.file_timeout)"
        message = f"the files of domain {domain.name} do not answer within {timeout}"
        late = JobError("unresponsive", message, remedy="see whether their storage hangs")
        if domain.uuid in self._hanging or len(self._hanging) >= WIDTH:
            raise late
        work = asyncio.ensure_future(asyncio.to_thread(look))
        await asyncio.wait({work}, timeout=self._settings.file_timeout)
        if not work.done():
            self._hanging.add(domain.uuid)
            work.add_done_callback(lambda _: self._hanging.discard(domain.uuid))
            raise late
        return work.result()


def holder_of(drive: Drive) -> Holder:
    return Holder(KIND, f"{drive.uuid}/{drive.target}")


def _as_before(row: AccessRow) -> Use:
    return Use(Need(Layer(row.path, "", row.file, 0, 0), row.mode, row.reason), row.label)
