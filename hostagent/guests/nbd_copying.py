"""Copy of a guest's disk into an NBD export, which QEMU fills while the guest runs.

Nothing goes over to it, and nothing but QEMU's last word says that it is whole. NBD has no locks, so the lease on its
URI is what keeps two jobs of ours from writing one export.

QEMU waits for a server that does not answer as long as that takes, and its guest stands still while an export is
opened, and while a disk is drained whose guest waits for the server, too. So the server is asked by the agent before
QEMU is; and where a call waits longer than an answer may take (exports.nbd_timeout), or a copy that was given up does
not end in its time (jobs.abort_timeout), QEMU's connections to the server are cut. The copy is lost then, and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

from hostagent.drivers import cutting
from hostagent.drivers.calls import Late
from hostagent.drivers.domain_xml import Disk
from hostagent.drivers.libvirt import CopyCall
from hostagent.errors import AgentError
from hostagent.guests.disks import COPY, Disks, drive_of
from hostagent.guests.finding import Found
from hostagent.guests.network_disks import disk_xml, servers_of, uri_of
from hostagent.guests.work import Work
from hostagent.nbd.copying import remote_layer, remote_target
from hostagent.nbd.network import closed_server
from hostagent.nbd.uri import server_of
from hostagent.nbd.uri_leases import UriLease, UriLeases
from hostagent.nbdclient.offer import ask
from jobs.errors import JobError
from jobs.model import Chain, Job, JobSpec, Layer, Plan

log = logging.getLogger(__name__)

SECTOR = 512
"""QEMU counts disks in these."""
CUT_AGAIN = 0.2
"""Seconds between two looks for connections: QEMU makes another one for its next request."""
CUTS = 25


@dataclass(frozen=True, slots=True)
class Settings:
    """`answer`: seconds for an NBD server to answer (exports.nbd_timeout); `abort`: for a copy that was given up to end
    (jobs.abort_timeout); `user` is QEMU's, for people."""

    answer: float
    abort: float
    user: str


