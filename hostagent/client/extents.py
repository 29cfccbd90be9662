"""What an image has where, and the pieces of work that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple

from hostagent.rangeset import RangeSet


class Extent(NamedTuple):
    """`zero`: reads as zeros. `hole`: no layer has it allocated. `dirty`: changed since the bitmap was made."""

    start: int
    length: int
    zero: bool
    hole: bool = False
    dirty: bool = False


class Kind(Enum):
    DATA = "data"
    ZERO = "zero"
    SKIP = "skip"
    """Stays as it is on the other side: it is that already, or is the backing file's."""


class Piece(NamedTuple):
    """One request's worth of work."""

    begin: int
    end: int
    kind: Kind


def cut(runs: Iterable[Piece], done: RangeSet, data_most: int, zero_most: int) -> Iterator[Piece]:
    """The pieces that are left to do of these runs: no larger than that, and nothing twice. What is skipped stays
    whole."""
    for begin, end, kind in runs:
        most = {Kind.DATA: data_most, Kind.ZERO: zero_most, Kind.SKIP: end - begin}[kind]
        for first, last in done.missing(begin, end):
            for at in range(first, last, most):
                yield Piece(at, min(at + most, last), kind)
