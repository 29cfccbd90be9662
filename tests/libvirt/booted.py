"""Guests that have booted already: each is booted once, held before it writes anything, and saved.

A guest of the same name on another disk of the same size is woken from that in a fraction of the time, and does then
what any guest does.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.libvirt.guest import Guest
from tests.libvirt.private import PrivateLibvirt, until

REST = 10_000
"""Microseconds between two blocks that a guest writes: others need the processor, too."""


class Booted:
    """`size` is that of the disks in bytes; `folder` is for what is saved, which ends with whoever has it."""

    def __init__(self, libvirt: PrivateLibvirt, folder: Path, size: int) -> None:
        self._libvirt = libvirt
        self._folder = folder
        self._size = size
        self._uuids: dict[str, str] = {}

    def define(self, name: str, disk: Path) -> Guest:
        """A guest that is off; one whose request fails stops, and goes on when it is resumed."""
        if name not in self._uuids:
            self._boot(name)
        return self._define(name, disk)

    def wake(self, guest: Guest) -> None:
        """Now it runs, and writes."""
        guest.wake(self._state(guest.name))

    def _boot(self, name: str) -> None:
        self._uuids[name] = str(uuid4())
        empty = self._folder / f"{name}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(empty), str(self._size)], check=True)
        guest = self._define(name, empty)
        guest.start()
        until(lambda: guest.console.exists() and b"HELD" in guest.console.read_bytes(), f"{name} has booted")
        guest.save(self._state(name))
        guest.remove()

    def _define(self, name: str, disk: Path) -> Guest:
        wanted: dict[str, Any] = {"uuid": self._uuids[name], "words": f"held=1 rest={REST}", "stops": True}
        return self._libvirt.guest(name, disk, **wanted)

    def _state(self, name: str) -> Path:
        return self._folder / f"{name}.state"
