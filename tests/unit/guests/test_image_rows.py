"""Several write what an image needs: who reads domains, jobs at their end, and who proves that it is not needed. None
takes back what another has just noted."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from events.model import DomainEvent, DomainEventKind
from hostagent.guests.holding import FRESH, Holding, holder_of
from hostagent.guests.reading import Settings
from hostagent.images.member import ChainLimits
from hostagent.records import Label, Use
from hostagent.store import Store
from jobs.errors import JobError
from jobs.model import Chain, Drive, FileId, Holder, Job, JobSpec, Layer, Need, Operation, State
from jobs.outcome import access_change
from jobs.ports import AccessChange, AccessResult
from tests.harness import MIB, overlay, raw_image
from tests.unit.guests.fake_libvirt import NOW, play
from tests.unit.guests.test_holding import QEMU, FakeLibvirt

DRIVE = Drive("a", "name-a", "vda")


class Rows:
    """The ledger without its files: the real store's rows."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def know_domains(self, known: bool, named: object = None) -> None: ...

    async def hold(self, holder: Holder, uses: Sequence[Use], *, name: str, trigger: str) -> dict[FileId, AccessResult]:
        await self.store.replace_needs(holder, uses, name=name)
        return {}

    async def share(self, holder: Holder, uses: Sequence[Use], *, trigger: str) -> None:
        await self.store.share_needs(holder, uses)

    async def lose(
        self, image: Holder, uses: Sequence[Use], *, name: str, trigger: str, file: FileId | None = None
    ) -> None:
        await self.store.lose_needs(image, uses, name=name, file=file)

    async def forget(self, holder: Holder, files: Sequence[FileId], *, trigger: str) -> None:
        await self.store.forget_needs(holder, files)

    async def release(self, holder: Holder, *, trigger: str) -> None:
        await self.store.release(holder)

    async def converge(self, files: Sequence[FileId], *, trigger: str) -> dict[FileId, AccessResult]:
        return {}


