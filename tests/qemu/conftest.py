"""What most tests with real storage daemons share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import AgentProcess, reachable
from tests.qemu.faults import HASTE, Pair


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """One agent for all tests of the module; each has its own images."""
    home = tmp_path_factory.mktemp("agent")
    with reachable(home), AgentProcess(home, HASTE) as process:
        yield process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("model") / "pair")


@pytest.fixture
def images(folder: Path, model: Pair) -> Pair:
    return model.copy(folder / "pair")
