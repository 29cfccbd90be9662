"""What the agent adds to a copy and to a commit: planning, leases, grants, a storage daemon, the seal, the end.

All sides move the same data at the same rate, so that the difference is ours, and all end with the result on stable
storage.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.bench import bare
from tests.bench.figure import Figure, Result, median
from tests.bench.stage import Stage, alternate, done
from tests.harness import MIB, AgentProcess, raw_image

NAME = "copy-overhead"
RUNS = 12
SIZE = 128 * MIB
SPEED = 200_000_000
TARGET_MS = 150.0


def measure(stage: Stage) -> Figure:
    source = raw_image(stage.folder / "source.raw", SIZE)
    target = stage.folder / "target.qcow2"
    seconds: dict[str, list[float]] = {name: [] for name in ("copy", "mirror", "convert", "commit", "bare commit")}
    runs = stage.count(RUNS)
    with stage.agent() as agent:

        def copy() -> None:
            began = time.perf_counter()
            spec = {"source_format": "raw", "format": "qcow2", "bandwidth": SPEED, "completion": "finish"}
            done(agent, {"operation": "copy", "target": str(source), "dest": str(target), **spec})
            seconds["copy"].append(time.perf_counter() - began)
            target.unlink()

        def mirror() -> None:
            seconds["mirror"].append(bare.mirror(source, target, size=SIZE, speed=SPEED))
            target.unlink()

        def convert() -> None:
            seconds["convert"].append(bare.convert(source, target, speed=SPEED))
            target.unlink()

        for number in range(runs):
            stage.say(f"{NAME}: run {number + 1} of {runs}")
            alternate(number, copy, mirror, convert)
            alternate(
                number,
                lambda: seconds["commit"].append(_commit(stage, source, agent)),
                lambda: seconds["bare commit"].append(_commit(stage, source, None)),
            )
    source.unlink()

    def added(ours: str, theirs: str) -> float:
        return median([1000 * (a - b) for a, b in zip(seconds[ours], seconds[theirs], strict=True)])

    return Figure(
        name=NAME,
        measured=f"copy of {SIZE // MIB} MiB at {SPEED // 1_000_000} MB/s into qcow2; commit of as much into raw",
        peer="blockdev-mirror and block-commit by a QMP script; qemu-img convert -r",
        runs=runs,
        results=(
            Result("copy, added to a bare mirror, median", added("copy", "mirror"), TARGET_MS, "ms"),
            Result("copy, added to qemu-img convert, median", added("copy", "convert"), TARGET_MS, "ms"),
            Result("commit, added to a bare one, median", added("commit", "bare commit"), TARGET_MS, "ms"),
        ),
        details={f"{name} ms": 1000 * median(values) for name, values in seconds.items()},
    )


def _commit(stage: Stage, data: Path, agent: AgentProcess | None) -> float:
    """Seconds to commit an overlay that holds all of `data` into an empty base."""
    base = stage.folder / "base.raw"
    with base.open("wb") as file:
        file.truncate(SIZE)
    with stage.filled_overlay(base, data) as overlay:
        began = time.perf_counter()
        if agent is None:
            seconds = bare.commit(overlay, base, speed=SPEED)
        else:
            done(agent, {"operation": "commit", "target": str(overlay), "bandwidth": SPEED, "completion": "pivot"})
            seconds = time.perf_counter() - began
    base.unlink()
    return seconds
