"""The driver in memory keeps the promises of a driver, so that tests of the engine on it say something."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.driver_suite import MIB, SIZE, Rig
from tests.contract.group_suite import GroupSuite
from tests.unit.jobs.fake_driver import FakeDriver


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


class TestFakeDriver(GroupSuite):
    @contextlib.asynccontextmanager
    async def rig(self, folder: Path) -> AsyncIterator[Rig]:
        driver = FakeDriver(size=SIZE, pace=MIB, slice=2 * MIB)
        driver.image("/i/top", depth=3)
        image = driver.images["/i/top"]

        async def kill() -> None:
            driver.die("/i/top")

        def same(path: str) -> bool:
            return path == "/i/top" or driver.names[path] in driver.sealed

        yield Rig(
            driver,
            "/i/top",
            "/i/top.1",
            "/i/top.2",
            "/i/dest",
            backing=lambda: image.backing,
            kill=kill,
            make=driver.file,
            names=lambda: set(driver.names),
            same=same,
            serves=lambda: driver.serving("/i/top").chain.top.file,
        )
        assert not any(image.users or image.daemon for image in driver.images.values())
