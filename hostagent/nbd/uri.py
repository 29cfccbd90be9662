"""NBD URIs, as in the NBD project's doc/uri.md: nbd://host[:port]/name and nbd+unix:///name?socket=/path.

The same export can be spelled in many ways. `normal` is the one by which it is known here, and `file_of` makes an
identity of that, so that leases and the ledger treat it like a file. Two names of one host, or two links to one socket,
are two servers: NBD has no way to tell. NBD has no passwords either, so a URI with one is refused, and never repeated.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from jobs.errors import JobError
from jobs.model import NETWORK, FileId

PORT = 10809
SCHEMES = ("nbd://", "nbd+unix://")
_AUTHORITY = re.compile(r"[^/?#]*")
_IDENTITY = (1 << 63) - 1


def is_uri(text: str) -> bool:
    """Whether it is meant for an NBD URI, right or wrong."""
    return text.startswith(SCHEMES)


def server_of(uri: str, field: str = "dest") -> tuple[dict[str, Any], str]:
    """QEMU's `server` option (SocketAddress), and the export's name. Raises JobError `invalid`, about `field`."""
    remedy = "write nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH"
    authority = _AUTHORITY.match(uri.partition("://")[2])
    if authority is not None and "@" in authority[0]:
        raise JobError("invalid", "an NBD URI has neither a user nor a password", field=field, remedy=remedy)
    try:
        if uri.isprintable():  # urlsplit would drop newlines
            return _parsed(urlsplit(uri))
    except ValueError:
        pass
    raise JobError("invalid", f"{uri!r} is no NBD URI that can be used here", field=field, value=uri, remedy=remedy)


def normal(uri: str) -> str:
    """The one spelling of what the URI leads to."""
    server, name = server_of(uri)
    if server["type"] == "unix":
        return f"nbd+unix:///{quote(name)}?socket={quote(server['path'])}"
    host = f"[{server['host']}]" if ":" in server["host"] else server["host"]
    return f"nbd://{host}:{server['port']}/{quote(name)}"


def file_of(uri: str) -> FileId:
    """What stands for a device and an inode number."""
    digest = hashlib.sha256(normal(uri).encode()).digest()
    return FileId(NETWORK, int.from_bytes(digest[:8], "big") & _IDENTITY)


def plain_host(name: str) -> str:
    """One spelling of an address; a name is in small letters already, and what it leads to is not asked."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    return name


def _parsed(parts: SplitResult) -> tuple[dict[str, Any], str]:
    """Raises ValueError for what means nothing to us, rather than to leave it out."""
    name = unquote(parts.path.removeprefix("/"), errors="strict")
    query = parse_qsl(parts.query.replace("+", "%2B"), strict_parsing=True, errors="strict") if parts.query else []
    if parts.fragment or not name.isprintable():
        raise ValueError(parts)
    if parts.scheme == "nbd" and parts.hostname and not query:
        port = PORT if parts.port is None else parts.port
        return {"type": "inet", "host": plain_host(parts.hostname), "port": str(port)}, name
    ((key, path),) = query
    if parts.scheme != "nbd+unix" or parts.netloc or key != "socket" or not path.isprintable():
        raise ValueError(parts)
    if not path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise ValueError(path)
    return {"type": "unix", "path": str(PurePosixPath("/", path.lstrip("/")))}, name
