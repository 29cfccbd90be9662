"""What a measure means: what is certainly too much, and what only may be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hostagent.images.chain import OpenChain, _Member
from hostagent.images.measure import Measured
from hostagent.nbd.space import Space, judge
from jobs.errors import JobError
from jobs.model import FileId, JobSpec, Layer, Operation

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
SPEC = JobSpec(Operation.COPY, "/disk.qcow2", dest="/copy.qcow2")


class Nobody:
    """The ledger, of files that everybody may read."""

    async def acquire(self, *_: object) -> None: ...

    async def release(self, *_: object, **__: object) -> None: ...


class Said:
    def __init__(self, found: Measured) -> None:
        self._found = found

    async def measure(self, *_: object, **__: object) -> Measured:
        return self._found


def test_tables_that_a_sparse_image_may_never_need_refuse_no_copy() -> None:
    """qemu-img measures 2.5 GiB for 1 MiB of data on a disk of 16 TiB, and the copy takes 1.5 MiB."""
    top = Layer("/disk.qcow2", "qcow2", FileId(1, 1), 16 * TIB, 2 * MIB)
    opened = OpenChain((_Member(7, top, None),))
    measure: Any = Said(Measured(MIB, 2684944384))
    growth = asyncio.run(Space(measure, Nobody()).of_copy(opened, 1, "qcow2", None))
    (warning,) = judge(SPEC, growth, GIB, "the target", field="dest")
    assert "may need up to 2685992960" in warning
    with pytest.raises(JobError) as refused:
        judge(SPEC, growth, MIB - 1, "the target", field="dest")
    assert (refused.value.code, refused.value.details["need"]) == ("no_space", MIB)
