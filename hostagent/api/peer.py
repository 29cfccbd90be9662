"""Who calls: what the kernel says of the other end of a unix socket (unix(7), SO_PEERCRED)."""

from __future__ import annotations

from typing import NamedTuple


class Peer(NamedTuple):
    """A connected process, as the kernel knew it when it connected."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


NOBODY = Peer(pid=0, uid=2**32 - 1, gid=2**32 - 1)
