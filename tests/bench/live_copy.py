"""What the agent adds to the copy of a running guest's disk, beside `virsh blockcopy --wait --finish` and `--pivot`.

One guest runs and writes all the time, and its disk is copied again and again at the same speed: by the agent and by
virsh in turn, finished and gone over to. A finished copy of ours is whole, durable and has its name; of a disk that went
over the access to the former chain is settled, too. virsh is done when libvirt says that the job is gone.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.bench.figure import Figure, Result, median
from tests.bench.live import SIZE, SPEED, Live, live, missing
from tests.bench.stage import Stage, alternate, done
from tests.harness import MIB

NAME = "live-copy"
RUNS = 5
TARGET_MS = 150.0
ENDS = ("finish", "pivot")


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    if (why := missing()) is not None:
        return _figure(runs, {}, why=why)
    seconds: dict[str, list[float]] = {f"{side}_{end}": [] for side in ("agent", "virsh") for end in ENDS}
    with live(stage) as at:
        disks = _Disks(at)
        for run in range(runs):
            for end in ENDS:
                stage.say(f"{NAME}: run {run + 1} of {runs}, {end}")
                alternate(
                    run,
                    lambda end=end: seconds[f"agent_{end}"].append(disks.ours(end)),  # type: ignore[misc]
                    lambda end=end: seconds[f"virsh_{end}"].append(disks.theirs(end)),  # type: ignore[misc]
                )
    return _figure(runs, seconds)


class _Disks:
    """The files that the guest's disk goes through: what is not needed any more is deleted, outside the time."""

    def __init__(self, at: Live) -> None:
        self._at = at
        self._disk = at.disk
        self._made = 0

    def ours(self, end: str) -> float:
        dest = self._next()
        request = {"operation": "copy", "target": f"{self._at.guest.name}/vda", "dest": str(dest), "completion": end}
        began = time.perf_counter()
        done(self._at.agent, {**request, "bandwidth": SPEED})
        took = time.perf_counter() - began
        self._clear(dest, end)
        return took

    def theirs(self, end: str) -> float:
        dest = self._next()
        took = self._at.virsh("blockcopy", str(dest), "--format", "qcow2", "--transient-job", "--wait", f"--{end}")
        self._clear(dest, end)
        return took

    def _next(self) -> Path:
        self._made += 1
        return self._at.disk.with_name(f"copy-{self._made}.qcow2")

    def _clear(self, dest: Path, end: str) -> None:
        if end == "pivot":
            self._disk, dest = dest, self._disk
        dest.unlink()


def _figure(runs: int, seconds: dict[str, list[float]], *, why: str = "") -> Figure:
    results = []
    for end in ENDS:
        pairs = zip(seconds.get(f"agent_{end}", []), seconds.get(f"virsh_{end}", []), strict=True)
        added = [1000 * (ours - theirs) for ours, theirs in pairs]
        what = f"--{end}: added by the agent, median"
        results.append(Result(what, median(added) if added else None, TARGET_MS, "ms", why=why))
    return Figure(
        name=NAME,
        measured=f"copy of {SIZE // MIB} MiB of a running guest's disk, from the POST until its access is settled",
        peer="virsh blockcopy --wait --finish, --pivot",
        runs=runs,
        results=tuple(results),
        details={f"{side}_ms": 1000 * median(values) for side, values in seconds.items()},
    )
