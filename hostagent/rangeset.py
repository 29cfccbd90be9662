"""Sets of bytes: what has moved, what is durable."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator


class RangeSet:
    """A union of ranges, kept in order and apart. Of more than `most` the shortest are forgotten, so that it may be too
    little and is never too much; or, where `whole` is asked for, all between the first and the last counts, so that it
    may be too much and is never too little."""

    def __init__(self, most: int = 65536, *, whole: bool = False) -> None:
        self._most = most
        self._whole = whole
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
            if self._whole:
                self._begins, self._ends = self._begins[:1], self._ends[-1:]
            else:
                self._forget(self._most // 16 + 1)  # many at once, for each look at all costs

    def _forget(self, number: int) -> None:
        pairs = self.pairs()
        shortest = set(heapq.nsmallest(number, range(len(pairs)), key=lambda at: pairs[at][1] - pairs[at][0]))
        kept = [pair for at, pair in enumerate(pairs) if at not in shortest]
        self._begins, self._ends = [begin for begin, _ in kept], [end for _, end in kept]

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
        other = RangeSet(self._most, whole=self._whole)
        other._begins, other._ends = list(self._begins), list(self._ends)
        return other

    def clear(self) -> None:
        self._begins, self._ends = [], []

    def __len__(self) -> int:
        """Bytes in all."""
        return sum(self._ends) - sum(self._begins)
