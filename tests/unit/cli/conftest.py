from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_agent import FakeAgent

from hostagent.cli.main import main

Run = Callable[..., int]


@pytest.fixture
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "s"  # short: a unix socket's name has 107 bytes


@pytest.fixture
def agent(socket_path: Path) -> Iterator[FakeAgent]:
    fake = FakeAgent(socket_path)
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def run(socket_path: Path) -> Run:
    """Run the command line in this process; its exit status."""

    def command(*words: str) -> int:
        return main(["--socket", str(socket_path), *words])

    return command


@pytest.fixture
def start(socket_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the command line as a process of its own, where signals matter."""

    def command(*words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "hostagent.cli.main", "--socket", str(socket_path), *words]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return command
