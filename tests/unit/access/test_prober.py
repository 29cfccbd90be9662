from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.access.prober import Prober
from jobs.errors import JobError
from tests.harness import stand_still

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run as another user")


@pytest.fixture
def nobody() -> Iterator[Prober]:
    with Prober(NOBODY, NOBODY, timeout=10) as prober:
        yield prober


def child(prober: Prober) -> int:
    assert prober._child is not None
    return prober._child.pid


@pytest.mark.root
@needs_root
@pytest.mark.parametrize(
    ("mode", "reads", "writes"),
    [(0o600, False, False), (0o644, True, False), (0o666, True, True), (0o602, False, False)],
)
def test_it_answers_as_the_user(tmp_path: Path, nobody: Prober, mode: int, reads: bool, writes: bool) -> None:
    path = tmp_path / "disk"
    path.write_text("data")
    path.chmod(mode)
    fd = os.open(path, os.O_PATH)
    assert nobody.can_open(fd, "r") is reads
    assert nobody.can_open(fd, "rw") is writes
    os.close(fd)
    assert path.read_text() == "data"


@pytest.mark.root
@needs_root
def test_an_open_descriptor_of_the_caller_lends_the_user_nothing(tmp_path: Path, nobody: Prober) -> None:
    path = tmp_path / "disk"
    path.touch(0o600)
    with path.open("r+") as file:
        assert not nobody.can_open(file.fileno(), "r")
        assert not nobody.can_open(file.fileno(), "rw")


@pytest.mark.root
@needs_root
def test_supplementary_groups_count(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch()
    os.chown(path, 0, 5001)
    path.chmod(0o640)
    with (
        path.open() as file,
        Prober(4001, 4001, (5001,), timeout=10) as inside,
        Prober(4001, 4001, timeout=10) as outside,
    ):
        assert inside.can_open(file.fileno(), "r")
        assert not outside.can_open(file.fileno(), "r")


@pytest.mark.root
@needs_root
def test_the_child_runs_as_the_user_with_no_capability_and_keeps_no_descriptor(tmp_path: Path, nobody: Prober) -> None:
    path = tmp_path / "disk"
    path.touch(0o644)
    with path.open() as file:
        for _ in range(50):
            nobody.can_open(file.fileno(), "r")
    status = Path(f"/proc/{child(nobody)}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == [str(NOBODY)] * 4 and fields["Gid"].split() == [str(NOBODY)] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert len(os.listdir(f"/proc/{child(nobody)}/fd")) == 3


def test_the_callers_own_user_works(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch(0o600)
    with path.open() as file, Prober(os.geteuid(), os.getegid(), os.getgroups(), timeout=10) as prober:
        assert prober.can_open(file.fileno(), "rw")


@pytest.mark.root
@needs_root
def test_a_plain_users_agent_asks_for_itself_and_for_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch(0o600)
    os.chown(path, 4001, 4001)
    program = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_PATH)\n"
        "os.setgroups([]); os.setgid(4001); os.setuid(4001)\n"
        "from hostagent.access.prober import Prober\n"
        "from jobs.errors import JobError\n"
        "print(Prober(4001, 4001, (4001,), timeout=10).can_open(fd, 'rw'))\n"
        "try: Prober(65534, 65534, timeout=10).can_open(fd, 'r')\n"
        "except JobError as error: print(error.code, bool(error.remedy))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=20)
    assert done.stdout.split() == ["True", "unavailable", "True"], done.stderr


@pytest.mark.root
@needs_root
@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv (util-linux)")
def test_the_agents_capabilities_are_not_the_users(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch(0o600)
    fd = os.open(path, os.O_PATH)
    program = (
        "import os, sys\n"
        "from hostagent.access.prober import Prober\n"
        "fd = int(sys.argv[1])\n"
        "os.close(os.open(f'/proc/self/fd/{fd}', os.O_RDWR))\n"
        "print(Prober(4001, 4001, timeout=10).can_open(fd, 'rw'))\n"
    )
    privileged = ["setpriv", "--reuid=4001", "--regid=4001", "--clear-groups"]
    privileged += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    command = [*privileged, sys.executable, "-c", program, str(fd)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, pass_fds=[fd])
    os.close(fd)
    assert done.stdout.split() == ["False"], done.stderr


def test_a_child_that_died_is_started_again(tmp_path: Path) -> None:
    with (tmp_path / "disk").open("w") as file, Prober(os.geteuid(), os.getegid(), timeout=10) as prober:
        assert prober.can_open(file.fileno(), "r")
        first = child(prober)
        os.kill(first, signal.SIGKILL)
        assert prober.can_open(file.fileno(), "r")
        assert child(prober) != first


def test_a_child_that_does_not_answer_is_a_timeout_and_is_replaced(tmp_path: Path) -> None:
    with (tmp_path / "disk").open("w") as file, Prober(os.geteuid(), os.getegid(), timeout=0.5) as prober:
        assert prober.can_open(file.fileno(), "r")
        stand_still(child(prober))
        with pytest.raises(JobError) as late:
            prober.can_open(file.fileno(), "r")
        assert late.value.code == "timeout"
        assert prober.can_open(file.fileno(), "r")


def test_what_is_no_answer_about_permission_is_an_error_and_not_a_no(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch()
    with path.open() as file, Prober(os.geteuid(), os.getegid(), timeout=10) as prober:
        fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_RDLCK)  # opening it for writing would block
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        with pytest.raises(JobError) as failed:
            prober.can_open(file.fileno(), "rw")
        assert failed.value.code == "io_error" and "disk" in failed.value.message


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import os\n"
        "from hostagent.access.prober import Prober\n"
        "prober = Prober(os.geteuid(), os.getegid(), timeout=10)\n"
        "prober.can_open(0, 'r')\n"
        "print(prober._child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 5
    while running(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running(int(done.stdout))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_many_threads_get_their_own_answers_fast(tmp_path: Path) -> None:
    readable, writable = tmp_path / "readable", tmp_path / "writable"
    readable.touch(0o400)
    writable.touch(0o600)
    wrong: list[object] = []
    questions = 200
    with readable.open() as one, writable.open() as two, Prober(os.geteuid(), os.getegid(), timeout=10) as prober:
        prober.can_open(one.fileno(), "r")
        may_write = os.access(readable, os.W_OK)  # root may

        def ask() -> None:
            for _ in range(questions):
                if prober.can_open(one.fileno(), "rw") is not may_write or not prober.can_open(two.fileno(), "rw"):
                    wrong.append(1)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        each = (time.monotonic() - began) / (questions * 2 * len(threads))
    assert not wrong
    assert each < 0.005, "a question must cost well below a millisecond; five here, for a busy machine"


def test_an_interpreter_that_cannot_run_is_unavailable_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python3"
    broken.write_text("not a program")
    monkeypatch.setattr("hostagent.access.prober.PYTHON", broken)
    with (tmp_path / "disk").open("w") as file, Prober(os.geteuid(), os.getegid(), timeout=10) as prober:
        with pytest.raises(JobError) as refused:
            prober.can_open(file.fileno(), "r")
        assert refused.value.code == "unavailable" and str(broken) in str(refused.value.remedy)
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
        with pytest.raises(JobError) as ended:
            prober.can_open(file.fileno(), "r")
        assert ended.value.code == "unavailable"
