"""Files on storage that hangs: each keeps one thread, however often it is tried again."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hostagent.guests import durable
from hostagent.guests.durable import Durable
from hostagent.images import covered
from hostagent.images.covered import Range
from hostagent.images.tool import Tool, ToolLimits
from jobs.errors import JobError
from jobs.model import Holder, Layer, Need
from tests.harness import MIB, overlay, raw_image
from tests.unit.guests.fake_libvirt import play
from tests.unit.guests.test_image_rows import layer


class Access:
    """QEMU's user can read all."""

    async def acquire(self, holder: Holder, needs: Sequence[Need]) -> None: ...

    async def release(self, holder: Holder, *, trigger: str) -> None: ...


@pytest.mark.parametrize("what", ["sync", "open"])
def test_a_file_that_hangs_keeps_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    base = raw_image(tmp_path / "base.raw", MIB)
    middle = overlay(tmp_path / "middle.qcow2", base)
    top = overlay(tmp_path / "top.qcow2", middle, "qcow2")
    go, began, open_before = threading.Event(), 0, set(os.listdir("/proc/self/fd"))
    sync, grasp = os.fdatasync, durable.grasp

    def hang() -> None:
        nonlocal began
        began += 1
        go.wait(20)

    def hanging_sync(fd: int) -> None:
        hang()
        sync(fd)

    def hanging_grasp(layer: Layer) -> int:
        hang()
        return grasp(layer)

    async def story() -> None:
        file = Durable(Tool(user=None, limits=ToolLimits(), binary="qemu-img"), Access(), 0.5)
        if what == "sync":
            monkeypatch.setattr(os, "fdatasync", hanging_sync)
        else:
            monkeypatch.setattr(durable, "grasp", hanging_grasp)
        try:
            for _ in range(3):
                with pytest.raises(JobError) as late:
                    await file.lacking([layer(top)], [layer(middle)], bare=True)
                assert (late.value.code, "does not answer" in late.value.message) == ("io_error", True)
            assert began == 1
        finally:
            go.set()
        await asyncio.sleep(0.2)
        assert await file.lacking([layer(top)], [layer(middle)], bare=True) == 0

    play(story())
    assert len(os.listdir("/proc/self/fd")) <= len(open_before), "what came late is closed"


def test_what_a_chain_holds_is_remembered_while_its_files_are_what_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = raw_image(tmp_path / "base.raw", MIB)
    middle = overlay(tmp_path / "middle.qcow2", base)
    top = overlay(tmp_path / "top.qcow2", middle, "qcow2")
    asked, held = list[int](), covered.held

    async def counted(tool: Tool, layers: Sequence[Layer], handles: Sequence[int], *, bare: bool) -> list[Range]:
        asked.append(len(layers))
        return await held(tool, layers, handles, bare=bare)

    async def story() -> None:
        file = Durable(Tool(user=None, limits=ToolLimits(), binary="qemu-img"), Access(), 10)

        async def missing() -> int:
            return await file.missing_from([layer(top), layer(middle)], bare=True, running=True)

        os.utime(middle, (2**32, 2**32))
        assert (await missing(), await missing(), len(asked)) == (0, 0, 2), "it was written just now"
        os.utime(middle, (1, 1))
        assert (await missing(), await missing(), len(asked)) == (0, 0, 3)
        subprocess.run(["qemu-io", "-c", "write -q -P 7 0 64k", middle], check=True)
        os.utime(middle, (1, 1))
        assert (await missing(), len(asked)) == (64 << 10, 4), "whatever its times say"
        subprocess.run(["qemu-io", "-c", "write -q -P 7 0 64k", top], check=True)
        assert (await missing(), len(asked)) == (0, 4)

    monkeypatch.setattr(covered, "held", counted)
    play(story())


def test_a_raw_image_is_not_taken_for_what_its_guest_has_written_there(tmp_path: Path) -> None:
    base = raw_image(tmp_path / "base.raw", MIB)
    top = overlay(tmp_path / "top.qcow2", base)
    subprocess.run(["qemu-io", "-c", "write -q -P 7 0 64k", top], check=True)
    raw = replace(layer(base), format="raw")
    file = Durable(Tool(user=None, limits=ToolLimits(), binary="qemu-img"), Access(), 10)
    for text in (overlay(tmp_path / "nested.qcow2", base).read_bytes(), b"QFI\xfb" + b"\xff" * 200):
        with base.open("r+b") as disk:
            disk.write(text[:MIB])
        assert asyncio.run(file.lacking([raw], [layer(top)], bare=True)) == 0


def test_of_devices_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another node of it a device is written, and this one's times stay."""
    asked = list[bool]()

    async def counted(tool: Tool, layers: Sequence[Layer], handles: Sequence[int], *, bare: bool) -> list[Range]:
        asked.append(bare)
        return []

    monkeypatch.setattr(covered, "held", counted)
    base = raw_image(tmp_path / "base.raw", MIB)
    os.utime(base, (1, 1))
    top = overlay(tmp_path / "top.qcow2", base)
    file = Durable(Tool(user=None, limits=ToolLimits(), binary="qemu-img"), Access(), 10)
    for device, times in ((False, 1), (True, 3)):
        for _ in range(2):
            below = replace(layer(base), format="raw", device=device)
            assert asyncio.run(file.missing_from([layer(top), below], bare=True, running=True)) == 0
        assert len(asked) == times
