"""The composition root's part for guests' disks: what runs jobs on them, follows those of others, and keeps what
domains need in the ledger, made and joined. Nothing here decides anything about a disk."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hostagent.access.leases import FileLease
from hostagent.access.ledger import Ledger
from hostagent.config import Config
from hostagent.drivers.process import User
from hostagent.guests.blank import Blank
from hostagent.guests.committing import GuestCommit
from hostagent.guests.copying import GuestCopy
from hostagent.guests.disks import Disks
from hostagent.guests.driver import GuestDriver
from hostagent.guests.driver import Settings as PullSettings
from hostagent.guests.durable import Durable
from hostagent.guests.external import ExternalDriver
from hostagent.guests.external import Settings as ExternalSettings
from hostagent.guests.finding import Finder
from hostagent.guests.holding import Holding
from hostagent.guests.lookout import Lookout
from hostagent.guests.lookout import Settings as LookoutSettings
from hostagent.guests.mirrors import Mirrors
from hostagent.guests.mirrors import Settings as MirrorSettings
from hostagent.guests.nbd_copying import NbdCopy
from hostagent.guests.nbd_copying import Settings as NbdCopySettings
from hostagent.guests.proof import Proof
from hostagent.guests.pulling import Pulling
from hostagent.guests.reading import Settings as ReadingSettings
from hostagent.guests.unseen import Settings as UnseenSettings
from hostagent.guests.unseen import Unseen
from hostagent.images.member import ChainLimits
from hostagent.images.tool import RunAs, Tool, ToolLimits
from hostagent.live import Live
from hostagent.nbd.chains import Chains
from hostagent.nbd.committing import Commit
from hostagent.nbd.copying import Copy
from hostagent.nbd.headers import Headers
from hostagent.nbd.uri import is_uri
from hostagent.store import Store
from jobs.engine import Engine
from jobs.model import Job, Operation
from jobs.ports import Clock


@dataclass(frozen=True, slots=True)
class Parts:
    """What guests' jobs share with all others. `run_as` and `tools`: who QEMU's programs run as, and their bounds;
    `copy` and `commit` are those of images, whose rules hold here, too; `engine` is made later than what it drives;
    `alarm(path, remedy)` is told of images that are not whole."""

    config: Config
    live: Live
    ledger: Ledger
    store: Store
    chains: Chains
    copy: Copy
    commit: Commit
    clock: Clock
    user: User
    run_as: RunAs | None
    tools: ToolLimits
    engine: Callable[[], Engine]
    alarm: Callable[[str, str], None]


class GuestJobs:
    """`pulls`, `mirrors` and `external` are the drivers; `holding` says what domains need."""

    def __init__(self, parts: Parts) -> None:
        config, libvirt, images, live = parts.config, parts.config.libvirt, parts.config.images, parts.live
        hypervisor, claims, timeout = live.hypervisor, live.hypervisor.claims, libvirt.file_timeout
        top, whole = ChainLimits(tuple(images.pools)), ChainLimits(tuple(images.pools), images.max_depth)
        self._engine = parts.engine
        finder = Finder(live.domains, claims, live.no_jobs)
        disks = Disks(hypervisor, live.domains, libvirt.connect_timeout)
        maps = replace(parts.tools, output=images.map_output)
        durable = Durable(Tool(user=parts.run_as, limits=maps, binary=images.qemu_img), parts.ledger, timeout)
        headers = Headers(timeout)
        proof = Proof(disks, headers, timeout=timeout, agree=libvirt.agree_timeout)
        self.holding = Holding(
            hypervisor,
            parts.ledger,
            parts.store,
            ReadingSettings(libvirt.xml_size, libvirt.refresh, timeout, whole, parts.user.uid, libvirt.qemu_conf),
        )
        self.pulls = GuestDriver(
            disks,
            claims,
            Pulling(disks, proof, file_timeout=timeout, end_timeout=config.jobs.abort_timeout),
            proof,
            durable,
            settings=PullSettings(top, timeout),
            finder=finder,
            hint=self._hint,
            holding=self.holding,
        )
        blank = Blank(Tool(user=parts.run_as, limits=parts.tools, binary=images.qemu_img), parts.ledger, timeout)
        copy = GuestCopy(disks, finder, parts.copy, blank, FileLease, limits=top, file_timeout=timeout)
        commit = GuestCommit(disks, finder, parts.commit, parts.chains, durable, headers, file_timeout=timeout)
        nbd = NbdCopy(
            disks,
            parts.chains.uris,
            NbdCopySettings(config.exports.nbd_timeout, config.jobs.abort_timeout, parts.user.name),
        )
        self.mirrors = Mirrors(
            disks,
            claims,
            finder,
            lambda spec: commit if spec.operation is Operation.COMMIT else nbd if is_uri(spec.dest or "") else copy,
            settings=MirrorSettings(top, timeout, libvirt.agree_timeout, libvirt.pivot_attempts, libvirt.pivot_wait),
            holding=self.holding,
            hint=self._hint,
        )
        self.external = ExternalDriver(
            disks,
            claims,
            self.pulls,
            headers,
            ExternalSettings(top, timeout, libvirt.agree_timeout),
            holding=self.holding,
            hint=self._hint,
        )
        self._lookout = Lookout(
            hypervisor,
            live.domains,
            LookoutSettings(top, libvirt.sample, timeout, libvirt.external_jobs),
            clock=parts.clock,
            active=self._on_disks,
            adopt=self._adopt,
        )
        self._unseen = Unseen(
            self.holding,
            parts.store,
            parts.ledger,
            durable,
            UnseenSettings(whole, timeout, libvirt.refresh, libvirt.agree_timeout),
            clock=parts.clock,
            ready=lambda: live.off is not None or live.status.connected,
            active=self._on_disks,
            record=lambda job, rows: self._engine().record(job, rows),
            alarm=parts.alarm,
        )
        self._here = not live.elsewhere
        if not self._here:
            return
        live.tell(self.holding, lost=self.holding.lost)
        for follower in (self.pulls, self.mirrors, self.external, self._lookout, self._unseen):
            live.tell(follower)

    def recover(self, unsettled: Sequence[Job]) -> None:
        """After a restart, before the engine has them."""
        for job in unsettled:
            if job.drive is not None and not job.external:
                (self.pulls if job.spec.operation is Operation.PULL else self.mirrors).recover(job)
        for job in unsettled:
            if job.external:
                self.external.follow(job)

    def looks(self) -> list[Coroutine[Any, Any, None]]:
        """What reads domains and looks for the jobs of others as long as the agent lives. Of another host's nothing:
        the files of this one may have the same names."""
        return [self.holding.run(), self._lookout.run(), self._unseen.run()] if self._here else []

    def settled(self, job: Job) -> None:
        self._lookout.settled(job)

    def _on_disks(self) -> list[Job]:
        """Jobs that have not ended, or whose end is being settled."""
        return [*self._engine().active(), *self._engine().settling()]

    def _hint(self, job: str) -> None:
        self._engine().hint(job)

    async def _adopt(self, job: Job, said: str | None) -> None:
        self.external.follow(job, said)
        await self._engine().adopt(job)
