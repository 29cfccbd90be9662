"""A bus, an agent on it, and somebody who calls it: one of each for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dbus.bus import Caller, PrivateBus, until
from tests.harness import AgentProcess, reachable

SETTINGS = {
    "JOBS_PROGRESS_INTERVAL": "0.1",
    "JOBS_SETTLE_RETRY": "0.1",
    "DBUS_RECONNECT_WAIT": "0.1",
    "DBUS_RECONNECT_WAIT_MAX": "0.2",
    "DBUS_CALL_TIMEOUT": "3",
    "DBUS_STALL_TIMEOUT": "1",
    "DBUS_POLKIT_TIMEOUT": "1",
}


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBus]:
    home = tmp_path_factory.mktemp("bus")
    with reachable(home), PrivateBus(home) as running:
        yield running


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, bus: PrivateBus) -> Iterator[AgentProcess]:
    home = tmp_path_factory.mktemp("agent")
    with reachable(home), AgentProcess(home, {**SETTINGS, "DBUS_ADDRESS": bus.address}) as process:
        on_the_bus(process)
        yield process


@pytest.fixture
def caller(agent: AgentProcess, bus: PrivateBus) -> Iterator[Caller]:
    on_the_bus(agent)
    with Caller(bus.socket) as one:
        one.listen()
        yield one


def on_the_bus(agent: AgentProcess) -> None:
    until(lambda: check(agent)["detail"].startswith("connected"), "the agent is on the bus")


def check(agent: AgentProcess) -> dict[str, str]:
    found: dict[str, str] = agent.call("GET", "/readyz")[2]["checks"]["dbus"]
    return found
