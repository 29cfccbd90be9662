"""Who is connected to a listening TCP port, as the kernel tells (/proc/net/tcp, proc(5)).

A client on another host is an address and nothing more. Only connections of our own network namespace are seen.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from hostagent.nbd.sockdiag import Client

TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
ESTABLISHED = "01"


def clients(port: int) -> list[Client]:
    """One entry for each connection to the port that clients hold open."""
    return [Client(None, peer, None) for table in TABLES for peer in _peers(Path(table), port)]


def _peers(table: Path, port: int) -> Iterator[str]:
    try:
        with table.open() as lines:
            next(lines, None)
            for line in lines:
                _, local, remote, state, *_ = line.split()
                if state == ESTABLISHED and int(local.rpartition(":")[2], 16) == port:
                    yield _shown(remote)
    except FileNotFoundError:
        return  # a kernel without IPv6


def _shown(address: str) -> str:
    """An address as the table has it: words in the host's byte order, then the port."""
    words, _, port = address.rpartition(":")
    data = b"".join(struct.pack("=I", int(words[n : n + 8], 16)) for n in range(0, len(words), 8))
    if len(data) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, data)}:{int(port, 16)}"
    host = ipaddress.IPv6Address(data)
    return f"{host.ipv4_mapped}:{int(port, 16)}" if host.ipv4_mapped else f"[{host}]:{int(port, 16)}"
