"""Who is at the other end of the unix socket, and whether that may talk to us at all.

The kernel's answer (SO_PEERCRED, SO_PEERGROUPS) is read once for each connection and handed to the gate (gate.py), so
that no handler can forget to look at it and no client can say anything about it. A peer that the policy does not allow
gets 403 for every request. The file mode of the socket says the same; this is the second lock, and it still holds when
somebody opens the mode up.

The protocol also bounds the number of connections, which uvicorn leaves open.
"""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import pwd
import socket
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from hostagent.api.bounded import BoundedProtocol, Known, raw_answer
from hostagent.api.peer import NOBODY, Peer, Places
from hostagent.api.seldom import Seldom
from hostagent.errors import AgentError
from hostagent.tokens import Scope

log = logging.getLogger(__name__)

_SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h; Python 3.11 has no name for it
_GROUPS_MAX = 256  # socket.getsockopt refuses a buffer of more than 1024 bytes: 256 gid_t
_UCRED = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class PeerPolicy:
    """Which users may use the socket: these, and whoever is in one of these groups, but for `never`."""

    uids: frozenset[int]
    gids: frozenset[int]
    never: frozenset[int] = frozenset()

    def allows(self, peer: Peer) -> bool:
        if peer.uid in self.never and peer.uid not in self.uids:
            return False
        return peer.uid in self.uids or peer.gid in self.gids or not self.gids.isdisjoint(peer.groups)

    @classmethod
    def for_group(cls, group: str | None = None, *, never: Collection[int] = ()) -> PeerPolicy:
        """root, the user that we run as, and the members of `group`, if there is such a group. `never`: users that are
        in it for the sake of something else."""
        gids: set[int] = set()
        if group:
            try:
                gids.add(grp.getgrnam(group).gr_gid)
            except KeyError:
                log.warning("group %s does not exist: only root and uid %d may connect", group, os.geteuid())
        return cls(uids=frozenset({0, os.geteuid()}), gids=frozenset(gids), never=frozenset(never))


def peer_of(sock: Any) -> Peer:
    """The peer of a connected socket; NOBODY where the kernel does not say."""
    try:
        pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    except (OSError, AttributeError):
        return NOBODY
    return Peer(pid, uid, gid, _groups(sock, uid, gid))


def _groups(sock: Any, uid: int, gid: int) -> tuple[int, ...]:
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX * 4)
    except OSError:  # more than 256 groups, or no such option: ask the user database
        try:
            return tuple(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
        except KeyError:
            return ()
    return struct.unpack(f"{len(data) // 4}I", data)


class Local:
    """A connection of the unix socket, as the gate knows it."""

    surface = "unix"

    def __init__(self, peer: Peer, *, allowed: bool) -> None:
        self._peer = peer
        self._allowed = allowed
        self.origin = f"pid {peer.pid}"
        self.who = peer.who

    async def identify(self, headers: Sequence[tuple[bytes, bytes]], needed: Scope) -> Peer:
        if not self._allowed:
            message, remedy = f"uid {self._peer.uid} may not use this agent", "ask an administrator to add the user to"
            raise AgentError("denied", message, remedy=f"{remedy} the socket's group")
        return self._peer


def protocol(
    policy: PeerPolicy, *, max_connections: int, stall_timeout: float, told: Callable[[str], None]
) -> type[H11Protocol]:
    """The class that uvicorn makes one of for each connection (its `http` setting). `told` hears why somebody was
    turned away."""

    places = Places(max_connections)
    full = Seldom(log, "refused connections: too many are open", setting="api.max_connections", most=max_connections)
    unknown = Seldom(log, "refused connections of a user who may not use this agent")
    seconds = stall_timeout

    class PeerProtocol(BoundedProtocol):
        stall_timeout = seconds

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._peer = peer_of(transport.get_extra_info("socket"))
            self._refused = not places.take(self._peer)
            if self._refused:
                # One who is turned away is heard first: a client that still sends when the door is closed sees a broken
                # pipe instead of the reason. How many may wait for that is bounded, too.
                told("local_connections")
                full(self._peer.who, uid=self._peer.uid, pid=self._peer.pid)
                if len(self.connections) > len(places) + max_connections:
                    self._turn_away()
                return
            allowed = policy.allows(self._peer)
            if not allowed:
                told("local_user")
                unknown(self._peer.who, uid=self._peer.uid, pid=self._peer.pid)
            self.app = Known(self.app, Local(self._peer, allowed=allowed))

        def data_received(self, data: bytes) -> None:
            if self._refused:
                self._turn_away()
            else:
                super().data_received(data)

        def connection_lost(self, exc: Exception | None) -> None:
            if not self._refused:
                places.leave(self._peer)
            super().connection_lost(exc)

        def _turn_away(self) -> None:
            self.transport.write(raw_answer("limit", "too many connections", field="api.max_connections"))
            self.transport.close()

    return PeerProtocol
