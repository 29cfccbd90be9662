"""The driver in memory keeps the promises of a driver, so that tests of the engine on it say something."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.driver_suite import MIB, SIZE, DriverSuite, Rig
from tests.unit.jobs.fake_driver import FakeDriver


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


class TestFakeDriver(DriverSuite):
    @contextlib.asynccontextmanager
    async def rig(self, folder: Path) -> AsyncIterator[Rig]:
        driver = FakeDriver(size=SIZE, pace=MIB, slice=2 * MIB)
        driver.image("/i/top", depth=3)

        async def kill() -> None:
            driver.die("/i/top")

        yield Rig(driver, "/i/top", "/i/top.2", lambda: driver.images["/i/top"].backing, kill)
        assert not driver.images["/i/top"].users
        assert driver.images["/i/top"].daemon is None
