"""What finished jobs cost those that come after them: the same requests over 100 and over 100,000 jobs in the store.

The store is filled directly (a pull takes longer than its record), and then used as always: jobs are stored by
`Store.save` with an event, and all else is asked of an agent that was started on that store.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hostagent.store import Store, _put_job
from jobs.model import Chain, FileId, Job, JobSpec, Layer, Operation, Revocation, State
from jobs.outcome import END_EVENTS, job_event
from tests.bench.figure import Figure, Result, median
from tests.bench.stage import Stage
from tests.harness import AgentProcess

NAME = "history"
FEW, MANY, RUNS = 100, 100_000, 20
TARGET_RATIO, TARGET_START_S = 2.0, 2.0
SETTINGS = {"JOBS_RETENTION_COUNT": "1000000", "JOBS_RETENTION_DAYS": "3650"}
NOW = datetime.now(UTC)
OLDEST = "vm0"
"""The oldest job of all has a disk, a label and a state (failed) that no other has: to be found among all others."""
LISTS = {
    "first page": "?limit=100",
    "page from the middle": "?limit=40&after={middle}",
    "by state": "?limit=2&state=completed",
    "by state, one": "?state=failed",
    "by target, one": f"?target=/images/{OLDEST}",
    "by label": "?limit=2&label=rack=r1",
    "by label, one": f"?label=vm={OLDEST}",
    "by label, none": "?label=vm=nobody",
    "by state and label": "?state=failed&label=rack=r1",
}


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    few, many = (_measured(stage, count, runs) for count in (FEW, MANY))
    ratios = [
        Result(f"{what}: {MANY:,} / {FEW}, median", many[what] / few[what], TARGET_RATIO, "x")
        for what in few
        if what != "start"
    ]
    return Figure(
        name=NAME,
        measured=f"with {MANY:,} finished jobs in the store",
        peer=f"the same with {FEW}",
        runs=runs,
        results=(*ratios, Result("start of the agent", many["start"], TARGET_START_S, "s")),
        details={f"{what}_{unit}".replace(" ", "_"): value for what, value in many.items() for unit in [_unit(what)]},
    )


def _unit(what: str) -> str:
    return "s" if what == "start" else "ms"


def _measured(stage: Stage, count: int, runs: int) -> dict[str, float]:
    """Milliseconds by what was asked; seconds of `start`."""
    state = stage.folder / "agent" / "state"
    state.mkdir(parents=True, exist_ok=True)
    stage.say(f"{NAME}: {count:,} jobs")
    found = {"insert": asyncio.run(_fill(state, count, runs))}
    stage.say(f"{NAME}: asking over {count:,} jobs")
    began = time.monotonic()
    with stage.agent(SETTINGS) as agent:
        found["start"] = time.monotonic() - began
        for what, query in LISTS.items():
            path = "/v1/jobs" + query.format(middle=f"{count // 2:08}")
            found[what] = median([_milliseconds(agent, path) for _ in range(runs)])
        found["readyz"] = median([_milliseconds(agent, "/readyz") for _ in range(runs)])
        found["host"] = median([_milliseconds(agent, "/v1/host") for _ in range(runs)])
    return found


async def _fill(state: Path, count: int, runs: int) -> float:
    """Bring the store to `count` jobs; the median of the milliseconds that `runs` more took."""
    store = Store(state, host="bench", publish=lambda record: None)
    await store.open()
    try:
        present = sum((await store.counts()).values())
        for first in range(present, count, 5000):
            jobs = [_job(number) for number in range(first, min(count, first + 5000))]
            await store._db.run(lambda db, jobs=jobs: [_put_job(db, job) for job in jobs])
        times = []
        for number in range(count, count + runs):
            job = _job(number)
            began = time.perf_counter()
            await store.save(job, [job_event(job, END_EVENTS[job.state])])
            times.append(1000 * (time.perf_counter() - began))
            await store.delete(job.id)
        return median(times)
    finally:
        await store.close()


def _job(number: int) -> Job:
    vm = f"vm{number}"
    top, base = (Layer(f"/images/{name}", "qcow2", FileId(1, n), 1 << 30, 1 << 20) for n, name in enumerate((vm, "b")))
    at = NOW - timedelta(days=30) + timedelta(seconds=number)
    state = State.COMPLETED if number else State.FAILED
    spec = JobSpec(Operation.PULL, top.path, labels={"vm": vm, "rack": "r1"})
    job = Job(f"{number:08}", spec, State.QUEUED, at, at, Chain((top, base)), Chain((top,)))
    return replace(job, state=state, started=at, finished=at, revocation=Revocation.DONE, revoked=(base.path,))


def _milliseconds(agent: AgentProcess, path: str) -> float:
    began = time.perf_counter()
    agent.get(path)
    return 1000 * (time.perf_counter() - began)
