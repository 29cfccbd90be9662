"""Many guests at once that do nothing, on one base: QEMUs with open disks, which take memory and no processor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.harness import MIB, AgentProcess, Json, overlay, raw_image
from tests.libvirt.guest import Guest
from tests.libvirt.private import PrivateLibvirt

SIZE = 16 * MIB
SLOW = 64 * 1024
"""Bytes per second: a pull of that size lasts for minutes."""


@contextlib.contextmanager
def crowd(libvirt: PrivateLibvirt, folder: Path, number: int) -> Iterator[list[Guest]]:
    """So many paused guests, web1 and so on; they are gone afterwards."""
    base = raw_image(folder / "base.raw", SIZE)
    guests = []
    try:
        for count in range(1, number + 1):
            guest = libvirt.guest(f"web{count}", overlay(folder / f"web{count}.qcow2", base))
            guests.append(guest)
            guest.start(paused=True)
        yield guests
    finally:
        libvirt.remove_guests()


def pull_all(agent: AgentProcess, guests: list[Guest], bandwidth: int = SLOW) -> list[Json]:
    """A pull of each one's disk; all run when this returns."""
    requests = [{"operation": "pull", "target": f"{guest.name}/vda", "bandwidth": bandwidth} for guest in guests]
    jobs = [agent.post("/v1/jobs", request) for request in requests]
    return [agent.until(job["id"], lambda job: job["state"] == "running") for job in jobs]
