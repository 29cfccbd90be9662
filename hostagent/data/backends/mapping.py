"""Where the bytes of an immutable image lie: for each stretch of the virtual disk a layer's file and an offset in it,
or zeros, or neither, which only QEMU can read (compressed clusters).

Three arrays, 18 bytes an extent; a range is found by bisection. Made once, never changed, shared by threads.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from hostagent.data.backends.base import Extent

LAYERS_MOST = 200
"""As in hostagent.images: what libvirt allows."""


class Where(IntEnum):
    FILE = 0
    ZEROS = 1
    ELSEWHERE = 2
    """Not to be had by an offset in a file."""


class Piece(NamedTuple):
    """`layer` and `offset` say where a file has it."""

    start: int
    length: int
    where: Where
    layer: int
    offset: int


class Batch(NamedTuple):
    """Bytes that are sent in one go: one piece of a file or of zeros, several small ones, or, without pieces, what is
    to be had elsewhere."""

    start: int
    length: int
    pieces: list[Piece]


class Unmappable(Exception):
    """Why an image is not read from its layers' files. `lasting`: asking again is of no use."""

    def __init__(self, why: str, *, lasting: bool = True) -> None:
        super().__init__(why)
        self.lasting = lasting


_HOLE, _LAYER = 1 << 2, 3  # in a mark: two bits of Where, one bit, then the layer's number


class Map:
    def __init__(self, starts: array[int], marks: array[int], offsets: array[int], size: int) -> None:
        self._starts = starts
        self._marks = marks
        self._offsets = offsets
        self.size = size

    def __len__(self) -> int:
        return len(self._starts)

    def pieces(self, start: int, length: int) -> Iterator[Piece]:
        """Of exactly these bytes, in order."""
        for at, number, index in self._within(start, length):
            mark, offset = self._marks[index], self._offsets[index]
            yield Piece(at, number, Where(mark & 3), mark >> _LAYER, offset + at - self._starts[index])

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        for at, number, index in self._within(start, length):
            mark = self._marks[index]
            yield Extent(at, number, mark & 3 == Where.ZEROS, bool(mark & _HOLE))

    def _within(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        end = min(start + length, self.size)
        if start >= end:
            return
        for index in range(bisect_right(self._starts, start) - 1, len(self._starts)):
            begin = max(self._starts[index], start)
            if begin >= end:
                return
            after = self._starts[index + 1] if index + 1 < len(self._starts) else self.size
            yield begin, min(after, end) - begin, index


def made(entries: Iterable[Mapping[str, Any]], sizes: Sequence[int], *, most: int) -> Map:
    """Of what qemu-img map says; `sizes` are those of the layers' files, the top first. Unmappable when there are more
    than `most` extents, or when they are no gapless image."""
    starts, marks, offsets = array("Q"), array("H"), array("Q")
    end = last = follows = 0
    for entry in entries:
        start, length, mark, offset = _understood(entry, sizes)
        if start != end:
            raise Unmappable(f"its map has a gap at byte {end}")
        if not length:
            continue
        if not starts or mark != last or (mark & 3 == Where.FILE and offset != follows):
            if len(starts) >= most:
                raise Unmappable(f"it has more than {most} extents (data.map_extents)")
            starts.append(start)
            marks.append(mark)
            offsets.append(offset)
        end, last, follows = start + length, mark, offset + length
    return Map(starts, marks, offsets, end)


def batched(pieces: Iterable[Piece], *, small: int, most: int) -> Iterator[Batch]:
    """Pieces of less than `small` bytes go together, up to `most` bytes; those beside what is elsewhere go with it."""
    start = end = 0
    run: list[Piece] = []
    elsewhere = False
    for piece in pieces:
        large = piece.where is not Where.ELSEWHERE and piece.length >= small
        full = not elsewhere and piece.where is not Where.ELSEWHERE and end - start + piece.length > most
        if end > start and (large or full):
            yield Batch(start, end - start, [] if elsewhere else run)
            run, elsewhere, start = [], False, end
        if large:
            yield Batch(piece.start, piece.length, [piece])
            start = end = piece.start + piece.length
            continue
        if end == start:
            start = piece.start
        end = piece.start + piece.length
        elsewhere |= piece.where is Where.ELSEWHERE
        if elsewhere:
            run = []
        else:
            run.append(piece)
    if end > start:
        yield Batch(start, end - start, [] if elsewhere else run)


def _understood(entry: Mapping[str, Any], sizes: Sequence[int]) -> tuple[int, int, int, int]:
    """Start, length, mark, offset."""
    try:
        start, length, layer = int(entry["start"]), int(entry["length"]), int(entry["depth"])
        if length < 0 or not 0 <= layer < len(sizes):
            raise ValueError("out of bounds")
        if entry["zero"]:
            return start, length, Where.ZEROS | (0 if entry.get("present", True) else _HOLE), 0
        offset = entry.get("offset")
        if not entry["data"] or offset is None or entry.get("compressed", False):
            return start, length, int(Where.ELSEWHERE), 0
        if not 0 <= offset <= sizes[layer] - length:  # QEMU pads what lies beyond a file's end; we never do
            return start, length, int(Where.ELSEWHERE), 0
        return start, length, Where.FILE | layer << _LAYER, int(offset)
    except (LookupError, TypeError, ValueError) as error:
        raise Unmappable(f"its map cannot be understood: {type(error).__name__}") from error
