"""What the agent costs while jobs run on the disks of 50 guests: processor time, and the time of a scrape."""

from __future__ import annotations

import time

from tests.bench.figure import Figure, Result, percentile
from tests.bench.process import cpu_seconds, rss_mib
from tests.bench.stage import Stage
from tests.libvirt.crowd import crowd, pull_all
from tests.libvirt.private import PrivateLibvirt, missing, until

NAME = "live-idle"
GUESTS = 50
SECONDS = 20.0
SCRAPES = 200
TARGET_CPU_PERCENT, TARGET_SCRAPE_MS = 10.0, 50.0


def measure(stage: Stage) -> Figure:
    why = missing() or ""
    cpu, scrape, details = (None, None, {}) if why else _measure(stage)
    return Figure(
        name=NAME,
        measured=f"the agent while a pull runs on each disk of {GUESTS} guests, over {SECONDS:g} s",
        peer="none",
        runs=1,
        results=(
            Result("processor time", cpu, TARGET_CPU_PERCENT, "%", why=why),
            Result("scrape, 99th percentile, one QEMU stopped", scrape, TARGET_SCRAPE_MS, "ms", why=why),
        ),
        details=details,
    )


def _measure(stage: Stage) -> tuple[float, float, dict[str, float]]:
    home = stage.folder / "libvirt"
    home.mkdir(mode=0o755)
    stage.folder.chmod(0o755)
    with PrivateLibvirt(home) as libvirt, stage.agent({"LIBVIRT_URI": libvirt.uri, "JOBS_WIDTH": "100"}) as agent:
        assert agent.process is not None
        pid = agent.process.pid
        until(lambda: agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
        stage.say(f"{NAME}: {GUESTS} guests")
        with crowd(libvirt, stage.folder, GUESTS) as guests:
            stage.say(f"{NAME}: {SECONDS:g} s without jobs")
            without = _percent(pid)
            pull_all(agent, guests)
            stage.say(f"{NAME}: {SECONDS:g} s of watching")
            percent = _percent(pid)
            scrapes = []
            with guests[0].frozen():
                for _ in range(SCRAPES):
                    began = time.perf_counter()
                    agent.get("/metrics")
                    scrapes.append(1000 * (time.perf_counter() - began))
            details = {"cpu_percent_without_jobs": without, "agent_rss_mib": rss_mib(pid)}
            return percent, percentile(scrapes, 99), details


def _percent(pid: int) -> float:
    before, began = cpu_seconds(pid), time.monotonic()
    time.sleep(SECONDS)
    return 100 * (cpu_seconds(pid) - before) / (time.monotonic() - began)
