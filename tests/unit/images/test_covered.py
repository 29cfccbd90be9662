"""Which bytes of some layers an image lacks."""

from __future__ import annotations

import pytest

from hostagent.images.covered import Range, _without


@pytest.mark.parametrize(
    ("needs", "has", "lacks"),
    [
        pytest.param([(0, 8)], [(0, 8)], [], id="the same"),
        pytest.param([(2, 8)], [], [(2, 8)], id="nothing"),
        pytest.param([(2, 8)], [(0, 4), (6, 9)], [(4, 6)], id="a hole"),
        pytest.param([(0, 2), (4, 6)], [(1, 5)], [(0, 1), (5, 6)], id="the ends"),
        pytest.param([(0, 4), (4, 8)], [(0, 6), (6, 7)], [(7, 8)], id="one extent over two"),
        pytest.param([(0, 30)], [(0, 10)], [], id="beyond the disk's end"),
        pytest.param([], [(0, 10)], [], id="nothing is needed"),
    ],
)
def test_what_is_missing(needs: list[Range], has: list[Range], lacks: list[Range]) -> None:
    assert list(_without(needs, has, 10)) == lacks
