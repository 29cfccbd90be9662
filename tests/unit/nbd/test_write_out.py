from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hostagent.blocks import write_out
from hostagent.nbd.write_out import AT_ONCE, STEP, WriteOut
from jobs.model import Cursor

END = 100 * STEP


class Kernel:
    """What is begun to be written, and how long that takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        self.done = threading.Event()
        self.done.set()
        self.error: OSError | None = None
        monkeypatch.setattr("hostagent.nbd.write_out.write_out", self._write_out)

    def _write_out(self, fd: int) -> None:
        self.files.append(os.readlink(f"/proc/self/fd/{fd}"))
        self.done.wait(10)
        if self.error is not None:
            raise self.error


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 65536)
    return path


def opened() -> int:
    return len(os.listdir("/proc/self/fd"))


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not done():
            await asyncio.sleep(0.001)


def run(image: Path, *cursors: tuple[str, int], each: Callable[[], bool] | None = None) -> None:
    """Looks at jobs that write the image, each with what is waited for after it."""

    async def scenario() -> None:
        writing, fd = WriteOut(), os.open(image, os.O_PATH)
        try:
            for job, cur in cursors:
                writing.begin(job, Cursor(cur, END), [fd])
                await until(lambda: writing._working == 0 or each is not None)
                if each is not None:
                    await until(each)
        finally:
            os.close(fd)

    asyncio.run(scenario())


def test_it_is_begun_each_time_that_a_job_has_come_far(kernel: Kernel, image: Path) -> None:
    before = opened()
    run(image, ("a", STEP - 1), ("a", STEP), ("b", STEP), ("a", 2 * STEP - 1), ("a", 2 * STEP), ("a", 0))
    assert kernel.files == [str(image)] * 3
    assert opened() == before


def test_storage_that_hangs_keeps_few_threads(kernel: Kernel, image: Path) -> None:
    kernel.done.clear()
    threading.Timer(0.3, kernel.done.set).start()
    run(image, *((f"{n}", STEP) for n in range(AT_ONCE + 5)), each=lambda: True)
    assert len(kernel.files) == AT_ONCE


def test_what_cannot_be_written_early_is_left_to_the_flush(kernel: Kernel, image: Path) -> None:
    before = opened()
    kernel.error = OSError(5, "Input/output error")
    run(image, ("a", STEP), ("a", 2 * STEP))
    assert len(kernel.files) == 2
    assert opened() == before


def test_the_kernel_takes_any_file_and_any_way_of_having_it_open(image: Path) -> None:
    for flags in (os.O_RDONLY, os.O_RDWR):
        fd = os.open(image, flags)
        write_out(fd)
        os.close(fd)
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="seek"):
        write_out(reader)
    os.close(reader)
    os.close(writer)
