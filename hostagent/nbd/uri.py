"""NBD URIs, as in the NBD project's doc/uri.md: nbd://host[:port]/name and nbd+unix:///name?socket=/path."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from jobs.errors import JobError

PORT = 10809


def server_of(uri: str) -> tuple[dict[str, Any], str]:
    """QEMU's `server` option (SocketAddress), and the export's name. Raises JobError `invalid`."""
    try:
        parts = urlsplit(uri)
        name = unquote(parts.path.removeprefix("/"))
        if parts.scheme == "nbd+unix":
            (path,) = parse_qs(parts.query, strict_parsing=True)["socket"]
            return {"type": "unix", "path": path}, name
        if parts.scheme == "nbd" and parts.hostname:
            return {"type": "inet", "host": parts.hostname, "port": str(parts.port or PORT)}, name
    except (ValueError, KeyError):
        pass
    remedy = "write nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH"
    raise JobError("invalid", f"{uri!r} is no NBD URI that can be used here", field="dest", value=uri, remedy=remedy)
