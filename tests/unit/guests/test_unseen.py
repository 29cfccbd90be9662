"""What is taken for proof that an image does not need any more what its chain lost: on real images, by qemu-img. libvirt
is played, and the pulls and commits are qemu-img's own, with and without the tables that they should have written."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hostagent.guests import unseen
from hostagent.guests.durable import Durable
from hostagent.guests.unseen import Settings, Unseen
from hostagent.images.member import ChainLimits
from hostagent.images.tool import Tool, ToolLimits
from hostagent.records import AccessRow, Use
from hostagent.store import Store
from jobs.engine import Engine
from jobs.errors import JobError
from jobs.model import FileId, Holder, Job, Layer, Need, Operation, Revocation, State
from jobs.ports import AccessResult, AccessVerdict, SystemClock
from jobs.world import Limits
from tests.harness import MIB, overlay, raw_image
from tests.libvirt.jobs import write
from tests.unit.guests.fake_libvirt import play
from tests.unit.guests.test_image_rows import DRIVE, Host, Rows, layer
from tests.unit.jobs.memory import Counts

LIMITS = Settings(ChainLimits(), 10.0, 0.05, 0.0)


class Access(Rows):
    """And what converged is closed, if no row has it."""

    async def delete(self, rows: Sequence[AccessRow], *, trigger: str) -> dict[FileId, AccessResult]:
        await self.store.delete_rows([row.id for row in rows])
        return {}

    async def acquire(self, holder: Any, needs: Any) -> None: ...

    async def converge(self, files: Sequence[FileId], *, trigger: str, at: object = None) -> dict[FileId, AccessResult]:
        needed = {row.file for row in await self.store.access_rows()}
        verdicts = ((file, AccessVerdict.GRANTED if file in needed else AccessVerdict.REVOKED) for file in files)
        return {file: AccessResult("", verdict) for file, verdict in verdicts}


class Agent(Host):
    """With one who proves; `recorded` and `alarms` are what it said."""

    def __init__(self, folder: Path, store: Store, settings: Settings = LIMITS) -> None:
        super().__init__(folder, store)
        self.access = Access(store)
        self.recorded: list[Job] = []
        self.alarms: list[str] = []
        self.active: list[Job] = []
        self.unseen = self.proving(settings)

    def proving(self, settings: Settings) -> Unseen:
        tool = Tool(user=None, limits=ToolLimits(), binary="qemu-img")
        return Unseen(
            self.holding,
            self.store,
            self.access,
            Durable(tool, self.access, 10.0),
            settings,
            clock=SystemClock(),
            ready=lambda: self.libvirt.connected,
            active=lambda: self.active,
            record=self._record,
            alarm=lambda path, remedy: self.alarms.append(remedy),
        )

    async def _record(self, job: Job, rows: tuple[str, ...]) -> None:
        await self.store.delete_rows(rows)
        self.recorded.append(job)

    async def look(self) -> None:
        """One round, after which the domain is what it was read as."""
        await self.holding.renew(DRIVE)
        for known in self.unseen._known.values():
            known.again = 0.0
        await self.unseen._round()

    async def kept(self) -> dict[str, str]:
        """What images keep, and why."""
        return {Path(row.path).name: row.reason for row in await self.store.access_rows() if row.lost}


def on_an_agent(test: Callable[[Agent], Awaitable[None]], **kind: Any) -> Callable[[Path], None]:
    async def story(folder: Path) -> None:
        (folder / "state").mkdir()
        store = Store(folder / "state", host="h", publish=lambda record: None)
        await store.open()
        try:
            agent = Agent(folder, store, **kind)
            for path, pattern in ((agent.middle, 5), (agent.top, 6)):
                write(path, pattern, (pattern - 5) * 256 * 1024, 128 * 1024)
            await agent.holding.renew(DRIVE)
            await test(agent)
        finally:
            await store.close()

    def run(tmp_path: Path) -> None:
        play(story(tmp_path))

    run.__name__ = test.__name__
    return run


def rebase(image: Path, base: Path | None, *, safe: bool = True) -> None:
    """`safe`: with the data that a pull takes in; else the header alone."""
    words = ["-b", ""] if base is None else ["-F", base.suffix[1:], "-b", str(base)]
    subprocess.run(["qemu-img", "rebase", *([] if safe else ["-u"]), *words, str(image)], check=True)


@on_an_agent
async def test_a_whole_pull_is_a_job_that_completed(agent: Agent) -> None:
    rebase(agent.top, None)
    await agent.look()
    (job,) = agent.recorded
    assert (job.state, job.spec.operation, job.external, job.drive) == (State.COMPLETED, Operation.PULL, True, DRIVE)
    assert job.before.paths() == [str(agent.top), str(agent.middle), str(agent.base)]
    assert job.after.paths() == [str(agent.top)] and job.revocation is Revocation.PENDING
    assert job.warnings and job.cursor == (MIB, MIB)
    assert await agent.kept() == {} and agent.alarms == []


@on_an_agent
async def test_a_pull_to_a_base_leaves_that(agent: Agent) -> None:
    rebase(agent.top, agent.base)
    await agent.look()
    (job,) = agent.recorded
    assert job.before.paths() == [str(agent.top), str(agent.middle), str(agent.base)]
    assert job.after.paths() == [str(agent.top), str(agent.base)]
    assert await agent.kept() == {}


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_header_without_its_tables_proves_nothing(tmp_path: Path, active: bool, whole: bool) -> None:
    """Also where all that the chain lost lies in what is still below: that it is there tells nothing of the middle."""

    @on_an_agent
    async def story(agent: Agent) -> None:
        agent.libvirt.active = active
        rebase(agent.top, None if whole else agent.base, safe=False)
        for _ in range(2):
            await agent.look()
        assert agent.recorded == [] and len(agent.alarms) == (0 if active else 1)
        kept = await agent.kept()
        assert set(kept) == ({"middle.qcow2", "base.raw"} if whole else {"middle.qcow2"})
        for reason in kept.values():
            assert "bytes of what it held are not written there" in reason
            assert ("sync" in reason) == active and ("qemu-img rebase -u" in reason) == (not active)
        rebase(agent.top, agent.middle, safe=False)  # as was said
        await agent.look()
        assert await agent.kept() == {}, "the disk itself has it again"
        rebase(agent.top, None)
        await agent.look()
        assert len(agent.recorded) == 1 and await agent.kept() == {}

    story(tmp_path)


@on_an_agent
async def test_zeros_of_a_layer_count_as_data_over_a_base_that_stays(agent: Agent) -> None:
    """What the image lacks of them reads as the base's old data."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(agent.middle), str(MIB)], check=True)
    rebase(agent.middle, agent.base, safe=False)
    zeros = ["qemu-io", "-c", "write -q -z 0 512k"]
    subprocess.run([*zeros, str(agent.middle)], check=True)
    rebase(agent.top, agent.base, safe=False)
    await agent.look()
    assert agent.recorded == [] and set(await agent.kept()) == {"middle.qcow2"}
    subprocess.run([*zeros, str(agent.top)], check=True)
    await agent.look()
    (job,) = agent.recorded
    assert job.spec.operation is Operation.PULL and await agent.kept() == {}


