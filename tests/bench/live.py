"""What figures of a running guest's disk share: a guest that writes all the time, its agent, and virsh beside it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.stage import Stage
from tests.harness import MIB, AgentProcess, overlay, raw_image
from tests.libvirt import private
from tests.libvirt.guest import Guest
from tests.libvirt.private import PrivateLibvirt

SIZE = 64 * MIB
SPEED = 64 * MIB
"""Bytes per second of the jobs of both sides."""
WAIT = 120.0
SETTLE = 1.0
"""Seconds in which the agent is done with somebody else's job, too: it has seen and followed it."""


def missing() -> str | None:
    """Why nothing of this can be measured here; None when it can."""
    return private.missing() or (None if shutil.which("virsh") else "virsh is not installed (tools/setup.sh develop)")


@dataclass(frozen=True, slots=True)
class Live:
    """`disk` is what the guest was started with."""

    libvirt: PrivateLibvirt
    agent: AgentProcess
    guest: Guest
    disk: Path

    def virsh(self, verb: str, *words: str) -> float:
        """A block job on the guest's disk from its command to its end, at SPEED; its seconds."""
        command = ["virsh", "-q", "-c", self.libvirt.uri, verb, self.guest.name, "vda", *words]
        began = time.perf_counter()
        subprocess.run([*command, "--bytes", "--bandwidth", str(SPEED)], check=True, timeout=WAIT, capture_output=True)
        took = time.perf_counter() - began
        time.sleep(SETTLE)
        return took


@contextlib.contextmanager
def live(stage: Stage) -> Iterator[Live]:
    base, home = raw_image(stage.folder / "base.raw", SIZE), stage.folder / "libvirt"
    home.mkdir(mode=0o755)
    stage.folder.chmod(0o755)
    disk = overlay(stage.folder / "0.qcow2", base)
    with PrivateLibvirt(home) as libvirt, stage.agent({"LIBVIRT_URI": libvirt.uri}) as agent:
        guest = libvirt.guest("web1", disk)
        guest.start()
        guest.until_flushed(3)
        yield Live(libvirt, agent, guest, disk)
        libvirt.remove_guests()
    base.unlink()


class Told:
    """Hears of the end of a block job, as anybody can."""

    def __init__(self, libvirt: PrivateLibvirt) -> None:
        self._connection = libvirt.connection()
        self._when: float | None = None
        self._wall = 0.0
        self._heard = threading.Event()

    def __enter__(self) -> Told:
        import libvirt

        found = self._connection.__enter__()
        found.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, self._hear, None)
        return self

    def __exit__(self, *error: Any) -> None:
        self._connection.__exit__(*error)

    def _hear(self, *_: Any) -> None:
        if self._when is None:
            self._when, self._wall = time.perf_counter(), time.time()
        self._heard.set()

    def when(self) -> float:
        assert self._heard.wait(WAIT), "libvirt told of no end"
        assert self._when is not None
        return self._when

    def wall(self) -> float:
        """The same in seconds since 1970."""
        self.when()
        return self._wall
