"""http.client over TCP and TLS, to an agent of another host. A module of its own, as unix_http is."""

from __future__ import annotations

import ssl
from http.client import HTTPConnection, HTTPSConnection
from typing import NamedTuple
from urllib.parse import urlsplit

from hostagent.errors import AgentError


class Address(NamedTuple):
    host: str
    port: int
    tls: bool


def address(url: str) -> Address:
    """Of `https://HOST:PORT`; `http:` is for the loopback address of an agent that is set so. AgentError invalid."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("https", "http") or not parts.hostname or port is None or parts.path not in ("", "/"):
        port = None
    if port is None or parts.username or parts.query or parts.fragment:
        remedy = "write https://HOST:PORT"
        raise AgentError("invalid", "that is no address of an agent", field="url", remedy=remedy)
    assert parts.hostname is not None
    return Address(parts.hostname, port, parts.scheme == "https")


def context(cafile: str, certificate: str, key: str) -> ssl.SSLContext:
    """Empty `cafile`: the system's authorities. AgentError invalid, naming the file."""
    try:
        found = ssl.create_default_context(cafile=cafile or None)
        found.minimum_version = ssl.TLSVersion.TLSv1_2
    except (OSError, ValueError) as error:
        raise AgentError("invalid", f"the authorities in {cafile!r} cannot be used: {error}", field="cafile") from error
    if certificate:
        try:
            found.load_cert_chain(certificate, key or None)
        except (OSError, ValueError) as error:
            message = f"the certificate {certificate!r} or its key cannot be used: {error}"
            raise AgentError("invalid", message, field="certificate") from error
    return found


def connection(where: Address, tls: ssl.SSLContext | None, timeout: float) -> HTTPConnection:
    if tls is None:
        return HTTPConnection(where.host, where.port, timeout=timeout)
    return HTTPSConnection(where.host, where.port, timeout=timeout, context=tls)
