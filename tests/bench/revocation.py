"""How long access outlives the job that needed it: from the job's terminal event, as the agent sees it, until the
hypervisor user was proven unable to open the base.

The agent measures this itself and logs it (`access settled`; the same number as the metric
hostagent_access_revocation_lag_seconds). Without another user there is no access to take back, so this needs root.
"""

from __future__ import annotations

import json

from tests.bench.figure import Figure, Result, median, percentile
from tests.bench.stage import Stage, pull
from tests.harness import MIB, AgentProcess, raw_image

NAME = "revocation"
RUNS = 200
SIZE = 16 * MIB
TARGET_MEDIAN_MS, TARGET_P99_MS = 20.0, 50.0


def measure(stage: Stage) -> Figure:
    base = raw_image(stage.folder / "base.raw", SIZE)
    runs = stage.count(RUNS)
    lags: list[float] = []
    why = ""
    with stage.agent() as agent:
        if agent.user is None:
            why = "needs root: without a hypervisor user of its own there is nothing to revoke"
        else:
            for number in range(runs):
                if number % 10 == 0:
                    stage.say(f"{NAME}: job {number + 1} of {runs}")
                with stage.overlay(base) as overlay:
                    refuse_unless_revoked(pull(agent, overlay)["chain"]["revoked"], str(base))
            lags = lags_of(agent)
            if len(lags) != runs:
                raise AssertionError(f"{runs} jobs ended, and {len(lags)} revocations are logged")
    base.unlink()
    return Figure(
        name=NAME,
        measured=f"end of a {SIZE // MIB} MiB pull seen → base proven closed to the hypervisor user; one by one",
        peer="none",
        runs=len(lags),
        results=(
            Result("lag, median", median(lags) if lags else None, TARGET_MEDIAN_MS, "ms", why=why),
            Result("lag, 99th percentile", percentile(lags, 99) if lags else None, TARGET_P99_MS, "ms", why=why),
        ),
        details={"lag_max_ms": max(lags)} if lags else {},
    )


def refuse_unless_revoked(revoked: list[str], base: str) -> None:
    if revoked != [base]:
        raise AssertionError(f"revoked is {revoked}, not {base}: the lag would mean nothing")


def lags_of(agent: AgentProcess) -> list[float]:
    """Milliseconds, from the agent's log."""
    lines = (json.loads(line) for line in agent.log.read_text().splitlines() if line.startswith("{"))
    return [1000 * float(line["lag_seconds"]) for line in lines if line["message"] == "access settled"]
