"""Disks that an NBD server has, in libvirt's words and as URIs."""

from __future__ import annotations

import contextlib
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from hostagent.drivers.domain_xml import LiveLayer
from hostagent.nbd.uri import normal, server_of
from jobs.errors import JobError


def disk_xml(uri: str) -> str:
    """The export as libvirt has a disk. As everywhere for these URIs, without TLS."""
    server, name = server_of(uri)
    if server["type"] == "unix":
        host = f"<host transport='unix' socket={quoteattr(server['path'])}/>"
    else:
        host = f"<host name={quoteattr(server['host'])} port={quoteattr(server['port'])}/>"
    named = f" name={quoteattr(name)}" if name else ""
    source = f"<source protocol='nbd'{named} tls='no'>{host}</source>"
    return f"<disk type='network'>{source}<driver name='qemu' type='raw'/></disk>"


def uri_of(layer: LiveLayer) -> str | None:
    """The URI of a layer that is an NBD export; None for all else, and for one that has no such URI."""
    if layer.protocol != "nbd" or len(layer.hosts) != 1:
        return None
    host, name = layer.hosts[0], quote(layer.path or "")
    with contextlib.suppress(JobError):
        if host.startswith("/"):
            return normal(f"nbd+unix:///{name}?socket={quote(host)}")
        return normal(f"nbd://{host}/{name}")
    return None


def servers_of(layer: LiveLayer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for host in layer.hosts:
        if host.startswith("/"):
            found.append({"type": "unix", "path": host})
            continue
        name, _, port = host.rpartition(":")
        if port.isdecimal():
            found.append({"type": "inet", "host": name.strip("[]"), "port": port})
    return found
