"""What a process costs, as the kernel counts it in /proc."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """User and system time (proc(5): fields 14 and 15 of stat, the 12th and 13th after the name)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    return _kib(Path(f"/proc/{pid}/status"), "VmRSS:") / 1024


def private_mib(pid: int) -> float:
    """What would be free if this process ended: its libraries are shared with the other daemons."""
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    return (_kib(rollup, "Private_Clean:") + _kib(rollup, "Private_Dirty:")) / 1024


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _kib(path: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key))