class Host:
    """A guest whose disk has three layers, which the ledger knows, and a job on it."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.store = store
        self.base, self.middle, self.top = (folder / name for name in ("base.raw", "middle.qcow2", "top.qcow2"))
        if not self.top.exists():
            overlay(self.top, overlay(self.middle, raw_image(self.base, MIB)), "qcow2")
        self.libvirt = FakeLibvirt()
        self.libvirt.disks["a"] = self.top
        hypervisor: Any = self.libvirt
        settings = Settings(MIB, 60.0, 30.0, ChainLimits(), QEMU.uid, folder / "qemu.conf")
        self.holding = Holding(hypervisor, Rows(store), store, settings)
        self.access: Any
        layers = tuple(layer(path) for path in (self.top, self.middle, self.base))
        spec = JobSpec(Operation.PULL, str(DRIVE))
        self.job = Job("4711", spec, State.RUNNING, NOW, NOW, Chain(layers), Chain(layers[:1]), drive=DRIVE)
        self.image = Holder("image", str(self.top))

    async def needs(self, holder: Holder) -> set[str]:
        return {Path(row.path).name for row in await self.store.access_rows() if row.holder == holder}

    async def needs_of_disk(self) -> set[str]:
        return await self.needs(holder_of(DRIVE))

    def stand(self, base: Path | None) -> None:
        words = ["-b", ""] if base is None else ["-F", base.suffix[1:], "-b", str(base)]
        subprocess.run(["qemu-img", "rebase", "-u", *words, str(self.top)], check=True)


def layer(path: Path) -> Layer:
    found = path.stat()
    return Layer(str(path), path.suffix[1:], FileId(found.st_dev, found.st_ino), MIB, MIB)


def on_a_host(test: Callable[[Host], Awaitable[None]]) -> Callable[[Path], None]:
    async def story(folder: Path) -> None:
        (folder / "state").mkdir()
        store = Store(folder / "state", host="h", publish=lambda record: None)
        await store.open()
        try:
            host = Host(folder, store)
            await host.holding.renew(DRIVE)
            await host.holding.begin(host.job)
            await test(host)
        finally:
            await store.close()

    def run(tmp_path: Path) -> None:
        play(story(tmp_path))

    run.__name__ = test.__name__
    return run


@on_a_host
async def test_what_a_domain_lost_and_what_its_job_leaves_at_the_same_moment_are_both_kept(host: Host) -> None:
    host.stand(host.base)  # the middle is gone
    await asyncio.gather(host.holding.renew(DRIVE), host.holding.leave_unproven(host.job, [host.job.before.layers[2]]))
    assert await host.needs(host.image) == {"middle.qcow2", "base.raw"}


@on_a_host
async def test_several_at_once_add_to_an_image(host: Host) -> None:
    """Each read what the image had, added its own, and wrote all of it anew: the later one won."""
    await asyncio.gather(*(host.holding.leave_unproven(host.job, [one]) for one in host.job.before.layers[1:]))
    assert await host.needs(host.image) == {"middle.qcow2", "base.raw"}
    rows = [row for row in await host.store.access_rows() if row.holder == host.image]
    assert {(row.label, row.name, row.lost, row.format) for row in rows} == {
        (QEMU, "name-a/vda", True, "qcow2"),
        (QEMU, "name-a/vda", True, "raw"),
    }
    assert {row.image for row in rows} == {host.job.before.top.file}


@on_a_host
async def test_a_job_that_completes_takes_what_it_proved_and_nothing_else(host: Host) -> None:
    """Of two pulls, the first nobody saw: that the second has all that it took in says nothing of the first."""
    host.stand(host.base)
    await host.holding.renew(DRIVE)
    assert await host.needs(host.image) == {"middle.qcow2"}
    top, _, base = host.job.before.layers
    job = replace(host.job, state=State.COMPLETED, before=Chain((top, base)), finished=NOW)
    host.stand(None)
    await host.holding.renew(DRIVE)
    assert await host.needs(host.image) == {"middle.qcow2", "base.raw"}
    await host.store.finish(job, [], access_change(job, ()))
    await host.holding.end(job)
    assert await host.needs(host.image) == {"middle.qcow2"}
    assert await host.needs(holder_of(DRIVE)) == {"top.qcow2"}


@on_a_host
async def test_nothing_is_given_up_before_the_end_is_recorded_though_libvirt_is_asked_meanwhile(host: Host) -> None:
    asked, all_three = [], {"top.qcow2", "middle.qcow2", "base.raw"}
    describe = host.libvirt.describe

    def noted(uuid: str) -> str:
        asked.append(uuid)
        return describe(uuid)

    host.libvirt.describe = noted  # type: ignore[method-assign]
    host.stand(None)
    job = replace(host.job, state=State.COMPLETED, finished=NOW)

    async def refused() -> None:
        raise JobError("store_full", "no space")

    with pytest.raises(JobError, match="no space"):
        await host.holding.conclude(job, refused)
    await asyncio.sleep(0.1)
    assert await host.needs_of_disk() == all_three

    async def slow() -> None:
        await asyncio.sleep(0.3)
        assert asked and await host.needs_of_disk() == all_three
        await host.store.finish(job, [], access_change(job, ()))

    asked.clear()
    await host.holding.conclude(job, slow)
    assert (await host.needs_of_disk(), await host.needs(host.image)) == ({"top.qcow2"}, set())


@on_a_host
async def test_what_was_foreseen_just_now_is_not_asked_again(host: Host) -> None:
    host.stand(None)
    host.holding.foresee(DRIVE)
    await asyncio.sleep(0.05)
    host.libvirt.hangs.add(DRIVE.uuid)
    await concluded(host)
    assert (await host.needs_of_disk(), await host.needs(host.image)) == ({"top.qcow2"}, set())


async def concluded(host: Host) -> None:
    job = replace(host.job, state=State.COMPLETED, finished=NOW)
    await host.holding.conclude(job, lambda: host.store.finish(job, [], access_change(job, ())))


async def an_event(host: Host) -> None:
    host.holding.event(DomainEvent(DomainEventKind.DEFINED, DRIVE.uuid, DRIVE.name))


async def a_connection(host: Host) -> None:
    host.holding.resync()


async def another_reading(host: Host) -> None:
    await host.holding.renew(DRIVE)


async def time(host: Host) -> None:
    await asyncio.sleep(FRESH + 0.01)


@pytest.mark.parametrize("between", [an_event, a_connection, another_reading, time])
def test_unless_it_may_have_changed_since(tmp_path: Path, between: Callable[[Host], Awaitable[None]]) -> None:
    @on_a_host
    async def story(host: Host) -> None:
        host.stand(None)
        host.holding.foresee(DRIVE)
        await asyncio.sleep(0.05)
        host.stand(host.base)
        await between(host)
        await concluded(host)
        assert await host.needs_of_disk() == {"top.qcow2", "base.raw"}

    story(tmp_path)


@on_a_host
async def test_a_job_on_the_image_itself_leaves_what_a_guest_lost_to_it(host: Host) -> None:
    """A guest whose QEMU was killed left an image that is not whole; a pull of that image proves nothing of it."""
    host.stand(host.base)
    await host.holding.renew(DRIVE)
    base = host.job.before.layers[2]
    await host.store.add_needs(host.image, [Need(base, "r", "job 4710 is failed: the image still depends on it")])
    assert await host.needs(host.image) == {"middle.qcow2", "base.raw"}
    top = host.job.before.layers[0]
    job = replace(host.job, state=State.COMPLETED, before=Chain((top, base)), drive=None, finished=NOW)
    await host.store.finish(job, [], access_change(job, ()))
    assert await host.needs(host.image) == {"middle.qcow2"}


@on_a_host
async def test_a_proof_from_before_does_not_take_what_is_needed_anew(host: Host) -> None:
    host.stand(None)
    await host.holding.renew(DRIVE)
    proven = [row for row in await host.store.access_rows() if row.lost]
    host.stand(host.middle)
    await host.holding.renew(DRIVE)
    host.stand(None)
    await host.holding.renew(DRIVE)  # pulled again: what is proven of the first time says nothing
    await host.store.delete_rows([row.id for row in proven])
    assert await host.needs(host.image) == {"middle.qcow2", "base.raw"}
    job = replace(host.job, state=State.COMPLETED, finished=NOW)
    await host.store.finish(job, [], AccessChange((), rows=tuple(row.id for row in proven)))
    assert await host.needs(host.image) == {"middle.qcow2", "base.raw"}
    again = [row for row in await host.store.access_rows() if row.lost]
    await host.store.finish(job, [], AccessChange((), rows=tuple(row.id for row in again)))
    assert await host.needs(host.image) == set()


@pytest.mark.parametrize("first", [None, QEMU])
def test_of_two_needs_of_an_image_the_greater_counts(tmp_path: Path, first: Label | None) -> None:
    async def story() -> None:
        store = Store(tmp_path, host="h", publish=lambda record: None)
        await store.open()
        path = raw_image(tmp_path / "base.raw", MIB)
        image = Holder("image", "/x")
        for label, mode in ((first, "rw"), (None if first else QEMU, "r")):
            await store.lose_needs(image, [Use(Need(layer(path), mode, ""), label)], name="web1/vda")
        (row,) = await store.access_rows()
        assert (row.label, row.mode) == (None, "rw")
        await store.close()

    asyncio.run(story())
