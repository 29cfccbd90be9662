"""What must hold after a job on a running guest's disk, whatever happened to it: its outcome, the chain in libvirt and in
the headers, every byte that the guest has flushed or never wrote, who may open what, and that nothing is left over."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness import Json, check_clean, sound
from tests.libvirt import pattern
from tests.libvirt.jobs import block_job, live_paths, terminal_events
from tests.libvirt.private import until
from tests.libvirt.works import ALICE
from tests.qemu.faults import open_below

if TYPE_CHECKING:
    from tests.libvirt.live import Cell

ROOT = (0, 0)


@dataclass(frozen=True)
class End:
    """What becomes of a job: its state, and the code of its error."""

    state: str
    code: str | None = None


COMPLETED = End("completed")
ABORTED = End("aborted", "cancelled")
STOPPED = End("failed", "guest_stopped")
FULL = End("failed", "no_space")
BROKEN = End("failed", "io_error")


def after(cell: Cell, job: Json, end: End) -> None:
    """When the job has ended, and so has its revocation."""
    assert (job["state"], job["error"] and job["error"]["code"]) == (end.state, end.code), job
    assert len(terminal_events(cell.agent, job)) == 1
    completed = end is COMPLETED
    chain = cell.scene.after if completed else cell.scene.before
    assert (job["chain"]["before"], job["chain"]["after"]) == (cell.scene.before, chain)
    assert not completed or job["cursor"]["cur"] == job["cursor"]["end"]
    _chain(cell, chain)
    _target(cell, job, completed)
    _held(cell, chain)
    _dropped(cell, job, cell.scene.dropped if completed else [])
    if completed and cell.work.completion == "finish":  # what was finished is there already, while the guest goes on
        result = cell.scene.copy if cell.work.copies else cell.scene.files["base"]
        cell.guest.verify(result, flushed=cell.flushed, before=cell.scene.truth, running=True)
    _nothing_runs(cell)


def in_the_end(cell: Cell, chain: list[str]) -> None:
    """Ends the guests, then undefines them."""
    written(cell, chain)
    cell.guest.start(paused=True)  # another QEMU can open it, too
    assert live_paths(cell.guest) == chain
    nothing_left(cell)


def written(cell: Cell, chain: list[str]) -> None:
    """Ends the guests: all is there that they flushed, and what they never wrote is what it was."""
    scene = cell.scene
    _off(cell)
    cell.guest.verify(Path(chain[0]), before=scene.truth)
    for other in cell.others:
        other.verify()
    for path in [*scene.files.values(), scene.copy]:
        if path.exists() and path.suffix != ".raw" and path.parent != scene.failing:
            assert sound(path) if cell.killed else check_clean(path)


def gone_over_or_not(cell: Cell, job: Json) -> None:
    """The guest ended in its pivot: one of the two files has all that it flushed, and both are there, and named."""
    old, new = cell.scene.top, Path(cell.scene.after[0])
    assert str(old) in job["error"]["message"] and str(new) in job["error"]["message"], job
    assert len(terminal_events(cell.agent, job)) == 1
    assert sound(old)
    found = [pattern.verify_image(path, cell.guest.flushed, before=cell.scene.truth) for path in (old, new)]
    assert not all(one.wrong for one in found), [one.wrong[:3] for one in found]
    _held(cell, cell.scene.before)
    _nothing_runs(cell)


def nothing_left(cell: Cell, but: Sequence[Path] = ()) -> None:
    """Undefines the guests: nobody needs anything then, and nobody can open it, `but` these."""
    scene = cell.scene
    _off(cell)
    for guest in (cell.guest, *cell.others):
        guest.remove()
    until(lambda: _needless(cell), "nobody needs anything")
    paths = [*scene.files.values(), scene.copy]
    for path in paths:
        if path.exists() and path not in but and path.parent != scene.failing:  # what fails takes no other owner
            until(lambda path=path: not cell.can_open(path), f"{path} is closed")


def _off(cell: Cell) -> None:
    """One that was undefined is gone then, and what it needed is given back before anybody looks into it."""
    for guest in (cell.guest, *cell.others):
        if guest.runs:
            guest.destroy()
    if not cell.guest.exists:
        until(lambda: _needless(cell), "its files are nobody's")


def _needless(cell: Cell) -> bool:
    """Nobody needs any file of the scene, and all is done about that."""
    paths = [*cell.scene.files.values(), cell.scene.copy]
    return not any(cell.holders(path) for path in paths) and not _pending(cell)


def _pending(cell: Cell) -> int:
    found: int = cell.agent.get("/v1/host")["revocations"]["pending"]
    return found


def _chain(cell: Cell, chain: list[str]) -> None:
    guest = cell.guest
    if guest.runs:
        assert block_job(guest) is None
        assert live_paths(guest) == chain
        guest.until_flushed(guest.flushed + 2)
    assert live_paths(guest)[0] == chain[0]
    below = dict(zip(chain, [*chain[1:], None], strict=True))
    assert cell.scene.headers(chain) == {path: below[path] for path in cell.scene.headers(chain)}


def _target(cell: Cell, job: Json, completed: bool) -> None:
    """It is whole, or gone, and so is everything else that a job makes for a while."""
    scene = cell.scene
    whole = completed and cell.work.copies
    assert (job["dest"] and job["dest"]["state"]) == (
        ("complete" if whole else "deleted") if cell.work.copies else None
    )
    beside = {other.disk for other in cell.others} | ({scene.copy} if whole else set())
    there = {path for folder in {scene.folder, scene.copy.parent} for path in folder.iterdir()}
    assert there == scene.there | beside


def _held(cell: Cell, chain: list[str]) -> None:
    """What the disk stands on is held for it, and open to QEMU's user while it runs."""
    guests = {f"{guest.uuid}/vda" for guest in (cell.guest, *cell.others)}
    mine = f"{cell.guest.uuid}/vda"
    for path in chain:
        until(lambda path=path: mine in cell.holders(path), f"{path} is held")
        until(lambda path=path: cell.holders(path) <= guests, f"{path} is held for no job any more")
        assert not cell.guest.runs or cell.can_open(Path(path)), path


