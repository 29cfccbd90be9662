"""Who is at the other end of the unix socket, and whether that may talk to us at all.

The kernel's answer (SO_PEERCRED, SO_PEERGROUPS) is read once for each connection and put into the ASGI scope, so that
no handler can forget to look at it and no client can say anything about it. A peer that the policy does not allow gets
403 for every request. The file mode of the socket says the same; this is the second lock, and it still holds when
somebody opens the mode up.

The protocol also bounds what uvicorn leaves open: the number of connections, the time that a client may take for the
head of a request, and the time that it may leave an answer unread.
"""

from __future__ import annotations

import asyncio
import grp
import json
import logging
import os
import pwd
import socket
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hostagent.api import problem
from hostagent.api.peer import NOBODY, Peer, Places

log = logging.getLogger(__name__)

SCOPE_KEY = "hostagent.peer"

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


class Guarded:
    """The application as one connection sees it: it tells who the peer is, or refuses the peer."""

    def __init__(self, app: ASGIApp, peer: Peer, *, allowed: bool) -> None:
        self._app = app
        self._peer = peer
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._allowed:
            scope[SCOPE_KEY] = self._peer
            await self._app(scope, receive, send)
            return
        answer = problem.answer(
            "denied",
            f"uid {self._peer.uid} may not use this agent",
            remedy="ask an administrator to add the user to the socket's group",
        )
        await answer(scope, receive, send)


class Deadline:
    """Does one thing when it was started and not stopped in time. Starting it again does not move it."""

    def __init__(self, seconds: float, act: Callable[[], None]) -> None:
        self._seconds = seconds
        self._act = act
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._act)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def protocol(policy: PeerPolicy, *, max_connections: int, stall_timeout: float) -> type[H11Protocol]:
    """The class that uvicorn makes one of for each connection (its `http` setting)."""

    places = Places(max_connections)

    class PeerProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self._head = Deadline(stall_timeout, transport.abort)
            self._unread = Deadline(stall_timeout, transport.abort)
            super().connection_made(transport)
            self._peer = peer_of(transport.get_extra_info("socket"))
            self._refused = not places.take(self._peer)
            if self._refused:
                # One who is turned away is heard first: a client that still sends when the door is closed sees a broken
                # pipe instead of the reason. How many may wait for that is bounded, too.
                log.warning("refused a connection: %d are open (api.max_connections)", max_connections)
                self._head.start()
                if len(self.connections) > len(places) + max_connections:
                    self._turn_away()
                return
            allowed = policy.allows(self._peer)
            if not allowed:
                log.warning("refused a connection of pid %d, uid %d", self._peer.pid, self._peer.uid)
            self.app = Guarded(self.app, self._peer, allowed=allowed)
            self._head.start()

        def data_received(self, data: bytes) -> None:
            if self._refused:
                self._turn_away()
                return
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._head.start()
            else:  # the head of a request is complete
                self._head.stop()

        def connection_lost(self, exc: Exception | None) -> None:
            if not self._refused:
                places.leave(self._peer)
            self._head.stop()
            self._unread.stop()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread.start()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unread.stop()

        def send_400_response(self, msg: str) -> None:
            self.transport.write(_raw_answer("invalid", "that was not an HTTP request", field=None))
            self.transport.close()

        def _turn_away(self) -> None:
            self.transport.write(_raw_answer("limit", "too many connections", field="api.max_connections"))
            self.transport.close()

    return PeerProtocol


def _raw_answer(code: str, message: str, *, field: str | None) -> bytes:
    """An answer for a connection that never reaches the application."""
    status, body = problem.describe(code, message, field=field, remedy="try again later" if code == "limit" else None)
    content = json.dumps(body).encode()
    head = (
        f"HTTP/1.1 {status} {body['title']}\r\ncontent-type: {problem.MEDIA_TYPE}\r\n"
        f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + content
