"""What the agent costs while nothing happens: processor time and memory, with 50 exports open and no client.

The kernel's own counts, from /proc. The prober (one small process) and the storage daemons (one for each chain) are
processes of their own, and are shown beside the agent's number.
"""

from __future__ import annotations

import time

from tests.bench.figure import Figure, Result, median
from tests.bench.process import children, cpu_seconds, private_mib, rss_mib
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
        before, began = cpu_seconds(pid), time.monotonic()
        time.sleep(SECONDS)
        percent = 100 * (cpu_seconds(pid) - before) / (time.monotonic() - began)
        daemons = agent.daemons()
        rss, daemon_rss = rss_mib(pid), median([rss_mib(daemon) for daemon in daemons])
        daemon_private = median([private_mib(daemon) for daemon in daemons])
        probers = [child for child in children(pid) if child not in daemons]
        details = {"storage_daemon_rss_mib": daemon_rss, "storage_daemon_private_mib": daemon_private}
        if probers:
            details["prober_rss_mib"] = sum(rss_mib(child) for child in probers)
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
