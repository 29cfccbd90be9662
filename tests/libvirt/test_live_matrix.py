"""Each operation on a running guest's disk, and all that can happen to it: one check of what must hold after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, ApiError, overlay, reachable
from tests.libvirt.booted import Booted
from tests.libvirt.holds import ABORTED, BROKEN, FULL, STOPPED
from tests.libvirt.jobs import block_job
from tests.libvirt.live import Cell
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.storage import Storage, failing_storage
from tests.libvirt.works import SIZE, SLOW, WORKS, Scene, Work
from tests.qemu.faults import HASTE
from tests.qemu.kills import left_in_store


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    with failing_storage(tmp_path_factory.mktemp("storage"), small=96 * MIB, size=SIZE) as found:
        yield found


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, storage: Storage) -> Iterator[PrivateLibvirt]:
    home = tmp_path_factory.mktemp("libvirt")
    with reachable(home), PrivateLibvirt(home) as process:
        yield process


@pytest.fixture(scope="module")
def module_agent(tmp_path_factory: pytest.TempPathFactory, daemon: PrivateLibvirt) -> Iterator[AgentProcess]:
    home = tmp_path_factory.mktemp("agent")
    settings = {
        **HASTE,
        "LIBVIRT_URI": daemon.uri,
        "LIBVIRT_RECONNECT_WAIT": "0.1",
        "LIBVIRT_RECONNECT_WAIT_MAX": "0.5",
        "IMAGES_POOLS": str(tmp_path_factory.getbasetemp()),  # a chain may lie on several file systems
    }
    with reachable(home), AgentProcess(home, settings) as process:
        yield process
        if process.process is not None:
            process.stop()
            assert left_in_store(process) == {}


@pytest.fixture
def agent(module_agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    if module_agent.process is None:
        module_agent.start()
    until(lambda: module_agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
    return module_agent


@dataclass
class Stage:
    """Where a cell takes place. `cell` is a guest that runs on a new disk, and nothing is done to that yet."""

    agent: AgentProcess
    libvirt: PrivateLibvirt
    booted: Booted
    storage: Storage
    folder: Path
    work: Work
    cells: list[Cell] = field(default_factory=list)

    def cell(self, *, full: bool = False, fails: bool = False) -> Cell:
        more = {"elsewhere": self.storage.small.folder} if full else {"put": self.storage.put} if fails else {}
        scene = Scene(self.folder / "disk", self.work, **more)
        self.cells.append(Cell(self.agent, self.libvirt, self.booted, scene))
        return self.cells[-1]


@pytest.fixture
def stage(
    agent: AgentProcess, libvirt: PrivateLibvirt, booted: Booted, storage: Storage, folder: Path, work: Work
) -> Iterator[Stage]:
    stage = Stage(agent, libvirt, booted, storage, folder, work)
    yield stage
    storage.mend()
    libvirt.remove_guests()
    for cell in stage.cells:
        cell.give_up()
    (storage.small.folder / "filler").unlink(missing_ok=True)


def completes(stage: Stage) -> None:
    cell = stage.cell()
    cell.begin()
    cell.midway()
    cell.completes()
    cell.close()


def aborted(stage: Stage) -> None:
    cell = stage.cell()
    cell.begin()
    cell.midway()
    cell.ask("abort")
    cell.ends(ABORTED)
    cell.close()


def aborted_when_ready(stage: Stage) -> None:
    cell = stage.cell()
    cell.begin()
    cell.ready()
    cell.ask("abort")
    cell.ends(ABORTED)
    cell.close()


def slower(stage: Stage) -> None:
    cell = stage.cell()
    cell.begin()
    cell.midway()
    cell.speed(2 * SLOW)
    until(lambda: (block_job(cell.guest) or {}).get("bandwidth") == 2 * SLOW, "QEMU has that speed")
    assert cell.until("running")["bandwidth"] == 2 * SLOW
    cell.completes()
    cell.close()


def without_libvirtd(stage: Stage) -> None:
    cell = stage.cell()
    cell.begin()
    cell.midway()
    stage.libvirt.kill()
    cell.until("unknown")
    cell.guest.until_flushed(cell.guest.flushed + 2)
    stage.libvirt.start()
    cell.until("running")
    cell.completes()
    cell.close()


def without_agent(stage: Stage) -> None:
    cell = stage.cell()
    cell.begin()
    cell.midway()
    stage.agent.kill()
    cell.guest.until_flushed(cell.guest.flushed + 2)
    stage.agent.start()
    cell.until("running")
    cell.completes()
    cell.close()


def guest_killed(stage: Stage) -> None:
    cell = stage.cell()
    cell.begin()
    cell.midway()
    cell.kill()
    cell.ends(STOPPED)
    cell.close()


def guest_destroyed(stage: Stage) -> None:
    cell = stage.cell()
    cell.begin()
    cell.midway()
    cell.guest.destroy()
    cell.ends(STOPPED)
    cell.close()


def no_space(stage: Stage) -> None:
    """Once there is some, the guest goes on, and so does the same job."""
    cell = stage.cell(full=True)
    cell.begin()
    cell.midway()
    filler = stage.storage.small.fill()
    cell.fails()
    filler.unlink()
    cell.resume()
    cell.ends(FULL)
    cell.begin()
    cell.completes()
    cell.close()


def broken(stage: Stage) -> None:
    """Once it is mended, the guest goes on, and so does the same job."""
    cell = stage.cell(fails=True)
    cell.begin()
    cell.midway()
    stage.storage.fail(stage.work.fails[1])
    cell.fails()
    stage.storage.mend()
    cell.resume()
    cell.ends(BROKEN)
    cell.begin()
    if not stage.work.mirrors or not has_kept_its_filter(cell):
        cell.completes()
    cell.close()


def has_kept_its_filter(cell: Cell) -> bool:
    """A QEMU that stops its guest in the moment in which a mirror fails may keep that one's filter: it takes no other
    mirror of this disk until it ends, and the user is told."""
    error = cell.until("running", "ready", "failed")["error"]
    if error is None or "root block node" not in error["message"]:
        return False
    assert "shut the guest down" in error["remedy"], error
    return True


def shared(stage: Stage) -> None:
    """A second guest stands on the same base: it keeps it, and what it stands on is not written."""
    cell = stage.cell()
    base = cell.scene.files["base"]
    other = cell.neighbour(overlay(cell.scene.folder / "web2.qcow2", base, "raw"), base)
    if stage.work.commits:
        with pytest.raises(ApiError) as refused:
            cell.begin()
        assert refused.value.code == "busy" and "web2/vda" in refused.value.body["detail"]
    else:
        cell.begin()
        cell.midway()
        cell.completes()
    other.until_flushed(other.flushed + 2)
    cell.close()


TROUBLES: tuple[Callable[[Stage], None], ...] = (
    completes,
    aborted,
    aborted_when_ready,
    slower,
    without_libvirtd,
    without_agent,
    guest_killed,
    guest_destroyed,
    no_space,
    broken,
    shared,
)


ESSENTIAL = {
    "pull": (completes, without_libvirtd, without_agent, guest_killed, shared),
    "pull-increments": (completes,),
    "copy-finish": (no_space,),
    "copy-pivot": (completes, aborted_when_ready, without_agent, broken),
    "commit-pivot": (completes, shared),
    "commit-keep": (guest_destroyed,),
    "commit-below": (completes, slower),
}
"""The others take minutes, and are part of `make test-full`."""


def cells() -> list[object]:
    return [
        pytest.param(
            work,
            trouble,
            id=f"{work}-{trouble.__name__}",
            marks=() if trouble in ESSENTIAL.get(str(work), ()) else pytest.mark.slow,
        )
        for work in WORKS
        for trouble in TROUBLES
        if trouble is not aborted_when_ready or work.mirrors
    ]


@pytest.mark.parametrize(("work", "trouble"), cells())
def test_live(stage: Stage, trouble: Callable[[Stage], None]) -> None:
    trouble(stage)