@on_an_agent
async def test_a_commit_below_the_top_is_proven_by_what_can_be_read_without_it(agent: Agent) -> None:
    subprocess.run(["qemu-img", "commit", "-q", str(agent.middle)], check=True)
    write(agent.middle, 5, 0, 128 * 1024)  # libvirt does not empty it
    rebase(agent.top, agent.base, safe=False)
    await agent.look()
    (job,) = agent.recorded
    assert (job.spec.operation, job.after.paths()) == (Operation.COMMIT, [str(agent.top), str(agent.base)])
    assert await agent.kept() == {}


@on_an_agent
async def test_a_commit_that_is_not_written_is_not_proven_and_compared_until_that_is_known(agent: Agent) -> None:
    rebase(agent.top, agent.base, safe=False)
    compared = 0
    proving = agent.unseen._file.adds_nothing

    async def counted(strand: Sequence[Layer], rest: Sequence[Layer]) -> bool:
        nonlocal compared
        compared += 1
        if compared == 1:
            raise JobError("timeout", "it took too long")
        return await proving(strand, rest)

    agent.unseen._file.adds_nothing = counted  # type: ignore[method-assign]
    await agent.holding.renew(DRIVE)
    known = agent.unseen._known.setdefault(agent.image, unseen._Known())
    await agent.unseen._settle(agent.image, [DRIVE], known)
    assert "cannot be said: it took too long" in (await agent.kept())["middle.qcow2"] and agent.alarms == []
    for _ in range(3):
        os.utime(agent.top)  # a guest writes there
        await agent.unseen._settle(agent.image, [DRIVE], known)
    assert compared == 2 and agent.recorded == []
    assert "gone down into" in (await agent.kept())["middle.qcow2"]
    write(agent.base, 5, 0, 128 * 1024)  # now it is
    await agent.unseen._settle(agent.image, [DRIVE], known)
    assert compared == 3 and len(agent.recorded) == 1


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_of_a_disk_that_went_over_to_a_copy_only_access_is_settled(tmp_path: Path, format: str) -> None:
    @on_an_agent
    async def story(agent: Agent) -> None:
        copy = agent.top.with_name(f"copy.{format}")
        subprocess.run(["qemu-img", "convert", "-O", format, str(agent.top), str(copy)], check=True)
        agent.libvirt.disks["a"], agent.libvirt.format = copy, format
        await agent.look()
        assert await agent.kept() == {} and agent.recorded == []

    story(tmp_path)


