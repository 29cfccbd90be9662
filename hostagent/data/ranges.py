"""Ranges of bytes that requests name (RFC 9110, section 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hostagent.data.errors import HttpError

_BYTES = re.compile(r"bytes=(\d{0,40})-(\d{0,40})", re.ASCII)
_CONTENT = re.compile(r"bytes (\d{1,40})-(\d{1,40}|\*)/(\d{1,40}|\*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Asked:
    """`first` None: the last `last` bytes. `last` None: to the end."""

    first: int | None
    last: int | None

    def within(self, size: int) -> tuple[int, int]:
        """Offset and length in an image of `size` bytes. HttpError 416 where it names bytes that are not there: what
        is written in the dialect's clients is exact, so nothing is clamped."""
        if self.first is None:
            assert self.last is not None
            length = min(self.last, size)
            if length == 0:
                raise unsatisfiable(size, f"Requested last {self.last} bytes of {size}")
            return size - length, length
        last = size - 1 if self.last is None else self.last
        if self.first >= size or last >= size:
            raise unsatisfiable(size, f"Requested range out of allowed range: {self.first}-{last}, size {size}")
        return self.first, last - self.first + 1


def parse_range(value: str) -> Asked:
    match = _BYTES.fullmatch(value.strip())
    if match is None:
        raise HttpError(416, f"Cannot satisfy range {value[:100]!r}, invalid range or multiple ranges")
    first, last = (int(text) if text else None for text in match.groups())
    if first is None and last is None:
        raise HttpError(416, f"Cannot satisfy range {value[:100]!r}, no first or last")
    if first is not None and last is not None and first > last:
        raise HttpError(416, f"Cannot satisfy range {value[:100]!r}, first > last")
    return Asked(first, last)


def parse_content_range(value: str) -> tuple[int, int | None]:
    """The first byte of a Content-Range, and the length that it says, if it does: clients of the dialect may not yet
    know where they end, and write `bytes 4096-*/*`."""
    match = _CONTENT.fullmatch(value.strip())
    if match is None:
        raise HttpError(400, f"Invalid Content-Range {value[:100]!r}")
    first = int(match[1])
    if match[2] == "*":
        return first, None
    last = int(match[2])
    if first > last or (match[3] != "*" and last >= int(match[3])):
        raise HttpError(400, f"Invalid Content-Range {value[:100]!r}")
    return first, last - first + 1


def unsatisfiable(size: int, message: str) -> HttpError:
    return HttpError(416, message, headers=(("content-range", f"bytes */{size}"),))