def _dropped(cell: Cell, job: Json, dropped: list[Path]) -> None:
    """What the chain has lost is nobody's, and closed; but for what another guest stands on, or cannot be closed."""
    scene = cell.scene
    shared = {scene.files["base"]} if cell.others else set()
    stays = {path for path in dropped if path in shared or path.parent == scene.failing}
    assert {Path(kept["path"]) for kept in job["chain"]["kept"]} == stays, job["chain"]
    assert {Path(path) for path in job["chain"]["revoked"]} == set(dropped) - stays, job["chain"]
    assert job["revocation"] == ("kept" if stays else "done" if dropped else "none")
    closed = set(dropped) - stays
    if cell.work.copies and job["state"] == "completed" and scene.copy not in map(Path, scene.after):
        closed.add(scene.copy)
    for path in closed:
        assert (cell.holders(path), cell.can_open(path)) == (set(), False), path
        found = path.stat()
        assert (found.st_uid, found.st_gid) in (ALICE, ROOT), path


def _nothing_runs(cell: Cell) -> None:
    agent = cell.agent
    assert agent.process is not None
    pid = agent.process.pid
    host = agent.get("/v1/host")
    assert (host["storage_daemons"], host["orphans"]) == ([], [])
    assert agent.get("/v1/jobs?origin=external")["items"] == []
    until(lambda: not _pending(cell), "nothing is to be revoked")
    until(lambda: open_below(pid, cell.scene.folder) == [], "the agent has closed the images")
    until(lambda: not _programs_of(pid), "the agent's programs have ended")


def _programs_of(pid: int) -> list[str]:
    """Those of QEMU's that a process runs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                found.append(Path(f"/proc/{child}/comm").read_text().strip())
    return [name for name in found if name.startswith("qemu")]