@on_an_agent
async def test_that_an_image_is_not_whole_is_told_again_after_a_restart_and_when_its_guest_was_killed_again(
    agent: Agent,
) -> None:
    rebase(agent.top, None, safe=False)
    for _ in range(2):
        await agent.look()
    assert len(agent.alarms) == 1
    agent.unseen = agent.proving(LIMITS)
    for _ in range(2):
        await agent.look()
    assert len(agent.alarms) == 2
    for active in (True, False):
        agent.libvirt.active = active
        await agent.look()
    assert len(agent.alarms) == 3 and agent.recorded == []


@on_an_agent
async def test_another_image_in_its_place_proves_nothing(agent: Agent) -> None:
    """It might be the overlay of a snapshot, pulled into, whose QEMU was killed before it wrote that."""
    other = agent.top.with_name("other.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(other), str(MIB)], check=True)
    agent.libvirt.disks["a"] = other
    await agent.look()
    assert set(await agent.kept()) == {"top.qcow2", "middle.qcow2", "base.raw"}


@on_an_agent
async def test_what_was_above_is_not_needed_by_what_it_stood_on(agent: Agent) -> None:
    """After a commit of the top, which QEMU writes before it goes over, or when somebody went back."""
    agent.libvirt.disks["a"] = agent.middle
    await agent.holding.renew(DRIVE)
    assert set(await agent.kept()) == {"top.qcow2"}
    await agent.look()
    assert await agent.kept() == {} and agent.recorded == []


@on_an_agent
async def test_of_two_that_stood_on_one_layer_the_unproven_one_keeps_it(agent: Agent) -> None:
    folder = agent.base.parent / "two"
    folder.mkdir()
    base = raw_image(folder / "base.raw", MIB, MIB // 2)
    image, bare, full = (overlay(folder / f"{name}.qcow2", base) for name in ("image", "bare", "full"))
    write(full, 3, MIB // 2, MIB // 4)
    uses = [Use(Need(layer(path), "r", ""), None) for path in (bare, full, base)]
    await agent.store.lose_needs(Holder("image", str(image)), uses, name=str(DRIVE))
    rebase(image, None)  # it has what the base held, and the bare one nothing more
    agent.libvirt.disks["a"] = image
    await agent.unseen._round()
    rows = [row for row in await agent.store.access_rows() if row.holder.id == str(image)]
    assert {Path(row.path).name for row in rows} == {"full.qcow2", "base.raw"} and agent.recorded == []


@pytest.mark.parametrize("kind", ["raw", "qcow2", "of the same base"])
def test_what_came_below_the_image_by_hand_proves_nothing(tmp_path: Path, kind: str) -> None:
    """It has something wherever the lost had: a raw file everywhere."""

    @on_an_agent
    async def story(agent: Agent) -> None:
        other = agent.base.with_name("other.raw" if kind == "raw" else "other.qcow2")
        if kind == "raw":
            other.write_bytes(bytes(MIB))
        elif kind == "qcow2":
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(other), str(MIB)], check=True)
        else:
            overlay(other, agent.base)
        if kind != "raw":
            write(other, 9, 0, MIB)
        rebase(agent.top, other, safe=False)
        for _ in range(2):
            await agent.look()
        kept = await agent.kept()
        assert agent.recorded == [] and set(kept) >= {"middle.qcow2"}
        assert ("base.raw" in kept) == (kind != "of the same base")
        command = kept["middle.qcow2"].partition("before it is used (")[2].partition(")")[0]
        assert command.endswith(f"-b {agent.middle} {agent.top}")

    story(tmp_path)


@on_an_agent
async def test_with_a_pull_and_then_a_snapshot_the_two_have_it_together(agent: Agent) -> None:
    rebase(agent.top, None)
    agent.libvirt.disks["a"] = overlay(agent.top.with_name("snapshot.qcow2"), agent.top, "qcow2")
    await agent.look()
    (job,) = agent.recorded
    assert job.after.paths()[1:] == [str(agent.top)] and await agent.kept() == {}


@on_an_agent
async def test_what_is_to_be_mended_is_what_stood_on_the_lost(agent: Agent) -> None:
    rebase(agent.top, None, safe=False)
    agent.libvirt.disks["a"] = overlay(agent.top.with_name("snapshot.qcow2"), agent.top, "qcow2")
    await agent.look()
    (mend,) = agent.alarms
    assert f"-b {agent.middle} {agent.top})" in mend and agent.recorded == []


@on_an_agent
async def test_a_raw_file_in_the_place_of_an_image_proves_nothing(agent: Agent) -> None:
    rebase(agent.top, None, safe=False)
    await agent.holding.renew(DRIVE)
    agent.top.write_bytes(bytes(MIB))
    agent.libvirt.format = "raw"
    await agent.look()
    kept = await agent.kept()
    assert set(kept) == {"middle.qcow2", "base.raw"} and "is raw" in kept["base.raw"] and agent.recorded == []


@on_an_agent
async def test_what_cannot_be_said_of_one_strand_holds_up_no_other(agent: Agent) -> None:
    bare = overlay(agent.base.with_name("bare.qcow2"), agent.base)
    rebase(agent.top, agent.base, safe=False)
    await agent.holding.renew(DRIVE)
    await agent.store.lose_needs(agent.image, [Use(Need(layer(bare), "r", ""), None)], name=str(DRIVE))

    async def late(*_: Any) -> bool:
        raise JobError("timeout", "it took too long")

    agent.unseen._file.adds_nothing = late  # type: ignore[method-assign]
    await agent.look()
    kept = await agent.kept()
    assert set(kept) == {"middle.qcow2"} and "cannot be said" in kept["middle.qcow2"] and agent.recorded == []


@on_an_agent
async def test_a_snapshot_on_what_is_not_proven_changes_nothing(agent: Agent) -> None:
    rebase(agent.top, None, safe=False)
    await agent.look()
    agent.libvirt.disks["a"] = overlay(agent.top.with_name("snapshot.qcow2"), agent.top, "qcow2")
    await agent.look()
    assert set(await agent.kept()) == {"middle.qcow2", "base.raw"} and agent.recorded == []


@on_an_agent
async def test_what_a_copy_that_ended_left_is_no_part_of_the_chain(agent: Agent) -> None:
    """Somebody's, which the guest did not go over to."""
    copies = [agent.top.with_name(name) for name in ("copy.qcow2", "copy2.qcow2")]
    for copy in copies:
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(agent.top), str(copy)], check=True)
        uses = [Use(Need(layer(copy), "rw", ""), None)]
        await agent.store.lose_needs(agent.image, uses, name=str(DRIVE))
    await agent.look()
    assert await agent.kept() == {} and agent.recorded == []
    assert await agent.needs_of_disk() == {"top.qcow2", "middle.qcow2", "base.raw"}


