"""What is in vagrant/, run on this machine: it changes nothing here but the folders that it is given."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "vagrant"


def provision(
    bin: Path, *, package: str = "none", path: str = "", folder: Path = FOLDER
) -> subprocess.CompletedProcess[str]:
    """`path` are folders that come before the others in PATH; `folder` is where the program lies."""
    more = {"HOSTAGENT_DEB": package, "HOSTAGENT_BIN": str(bin), "HOSTAGENT_SERVICES": "no"}
    return _run(folder / "provision.sh", path, more, [])


def smoke(bin: Path, *parts: str, path: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """With the `hostagent` that is in `bin`; images are beside it."""
    images = bin.parent / "images"
    images.mkdir(exist_ok=True)
    for folder in (images, *images.parents):  # other users must be able to pass
        if folder == Path("/tmp"):
            break
        folder.chmod(folder.stat().st_mode | 0o011)
    return _run(FOLDER / "smoke.py", f"{path}:{bin}", {"TMPDIR": str(images), **more}, list(parts))


def _run(program: Path, path: str, more: dict[str, str], words: list[str]) -> subprocess.CompletedProcess[str]:
    others = ("HOSTAGENT_", "MAKE", "MFLAGS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    environment |= {**more, "PATH": f"{path}:{os.environ['PATH']}"}
    nothing = subprocess.DEVNULL
    command = [str(program), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, stdin=nothing)
