"""Extents: what every backend promises that tells which bytes are data."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hostagent.data.backends.base import DirtyExtent, Extent, ImageBackend
from hostagent.errors import AgentError
from hostagent.extents import merged
from tests.contract.backend_suite import MIB, BackendSuite, Rig


class ExtentsSuite(BackendSuite):
    extents = True

    def test_extents_of_the_whole_image_keep_their_laws(self, rig: Rig, backend: ImageBackend) -> None:
        found = [Extent(*map(one.get, ("start", "length", "zero", "hole"))) for one in backend.get_allocation_extents()]
        lawful(found, 0, len(rig.content))
        assert list(pairwise(found)) == [(one, other) for one, other in pairwise(found) if one[2:] != other[2:]]
        zeros_are_zeros(found, rig.content)

    def test_extents_of_a_part_are_a_part_of_all(self, rig: Rig, backend: ImageBackend) -> None:
        end = len(rig.content)
        whole = list(merged(backend.extents(0, end)))
        zeros_are_zeros(whole, rig.content)
        for start, length in [(0, 1), (end - 1, 1), (1, end - 1), (65535, 65538), (MIB - 1, MIB + 2), (end, 0)]:
            part = list(merged(backend.extents(start, length)))
            lawful(part, start, length)
            for one in part:
                (around,) = [w for w in whole if w.start <= one.start < w.start + w.length]
                assert one[2:] == around[2:]
                assert one.start + one.length <= around.start + around.length

    def test_dirty_extents_keep_their_laws(self, rig: Rig, backend: ImageBackend) -> None:
        if not rig.dirty:
            with pytest.raises(AgentError) as error:
                list(backend.dirty_extents(0, len(rig.content)))
            assert error.value.code == "not_found"
            return
        found = list(merged(backend.dirty_extents(0, len(rig.content))))
        lawful(found, 0, len(rig.content))
        zeros_are_zeros(found, rig.content)
        for start, length in [(0, 1), (65535, MIB), (len(rig.content) - 1, 1)]:
            lawful(list(merged(backend.dirty_extents(start, length))), start, length)
        dirty = [(one.start, one.start + one.length) for one in found if one.dirty]
        for first, last in rig.dirty:
            assert covers(dirty, first, last), (dirty, first, last)
        context = backend.dirty_context
        assert context
        again = [DirtyExtent(**one) for one in backend.get_dirty_extents(context)]
        assert again == found


def lawful(extents: list[Extent] | list[DirtyExtent], start: int, length: int) -> None:
    """Sorted, gapless, none of them empty, and of exactly these bytes."""
    position = start
    for one in extents:
        assert one.start == position
        assert one.length > 0
        position += one.length
    assert position == start + length


def zeros_are_zeros(extents: list[Extent] | list[DirtyExtent], content: bytes) -> None:
    for one in extents:
        if one.zero:
            assert not any(content[one.start : one.start + one.length])


def covers(ranges: list[tuple[int, int]], first: int, last: int) -> bool:
    return any(begin <= first and last <= end for begin, end in ranges)
