from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import harness
from tests.harness import AgentProcess, reachable
from tests.zygote import Zygote

# Started in the background of a shell, we would hand an ignored SIGINT down to every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # as machines are
settings.load_profile("busy")

SLOWEST_FIRST = ("libvirt", "qemu")
"""Folders of tests, whose files keep one of several workers for minutes: begun last, they would keep it alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return SLOWEST_FIRST.index(folder) if folder in SLOWEST_FIRST else len(SLOWEST_FIRST)

    items.sort(key=turn)


@pytest.fixture(scope="session", autouse=True)
def _zygote() -> Iterator[None]:
    harness.zygote = Zygote()
    yield
    harness.zygote = None


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for images that other users may pass through."""
    images = tmp_path / "img"
    images.mkdir(mode=0o755)
    with reachable(images):
        yield images


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    """A running agent with quick timers."""
    settings = {"JOBS_PROGRESS_INTERVAL": "0.1", "JOBS_SETTLE_RETRY": "0.1"}
    with AgentProcess(tmp_path, settings) as process:
        yield process
