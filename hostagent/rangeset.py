"""Sets of bytes: what has moved, what is durable."""

from __future__ import annotations

import bisect
from collections.abc import Iterator


class RangeSet:
    """A union of ranges, kept in order and apart; of more than `most` the shortest are forgotten, so it may be too
    little, and never too much."""

    def __init__(self, most: int = 65536) -> None:
        self._most = most
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, end: int) -> None:
        if begin >= end:
            return
        first = bisect.bisect_left(self._ends, begin)
        last = bisect.bisect_right(self._begins, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last], self._ends[first:last] = [begin], [end]
        if len(self._begins) > self._most:
            shortest = min(range(len(self._begins)), key=lambda i: self._ends[i] - self._begins[i])
            del self._begins[shortest], self._ends[shortest]

    def update(self, other: RangeSet) -> None:
        for begin, end in other.pairs():
            self.add(begin, end)

    def discard(self, begin: int, end: int) -> None:
        """Without these bytes from now on."""
        first = bisect.bisect_right(self._ends, begin)
        last = bisect.bisect_left(self._begins, end)
        if begin >= end or first >= last:
            return
        kept = [(b, e) for b, e in ((self._begins[first], begin), (end, self._ends[last - 1])) if b < e]
        self._begins[first:last] = [b for b, _ in kept]
        self._ends[first:last] = [e for _, e in kept]

    def missing(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """What of these bytes is not in the set, in order."""
        for at in range(bisect.bisect_right(self._ends, begin), bisect.bisect_left(self._begins, end)):
            if begin < self._begins[at]:
                yield begin, self._begins[at]
            begin = self._ends[at]
        if begin < end:
            yield begin, end

    def pairs(self) -> list[tuple[int, int]]:
        """From the first byte to that after the last, in order."""
        return list(zip(self._begins, self._ends, strict=True))

    @property
    def parts(self) -> int:
        """Ranges that it consists of."""
        return len(self._begins)

    def copy(self) -> RangeSet:
        other = RangeSet(self._most)
        other._begins, other._ends = list(self._begins), list(self._ends)
        return other

    def clear(self) -> None:
        self._begins, self._ends = [], []

    def __len__(self) -> int:
        """Bytes in all."""
        return sum(self._ends) - sum(self._begins)
