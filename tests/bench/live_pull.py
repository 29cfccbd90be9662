"""What the agent adds to the pull of a running guest's disk, beside `virsh blockpull --wait`.

One guest runs and writes all the time; each pull is of a new overlay, which a snapshot has put on all that the guest
has. Both sides pull at the same speed, in turn. virsh is done when libvirt's job is gone, and looks every half
second; the agent is done when the data are on the file, which takes the guest's next flush, and its access is settled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from tests.bench.figure import Figure, Result, median, percentile
from tests.bench.live import SIZE, SPEED, Live, Told, live, missing
from tests.bench.stage import Stage, alternate, pull
from tests.harness import MIB
from tests.libvirt.guest import Guest

NAME = "live-pull"
RUNS = 5
TARGET_MS, TARGET_EVENT_MS, TARGET_REVOKED_MS, TARGET_LATE_MS = 150.0, 1000.0, 20.0, 50.0
WHAT = "added by the agent, median"
TOLD = "from libvirt's event to the settled end, median"
REVOKED = "from libvirt's event to the proven revocation, median"
REVOKED_LATE = "from libvirt's event to the proven revocation, 99th percentile"


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    if (why := missing()) is not None:
        return _figure(runs, None, None, (), why=why)
    seconds: dict[str, list[float]] = {"agent": [], "virsh": [], "told": [], "revoked": []}
    with live(stage) as at:

        def ours() -> None:
            with Told(at.libvirt) as told:
                began = time.perf_counter()
                pull(at.agent, Path(f"{at.guest.name}/vda"), bandwidth=SPEED)
                ended = time.perf_counter()
                seconds["agent"].append(ended - began)
                seconds["told"].append(ended - told.when())
                seconds["revoked"].append(revoked(at) - told.wall())

        def theirs() -> None:
            seconds["virsh"].append(at.virsh("blockpull", "--wait"))

        tops = [at.disk.with_name(f"{number}.qcow2") for number in range(2 * runs + 1)]

        def on_a_snapshot(side: Callable[[], None]) -> None:
            old, top = tops.pop(0), tops[0]
            snapshot(at.guest, top)
            side()
            old.unlink()

        for run in range(runs):
            stage.say(f"{NAME}: run {run + 1} of {runs}")
            alternate(run, lambda: on_a_snapshot(ours), lambda: on_a_snapshot(theirs))
    added = [1000 * (a - b) for a, b in zip(seconds["agent"], seconds["virsh"], strict=True)]
    details = {
        "agent_ms": 1000 * median(seconds["agent"]),
        "virsh_ms": 1000 * median(seconds["virsh"]),
        "qemu_needs_ms": 1000 * SIZE / SPEED,
    }
    told, taken = 1000 * median(seconds["told"]), [1000 * each for each in seconds["revoked"]]
    return _figure(runs, median(added), told, taken, details=details)


def revoked(at: Live) -> float:
    """When the last file was, in seconds since 1970."""
    times = [event["time"] for event in at.agent.events() if event["type"] == "org.hostagent.grant.revoked.v1"]
    return datetime.fromisoformat(times[-1]).timestamp()


def _figure(
    runs: int,
    added: float | None,
    told: float | None,
    taken: Sequence[float],
    *,
    why: str = "",
    details: dict[str, float] | None = None,
) -> Figure:
    return Figure(
        name=NAME,
        measured=f"pull of {SIZE // MIB} MiB of a running guest's disk, from the POST until its access is settled",
        peer="virsh blockpull --wait",
        runs=runs,
        results=(
            Result(WHAT, added, TARGET_MS, "ms", why=why),
            Result(TOLD, told, TARGET_EVENT_MS, "ms", why=why),
            Result(REVOKED, median(taken) if taken else None, TARGET_REVOKED_MS, "ms", why=why),
            Result(REVOKED_LATE, percentile(taken, 99) if taken else None, TARGET_LATE_MS, "ms", why=why),
        ),
        details=details or {},
    )


def snapshot(guest: Guest, top: Path) -> None:
    """Put a new overlay on the guest's disk."""
    import libvirt

    xml = f"<domainsnapshot><disks><disk name='vda'><source file='{top}'/></disk></disks></domainsnapshot>"
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    with guest.domain() as domain:
        domain.snapshotCreateXML(xml, flags)
