"""What the agent adds to a pull: planning, leases, grants, a storage daemon, the proof, the revocation.

Both sides pull the same base at the same `speed`, so that QEMU's part takes the same time and the difference is ours.
The agent makes the data durable before the header forgets the base, which a bare block-stream does not; therefore the
peer that counts flushes there, too, and the other one is shown beside it.
"""

from __future__ import annotations

import time

from tests.bench import bare
from tests.bench.figure import Figure, Result, median
from tests.bench.stage import Stage, alternate, pull
from tests.harness import MIB, raw_image

NAME = "pull-overhead"
RUNS = 20
SIZE = 128 * MIB
SPEED = 200_000_000
TARGET_MS = 100.0


def measure(stage: Stage) -> Figure:
    base = raw_image(stage.folder / "base.raw", SIZE)
    seconds: dict[str, list[float]] = {"agent": [], "flushed": [], "plain": []}
    runs = stage.count(RUNS)
    with stage.agent() as agent:

        def ours() -> None:
            with stage.overlay(base) as overlay:
                began = time.perf_counter()
                pull(agent, overlay, bandwidth=SPEED)
                seconds["agent"].append(time.perf_counter() - began)

        def theirs(name: str, *, flush: bool) -> None:
            with stage.overlay(base) as overlay:
                seconds[name].append(bare.stream(overlay, base, speed=SPEED, flush=flush))

        for number in range(runs):
            stage.say(f"{NAME}: run {number + 1} of {runs}")
            alternate(number, ours, lambda: theirs("flushed", flush=True), lambda: theirs("plain", flush=False))
    base.unlink()
    against = {
        name: [1000 * (a - b) for a, b in zip(seconds["agent"], seconds[name], strict=True)]
        for name in ("flushed", "plain")
    }
    return Figure(
        name=NAME,
        measured=f"pull of {SIZE // MIB} MiB at {SPEED // 1_000_000} MB/s, from the POST to its revocation done",
        peer="block-stream by a QMP script, flushed before job-finalize",
        runs=runs,
        results=(Result("added by the agent, median", median(against["flushed"]), TARGET_MS, "ms"),),
        details={
            "agent_ms": 1000 * median(seconds["agent"]),
            "bare_flushed_ms": 1000 * median(seconds["flushed"]),
            "bare_unflushed_ms": 1000 * median(seconds["plain"]),
            "added_over_unflushed_ms": median(against["plain"]),
        },
    )
