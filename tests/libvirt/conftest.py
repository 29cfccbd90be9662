"""One private libvirtd for a module; its guests end with each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, overlay, raw_image, reachable
from tests.libvirt.booted import Booted
from tests.libvirt.private import PrivateLibvirt, missing
from tests.libvirt.works import SIZE
from tests.qemu.faults import HASTE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    reason = missing() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.libvirt)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateLibvirt]:
    """The module's libvirtd. A test that ends it gets it back by `libvirt`."""
    home = tmp_path_factory.mktemp("libvirt")
    with reachable(home), PrivateLibvirt(home) as process:
        yield process


@pytest.fixture(scope="module")
def module_agent(tmp_path_factory: pytest.TempPathFactory, daemon: PrivateLibvirt) -> Iterator[AgentProcess]:
    """The module's agent, which looks after that libvirtd's guests."""
    home = tmp_path_factory.mktemp("agent")
    settings = {
        **HASTE,
        "LIBVIRT_URI": daemon.uri,
        "LIBVIRT_RECONNECT_WAIT": "0.1",
        "LIBVIRT_RECONNECT_WAIT_MAX": "0.5",
    }
    with reachable(home), AgentProcess(home, settings) as process:
        yield process


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory, daemon: PrivateLibvirt) -> Booted:
    """Guests that are awake at once, with disks as works.py has them."""
    home = tmp_path_factory.mktemp("booted")
    with reachable(home):
        return Booted(daemon, home, SIZE)


@pytest.fixture
def libvirt(daemon: PrivateLibvirt) -> Iterator[PrivateLibvirt]:
    """A libvirtd that runs and has no guests; afterwards again."""
    yield daemon
    if not daemon.processes("libvirtd"):
        daemon.start()
    daemon.remove_guests()


@pytest.fixture
def disk(folder: Path) -> Path:
    """A qcow2 overlay of 4 MiB on a raw base with random data."""
    return overlay(folder / "overlay.qcow2", raw_image(folder / "base.raw", 4 * MIB))
