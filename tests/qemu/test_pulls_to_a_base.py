"""When a pull to a base is on the file: seen from its tables, of a storage daemon that is killed before it wrote them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from hostagent.guests.durable import Durable
from hostagent.images.tool import Tool, ToolLimits
from jobs.model import Holder, Need
from jobs.ports import Phase
from tests.harness import MIB, backing_of, overlay, same_content
from tests.libvirt.jobs import write
from tests.qemu.test_proofs import JOB, bench, run
from tests.unit.guests.test_image_rows import layer

pytestmark = pytest.mark.qemu


class Access:
    """Nobody need be given anything here."""

    async def acquire(self, holder: Holder, needs: Sequence[Need]) -> None: ...

    async def release(self, holder: Holder, *, trigger: str) -> None: ...


@pytest.mark.parametrize("flushed", [True, False])
def test_zeros_over_what_stays_are_missing_until_they_are_written(folder: Path, flushed: bool) -> None:
    """What the top lacks reads as the base's old data then, and not as zeros."""
    base, middle, top = (folder / f"{name}.qcow2" for name in ("base", "middle", "top"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(base), str(16 * MIB)], check=True)
    write(base, 0xAA, 0, 8 * MIB)
    overlay(middle, base, "qcow2")
    subprocess.run(["qemu-io", "-c", f"write -q -z 0 {4 * MIB}", str(middle)], check=True)
    overlay(top, middle, "qcow2")
    truth = folder / "truth.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(top), str(truth)], check=True)

    async def test() -> None:
        async with bench(top) as it:
            await it.reopen(writable=True)
            await it.daemon.stream(JOB, it.top, it.nodes[2], backing=str(base), speed=0)
            await it.until(Phase.PENDING)
            if flushed:
                await it.daemon.flush(it.top, it.below)
            await it.daemon.finalize(JOB)
            await it.until(Phase.CONCLUDED)
            assert backing_of(top) == str(base)
            await it.daemon.kill()
        file = Durable(Tool(user=None, limits=ToolLimits(), binary="qemu-img"), Access(), 10.0)
        lacks = await file.lacking([layer(top)], [layer(middle)], bare=False)
        of_job = await file.missing_from([layer(top), layer(middle)], bare=False, running=True)
        assert lacks == of_job and (lacks == 0) == flushed

    run(test())
    assert same_content(truth, top, first="raw") == flushed