class NbdCopy(Work):
    types: tuple[int, ...] = (COPY,)

    def __init__(self, disks: Disks, uris: UriLeases, settings: Settings) -> None:
        self._disks = disks
        self._uris = uris
        self._settings = settings
        self._leases: dict[str, UriLease] = {}
        self._given_up: dict[str, float] = {}
        self._kept: set[str] = set()
        """The jobs of which it was said that their connections are not cut."""

    async def plan(self, spec: JobSpec, found: Found, before: Chain) -> Plan:
        target = remote_target(spec)
        size = before.top.virtual_size
        self._uris.refuse(remote_layer(target.path, size), exclusive=True)
        return Plan(before, before, size, found.warnings, {"space": {}}, target, found.drive)

    # The lease

    def claim(self, job: Job) -> None:
        if job.id not in self._leases:
            self._leases[job.id] = self._uris.take(_layer(job), exclusive=True, holder=str(job.holder))

    def release(self, job: Job) -> None:
        self._given_up.pop(job.id, None)
        self._kept.discard(job.id)
        if (lease := self._leases.pop(job.id, None)) is not None:
            lease.release()

    async def make_ready(self, job: Job) -> Mapping[str, Any]:
        self.claim(job)
        if job.started is None:
            await self._ask(job)
        return {}

    # The job

    async def begin(self, job: Job, disk: Disk) -> None:
        synchronous = job.spec.synchronous_writes
        wanted = CopyCall(
            disk_xml(_uri(job)), shallow=False, reuse=True, synchronous=synchronous, bandwidth=job.bandwidth
        )
        try:
            await self._or_cut(job, self._disks.copy(drive_of(job), wanted), opening=True)
        except JobError as error:
            if "permission denied" not in error.message.lower():
                raise
            raise closed_server(_uri(job), self._settings.user, field="dest") from error

    async def _ask(self, job: Job) -> None:
        """What the server offers fits, and it answers: QEMU would wait for it with its guest standing still."""
        uri, size = _uri(job), job.before.top.virtual_size
        server, name = server_of(uri)
        wait = self._settings.answer
        try:
            asked = asyncio.to_thread(ask, server, name, wait)
            offer = await asyncio.wait_for(asked, wait + 1)  # a name's look-up has no bound of its own
        except TimeoutError:
            raise _silent(uri, wait) from None
        except AgentError as error:
            if error.code == "timeout":
                raise _silent(uri, wait) from error
            remedy = error.remedy or "see that the server runs, and answers this host (nbdinfo)"
            message = f"{uri!r} cannot be opened: {error.message}"
            raise JobError(error.code, message, field="dest", value=uri, remedy=remedy) from error
        if offer is None:
            return
        if offer.read_only:
            remedy = "let the server serve it for writing"
            raise JobError("denied", f"{uri!r} cannot be written", field="dest", value=uri, remedy=remedy)
        if _sectors(offer.size) != _sectors(size):
            sizes = f"{uri!r} has {offer.size} bytes, and the disk {size}: source and target have different sizes"
            raise JobError("invalid", sizes, field="dest", value=uri, remedy="make the export as large as the disk")

    def is_ours(self, job: Job, disk: Disk) -> bool:
        mirror = disk.mirror.layer if disk.mirror else None
        return mirror is not None and uri_of(mirror) == _uri(job)

    async def proven(self, job: Job, disk: Disk) -> bool:
        return False

    async def named(self, job: Job) -> bool:
        return False

    async def audit(self, job: Job) -> tuple[str, ...]:
        return ()

    async def seal(self, job: Job) -> None:
        """QEMU has flushed it: what a flush is worth is for the server to say."""

    async def discard(self, job: Job, disk: Disk | None, *, over: bool) -> bool:
        return False

    # A server that does not answer

    async def end(self, job: Job, call: Awaitable[None]) -> None:
        """Given up, nothing of the copy matters any more. Else only a guest does that waits for the server, too."""
        if job.spec.synchronous_writes or _is_given_up(job):
            await self._or_cut(job, call)
        else:
            await call

    async def hasten(self, job: Job) -> None:
        if not _is_given_up(job):
            return
        now = asyncio.get_running_loop().time()
        if now >= self._given_up.setdefault(job.id, now) + self._settings.abort:
            await self._cut_if_it_may_be(job)

    async def _or_cut(self, job: Job, call: Awaitable[None], *, opening: bool = False) -> None:
        """The call's own end, which comes soon when its connection is cut. While that is to be opened, the server's
        time begins when QEMU is seen to have it: until then the call waits for something else."""
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait({task}, timeout=self._settings.answer)
            if opening:
                await self._until_connected(job, task)
                await asyncio.wait({task}, timeout=self._settings.answer)
            if not task.done():
                await self._cut_if_it_may_be(job, until=task)
            await task
        except Late:
            if opening:
                await self._cut_unless_it_answers(job)
            raise
        finally:
            task.cancel()

    async def _cut_unless_it_answers(self, job: Job) -> None:
        """We were told no more of the call; a guest that stands still in it says nothing."""
        await asyncio.sleep(self._settings.answer)
        try:
            await self._disks.look(drive_of(job))
        except JobError:
            await self._cut_if_it_may_be(job)

    async def _until_connected(self, job: Job, task: asyncio.Future[None]) -> None:
        server, _ = server_of(_uri(job))
        while not task.done() and not await asyncio.to_thread(_count, drive_of(job).uuid, server):
            await asyncio.wait({task}, timeout=CUT_AGAIN)

    async def _cut_if_it_may_be(self, job: Job, *, until: asyncio.Future[Any] | None = None) -> None:
        try:
            await self.cut(job, until=until)
        except JobError as error:
            if job.id not in self._kept:
                self._kept.add(job.id)
                fields = {"job": job.id, "server": _uri(job), "error": error.message}
                log.warning("a server does not answer, and QEMU's connections are not cut", extra={"fields": fields})

    async def cut(self, job: Job, *, until: asyncio.Future[Any] | None = None) -> None:
        """Cut QEMU's connections to the server, and those that it makes instead. `not_supported` where they cannot be
        told from those of the guest's own disks, or not be had."""
        drive, (server, _) = drive_of(job), server_of(_uri(job))
        others = await self._servers_of_disks(job)
        for _ in range(CUTS):
            found = await asyncio.to_thread(_cut, drive.uuid, server, others)
            if found:
                fields = {"job": job.id, "server": _uri(job), "connections": found}
                log.warning("QEMU's connections to a copy's target were cut", extra={"fields": fields})
            if (until is None and not found) or (until is not None and until.done()):
                return
            await asyncio.sleep(CUT_AGAIN)

    async def _servers_of_disks(self, job: Job) -> list[dict[str, Any]]:
        """The servers of all layers of the guest's disks, of other protocols too: it is a connection that is cut."""
        domain = await self._disks.described_aside(drive_of(job))
        mirrors = [disk.mirror.layer for disk in domain.disks if disk.mirror and disk.mirror.layer]
        layers = [layer for disk in domain.disks for layer in disk.layers]
        layers += [mirror for mirror in mirrors if uri_of(mirror) != _uri(job)]
        return [server for layer in layers for server in servers_of(layer)]


def _count(domain: str, server: Mapping[str, Any]) -> int:
    """Blocking. Where it cannot be seen, there is none."""
    pid = cutting.process_of(domain)
    with contextlib.suppress(JobError):
        return 0 if pid is None else cutting.count(pid, cutting.addresses(server))
    return 0


def _cut(domain: str, server: Mapping[str, Any], others: list[dict[str, Any]]) -> int:
    """Blocking."""
    wanted = cutting.addresses(server)
    for other in others:
        if wanted & cutting.addresses(other):
            message = "a disk of the guest has the same server: its connection may not be cut"
            raise JobError("not_supported", message, remedy="see whether the server can be made to answer, or end it")
    pid = cutting.process_of(domain)
    return 0 if pid is None else cutting.cut(pid, wanted)


def _is_given_up(job: Job) -> bool:
    return job.intent == "abort" or job.error is not None


def _silent(uri: str, seconds: float) -> JobError:
    message = f"{uri!r} does not answer within {seconds:g} s (exports.nbd_timeout)"
    return JobError("timeout", message, field="dest", value=uri, remedy="see whether its server hangs (nbdinfo)")


def _sectors(size: int) -> int:
    return -(-size // SECTOR)


def _uri(job: Job) -> str:
    assert job.target is not None, f"job {job.id} copies nowhere"
    return job.target.path


def _layer(job: Job) -> Layer:
    return remote_layer(_uri(job), job.before.top.virtual_size)
