"""Runs of an image's bytes, each with what is said of it: named tuples that begin with `start` and `length`, in order
and without gaps. Both sides of a transfer have their own kinds of them, and this in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, Self, TypeVar


class Span(Protocol):
    @property
    def start(self) -> int: ...

    @property
    def length(self) -> int: ...

    def __getitem__(self, part: slice, /) -> tuple[Any, ...]: ...

    def _replace(self, *, start: int = ..., length: int = ...) -> Self: ...


S = TypeVar("S", bound=Span)


def clipped(extents: Iterable[S], start: int, end: int) -> Iterator[S]:
    """What of the extents lies in these bytes."""
    for one in extents:
        first, last = max(one.start, start), min(one.start + one.length, end)
        if first < last:
            yield one._replace(start=first, length=last - first)


def merged(extents: Iterable[S]) -> Iterator[S]:
    """Neighbours that say the same become one."""
    before: S | None = None
    for one in extents:
        if before is not None and before[2:] == one[2:] and before.start + before.length == one.start:
            before = before._replace(length=before.length + one.length)
            continue
        if before is not None:
            yield before
        before = one
    if before is not None:
        yield before
