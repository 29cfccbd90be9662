"""Images of every kind for transfers, and what a guest sees of them."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path

MIB = 1 << 20
SIZE = 24 * MIB


def run(*words: object) -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


def sparse(path: Path, size: int = SIZE, seed: int = 1) -> Path:
    """Data at both ends and here and there, at borders that fit nothing."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for at in (0, size // 5 + 4096, size // 2 - 512, size - 3 * 512):
            at = at // 512 * 512
            file.seek(at)
            file.write(rng.randbytes(min(rng.randrange(size // 20, size // 8) // 512 * 512, size - at)))
    return path


def chain(folder: Path, size: int = SIZE) -> Path:
    """A raw base that is smaller than its overlay, compressed clusters, zeros over data, and a top with a little."""
    base = sparse(folder / "base.raw", size - 4 * MIB, seed=2)
    compressed = folder / "mid.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", compressed, size)
    run(
        "qemu-io",
        "-c",
        "write -c -P 65 2M 1M",
        "-c",
        "write -z 5M 2M",
        "-c",
        f"write -P 9 {size - MIB} 64k",
        compressed,
    )
    top = folder / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", top)
    run("qemu-io", "-c", "write -P 7 1M 70k", "-c", "write -z 11M 128k", "-c", "discard 2M 64k", top)
    return top


def new_qcow2(path: Path, size: int = SIZE) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", path, size)
    return path


def seen(path: Path) -> str:
    """The digest of what a guest reads."""
    image_format = "qcow2" if path.suffix == ".qcow2" else "raw"
    raw = path.with_suffix(".seen")
    run("qemu-img", "convert", "-f", image_format, "-O", "raw", path, raw)
    try:
        return hashlib.sha256(raw.read_bytes()).hexdigest()
    finally:
        raw.unlink()


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512
