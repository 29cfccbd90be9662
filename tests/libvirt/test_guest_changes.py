"""What else is done to a guest while a job runs on its disk, or just after: refused by libvirt, or without harm to either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import AgentProcess, reachable
from tests.libvirt import holds
from tests.libvirt.booted import Booted
from tests.libvirt.holds import STOPPED
from tests.libvirt.jobs import block_job, live_paths, pivot, speed_up
from tests.libvirt.live import PAUSED, Cell
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.works import SIZE, STEP, WORKS, Scene, Work

PULL, INCREMENTS, COPY, PIVOTED, BELOW = (WORKS[n] for n in (0, 2, 4, 5, 7))
DETACHED = "<disk type='file' device='disk'><target dev='vda' bus='virtio'/></disk>"
NO_METADATA, DISK_ONLY = 4, 16
"""VIR_DOMAIN_SNAPSHOT_CREATE_…"""
LIVE, PEER, UNSAFE = 1, 2, 512
"""VIR_MIGRATE_…: two hosts with one file system look like two with none in common."""

ESSENTIAL = (COPY,)


def works(*some: Work) -> list[Any]:
    essential = some[:1] or ESSENTIAL
    return [
        pytest.param(work, id=str(work), marks=[] if work in essential else pytest.mark.slow) for work in some or WORKS
    ]


@pytest.fixture
def agent(module_agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    until(lambda: module_agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
    return module_agent


@pytest.fixture
def cell(agent: AgentProcess, libvirt: PrivateLibvirt, booted: Booted, folder: Path, work: Work) -> Iterator[Cell]:
    cell = Cell(agent, libvirt, booted, Scene(folder / "disk", work))
    yield cell
    libvirt.remove_guests()
    cell.give_up()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateLibvirt]:
    """Another host, as far as libvirt knows."""
    home = tmp_path_factory.mktemp("elsewhere")
    with reachable(home), PrivateLibvirt(home) as process:
        yield process


def migrate(cell: Cell, to: PrivateLibvirt) -> None:
    with cell.guest.domain() as domain:
        uri, socket = to.uri.replace("qemu:", "qemu+unix:"), f"unix://{to.runtime}/migration"
        domain.migrateToURI3(uri, {"migrate_uri": socket}, LIVE | PEER | UNSAFE)


@pytest.mark.parametrize("work", works())
def test_libvirt_keeps_a_disk_with_a_job_as_it_is(cell: Cell, elsewhere: PrivateLibvirt) -> None:
    import libvirt

    changes: list[Callable[[Any], object]] = [
        lambda domain: domain.managedSave(0),
        lambda domain: domain.save(str(cell.scene.folder / "saved")),
        lambda domain: domain.snapshotCreateXML("<domainsnapshot/>", DISK_ONLY),
        lambda domain: domain.detachDeviceFlags(DETACHED, 1),
        lambda domain: domain.blockResize("vda", 2 * SIZE, 1),
        lambda domain: domain.backupBegin("<domainbackup/>", None),
        lambda domain: migrate(cell, elsewhere),
    ]
    cell.begin()
    cell.midway()
    with cell.guest.domain() as domain:
        for change in changes:
            with pytest.raises(libvirt.libvirtError, match=r"block ?job|block copy|in use"):
                change(domain)
    cell.until("running")
    cell.completes()
    cell.close()


@pytest.mark.parametrize("work", works())
def test_a_guest_that_stands_still_for_a_while_or_is_reset(cell: Cell) -> None:
    cell.begin()
    cell.midway()
    with cell.guest.domain() as domain:
        domain.suspend()
        before = (block_job(cell.guest) or {"cur": 0})["cur"]
        until(lambda: (block_job(cell.guest) or {"cur": before + 1})["cur"] > before, "QEMU goes on")
        domain.resume()
        cell.until("running")
        domain.reset()
    until(lambda: "READY" in cell.guest.console.read_text(errors="replace")[-400:], "it boots again")
    cell.guest.until_flushed(2)
    cell.completes()
    cell.close()


@pytest.mark.parametrize("work", works())
@pytest.mark.parametrize("ends", [False, True], ids=["goes-on", "ends"])
def test_a_guest_that_is_undefined(cell: Cell, ends: bool) -> None:
    """It goes on, and is gone with its end."""
    cell.begin()
    cell.midway()
    with cell.guest.domain() as domain:
        domain.undefine()
    cell.until("running")
    if ends:
        cell.guest.destroy()
        job = cell.agent.until_ended(cell.job["id"])
        assert (job["state"], job["error"]["code"]) == ("failed", "guest_stopped")
    else:
        cell.completes()
    holds.written(cell, cell.scene.before if ends else cell.scene.after)
    holds.nothing_left(cell)


def pulled_and_not_flushed(cell: Cell) -> None:
    """The guest stands still: what was pulled is in QEMU's memory only, and of a job libvirt knows nothing any more."""
    cell.begin()
    cell.midway()
    with cell.guest.domain() as domain:
        domain.suspend()
    cell.speed(0)
    until(
        lambda: block_job(cell.guest) is None and not cell.scene.headers(cell.scene.after)[str(cell.scene.top)], "done"
    )
    assert cell.until("running")


