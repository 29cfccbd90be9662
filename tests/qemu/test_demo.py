"""The demonstration, small: it ends well and leaves nothing, and an interrupted one leaves nothing either."""

from __future__ import annotations

import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.qemu

SIZE = ["--size", "64M"]


@pytest.fixture
def place() -> Iterator[Path]:
    """Where the demonstration makes its folder: short, for sockets' sake, and passable for its user."""
    folder = Path(tempfile.mkdtemp(prefix="d-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def demo(place: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hostagent.cli.main", "demo", *SIZE, *options]
    environment = {**os.environ, "TMPDIR": str(place), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def storage_daemons(output: str) -> set[int]:
    return {int(pid) for pid in re.findall(r"storage daemon (\d+) has open", output)}


def processes_of(place: Path) -> list[str]:
    """Command lines of the processes that stand in a folder below `place`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd").startswith(f"{place}/"):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [line for line in found if line]


def nothing_is_left(place: Path, output: str) -> bool:
    return not list(place.iterdir()) and not processes_of(place) and not any(map(alive, storage_daemons(output)))


def test_the_demonstration_ends_well_and_leaves_nothing(place: Path) -> None:
    output, _ = demo(place).communicate(timeout=90)
    assert "COMPLETED" in output, output
    assert "the job goes on from its cursor: 75 %" in output
    assert "all of it was right" in output
    assert "Images are identical." in output
    assert "the storage daemon has closed the base" in output
    said = "hostagent-demo can no longer open the base" if os.geteuid() == 0 else "File modes were not touched"
    assert said in output
    assert len(storage_daemons(output)) == 1
    assert nothing_is_left(place, output)


@pytest.mark.parametrize(
    ("moment", "number", "status"),
    [
        pytest.param("hostagent job watch", signal.SIGINT, 130, id="Ctrl-C while a pull runs"),
        pytest.param("# the agent", signal.SIGTERM, 143, id="SIGTERM while the agent is dead"),
    ],
)
def test_an_interrupted_demonstration_leaves_nothing(
    place: Path, moment: str, number: signal.Signals, status: int
) -> None:
    process = demo(place)
    output = _read_until(process, moment)
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == status, output + rest
    assert storage_daemons(output)
    assert nothing_is_left(place, output)


@pytest.mark.slow
def test_a_kept_agent_answers_and_is_ended_by_the_commands_that_are_said(place: Path) -> None:
    output, _ = demo(place, "--keep").communicate(timeout=90)
    assert "The agent runs on" in output, output
    commands = output.partition("The agent runs on")[2]
    said = [line.strip() for line in commands.splitlines() if line.startswith("  ")]
    environment, status, *end = [line for line in said if not line.startswith("userdel")]
    socket = shlex.split(environment)[1].partition("=")[2]

    def run(command: str) -> str:
        done = subprocess.run(
            ["sh", "-ec", command], env={**os.environ, "HOSTAGENT_SOCKET": socket}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    found = run(status)
    assert "nothing needs attention" in found, found
    for command in end:
        run(command)
    deadline = time.monotonic() + 15
    while not nothing_is_left(place, output) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert nothing_is_left(place, output)


def _read_until(process: subprocess.Popen[str], word: str, timeout: float = 60) -> str:
    """What is printed until `word` is."""
    assert process.stdout is not None
    text, deadline = "", time.monotonic() + timeout
    while word not in text:
        ready, _, _ = select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))
        piece = os.read(process.stdout.fileno(), 65536).decode() if ready else ""
        assert piece, f"{word!r} was not printed: {text}"
        text += piece
    return text
