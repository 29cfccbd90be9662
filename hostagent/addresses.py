"""Addresses to listen on by TCP, as settings name them, and the sockets that do."""

from __future__ import annotations

import ipaddress
import re
import socket

from hostagent.errors import AgentError

_ADDRESS = re.compile(r"(\[(?P<six>[^\]]+)\]|(?P<four>[0-9.]+)):(?P<port>[0-9]{1,5})", re.ASCII)


def tcp_address(text: str) -> tuple[str, int] | None:
    """IP:PORT, an IPv6 address in brackets; None when it is no such thing. Port 0 is any."""
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) >= 1 << 16:
        return None
    try:
        known = ipaddress.IPv6Address(found["six"]) if found["six"] else ipaddress.IPv4Address(found["four"])
    except ValueError:
        return None
    return str(known), int(found["port"])


def network_of(address: str) -> str:
    """What is counted as one client: an IPv4 address, the 64 bits of an IPv6 one that a host has to itself, or this
    host, which has all that begin with 127."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(known, ipaddress.IPv6Address):
        if known.ipv4_mapped:
            return str(known.ipv4_mapped)
        return str(ipaddress.ip_network((int(known) >> 64 << 64, 64)))
    return "127.0.0.1" if known.is_loopback else str(known)


def listener(address: str, port: int, *, backlog: int, setting: str, value: str | int) -> socket.socket:
    """It blocks. An unspecified IPv6 address takes IPv4, too. AgentError unavailable, naming the `setting` and its
    `value`."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        found.bind((address, port))
        found.listen(backlog)
    except OSError as error:
        found.close()
        message, remedy = f"cannot listen on {address} port {port}: {error.strerror}", "see `ss -tlnp`, `ip address`"
        raise AgentError("unavailable", message, field=setting, value=value, remedy=remedy) from error
    return found
