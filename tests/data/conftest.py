from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.both import OURS, THEIRS
from tests.data.daemons import Daemon
from tests.data.pki import Pki


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module", params=[OURS, THEIRS])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with request.param(tmp_path_factory.mktemp("daemon")) as process:
        yield process


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For images."""
    return tmp_path_factory.mktemp("images")
