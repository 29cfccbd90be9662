"""One image under two names: what a block device stands on, and which loop devices stand on a file, as sysfs says.

A loop device has its data in a file, a partition in its disk, a mapped device (LVM, multipath, dm-crypt) and an array
in others. The kernel claims most of what lies below (`slaves`, partitions), but not for readers, and not the file under
a loop device. What cannot be seen (a file that was deleted, or that lies in another mount namespace) is left out. All
of this blocks: use a thread.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

SYS = Path("/sys")
DEV = Path("/dev")
DEPTH = 16
"""Devices on devices that are followed. The kernel allows no loops among them; people stack some four."""


def stands_on(fd: int) -> list[Path]:
    """The files and devices, all the way down, in which a block device has its data; nothing for a file."""
    found = os.fstat(fd)
    if not stat.S_ISBLK(found.st_mode):
        return []
    return list(dict.fromkeys(_below(_place(found.st_rdev), DEPTH)))


def loops_on(fd: int) -> list[Path]:
    """The loop devices that have their data in this file."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        return []
    name = Path(os.readlink(f"/proc/self/fd/{fd}")).name  # noqa: PTH115 - of a descriptor
    loops = []
    for device in sorted(SYS.glob("block/loop*")):
        path = _backing_file(device)
        if (
            path is not None and path.name == name and _same(path, found)
        ):  # by name first: others may be on dead storage
            loops.append(DEV / device.name)
    return loops


def _place(device: int) -> Path:
    return SYS / "dev/block" / f"{os.major(device)}:{os.minor(device)}"


def _below(place: Path, depth: int) -> list[Path]:
    if depth == 0:
        return []
    place = Path(os.path.realpath(place))
    below = sorted((place / "slaves").glob("*"))
    if (place / "partition").exists():
        below.append(place.parent)
    found = [] if (file := _backing_file(place)) is None else [file]
    for device in below:
        if (node := _node(device)) is not None:
            found += [node, *_below(device, depth - 1)]
    return found


def _node(place: Path) -> Path | None:
    lines = _read(place / "uevent").splitlines()
    return next((DEV / line.removeprefix("DEVNAME=") for line in lines if line.startswith("DEVNAME=")), None)


def _backing_file(place: Path) -> Path | None:
    said = _read(place / "loop/backing_file").removesuffix("\n")
    return Path(said) if said.startswith("/") else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""


def _same(path: Path, found: os.stat_result) -> bool:
    try:
        other = path.stat()
    except OSError:
        return False
    return (other.st_dev, other.st_ino) == (found.st_dev, found.st_ino)
