"""Whether the agent still answers with 500 exports served and 100 pulls running, on one host.

600 chains have 600 storage daemons; the agent looks at each running job twice a second and serves everybody else from
one loop, so what is measured is how long a request waits for its turn. `/healthz`, which does nothing, is asked in the
same rounds: what it needs is the machine's and the loop's, not the request's.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.figure import Figure, Result, median, percentile
from tests.bench.process import cpu_seconds, rss_mib
from tests.bench.revocation import lags_of, refuse_unless_revoked
from tests.bench.stage import Stage, pull
from tests.harness import MIB, AgentProcess, overlay, raw_image

NAME = "crowd"
EXPORTS, JOBS, RUNS = 500, 100, 100
BANDWIDTH = 1 * MIB
"""Bytes per second of each running pull."""
LONG = 4096 * MIB
"""A sparse base that lasts for an hour at that speed."""
SHORT = 1 * MIB
CLIENTS = 8
"""Requests at a time while the crowd is made."""
SETTLE = 5.0  # seconds for the last start's traces to pass
TARGET_READ_MS, TARGET_REVOKED_MS, TARGET_RSS_MIB = 50.0, 250.0, 200.0
SETTINGS = {"JOBS_WIDTH": str(JOBS + CLIENTS)}
READS = ("/healthz", "/metrics", "/v1/jobs")


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    with stage.agent(SETTINGS) as agent:
        assert agent.process is not None
        pid = agent.process.pid
        stage.say(f"{NAME}: {EXPORTS} exports")
        began = time.monotonic()
        exports = _side_by_side(agent.export, _overlays(stage.folder / "served", EXPORTS, LONG))
        stage.say(f"{NAME}: {JOBS} jobs")
        images = _overlays(stage.folder / "pulled", JOBS, LONG)
        jobs = _side_by_side(lambda image: agent.pull(image, bandwidth=BANDWIDTH), images)
        for job in jobs:
            agent.until(job["id"], lambda now: now["state"] == "running")
        made = time.monotonic() - began
        time.sleep(SETTLE)
        before, began = cpu_seconds(pid), time.monotonic()
        times: dict[str, list[float]] = {path: [] for path in READS}
        for number in range(runs):
            stage.say(f"{NAME}: round {number + 1} of {runs}")
            for path in READS:
                times[path].append(_milliseconds(lambda path=path: agent.call("GET", path)))
        why = "" if agent.user else "needs root: without a hypervisor user of its own there is nothing to revoke"
        lags = [] if why else _revocations(stage, agent, runs)
        busy = 100 * (cpu_seconds(pid) - before) / (time.monotonic() - began)
        _refuse_if_any_ended(agent)
        rss, daemons = rss_mib(pid), [rss_mib(daemon) for daemon in agent.daemons()]
        stage.say(f"{NAME}: clearing away")
        _side_by_side(lambda job: agent.post(f"/v1/jobs/{job['id']}/abort"), jobs)
        for job in jobs:
            agent.until_ended(job["id"])
        _side_by_side(lambda export: agent.delete(f"/v1/exports/{export['id']}?force=true"), exports)
    return Figure(
        name=NAME,
        measured=f"with {EXPORTS} exports served and {JOBS} pulls running at {BANDWIDTH // MIB} MiB/s",
        peer="none",
        runs=runs,
        results=(
            Result("GET /metrics, 99th percentile", percentile(times["/metrics"], 99), TARGET_READ_MS, "ms"),
            Result("GET /v1/jobs, 99th percentile", percentile(times["/v1/jobs"], 99), TARGET_READ_MS, "ms"),
            Result(
                "revocation, 99th percentile", percentile(lags, 99) if lags else None, TARGET_REVOKED_MS, "ms", why=why
            ),
            Result("resident memory of the agent", rss, TARGET_RSS_MIB, "MiB"),
        ),
        details={
            "metrics_median_ms": median(times["/metrics"]),
            "jobs_median_ms": median(times["/v1/jobs"]),
            "healthz_median_ms": median(times["/healthz"]),
            "healthz_p99_ms": percentile(times["/healthz"], 99),
            "agent_processor_percent": busy,
            "made_in_s": made,
            "storage_daemons": len(daemons),
            "storage_daemon_rss_mib": median(daemons),
        }
        | ({"revocation_median_ms": median(lags)} if lags else {}),
    )


def _overlays(folder: Path, count: int, size: int) -> list[Path]:
    """Overlays of one sparse base, which hold nothing."""
    folder.mkdir()
    first = overlay(folder / "overlay-0.qcow2", raw_image(folder / "base.raw", size, 0))
    others = [folder / f"overlay-{number}.qcow2" for number in range(1, count)]
    return [first, *(Path(shutil.copy2(first, other)) for other in others)]


def _revocations(stage: Stage, agent: AgentProcess, runs: int) -> list[float]:
    """Milliseconds from the seen end of a short pull to its base's proven revocation; each has a base of its own."""
    before = len(lags_of(agent))
    base = raw_image(stage.folder / "short.raw", SHORT)
    for number in range(runs):
        if number % 10 == 0:
            stage.say(f"{NAME}: revocation {number + 1} of {runs}")
        with stage.overlay(base, "short.qcow2") as image:
            refuse_unless_revoked(pull(agent, image)["chain"]["revoked"], str(base))
    lags = lags_of(agent)[before:]
    if len(lags) != runs:
        raise AssertionError(f"{runs} jobs ended, and {len(lags)} revocations are logged")
    return lags


def _refuse_if_any_ended(agent: AgentProcess) -> None:
    host = agent.get("/v1/host")
    if host["jobs"].get("running") != JOBS or host["exports"] != {"running": EXPORTS}:
        raise AssertionError(f"the crowd is not what it was: {host['jobs']}, {host['exports']}")


def _side_by_side(call: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(call, items))


def _milliseconds(call: Callable[[], tuple[int, Any, Any]]) -> float:
    began = time.perf_counter()
    status, _, _ = call()
    if status != 200:
        raise AssertionError(f"it answered {status}")
    return 1000 * (time.perf_counter() - began)