@pytest.mark.parametrize("work", [PULL], ids=str)
def test_a_guest_that_is_saved_before_it_flushed_what_was_pulled(cell: Cell) -> None:
    pulled_and_not_flushed(cell)
    with cell.guest.domain() as domain:
        domain.managedSave(0)
    job = cell.agent.until_ended(cell.job["id"])
    assert (job["state"], job["revocation"]) == ("completed", "done"), job
    cell.guest.start()
    with cell.guest.domain() as domain:
        domain.resume()
    cell.guest.until_flushed(2)  # its console begins anew
    cell.close()


@pytest.mark.parametrize("work", [PULL], ids=str)
def test_a_snapshot_before_the_guest_flushed_what_was_pulled(cell: Cell) -> None:
    pulled_and_not_flushed(cell)
    snapshot(cell)
    completed_below_a_snapshot(cell)


def snapshot(cell: Cell) -> None:
    with cell.guest.domain() as domain:
        domain.snapshotCreateXML("<domainsnapshot><name>s</name></domainsnapshot>", DISK_ONLY | NO_METADATA)


def completed_below_a_snapshot(cell: Cell) -> None:
    job = cell.agent.until_ended(cell.job["id"])
    assert job["state"] == "completed", job["error"]
    assert job["chain"]["after"] == cell.scene.after == live_paths(cell.guest)[1:]
    assert {*job["chain"]["revoked"]} == {str(path) for path in cell.scene.dropped}
    with cell.guest.domain() as domain:
        if domain.state()[0] == PAUSED:
            domain.resume()
    cell.guest.until_flushed(cell.guest.flushed + 2)
    cell.guest.destroy()
    cell.guest.verify(Path(str(live_paths(cell.guest)[0])), before=cell.scene.truth)


@pytest.mark.parametrize("work", works(PULL, COPY, PIVOTED, BELOW))
def test_a_job_that_ended_unseen_and_a_snapshot_after_it(cell: Cell) -> None:
    cell.begin()
    cell.midway()
    cell.agent.kill()
    speed_up(cell.guest)
    if cell.work.completion:
        until(lambda: try_pivot(cell), "it has gone over")
    until(lambda: block_job(cell.guest) is None, "it has ended")
    cell.guest.until_flushed(cell.guest.flushed + 2)
    snapshot(cell)
    cell.agent.start()
    completed_below_a_snapshot(cell)


def try_pivot(cell: Cell) -> bool:
    import libvirt

    try:
        pivot(cell.guest)
    except libvirt.libvirtError:  # it is not ready yet
        return False
    return True


@pytest.mark.parametrize("work", [INCREMENTS], ids=str)
def test_a_guest_that_ends_or_is_undefined_between_two_increments(cell: Cell) -> None:
    cell.begin()
    cell.speed(STEP)  # without a limit QEMU may be through before anybody sees that it has passed the goal
    cell.until("waiting")
    cell.guest.destroy()
    cell.ask("next")
    cell.ends(STOPPED)
    cell.close()
