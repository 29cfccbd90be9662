"""When it is known what all domains need, and what the ledger is told; libvirt and the ledger are played."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from events.model import DiskJobEvent, DiskJobKind, DomainEvent, DomainEventKind
from hostagent.drivers.libvirt import DomainRef
from hostagent.guests import holding
from hostagent.guests.holding import Holding
from hostagent.guests.reading import Settings
from hostagent.guests.strands import is_deleted
from hostagent.images.member import ChainLimits
from hostagent.records import AccessFile, AccessRow, Label, Use
from jobs.errors import JobError
from jobs.model import Drive, FileId, Holder, Layer
from jobs.ports import AccessResult
from tests.harness import MIB, overlay, raw_image
from tests.unit.guests.fake_libvirt import NOW, play

QEMU = Label(64055, 64055)
CAPABILITIES = "<capabilities><host><secmodel><model>dac</model><baselabel>+64055:+64055</baselabel></secmodel></host></capabilities>"  # fmt: skip


class FakeLedger:
    """The ledger, and the store's rows."""

    def __init__(self) -> None:
        self.known: bool | None = None
        self.named: dict[FileId, str] = {}
        self.rows: dict[Holder, list[Use]] = {}
        self.said: list[str] = []

    def know_domains(self, known: bool, named: Mapping[FileId, str] | None = None) -> None:
        self.known, self.named = known, dict(named or {})
        self.said.append(f"know {known}")

    async def hold(self, holder: Holder, uses: Sequence[Use], *, name: str, trigger: str) -> dict[FileId, AccessResult]:
        self.rows[holder] = list(uses)
        self.said.append(f"hold {holder.id}")
        return {}

    async def share(self, holder: Holder, uses: Sequence[Use], *, trigger: str) -> None:
        had = self.rows.setdefault(holder, [])
        had += [use for use in uses if use.need.layer.file not in {one.need.layer.file for one in had}]

    async def lose(
        self, image: Holder, uses: Sequence[Use], *, name: str, trigger: str, file: FileId | None = None
    ) -> None:
        await self.share(image, uses, trigger=trigger)

    async def forget(self, holder: Holder, files: Sequence[FileId], *, trigger: str) -> None:
        left = [use for use in self.rows.pop(holder, []) if use.need.layer.file not in files]
        self.rows |= {holder: left} if left else {}

    async def release(self, holder: Holder, *, trigger: str) -> None:
        self.rows.pop(holder, None)

    async def converge(self, files: Sequence[FileId], *, trigger: str) -> dict[FileId, AccessResult]:
        self.said.append("converge")
        return {}

    async def access_rows(self, files: Sequence[FileId] | None = None) -> list[AccessRow]:
        return [
            AccessRow(
                *("", use.need.layer.file, use.need.layer.path, holder, use.need.mode, NOW, ""),
                label=use.label,
                format=use.need.layer.format,
            )
            for holder, uses in self.rows.items()
            for use in uses
            if files is None or use.need.layer.file in files
        ]

    async def access_files(self, files: Sequence[FileId] | None = None) -> list[AccessFile]:
        return []


class FakeLibvirt:
    """A hypervisor whose domains, by UUID, have one disk each, and say themselves what is `below` it; `hangs` are those
    that do not answer."""

    active = False

    def __init__(self) -> None:
        self.status: Any = self
        self.connected = True
        self.disks: dict[str, Path] = {}
        self.hangs: set[str] = set()
        self.format = "qcow2"
        self.below: list[Path] = []
        self.mirror = ""

    async def call(self, name: str, call: Callable[[Any], Any], *, domain: DomainRef | None = None) -> Any:
        if not self.connected:
            raise JobError("unavailable", "libvirt is away")
        if domain is not None and domain.uuid in self.hangs:
            raise JobError("unresponsive", f"describe of domain {domain.name}: no answer")
        return call(self)

    def domains(self) -> list[DomainRef]:
        return [self.find(uuid) for uuid in self.disks]

    def find(self, uuid: str) -> DomainRef:
        if uuid not in self.disks:
            raise JobError("not_found", "no such domain")
        return DomainRef(uuid, f"name-{uuid}", self.active)

    def descriptions(self, uuid: str) -> tuple[DomainRef, list[str]]:
        return self.find(uuid), [self.describe(uuid)]

    def describe(self, uuid: str) -> str:
        self.find(uuid)
        below = "".join(
            f"<backingStore type='file'><format type='{path.suffix[1:]}'/><source file='{path}'/>"
            for path in self.below
        )
        below += "<backingStore/>" * bool(self.below) + "</backingStore>" * len(self.below)
        source = f"<driver type='{self.format}'/><source file='{self.disks[uuid]}'/>{below}{self.mirror}"
        disk = f"<disk type='file'>{source}<target dev='vda'/></disk>"
        return f"<domain><name>name-{uuid}</name><uuid>{uuid}</uuid><devices>{disk}</devices></domain>"

    def capabilities(self) -> str:
        return CAPABILITIES


