"""What the agent adds to the pull of a running guest's disk, beside `virsh blockpull --wait`.

One guest runs and writes all the time; each pull is of a new overlay, which a snapshot has put on all that the guest
has. Both sides pull at the same `speed`, in turn. virsh is done when libvirt's job is gone, and looks every half
second; the agent is done when the data are on the file, which takes the guest's next flush, and its access is settled.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.figure import Figure, Result, median
from tests.bench.stage import Stage, alternate, pull
from tests.harness import MIB, overlay, raw_image
from tests.libvirt.guest import Guest
from tests.libvirt.private import PrivateLibvirt, missing

NAME = "live-pull"
RUNS = 5
SIZE = 64 * MIB
SPEED = 64 * MIB
TARGET_MS, TARGET_EVENT_MS = 150.0, 1000.0
WHAT = "added by the agent, median"
TOLD = "from libvirt's event to the settled end, median"
WAIT = 120.0
SETTLE = 1.0
"""Seconds in which the agent is done with somebody else's pull, too: it has seen and followed it."""


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    if (why := missing()) is not None:
        return _figure(runs, None, None, why=why)
    base = raw_image(stage.folder / "base.raw", SIZE)
    seconds: dict[str, list[float]] = {"agent": [], "virsh": [], "told": []}
    home = stage.folder / "libvirt"
    home.mkdir(mode=0o755)
    stage.folder.chmod(0o755)
    with PrivateLibvirt(home) as libvirt, stage.agent({"LIBVIRT_URI": libvirt.uri}) as agent:
        guest = libvirt.guest("web1", overlay(stage.folder / "0.qcow2", base))
        guest.start()
        guest.until_flushed(3)

        def ours() -> None:
            with Told(libvirt) as told:
                began = time.perf_counter()
                pull(agent, f"{guest.name}/vda", bandwidth=SPEED)
                ended = time.perf_counter()
                seconds["agent"].append(ended - began)
                seconds["told"].append(ended - told.when())

        def theirs() -> None:
            words = ["virsh", "-q", "-c", libvirt.uri, "blockpull", guest.name, "vda", "--wait"]
            began = time.perf_counter()
            subprocess.run(
                [*words, "--bytes", "--bandwidth", str(SPEED)], check=True, timeout=WAIT, capture_output=True
            )
            seconds["virsh"].append(time.perf_counter() - began)
            time.sleep(SETTLE)

        tops = [stage.folder / f"{number}.qcow2" for number in range(2 * runs + 1)]

        def on_a_snapshot(side: Callable[[], None]) -> None:
            old, top = tops.pop(0), tops[0]
            snapshot(guest, top)
            side()
            old.unlink()

        for run in range(runs):
            stage.say(f"{NAME}: run {run + 1} of {runs}")
            alternate(run, lambda: on_a_snapshot(ours), lambda: on_a_snapshot(theirs))
        libvirt.remove_guests()
    base.unlink()
    added = [1000 * (a - b) for a, b in zip(seconds["agent"], seconds["virsh"], strict=True)]
    details = {
        "agent_ms": 1000 * median(seconds["agent"]),
        "virsh_ms": 1000 * median(seconds["virsh"]),
        "qemu_needs_ms": 1000 * SIZE / SPEED,
    }
    return _figure(runs, median(added), 1000 * median(seconds["told"]), details=details)


def _figure(
    runs: int, added: float | None, told: float | None, *, why: str = "", details: dict[str, float] | None = None
) -> Figure:
    return Figure(
        name=NAME,
        measured=f"pull of {SIZE // MIB} MiB of a running guest's disk, from the POST until its access is settled",
        peer="virsh blockpull --wait",
        runs=runs,
        results=(
            Result(WHAT, added, TARGET_MS, "ms", why=why),
            Result(TOLD, told, TARGET_EVENT_MS, "ms", why=why),
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


class Told:
    """Hears of the end of a block job, as anybody can."""

    def __init__(self, libvirt: PrivateLibvirt) -> None:
        self._connection = libvirt.connection()
        self._when: float | None = None
        self._heard = threading.Event()

    def __enter__(self) -> Told:
        import libvirt

        found = self._connection.__enter__()
        found.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, self._hear, None)
        return self

    def __exit__(self, *error: Any) -> None:
        self._connection.__exit__(*error)

    def _hear(self, *_: Any) -> None:
        self._when = self._when or time.perf_counter()
        self._heard.set()

    def when(self) -> float:
        assert self._heard.wait(WAIT), "libvirt told of no end"
        assert self._when is not None
        return self._when