@on_an_agent
async def test_what_libvirt_names_is_needed_whatever_the_header_says(agent: Agent) -> None:
    rebase(agent.top, None)
    await agent.holding.renew(DRIVE)
    agent.libvirt.below = [agent.middle, agent.base]
    await agent.look()
    assert agent.recorded == [] and set(await agent.kept()) == {"middle.qcow2", "base.raw"}
    assert await agent.needs_of_disk() == {"top.qcow2", "middle.qcow2", "base.raw"}
    agent.libvirt.below = []
    await agent.look()
    assert len(agent.recorded) == 1


@on_an_agent
async def test_a_job_on_the_disk_or_a_libvirt_that_is_away_is_waited_for(agent: Agent) -> None:
    rebase(agent.top, None)
    for job in (agent.job, replace(agent.job, drive=None)):
        agent.active = [job]
        await agent.look()
        assert agent.recorded == []
    agent.active = [replace(agent.job, state=State.QUEUED)]
    await agent.holding.renew(DRIVE)
    agent.libvirt.connected = False
    await agent.unseen._round()
    assert agent.recorded == []
    agent.libvirt.connected = True
    await agent.look()
    assert len(agent.recorded) == 1


@on_an_agent
async def test_what_cannot_be_read_is_said_and_stays(agent: Agent) -> None:
    rebase(agent.top, None)
    await agent.holding.renew(DRIVE)
    away = agent.middle.rename(agent.middle.with_suffix(".away"))
    await agent.look()
    kept = await agent.kept()
    assert set(kept) == {"middle.qcow2", "base.raw"} and all("cannot be said" in reason for reason in kept.values())
    away.rename(agent.middle)
    agent.libvirt.hangs = {"a"}
    agent.unseen._known.clear()
    await agent.unseen._round()
    assert "no answer" in (await agent.kept())["base.raw"] and agent.recorded == []
    agent.libvirt.hangs = set()
    await agent.look()
    assert len(agent.recorded) == 1 and await agent.kept() == {}