class Host:
    def __init__(self, folder: Path) -> None:
        self.libvirt, self.ledger = FakeLibvirt(), FakeLedger()
        self.base = raw_image(folder / "base.raw", MIB)
        for uuid in ("a", "b"):
            self.libvirt.disks[uuid] = overlay(folder / f"{uuid}.qcow2", self.base)
        self.qemu_conf = folder / "qemu.conf"
        settings = Settings(MIB, 60.0, 30.0, ChainLimits(), QEMU.uid, self.qemu_conf)
        hypervisor: Any = self.libvirt
        self.holding = Holding(hypervisor, self.ledger, self.ledger, settings)

    def held(self) -> dict[str, set[str]]:
        return {
            holder.id: {Path(use.need.layer.path).name for use in uses} for holder, uses in self.ledger.rows.items()
        }

    async def until(self, done: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not done():
                await asyncio.sleep(0.005)

    async def connect(self) -> None:
        self.holding.resync()
        await self.until(lambda: self.ledger.known)

    def tell(self, kind: DomainEventKind, uuid: str = "a") -> None:
        self.holding.event(DomainEvent(kind, uuid, f"name-{uuid}"))


def on_a_host(test: Callable[[Host], Awaitable[None]]) -> Callable[[Path], None]:
    async def with_run(host: Host) -> None:
        run = asyncio.create_task(host.holding.run())
        try:
            await test(host)
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)

    def run(tmp_path: Path) -> None:
        play(with_run(Host(tmp_path)))

    run.__name__ = test.__name__
    return run


@contextmanager
def soon() -> Iterator[None]:
    before, holding.AGAIN = holding.AGAIN, 0.02
    try:
        yield
    finally:
        holding.AGAIN = before


BOTH = {"a/vda": {"a.qcow2", "base.raw"}, "b/vda": {"b.qcow2", "base.raw"}}


@on_a_host
async def test_all_is_known_when_all_has_been_read_and_not_when_the_connection_is_lost(host: Host) -> None:
    assert not host.ledger.known
    await host.connect()
    assert host.held() == BOTH
    assert host.ledger.said[-2:] == ["know True", "converge"]  # what waited for that
    assert host.holding.check() == {"ok": True, "detail": "of 2, with 2 disks, it is known what they need"}
    host.libvirt.connected = False
    host.holding.lost()
    assert not host.ledger.known and "not known" in host.holding.check()["detail"]
    assert host.held() == BOTH
    host.libvirt.connected = True
    await host.connect()


@on_a_host
async def test_a_domain_that_is_new_is_not_known_from_the_event_on(host: Host) -> None:
    await host.connect()
    for kind in (DomainEventKind.DEFINED, DomainEventKind.STARTED):
        host.tell(kind)
        assert not host.ledger.known, "not a moment later"
        await host.until(lambda: host.ledger.known)
    host.libvirt.disks["c"] = overlay(host.base.parent / "c.qcow2", host.base)
    host.tell(DomainEventKind.DEFINED, "c")
    await host.until(lambda: host.ledger.known)
    assert host.held() == BOTH | {"c/vda": {"c.qcow2", "base.raw"}}


