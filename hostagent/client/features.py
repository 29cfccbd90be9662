"""What a server says that it can do with an image."""

from __future__ import annotations

import re
from dataclasses import dataclass
from http.client import HTTPMessage

from hostagent.client.trouble import decoded

_ETAG = re.compile(r'(?:W/)?"[!#-~]{1,200}"', re.ASCII)


@dataclass(frozen=True, slots=True)
class Features:
    """What OPTIONS says. One that does not know it (405, 204) gets one connection, and nothing but GET and PUT."""

    extents: bool = False
    zero: bool = False
    flush: bool = False
    checksum: bool = False
    writable: bool = True
    readers: int = 1
    writers: int = 1
    size: int | None = None
    unix_socket: str = ""
    etag: str = ""


def features_of(body: bytes, headers: HTTPMessage) -> Features:
    found = decoded(body)
    if not isinstance(found, dict):
        return Features()
    names = found.get("features")
    names = names if isinstance(names, list) else []
    allow = headers.get("allow")
    size, socket_name, generation = found.get("size"), found.get("unix_socket"), found.get("generation", "")
    return Features(
        extents="extents" in names,
        zero="zero" in names,
        flush="flush" in names,
        checksum="checksum" in names,
        writable=allow is None or "PUT" in allow,
        readers=_count(found.get("max_readers")),
        writers=_count(found.get("max_writers")),
        size=size if isinstance(size, int) and size >= 0 else None,
        unix_socket=socket_name if isinstance(socket_name, str) else "",
        etag=_tag(headers.get("etag") or f'"{generation}"'),
    )


def _tag(value: object) -> str:
    """An ETag (RFC 9110) that may be sent back; "" for what is none."""
    return value if isinstance(value, str) and _ETAG.fullmatch(value) else ""


def _count(value: object) -> int:
    return max(1, value) if isinstance(value, int) else 1
