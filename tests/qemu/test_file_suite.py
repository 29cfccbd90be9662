"""The file backend keeps the promises of a backend: files that it opens, descriptors handed over, block devices."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.data.backends.file import files, handed_over
from hostagent.data.backends.holds import Holds
from hostagent.data.backends.registry import Opening
from tests.contract.backend_guards import GuardSuite
from tests.contract.backend_laws import ExtentsSuite
from tests.contract.backend_suite import MIB, RangeSuite, Rig, pattern
from tests.qemu.faults import ROOT
from tests.qemu.test_device_exports import loop

SIZE = 6 * MIB + 5 * 512


def with_holes(path: Path) -> Path:
    with path.open("wb") as image:
        image.truncate(SIZE)
        for offset in (0, 2 * MIB, SIZE - 4096):
            image.seek(offset)
            image.write(pattern(4096, offset % 101))
    return path


class TestFile(RangeSuite, ExtentsSuite, GuardSuite):
    @contextlib.contextmanager
    def make(self, folder: Path) -> Iterator[Rig]:
        path = with_holes(folder / "disk.raw")
        factory = files([str(folder)], Holds())
        yield Rig(
            lambda writable=True: factory(Opening(f"file://{path}", SIZE, writable=writable)),
            path.read_bytes(),
            path.read_bytes,
        )


class TestDescriptor(RangeSuite, ExtentsSuite, GuardSuite):
    @contextlib.contextmanager
    def make(self, folder: Path) -> Iterator[Rig]:
        path = with_holes(folder / "disk.raw")
        with path.open("r+b") as file:
            direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
            factory = handed_over(lambda _, name: [os.dup(file.fileno()), os.dup(direct)], Holds())
            yield Rig(
                lambda writable=True: factory(Opening("fd:one", SIZE, writable=writable)),
                path.read_bytes(),
                path.read_bytes,
            )
            os.close(direct)


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="loop devices need root")
class TestDevice(RangeSuite, ExtentsSuite, GuardSuite):
    @contextlib.contextmanager
    def make(self, folder: Path) -> Iterator[Rig]:
        path = with_holes(folder / "disk.raw")
        with loop(path) as device:
            factory = files([str(device)], Holds())
            yield Rig(
                lambda writable=True: factory(Opening(f"file://{device}", SIZE, writable=writable)),
                device.read_bytes(),
                device.read_bytes,
            )