@on_a_host
async def test_who_is_gone_needs_nothing(host: Host) -> None:
    await host.connect()
    del host.libvirt.disks["a"]
    host.tell(DomainEventKind.UNDEFINED)
    assert host.ledger.known  # it needs no more than before
    await host.until(lambda: "a/vda" not in host.held())
    assert host.held() == {"b/vda": BOTH["b/vda"]}
    del host.libvirt.disks["b"]
    await host.holding.renew(Drive("b", "name-b", "vda"))
    assert host.held() == {}


@on_a_host
async def test_a_chain_that_changed_is_read_anew_at_the_jobs_end(host: Host) -> None:
    await host.connect()
    raw_image(host.libvirt.disks["a"], MIB)
    host.holding.event(DiskJobEvent(DiskJobKind.COMPLETED, "a", "name-a", "vda", "pull"))
    assert host.ledger.known
    lost = {str(host.libvirt.disks["a"]): {"base.raw"}}
    await host.until(lambda: host.held() == BOTH | {"a/vda": {"a.qcow2"}} | lost)


@on_a_host
async def test_one_that_hangs_stops_no_other_and_is_not_known(host: Host) -> None:
    host.libvirt.hangs = {"a"}
    with soon():
        host.holding.resync()
        await host.until(lambda: "b/vda" in host.held())
        await host.until(lambda: "remedy" in host.holding.check())
        assert not host.ledger.known and "name-a" in host.holding.check()["detail"]
        host.libvirt.hangs = set()
        await host.until(lambda: host.ledger.known)
    assert host.held() == BOTH


@on_a_host
async def test_what_cannot_be_read_or_is_not_there_keeps_what_it_had(host: Host) -> None:
    await host.connect()
    top = host.libvirt.disks["a"]
    whole = top.read_bytes()
    top.write_bytes(whole.replace(b"base.raw", b"nbd:x:10", 1))
    with soon():
        host.tell(DomainEventKind.STOPPED)
        await host.until(lambda: not host.ledger.known)
        assert host.held() == BOTH
        top.unlink()
        await host.until(lambda: host.ledger.known)  # there is nothing that could be used
        assert host.held() == BOTH
        raw_image(top, MIB)
        host.tell(DomainEventKind.DEFINED)
        await host.until(lambda: host.held()["a/vda"] == {"a.qcow2"})
        assert host.held()[str(top)] >= {"base.raw"}, "what lost it is gone, and the ledger itself sees to that"


@on_a_host
async def test_a_job_keeps_what_the_disk_needs_until_it_is_proven(host: Host) -> None:
    await host.connect()
    disk, job, image = holding.holder_of(Drive("a", "name-a", "vda")), Holder("job", "4711"), Holder("image", "/a")
    layers = [use.need.layer for use in host.ledger.rows[disk]]
    await host.holding.share(disk, job, layers[1:])
    raw_image(host.libvirt.disks["a"], MIB)
    await host.holding.renew(Drive("a", "name-a", "vda"))
    await host.holding.share(job, image, layers)
    assert host.held()["a/vda"] == {"a.qcow2"}
    for holder in (job, image):
        assert [(use.need.layer.path, use.label) for use in host.ledger.rows[holder]] == [(str(host.base), QEMU)]


A = Drive("a", "name-a", "vda")


def identity(path: Path) -> FileId:
    found = path.stat()
    return FileId(found.st_dev, found.st_ino)


def stand(image: Path, base: Path | None) -> None:
    """Rewrite the header alone, as QEMU does at the end of a pull."""
    words = ["-b", ""] if base is None else ["-F", "raw", "-b", str(base)]
    subprocess.run(["qemu-img", "rebase", "-u", *words, str(image)], check=True)


