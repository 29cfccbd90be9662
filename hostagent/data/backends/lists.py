"""Lists of extents as JSON, which may be gigabytes long, a block at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

READ = 64 * 1024
OBJECT_MOST = 512
"""Bytes of one extent, which has some 110."""


def objects(blocks: Iterator[bytes]) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON array of flat objects. ValueError for what is none, or does not end."""
    left, begun = b"", False
    for block in blocks:
        left += block
        cut = left.rfind(b"}") + 1
        if cut == 0:
            if len(left) > OBJECT_MOST + READ:
                raise ValueError("it is no list of extents")
            continue
        text, left = left[:cut].lstrip(b" \r\n\t"), left[cut:]
        if not begun and not text.startswith(b"["):
            raise ValueError("it is no list of extents")
        found = json.loads(b"[" + text.lstrip(b" \r\n\t,[" if not begun else b" \r\n\t,") + b"]")
        begun = True
        if not all(isinstance(one, dict) for one in found):
            raise ValueError("it is no list of extents")
        yield from found
    if left.strip() != (b"]" if begun else b"[]") and left.split() != [b"[", b"]"]:
        raise ValueError("it breaks off")
