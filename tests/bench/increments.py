"""What a pull in increments costs against one that streams in the background, both through the agent, without limit.

Between two increments the image is closed and unlocked and the cursor is durable, so each one opens the chain, copies,
flushes and closes it again.
"""

from __future__ import annotations

import time

from tests.bench.figure import Figure, Result, median
from tests.bench.stage import Stage, alternate, pull, settled, until
from tests.harness import MIB, AgentProcess, Json, raw_image

NAME = "increments"
RUNS = 5
SIZE, DATA = 1024 * MIB, 512 * MIB
INCREMENT = 64 * MIB
TARGET_RATIO = 0.8


def measure(stage: Stage) -> Figure:
    base = raw_image(stage.folder / "base.raw", SIZE, DATA)
    continuous: list[float] = []
    incremental: list[float] = []
    steps: list[float] = []
    runs = stage.count(RUNS)
    with stage.agent() as agent:

        def at_once() -> None:
            with stage.overlay(base) as overlay:
                began = time.perf_counter()
                pull(agent, overlay)
                continuous.append(time.perf_counter() - began)

        def in_steps() -> None:
            with stage.overlay(base) as overlay:
                began = time.perf_counter()
                steps.append(_step_through(agent, agent.pull(overlay, increment=INCREMENT)))
                incremental.append(time.perf_counter() - began)

        for number in range(runs):
            stage.say(f"{NAME}: run {number + 1} of {runs}")
            alternate(number, at_once, in_steps)
    base.unlink()
    ratio = median([whole / steps for whole, steps in zip(continuous, incremental, strict=True)])
    what = f"{SIZE // MIB} MiB image with {DATA // MIB} MiB of data"
    return Figure(
        name=NAME,
        measured=f"pull in increments of {INCREMENT // MIB} MiB, `next` as soon as it waits; {what}",
        peer="a continuous pull of the same image through the agent",
        runs=runs,
        results=(Result("throughput of increments / continuous, median", ratio, TARGET_RATIO, "x", at_least=True),),
        details={
            "incremental_mib_per_s": DATA / MIB / median(incremental),
            "continuous_mib_per_s": DATA / MIB / median(continuous),
            "steps": median(steps),
        },
    )


def _step_through(agent: AgentProcess, job: Json) -> int:
    """How many steps it took, the one that the job begins with included."""
    job, steps = until(agent, job, _rests), 1
    while not settled(job):
        following = agent.post(f"/v1/jobs/{job['id']}/next", {"cursor": job["cursor"]["cur"]})
        job, steps = until(agent, following, _rests), steps + 1
    if job["state"] != "completed":
        raise AssertionError(f"the pull is {job['state']}: {job['error']}")
    return steps


def _rests(job: Json) -> bool:
    return job["state"] == "waiting" or settled(job)