def test_what_a_chain_lost_is_its_images_until_that_is_proven(tmp_path: Path) -> None:
    @on_a_host
    async def scenario(host: Host) -> None:
        await host.connect()
        top = host.libvirt.disks["a"]
        stand(top, None)
        await host.holding.renew(A)
        assert (host.held()["a/vda"], host.held()[str(top)]) == ({"a.qcow2"}, {"base.raw"})
        new = host.libvirt.disks["a"] = overlay(top.with_name("copy.qcow2"), host.base)
        await host.holding.renew(A)
        assert host.held()["a/vda"] == {"copy.qcow2", "base.raw"}
        assert host.held()[str(new)] == {"a.qcow2"}
        await host.holding.renew(A, proven=[identity(top)])
        assert str(new) not in host.held()
        assert host.held()[str(top)] == {"base.raw"}, "nobody proved that"

    for active in (True, False):
        folder = tmp_path / str(active)
        folder.mkdir()
        before, FakeLibvirt.active = FakeLibvirt.active, active
        try:
            scenario(folder)
        finally:
            FakeLibvirt.active = before


@on_a_host
async def test_what_is_proven_is_its_images_no_more(host: Host) -> None:
    await host.connect()
    top = host.libvirt.disks["a"]
    stand(top, None)
    await host.holding.renew(Drive("a", "name-a", "vdb"), proven=[identity(host.base)])
    assert host.held()[str(top)] == {"base.raw"}, "that was another disk's"
    await host.holding.renew(A, proven=[identity(top)])
    assert host.held()[str(top)] == {"base.raw"}, "that was another file"
    await host.holding.renew(A, proven=[identity(host.base)])
    assert str(top) not in host.held() and host.held()["a/vda"] == {"a.qcow2"}


@on_a_host
async def test_what_is_proven_before_it_is_read_never_is_its_images(host: Host) -> None:
    await host.connect()
    stand(host.libvirt.disks["a"], None)
    await host.holding.renew(A, proven=[identity(host.base)])
    assert host.held() == BOTH | {"a/vda": {"a.qcow2"}}


@on_a_host
async def test_a_raw_image_has_nothing_but_what_is_written(host: Host) -> None:
    await host.connect()
    new = raw_image(host.base.with_name("copy.raw"), MIB)
    host.libvirt.disks["a"], host.libvirt.format = new, "raw"
    await host.holding.renew(A)
    assert host.held() == BOTH | {"a/vda": {"copy.raw"}}


def mirror(path: Path) -> str:
    """The target of a copy, as libvirt's XML has it while that runs."""
    return f"<mirror type='file' job='copy'><format type='qcow2'/><source file='{path}'/></mirror>"


@pytest.mark.parametrize("over", [True, False])
def test_the_target_of_a_copy_was_never_below(tmp_path: Path, over: bool) -> None:
    """The guest goes over to it, or the copy is aborted: of the two images that were written one is left."""

    @on_a_host
    async def scenario(host: Host) -> None:
        top = host.libvirt.disks["a"]
        copy = top.with_name("copy.qcow2")
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(top), str(copy)], check=True)
        host.libvirt.mirror = mirror(copy)
        await host.connect()
        assert host.held()["a/vda"] == {"a.qcow2", "base.raw", "copy.qcow2"}
        host.libvirt.mirror = ""
        if over:
            host.libvirt.disks["a"] = copy
        await host.holding.renew(A)
        if over:
            assert host.held()["a/vda"] == {"copy.qcow2"}
            assert host.held()[str(copy)] == {"a.qcow2", "base.raw"}, "it may still have to write what it took in"
        else:
            assert host.held()["a/vda"] == {"a.qcow2", "base.raw"} and str(top) not in host.held()
        assert str(top) not in host.held(), "its header names what it stood on"

    scenario(tmp_path)


@on_a_host
async def test_an_image_that_lost_what_it_stood_on_keeps_it_when_its_domain_is_gone(host: Host) -> None:
    """As a transient one whose QEMU was killed just after a pull."""
    await host.connect()
    lost, whole = host.libvirt.disks["a"], host.libvirt.disks["b"]
    stand(lost, None)
    host.libvirt.disks.clear()
    host.tell(DomainEventKind.STOPPED)
    await host.until(lambda: host.held() == {str(lost): {"base.raw"}})
    assert str(whole) not in host.held()


