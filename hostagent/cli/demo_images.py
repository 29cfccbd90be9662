"""What the demonstration shows: the images it makes, a client that compares all that it reads, and open descriptors.

Everything in the images follows from their size, so that a small demonstration is the same story as a large one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PIECES = 256
"""A base is made of so many pieces: random, text, two holes, and again. Half of it is data, as in a used disk."""
ALIGNMENT = 64 << 10  # bytes; a cluster of qcow2

READER = '''\
"""Read random pieces of an export, over one connection, and compare each with a copy of the image."""
import os, random, sys, time
import nbd

uri, copy = sys.argv[1:]
export = nbd.NBD()
export.connect_uri(uri)
size, original = export.get_size(), os.open(copy, os.O_RDONLY)
piece, total, slowest, said = 256 << 10, 0, 0.0, 0.0
while True:
    offset = random.randrange(0, size - piece, 512)
    began = time.monotonic()
    data = export.pread(piece, offset)
    slowest = max(slowest, time.monotonic() - began)
    if data != os.pread(original, piece, offset):
        sys.exit(f"what was read at {offset} differs from the copy")
    total += piece
    if time.monotonic() - said > 0.1:
        said = time.monotonic()
        print(total, round(slowest * 1000), flush=True)
    time.sleep(0.005)
'''
"""A program of its own, because it is a client like any other: it knows the URI and nothing else of the agent."""


def make_base(path: Path, size: int) -> None:
    """A raw image that only its owner may read, with data as a disk has them: some random, some text, many holes."""
    piece = size // PIECES
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as image:
        image.truncate(size)
        for number in range(0, PIECES, 4):
            image.seek(number * piece)
            image.write(os.urandom(piece))
            image.write(_text(number, piece))


def _text(number: int, length: int) -> bytes:
    line = f"{number:08d} the quick brown fox jumps over the lazy dog\n".encode()
    return (line * (length // len(line) + 1))[:length]


def own_data(size: int) -> list[str]:
    """The qemu-io commands that give an overlay something of its own: one write in each half."""
    length = size // 128 // ALIGNMENT * ALIGNMENT or ALIGNMENT
    offsets = (size // 10 // ALIGNMENT * ALIGNMENT, size * 7 // 10 // ALIGNMENT * ALIGNMENT)
    return [f"write -q -P {pattern} {offset} {length}" for pattern, offset in zip((0x5A, 0xC3), offsets, strict=True)]


@dataclass(frozen=True, slots=True)
class Reading:
    """How far the reader is: bytes compared, and its slowest answer in milliseconds."""

    total: int
    slowest: int


def reading(log: Path) -> Reading:
    """The last whole line that the reader wrote."""
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    numbers = lines[-1].split() if lines else []
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        return Reading(0, 0)
    return Reading(int(numbers[0]), int(numbers[1]))


@dataclass(frozen=True, slots=True)
class Descriptor:
    number: int
    name: str
    flags: int

    @property
    def opens(self) -> bool:
        """Whether data can be reached through it. O_PATH only says which file is meant (open(2))."""
        return not self.flags & os.O_PATH

    @property
    def says(self) -> str:
        if not self.opens:
            return "O_PATH: names the file, gives no access to it"
        return "open for reading and writing" if self.flags & os.O_ACCMODE == os.O_RDWR else "open for reading"


def descriptors(pid: int, folder: Path) -> Iterator[Descriptor]:
    """What a process has open in a folder, as the kernel says it."""
    for number in sorted(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()):
        try:
            file = Path(f"/proc/{pid}/fd/{number}").readlink()
            info = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
        except FileNotFoundError:  # closed since it was listed
            continue
        if file.parent == folder:
            flags = next(line.split()[1] for line in info.splitlines() if line.startswith("flags:"))
            yield Descriptor(number, file.name, int(flags, 8))
