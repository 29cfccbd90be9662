"""What the test guest writes (guest_init.sh), and whether a disk has it.

The guest writes block after block without end. A block says its number and its place, so a disk of which `n` blocks were
flushed must hold, in each place, the last block of these n that belongs there, or a later one.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

BLOCK = 4096
STRIDE = 7919
_RECORD = re.compile(rb"(BLOCK number=(\d+) offset=(\d+)) md5=([0-9a-f]{32}) ")


class Verdict(NamedTuple):
    """`checked` places of the disk that were flushed, and what is wrong with some of them."""

    checked: int
    wrong: list[str]


def verify(disk: BinaryIO, flushed: int, before: BinaryIO | None = None) -> Verdict:
    """Look at the disk's bytes, raw, for the first `flushed` blocks. `before` is the disk as it was before the guest
    wrote: wherever it has flushed nothing, the disk must be that, or have a block whose flush was not heard of."""
    blocks = disk.seek(0, 2) // BLOCK
    last = {number * STRIDE % blocks: number for number in range(1, flushed + 1)}
    wrong = []
    for place, number in last.items():
        if (what := _fault(_at(disk, place), place, number)) is not None:
            wrong.append(f"block {number} at {place * BLOCK}: {what}")
    for place in range(blocks) if before is not None else ():
        if place in last or (found := _at(disk, place)) == _at(before, place):
            continue
        if (what := _fault(found, place, flushed + 1)) is not None:
            wrong.append(f"not what the disk had at {place * BLOCK}: {what}")
    return Verdict(len(last), wrong)


def verify_image(image: Path, flushed: int, *, running: bool = False, before: Path | None = None) -> Verdict:
    """The same for an image of any format, with its chain; `running`: read past QEMU's locks; `before` is raw."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "disk.raw"
        command = ["qemu-img", "convert", *(["-U"] if running else []), "-O", "raw", str(image), str(raw)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        with contextlib.ExitStack() as stack:
            was = stack.enter_context(before.open("rb")) if before else None
            return verify(stack.enter_context(raw.open("rb")), flushed, was)


def block(number: int, blocks: int) -> tuple[int, bytes]:
    """Where block `number` belongs on a disk of so many blocks, and its bytes."""
    place = number * STRIDE % blocks
    head = f"BLOCK number={number} offset={place * BLOCK}"
    digest = hashlib.md5(f"{head}\n".encode()).hexdigest()
    record = f"{head} md5={digest} {'.' * 128}"[:127] + "_"
    return place * BLOCK, record.encode() * 32


def _at(disk: BinaryIO, place: int) -> bytes:
    disk.seek(place * BLOCK)
    return disk.read(BLOCK)


def _fault(data: bytes, place: int, number: int) -> str | None:
    record = data[:128]
    found = _RECORD.match(record)
    if found is None:
        return f"no block of the guest: {record[:40]!r}"
    if data != record * 32:
        return "torn"
    if hashlib.md5(found[1] + b"\n").hexdigest().encode() != found[4] or int(found[3]) != place * BLOCK:
        return f"not what the guest wrote: {record[:60]!r}"
    if int(found[2]) < number:
        return f"older data, of block {int(found[2])}"
    return None
