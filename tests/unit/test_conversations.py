"""Ranges of a disk, in whole grains and never too many."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hostagent.errors import AgentError
from hostagent.nbdclient import conversations


def ranges(grain: int, size: int, *added: conversations.Range) -> list[conversations.Range]:
    found = conversations._Ranges(grain, size)
    for one in added:
        found.add(*one)
    return found.all


def test_ranges_are_rounded_outwards_and_joined() -> None:
    assert ranges(10, 95, (3, 5), (12, 20), (31, 32), (33, 40), (91, 95)) == [(0, 20), (30, 40), (90, 95)]


def test_too_many_become_fewer_and_coarser_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "RANGES_MOST", 4)
    added = [(n, n + 1) for n in range(0, 1000, 37)]
    found = ranges(1, 1000, *added)
    assert len(found) <= 4
    assert all(any(begin <= one[0] and one[1] <= end for begin, end in found) for one in added)
    assert all(first[1] < second[0] for first, second in pairwise(found))


def test_patience_ends() -> None:
    conversations.Patience(1, 60).refuse_late()
    with pytest.raises(AgentError, match=r"exports\.merge_timeout"):
        conversations.Patience(1, 60, began=-1e9).refuse_late()
