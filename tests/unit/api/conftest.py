"""One agent for a module's tests, or one with other settings for a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running_agent import Agent, serving


@pytest.fixture(scope="module")
def shared_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with serving(tmp_path_factory.mktemp("agent") / "s") as running:
        yield running


@pytest.fixture
def agent(shared_agent: Agent) -> Agent:
    """An agent that knows nothing yet. One process serves a module's tests, because a start and a stop take 0.3 s."""
    shared_agent.service.forget()
    return shared_agent


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., Any]:
    """An agent of its own, with other settings, as a context manager."""
    return lambda **settings: serving(tmp_path / "s", **settings)
