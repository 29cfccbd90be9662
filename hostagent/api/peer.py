"""Who calls: what the kernel says of the other end of a unix socket (unix(7), SO_PEERCRED)."""

from __future__ import annotations

import os
from typing import NamedTuple


class Peer(NamedTuple):
    """A connected process, as the kernel knew it when it connected."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @property
    def owner(self) -> bool:
        """Whether the host is theirs: root, or the user that we run as."""
        return self.uid in (0, os.geteuid())


NOBODY = Peer(pid=0, uid=2**32 - 1, gid=2**32 - 1)


class Places:
    """`most` for owners, and as many for all others: these can take up theirs, and keep no owner out."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = {True: 0, False: 0}

    def __len__(self) -> int:
        return sum(self._taken.values())

    def take(self, peer: Peer) -> bool:
        """False when there is none left."""
        free = self._taken[peer.owner] < self._most
        self._taken[peer.owner] += free
        return free

    def leave(self, peer: Peer) -> None:
        self._taken[peer.owner] -= 1