def test_a_look_that_comes_late_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then others have settled what it tells of."""
    go, read = threading.Event(), unseen._read

    def slow(*args: Any) -> Any:
        found = read(*args)
        go.wait(20)
        return found

    @on_an_agent
    async def story(agent: Agent) -> None:
        agent.unseen = agent.proving(replace(LIMITS, file_timeout=0.5))
        rebase(agent.top, None, safe=False)
        monkeypatch.setattr(unseen, "_read", slow)
        for _ in range(2):
            await agent.look()
            assert "do not answer" in (await agent.kept())["base.raw"]
        base = [row for row in await agent.store.access_rows() if row.lost and row.path == str(agent.base)]
        await agent.store.delete_rows([row.id for row in base])  # `grant revoke`
        monkeypatch.setattr(unseen, "_read", read)
        asyncio.get_running_loop().call_later(0.1, go.set)
        await agent.look()
        await asyncio.sleep(0.2)
        await agent.look()
        assert "not written there" in (await agent.kept())["middle.qcow2"]

    story(tmp_path)


@on_an_agent
async def test_of_an_image_that_could_not_be_read_when_its_domain_went_its_header_tells_later(agent: Agent) -> None:
    reading = agent.holding._reading
    stands_on = reading.stands_on

    async def late(*_: Any) -> None:
        raise JobError("unresponsive", "the files do not answer")

    reading.stands_on = late  # type: ignore[method-assign]
    del agent.libvirt.disks["a"]
    await agent.holding.renew(DRIVE)
    reading.stands_on = stands_on  # type: ignore[method-assign]
    assert set(await agent.kept()) == {"middle.qcow2", "base.raw"}
    await agent.look()
    assert await agent.kept() == {} and agent.recorded == []


@on_an_agent
async def test_an_image_that_no_domain_has_any_more_is_proven_by_its_file(agent: Agent) -> None:
    rebase(agent.top, None, safe=False)
    del agent.libvirt.disks["a"]
    await agent.look()
    assert set(await agent.kept()) == {"middle.qcow2", "base.raw"} and len(agent.alarms) == 1
    rebase(agent.top, agent.middle, safe=False)
    rebase(agent.top, None)
    await agent.look()
    assert await agent.kept() == {} and agent.recorded == []


@on_an_agent
async def test_an_image_that_is_never_whole_or_makes_the_agent_fail_holds_up_no_other(agent: Agent) -> None:
    rebase(agent.top, None, safe=False)
    await agent.holding.renew(DRIVE)
    other = agent.base.with_name("zz.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(other), str(MIB)], check=True)
    write(other, 1, 0, MIB)
    uses = [Use(Need(layer(agent.base), "r", ""), None)]

    async def look() -> None:
        await agent.store.lose_needs(Holder("image", str(other)), uses, name="other/vda")
        agent.unseen._known.clear()
        await agent.unseen._round()
        assert str(other) not in {row.holder.id for row in await agent.store.access_rows()}

    await look()
    settle = agent.unseen._settle

    async def nothing(*_: Any) -> None: ...

    agent.unseen._settle = nothing  # type: ignore[method-assign]
    rows = await agent.store.access_rows()
    for _ in range(1100):  # it takes days
        agent.unseen._known[agent.image].again = 0.0
        await agent.unseen._judge(agent.image, rows)

    async def failing(image: Holder, *rest: Any) -> None:
        if image == agent.image:
            raise KeyError("a fault")
        await settle(image, *rest)

    agent.unseen._settle = failing  # type: ignore[method-assign]
    await look()
    assert set(await agent.kept()) == {"middle.qcow2", "base.raw"}


def test_a_loss_is_looked_at_when_a_job_that_was_seen_would_be_known(tmp_path: Path) -> None:
    @on_an_agent
    async def story(agent: Agent) -> None:
        agent.unseen = agent.proving(replace(LIMITS, interval=50.0, patience=30.0))
        rebase(agent.top, None)
        await agent.holding.renew(DRIVE)
        assert 20.0 < await agent.unseen._round() <= 30.0 and agent.recorded == []

    story(tmp_path)


# The agent killed at any step


class Crash(Exception):
    """The agent is killed here."""


class CrashingStore(Store):
    """Dies at the n-th transaction, before or after it is durable; and then nothing more is written. The test's own
    looks do not count."""

    def arm(self, left: int | None, *, after: bool) -> None:
        self.left, self.after, self.steps, self.dead = left, after, 0, False
        run, ours = self._db.run, asyncio.current_task()

        async def counted(work: Any) -> Any:
            if asyncio.current_task() is ours:
                return await run(work)
            self.steps += 1
            if self.dead or (self.steps == self.left and not self.after):
                self.dead = True
                raise Crash
            found = await run(work)
            if self.steps == self.left:
                self.dead = True
                raise Crash
            return found

        self._db.run = counted  # type: ignore[method-assign]


class Life:
    """One agent on the store, from its start to its death."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.agent = Agent(folder, store)
        self.agent.access.store = store
        holding = self.agent.holding

        class Driver:
            async def drop(self, job: Job) -> None:
                await holding.end(job)

            async def leave(self, job: Job) -> None: ...

        driver: Any = Driver()
        limits = Limits(settle_retry=0.001, settle_retry_max=0.01)
        self.engine = Engine(
            driver,
            store,
            self.agent.access,
            clock=SystemClock(),
            observer=Counts(),
            limits=limits,
            changed=lambda job: None,
        )
        unseen = self.agent.unseen
        unseen._record = self.engine.record
        unseen._active = lambda: [*self.engine.active(), *self.engine.settling()]

    async def live(self, until: Callable[[], Awaitable[bool]]) -> None:
        tasks = [asyncio.create_task(self.agent.unseen.run()), asyncio.create_task(self.agent.holding.run())]
        try:
            await asyncio.create_task(self.engine.recover())
            self.agent.holding.resync()
            async with asyncio.timeout(20):
                while not await until():
                    await asyncio.sleep(0.002)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.engine.stop()


