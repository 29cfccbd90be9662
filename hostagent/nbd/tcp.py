"""Who is connected to a listening TCP port, as the kernel tells (/proc/net/tcp, proc(5)).

A client on another host is an address and nothing more. Only connections of our own network namespace are seen.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from pathlib import Path

from hostagent.nbd.sockdiag import Client

TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
ESTABLISHED = "01"
EVERYWHERE = (ipaddress.ip_address("0.0.0.0"), ipaddress.ip_address("::"))  # noqa: S104 - recognised, not bound


def clients(host: str, port: int) -> list[Client]:
    """One entry for each connection to the listener that clients hold open. `host` is an address of ours, or one that
    stands for all of them."""
    return [Client(None, peer, None) for table in TABLES for peer in _peers(Path(table), host, port)]


def _peers(table: Path, host: str, port: int) -> Iterator[str]:
    try:
        with table.open() as lines:
            next(lines, None)
            for line in lines:
                _, local, remote, state, *_ = line.split()
                if state != ESTABLISHED or int(local.rpartition(":")[2], 16) != port:
                    continue
                if ipaddress.ip_address(host) in (_address(local), *EVERYWHERE):
                    yield _shown(remote)
    except FileNotFoundError:
        return  # a kernel without IPv6


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address as the tables have it: words in the host's byte order, then the port."""
    words = text.rpartition(":")[0]
    data = b"".join(struct.pack("=I", int(words[n : n + 8], 16)) for n in range(0, len(words), 8))
    found = ipaddress.ip_address(data)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def _shown(text: str) -> str:
    address, port = _address(text), int(text.rpartition(":")[2], 16)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
