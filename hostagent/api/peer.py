"""Who calls, and what that may do: a process on this host, as the kernel knows the other end of a unix socket (unix(7),
SO_PEERCRED), or somebody who came by TCP and showed a token or a certificate."""

from __future__ import annotations

import os
from collections import Counter
from typing import NamedTuple

from hostagent.tokens import Scope

_NO_ID = 2**32 - 1


class Remote(NamedTuple):
    """Somebody at the other end of a TCP connection. `name` is `token NAME` or `certificate KIND:NAME`, and empty where
    none was shown; `address` is where from."""

    name: str
    scope: Scope
    address: str


class Peer(NamedTuple):
    """A connected process, as the kernel knew it when it connected; or who is `remote`."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    remote: Remote | None = None

    @property
    def owner(self) -> bool:
        """Whether the host is theirs: root, the user that we run as, or who has the scope admin."""
        return self.remote.scope is Scope.ADMIN if self.remote else self.uid in (0, os.geteuid())

    @property
    def scope(self) -> Scope:
        """What they may do. Whoever may use the unix socket may operate."""
        if self.remote:
            return self.remote.scope
        return Scope.ADMIN if self.owner else Scope.OPERATE if self.uid != _NO_ID else Scope.NONE

    @property
    def who(self) -> str:
        if self.remote:
            return self.remote.name or "nobody"
        return f"uid {self.uid}" if self.uid != _NO_ID else "nobody"

    @property
    def place(self) -> str:
        """Whom they share a limit with."""
        return "remote" if self.remote else "owner" if self.owner else "other"


NOBODY = Peer(pid=0, uid=_NO_ID, gid=_NO_ID)


def from_afar(remote: Remote) -> Peer:
    return NOBODY._replace(remote=remote)


class Places:
    """`most` for owners, as many for all others of this host, and as many for who comes by TCP: these can take up
    theirs, and keep no owner out."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(self._taken.values())

    def take(self, peer: Peer) -> bool:
        """False when there is none left."""
        free = self._taken[peer.place] < self._most
        self._taken[peer.place] += free
        return free

    def leave(self, peer: Peer) -> None:
        self._taken[peer.place] -= 1