@on_a_host
async def test_an_image_that_was_deleted_with_its_domain_needs_nothing(host: Host) -> None:
    await host.connect()
    host.libvirt.disks.pop("a").unlink()
    host.tell(DomainEventKind.UNDEFINED)
    await host.until(lambda: host.held() == {"b/vda": BOTH["b/vda"]})


@on_a_host
async def test_nor_does_one_whose_folder_was_deleted(host: Host) -> None:
    folder = host.base.parent / "vm"
    folder.mkdir()
    host.libvirt.disks["a"] = overlay(folder / "disk.qcow2", host.base)
    host.libvirt.below = [host.base]
    await host.connect()
    assert host.held()["a/vda"] == {"disk.qcow2", "base.raw"}
    shutil.rmtree(folder)
    del host.libvirt.disks["a"]
    host.tell(DomainEventKind.UNDEFINED)
    await host.until(lambda: host.held() == {"b/vda": BOTH["b/vda"]})


def test_only_on_a_file_system_that_is_there_is_a_file_deleted(tmp_path: Path) -> None:
    file = identity(raw_image(tmp_path / "disk.raw", MIB))
    elsewhere = FileId(file.dev + 1, file.ino)  # what is mounted there is away
    for path, there, away in (
        (tmp_path / "disk.raw", False, False),
        (tmp_path / "none.raw", True, False),
        (tmp_path / "gone" / "far" / "disk.raw", True, False),
    ):
        found = [is_deleted(Layer(str(path), "raw", one, 0, 0)) for one in (file, elsewhere)]
        assert found == [there, away], path


@on_a_host
async def test_an_image_that_cannot_be_read_when_its_domain_is_gone_keeps_what_it_had(host: Host) -> None:
    await host.connect()
    top = host.libvirt.disks.pop("a")
    top.write_bytes(b"no header")
    host.tell(DomainEventKind.UNDEFINED)
    await host.until(lambda: host.held() == {"b/vda": BOTH["b/vda"], str(top): {"base.raw"}})


@on_a_host
async def test_a_raw_base_elsewhere_is_named_and_holds_up_no_other(host: Host) -> None:
    far = host.base.parent / "far"
    far.mkdir()
    base = raw_image(far / "base.raw", MIB)
    stand(host.libvirt.disks["a"], base)
    await host.connect()
    assert host.held()["a/vda"] == {"a.qcow2"}
    named = {identity(base): "domain:a/vda (name-a/vda)"}
    assert host.ledger.named == named
    away = host.libvirt.disks["a"].rename(host.base.parent / "away")
    await host.holding.renew(A)
    assert host.ledger.known and host.ledger.named == named, "it is only away"
    away.rename(host.libvirt.disks["a"])
    stand(host.libvirt.disks["a"], host.base)
    await host.holding.renew(A)
    assert host.ledger.known and host.ledger.named == {} and host.held() == BOTH


@on_a_host
async def test_what_nobody_can_say_of_one_domain_is_said_to_who_asks(host: Host) -> None:
    await host.connect()
    host.libvirt.hangs = {"a"}
    drive = Drive("a", "name-a", "vda")
    try:
        await host.holding.renew(drive)
        raise AssertionError("it is no answer")
    except JobError as error:
        assert error.code == "unresponsive"
    assert not host.ledger.known and host.held() == BOTH
    host.libvirt.hangs = set()
    await host.holding.renew(drive)
    await host.until(lambda: host.ledger.known)


@on_a_host
async def test_a_libvirt_that_changes_no_owners_leaves_none_behind(host: Host) -> None:
    host.qemu_conf.write_text("# dynamic_ownership = 1\nuser = 'qemu'\n dynamic_ownership=0 # ours\n")
    await host.connect()
    assert {use.label for uses in host.ledger.rows.values() for use in uses} == {None}
    host.qemu_conf.write_text("#dynamic_ownership = 0\n")
    await host.connect()
    assert {use.label for uses in host.ledger.rows.values() for use in uses} == {QEMU}
    host.qemu_conf.unlink()
    host.qemu_conf.mkdir()
    host.holding.resync()
    await host.until(lambda: "qemu.conf" in host.holding.check()["detail"])
    assert not host.ledger.known