def crash_at(images: Path, folder: Path, step: int | None, *, after: bool, whole: bool) -> int:
    """Start on a disk that lost its base, die at that step, and start again: how many steps it takes."""

    async def story() -> int:
        (folder / "state").mkdir(parents=True)
        for path in images.iterdir():
            shutil.copy(path, folder)
        store = CrashingStore(folder / "state", host="h", publish=lambda record: None)
        await store.open()
        first = Life(folder, store)
        await first.agent.holding.renew(DRIVE)
        first.agent.top.write_bytes((folder / "pulled.qcow2").read_bytes())
        store.arm(step, after=after)

        async def settled() -> bool:
            if store.dead:
                raise Crash
            jobs = await store.jobs()
            rows = await store.access_rows()
            said = [row for row in rows if row.lost and "not written" in row.reason]
            return bool(jobs and jobs[0].revocation is Revocation.DONE) or (not whole and len(said) == 2)

        with suppress(Crash):
            await first.live(settled)
        steps = store.steps
        await store.close()
        store = CrashingStore(folder / "state", host="h", publish=lambda record: None)
        await store.open()
        store.arm(None, after=False)
        held = {Path(row.path).name for row in await store.access_rows()}
        jobs = await store.jobs()
        assert held >= {"middle.qcow2", "base.raw"} or (whole and len(jobs) == 1), "it is open until it is proven"
        second = Life(folder, store)
        await second.live(settled)
        jobs = await store.jobs()
        held = {Path(row.path).name for row in await store.access_rows()}
        events = await store.events_since(0, 100)
        assert events is not None
        if whole:
            assert [job.state for job in jobs] == [State.COMPLETED] and held == {"top.qcow2"}
            assert {Path(path).name for path in jobs[0].revoked} == {"middle.qcow2", "base.raw"}
            assert len(events) == 1, "told once"
        else:
            assert jobs == [] and held == {"top.qcow2", "middle.qcow2", "base.raw"} and events == []
        await store.close()
        return steps

    return asyncio.run(asyncio.wait_for(story(), 60))


@pytest.mark.parametrize("whole", [True, False])
def test_an_agent_killed_at_any_step_takes_nothing_that_is_not_proven_and_ends_with_the_same(
    tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lacking(self: Durable, above: Sequence[Layer], strand: Sequence[Layer], *, bare: bool) -> int:
        return 0 if whole else 4096

    monkeypatch.setattr(Durable, "lacking", lacking)  # qemu-img is slow, and proven above
    images = tmp_path / "images"
    images.mkdir()
    top, middle = images / "top.qcow2", images / "middle.qcow2"
    overlay(top, overlay(middle, raw_image(images / "base.raw", MIB)), "qcow2")
    shutil.copy(top, images / "pulled.qcow2")
    rebase(images / "pulled.qcow2", None, safe=False)
    steps = crash_at(images, tmp_path / "none", None, after=False, whole=whole)
    assert steps > 8
    for step in range(1, steps + 1):
        for after in (False, True):
            crash_at(images, tmp_path / f"{step}-{after}", step, after=after, whole=whole)
