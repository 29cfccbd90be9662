"""Network images: which servers may be reached, and what their refusals mean.

A storage daemon connects in the agent's name, to where the agent may reach and its caller perhaps not. So only servers
that the configuration lists (images.network) are ever connected to; none are by default. Each network image has a
storage daemon of its own: one whose server is silent answers nobody while it is opened (`blockdev-add`), and may not
end before the server answers.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hostagent.drivers.qmp import Refused
from hostagent.nbd.uri import file_of, normal, plain_host, server_of
from jobs.errors import JobError
from jobs.model import Layer


@dataclass(frozen=True, slots=True)
class Settings:
    """`servers` as in images.network; `open_timeout` in whole seconds (exports.open_timeout)."""

    servers: tuple[str, ...]
    open_timeout: int


@dataclass(frozen=True, slots=True)
class Remote:
    """How a storage daemon opens a network image: all of it for writing, or nothing."""

    uri: str
    writable: bool
    timeout: int


def network_layer(uri: str, servers: Sequence[str]) -> Layer:
    """The image that the URI leads to, if images.network lists its server. Its size is not known before it is opened.
    Blocking: a socket's folder is looked at."""
    server, _ = server_of(uri, "image")
    if not any(_covers(entry, server) for entry in servers):
        what = str(Path(os.path.realpath(server["path"])).parent) if server["type"] == "unix" else _shown(server)
        raise JobError(
            "denied",
            f"{uri!r} leads to a server that images.network does not list",
            field="image",
            value=uri,
            remedy=f"if everybody who may use the agent may use that server: add {what!r} to images.network",
        )
    return Layer(normal(uri), "raw", file_of(uri), 0, 0)


def _covers(entry: str, server: Mapping[str, Any]) -> bool:
    if server["type"] == "unix":  # by what is there: a link in the folder must not lead out of it
        return entry.startswith("/") and Path(os.path.realpath(server["path"])).is_relative_to(os.path.realpath(entry))
    if entry.startswith("/"):
        return False
    listed = urlsplit(f"//{entry}")
    if plain_host(listed.hostname or "") != server["host"]:
        return False
    return listed.port is None or str(listed.port) == server["port"]


def _shown(server: Mapping[str, Any]) -> str:
    host = f"[{server['host']}]" if ":" in server["host"] else server["host"]
    return f"{host}:{server['port']}"


def refused(uri: str, user: str, error: Refused) -> JobError:
    """What QEMU, as `user`, said when it opened the image, as a person can use it. QEMU has no codes, only words."""
    text = error.text
    if "failed to connect" in text.lower() and "permission denied" in text.lower():
        return closed_server(uri, user, field="image")
    for words, code, field, remedy in _REFUSALS:
        if words in text.lower():
            return JobError(code, f"{uri!r}: {text}", field=field, value=uri, remedy=remedy)
    remedy = "see that the server runs, and answers this host (nbdinfo)"
    return JobError("unavailable", f"{uri!r} cannot be opened: {text}", field="image", value=uri, remedy=remedy)


_REFUSALS = (
    ("sum of offset", "invalid", "size", "say a part of the image"),
    ("offset (", "invalid", "offset", "say a part of the image"),
    ("export not available", "not_found", "image", "see what the server exports: nbdinfo --list"),
    ("permission denied", "denied", "writable", "the server does not let it be written: export it read-only"),
)


def closed_server(uri: str, user: str, *, field: str) -> JobError:
    """The hypervisor user, `user`, may not connect; whose socket it is says who can let it."""
    server, _ = server_of(uri)
    where, remedy = "the server", "see what the server allows"
    if (path := server.get("path")) is not None:
        path = os.path.realpath(path)
        try:
            found = Path(path).stat()
            where = f"{path!r} (uid {found.st_uid}, gid {found.st_gid}, mode {found.st_mode & 0o7777:04o})"
        except OSError:
            where = repr(path)
        plain = shlex.quote(path)
        remedy = f"let it use the socket (setfacl -m u:{user}:rw {plain}), and pass through the folders above"
    message = f"the hypervisor user may not connect to {where}"
    return JobError("access_refused", message, field=field, value=uri, remedy=remedy)
