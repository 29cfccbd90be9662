"""Who is connected to a listening unix socket, as the kernel tells (sock_diag(7), unix_diag).

A storage daemon's monitor does not say who its NBD clients are, so the kernel is asked. An accepted connection carries
the listener's name, as it was bound, and the inode of its peer; the peer's process is the one that has `socket:[inode]`
open. A connection that still waits to be accepted is not counted, nor one whose client is gone. Only sockets of our own
network namespace are seen.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from jobs.errors import JobError

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
ESTABLISHED = 1
ATTRIBUTE_NAME, ATTRIBUTE_PEER = 0, 2
SHOW_NAME, SHOW_PEER = 1, 4

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
REQUEST = struct.Struct("=BBHIIIII")  # family, protocol, pad, states, inode, show, cookie
MESSAGE = struct.Struct("=BBBBIII")  # family, type, state, pad, inode, cookie
ATTRIBUTE = struct.Struct("=HH")  # length, type

RECEIVE_BYTES = 1 << 16  # the kernel fills at most 32 KiB a datagram
MAX_DATAGRAMS = 10_000  # some 60 bytes a socket: millions of them, an end to a dump that has none


class Client(NamedTuple):
    """One connection. `pid` is None where its process cannot be seen from here; then `name` is its address, or `?`."""

    pid: int | None
    name: str
    uid: int | None

    def __str__(self) -> str:
        if self.pid:
            return f"{self.name} (pid {self.pid})"
        return self.name if self.name != "?" else "a process that cannot be seen from here"


def clients(socket_path: str, *, skip_pids: Collection[int] = (), timeout: float = 5.0) -> list[Client]:
    """One entry for each connection to the listener bound at this absolute path, but for those of `skip_pids`."""
    return clients_of({socket_path}, skip_pids=skip_pids, timeout=timeout)[socket_path]


def clients_of(
    sockets: Collection[str], *, skip_pids: Collection[int] = (), timeout: float = 5.0
) -> dict[str, list[Client]]:
    """The same for many listeners, with one look at the kernel's table and at most one at /proc."""
    names = {os.fsencode(path): path for path in sockets}
    peers = [(names[bound], peer) for bound, peer in _dump(timeout) if bound in names and peer]
    owners = _owners({inode for _, inode in peers}) if peers else {}
    found: dict[str, list[Client]] = {path: [] for path in sockets}
    for path, inode in peers:
        pids = owners.get(inode, [])
        if not any(pid in skip_pids for pid in pids):
            found[path].append(_client(pids[0]) if pids else Client(None, "?", None))
    return found


def connections(socket_path: str, *, skip_self: bool = False, timeout: float = 5.0) -> int:
    """How many connections the listener has; `skip_self` leaves out this process's. Cheap: no search of /proc."""
    peers = _peers(socket_path, timeout)
    if skip_self and peers:
        own = set(_sockets_of(os.getpid()))
        return sum(inode not in own for inode in peers)
    return len(peers)


def _peers(socket_path: str, timeout: float) -> list[int]:
    """The client-side inodes of the accepted connections of a listener."""
    name = os.fsencode(socket_path)
    return [peer for bound, peer in _dump(timeout) if bound == name and peer]


def _dump(timeout: float) -> Iterator[tuple[bytes, int]]:
    """(bound name, peer's inode) of every established unix socket that has a name."""
    body = REQUEST.pack(socket.AF_UNIX, 0, 0, 1 << ESTABLISHED, 0, SHOW_NAME | SHOW_PEER, 0xFFFFFFFF, 0xFFFFFFFF)
    header = HEADER.pack(HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(timeout)
            netlink.send(header + body)
            for _ in range(MAX_DATAGRAMS):
                for kind, payload in _messages(netlink.recv(RECEIVE_BYTES)):
                    if kind == NLMSG_DONE:
                        return
                    if kind == NLMSG_ERROR:
                        number = -struct.unpack_from("=i", payload)[0]
                        raise OSError(number, os.strerror(number))
                    yield from _named(payload)
    except TimeoutError:
        raise JobError("timeout", f"the kernel did not list its unix sockets in {timeout} s") from None
    except OSError as error:
        raise _unavailable(error) from error
    raise JobError("limit", f"the kernel's list of unix sockets does not end after {MAX_DATAGRAMS} messages")


def _messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + HEADER.size <= len(datagram):
        length, kind, _, _, _ = HEADER.unpack_from(datagram, offset)
        yield kind, datagram[offset + HEADER.size : offset + length]
        offset += _aligned(max(length, HEADER.size))


def _named(payload: bytes) -> Iterator[tuple[bytes, int]]:
    name, peer = b"", 0
    offset = MESSAGE.size
    while offset + ATTRIBUTE.size <= len(payload):
        length, kind = ATTRIBUTE.unpack_from(payload, offset)
        value = payload[offset + ATTRIBUTE.size : offset + length]
        if kind == ATTRIBUTE_NAME:
            name = value.rstrip(b"\0")
        elif kind == ATTRIBUTE_PEER and len(value) == 4:
            (peer,) = struct.unpack("=I", value)
        offset += _aligned(max(length, ATTRIBUTE.size))
    if name:
        yield name, peer


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _owners(inodes: Collection[int]) -> dict[int, list[int]]:
    """Which processes have these sockets open, lowest pid first: a fork may share one."""
    owners: dict[int, list[int]] = {}
    for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        for inode in set(_sockets_of(pid)).intersection(inodes):
            owners.setdefault(inode, []).append(pid)
    return owners


def _sockets_of(pid: int) -> Iterator[int]:
    folder = f"/proc/{pid}/fd"
    try:
        descriptors = os.listdir(folder)  # noqa: PTH208 - thousands of them, and Path costs; so below
    except OSError:  # gone, or not ours to look into
        return
    for descriptor in descriptors:
        try:
            target = os.readlink(f"{folder}/{descriptor}")  # noqa: PTH115
        except OSError:
            continue
        if target.startswith("socket:["):
            yield int(target[8:-1])


def _client(pid: int) -> Client:
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return Client(pid, "?", None)
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return Client(pid, fields["Name"].strip(), int(fields["Uid"].split()[0]))


def _unavailable(error: OSError) -> JobError:
    remedy = "allow the agent AF_NETLINK sockets (RestrictAddressFamilies= of its unit)"
    if error.errno == errno.ENOENT:
        remedy = "load the kernel module unix_diag"
    return JobError("unavailable", f"the kernel does not list unix sockets: {error.strerror}", remedy=remedy)
