"""What the agent costs while nothing happens: processor time and memory, with 50 exports open and no client.

The kernel's own counts, from /proc. The prober (one small process) and the storage daemons (one for each chain) are
processes of their own, and are shown beside the agent's number.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.bench.figure import Figure, Result, median
from tests.bench.stage import Stage
from tests.harness import MIB, overlay, raw_image

NAME = "idle"
EXPORTS = 50
SECONDS = 20.0
SETTLE = 2.0  # seconds for the last request's traces to pass
TARGET_CPU_PERCENT, TARGET_RSS_MIB = 1.0, 120.0


def measure(stage: Stage) -> Figure:
    base = raw_image(stage.folder / "base.raw", 16 * MIB)
    images = [overlay(stage.folder / f"idle-{number}.qcow2", base) for number in range(EXPORTS)]
    with stage.agent() as agent:
        assert agent.process is not None
        pid = agent.process.pid
        exports = []
        for number, image in enumerate(images):
            if number % 10 == 0:
                stage.say(f"{NAME}: export {number + 1} of {EXPORTS}")
            exports.append(agent.export(image)["id"])
        stage.say(f"{NAME}: {SECONDS:g} s of nothing")
        time.sleep(SETTLE)
        before, began = _cpu_seconds(pid), time.monotonic()
        time.sleep(SECONDS)
        percent = 100 * (_cpu_seconds(pid) - before) / (time.monotonic() - began)
        daemons = agent.daemons()
        rss, daemon_rss = _rss_mib(pid), median([_rss_mib(daemon) for daemon in daemons])
        daemon_private = median([_private_mib(daemon) for daemon in daemons])
        probers = [child for child in _children(pid) if child not in daemons]
        details = {"storage_daemon_rss_mib": daemon_rss, "storage_daemon_private_mib": daemon_private}
        if probers:
            details["prober_rss_mib"] = sum(_rss_mib(child) for child in probers)
        for export in exports:  # so that the daemons end as the agent's children, and it reaps them
            agent.delete(f"/v1/exports/{export}")
    for image in (*images, base):
        image.unlink()
    return Figure(
        name=NAME,
        measured=f"the agent with {EXPORTS} exports open and no client, over {SECONDS:g} s",
        peer="none",
        runs=1,
        results=(
            Result("processor time", percent, TARGET_CPU_PERCENT, "%"),
            Result("resident memory", rss, TARGET_RSS_MIB, "MiB"),
        ),
        details=details,
    )


def _cpu_seconds(pid: int) -> float:
    """User and system time (proc(5): fields 14 and 15 of stat, the 12th and 13th after the name)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mib(pid: int) -> float:
    return _kib(Path(f"/proc/{pid}/status"), "VmRSS:") / 1024


def _private_mib(pid: int) -> float:
    """What would be free if this process ended: its libraries are shared with the other daemons."""
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    return (_kib(rollup, "Private_Clean:") + _kib(rollup, "Private_Dirty:")) / 1024


def _kib(path: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key))


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found
