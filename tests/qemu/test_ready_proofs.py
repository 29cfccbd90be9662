"""What a group of copies stands on, tried on the storage daemon itself: the target of a mirror that is ready can be
flushed, is whole then, and everybody can still go over to it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from hostagent.records import Node
from jobs.model import FileId, Layer
from jobs.ports import Phase
from tests.harness import check_clean, same_content
from tests.qemu.faults import Pair, Reader
from tests.qemu.test_proofs import JOB, SIZE, Bench, aside, bench, run

pytestmark = pytest.mark.qemu

FLUSHES = 20


@pytest.fixture
def images(folder: Path) -> Pair:
    return Pair(folder / "pair", SIZE)


async def mirrored(it: Bench, dest: Path, *, shallow: bool, format: str = "qcow2") -> Node:
    """The target of a mirror that is ready."""
    dest.touch(mode=0o600)
    os.truncate(dest, SIZE if format == "raw" else 0)
    found = dest.stat()
    layer = Layer(str(dest), format, FileId(found.st_dev, found.st_ino), SIZE, 0)
    node = await it.daemon.grasp(str(dest), layer, 1 + len(it.nodes))
    below = it.below if shallow else None
    backing = (Path(below.layer.path).name, below.layer.format) if below else None
    await it.daemon.add_target(node, below, new=True, backing=backing)
    await it.daemon.mirror(JOB, it.top, node, shallow=shallow, speed=0)
    await it.until(Phase.READY)
    return node


@pytest.mark.parametrize("shallow", [False, True], ids=["whole", "shallow"])
@pytest.mark.parametrize("pivot", [False, True], ids=["finish", "pivot"])
def test_a_target_is_flushed_while_its_mirror_is_ready_and_cuts_nobody_off(
    images: Pair, shallow: bool, pivot: bool
) -> None:
    dest = images.folder / "dest.qcow2"

    async def test() -> None:
        async with bench(images.top) as it:
            await it.daemon.add_client_export("disk", it.top)
            with Reader(it.uri, images.truth) as reader:
                node = await mirrored(it, dest, shallow=shallow)
                for _ in range(FLUSHES):
                    await it.daemon.flush(node, it.below if shallow else None)
                    await asyncio.sleep(0.005)
                assert (await it.daemon.block_job(JOB)).phase is Phase.READY
                await it.daemon.complete(JOB, pivot=pivot)
                assert (await it.until(Phase.CONCLUDED)).error is None
                await it.daemon.dismiss(JOB)
                await asyncio.sleep(0.05)
                assert await aside(reader.stop) > 0
            assert await it.daemon.quit()

    run(test())
    assert check_clean(dest)
    assert same_content(dest, images.truth)
    assert same_content(images.top, images.truth)


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_flushed_target_is_whole_although_its_daemon_is_killed_before_the_mirror_ended(
    images: Pair, format: str
) -> None:
    dest = images.folder / "dest"

    async def test() -> None:
        async with bench(images.top) as it:
            node = await mirrored(it, dest, shallow=False, format=format)
            await it.daemon.flush(node, None)
            os.kill(it.daemon.pid, signal.SIGKILL)
            await it.daemon.kill()

    run(test())
    assert same_content(dest, images.truth, first=format)
