"""The watch over open files: told once, true for as long as it is true, and silent about what is nobody's any more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent.images.drift import Drift
from hostagent.nbd.watch import Watch
from jobs.model import FileId, Layer


class OpenFile:
    """A chain of one file of 1000 bytes, as far as the watch sees it."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"x" * 1000)
        self.path, self.fd = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self.fd)
        self.layers = [Layer(str(path), "raw", FileId(found.st_dev, found.st_ino), 1000, 4096, length=1000)]
        self.asked: Callable[[], None] = lambda: None

    def descriptor(self, file: FileId) -> int:
        self.asked()
        return self.fd


class Registry:
    def __init__(self, *chains: OpenFile) -> None:
        self.chains = list(chains)

    def all(self) -> list[OpenFile]:
        return list(self.chains)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[OpenFile]:
    chain = OpenFile(tmp_path / "base.raw")
    yield chain
    os.close(chain.fd)


def watching(registry: Any, told: list[Drift]) -> Watch:
    return Watch(registry, interval=3600, tell=told.append)


def test_a_change_is_told_once_and_stays_until_the_file_is_nobodys(one: OpenFile) -> None:
    registry, told = Registry(one, one), []
    watch = watching(registry, told)
    asyncio.run(watch.look())
    assert watch.found == told == []
    os.truncate(one.path, 10)
    for _ in range(3):
        asyncio.run(watch.look())
    assert [drift.lost for drift in told] == [True]
    assert watch.found == told
    registry.chains.clear()
    asyncio.run(watch.look())
    assert watch.found == []
    watch.close()


@pytest.mark.parametrize("how", ["the chain became another", "the chain was closed"])
def test_what_left_the_chain_during_the_look_is_not_told(one: OpenFile, how: str) -> None:
    registry, told = Registry(one), []
    watch = watching(registry, told)
    one.path.unlink()
    one.asked = one.layers.clear if how == "the chain became another" else registry.chains.clear
    asyncio.run(watch.look())
    assert told == watch.found == []
    watch.close()


def test_a_descriptor_that_is_another_files_by_now_says_nothing(one: OpenFile, tmp_path: Path) -> None:
    told: list[Drift] = []
    watch = watching(Registry(one), told)
    (tmp_path / "short").write_bytes(b"")
    stranger = os.open(tmp_path / "short", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(stranger, one.fd)
    os.close(stranger)
    asyncio.run(watch.look())
    assert told == []
    watch.close()
