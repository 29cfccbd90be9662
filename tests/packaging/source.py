"""The repository as it would be checked out: where packages are built from, so that nothing is written into ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WAIT = 600.0


def files() -> list[str]:
    """What belongs to the repository, as it is now. Outside of git: all but what would be ignored there."""
    if (REPOSITORY / ".git").exists() and shutil.which("git"):
        command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "-z"]  # whoever runs this, and whose it is
        listed = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=WAIT
        ).stdout
        return sorted(name for name in listed.split("\0") if name and (REPOSITORY / name).is_file())
    ignored = {line.strip("/\n") for line in (REPOSITORY / ".gitignore").read_text().splitlines()}
    found = [path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*") if path.is_file()]
    return sorted(
        str(path) for path in found if not any(Path(part).match(name) for part in path.parts for name in ignored)
    )


def copied(folder: Path) -> Path:
    for name in files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target)
    return folder
