"""Leases on network images, by what their URIs lead to: NBD has no locks, so these are this agent's own.

They keep a writable export and whoever else uses the same URI here apart: exports, and copies into it. They know
nothing of other hosts and programs; who may write the image is for its server to say. They go with the process, and are
taken again at start, before anybody can ask for one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from jobs.errors import JobError
from jobs.model import FileId, Layer


class UriLease:
    """One of them; like access.leases.Lease to who has it. Thread-safe, and waits for nothing."""

    def __init__(self, leases: UriLeases, layer: Layer, *, exclusive: bool, holder: str = "") -> None:
        """Made by `UriLeases.take`."""
        self._leases = leases
        self.layer = layer
        self.holder = holder
        self.is_exclusive = exclusive

    def exclude(self, *, ours: Sequence[int]) -> None:
        with self._leases.guard:
            self._leases.refuse(self.layer, exclusive=True, besides=self)
            self.is_exclusive = True

    def share(self, *, ours: Sequence[int]) -> None:
        self.is_exclusive = False

    def release(self) -> None:
        """Idempotent."""
        self._leases.forget(self)


class UriLeases:
    def __init__(self, users: Callable[[FileId], list[str]]) -> None:
        """`users` are who uses the image, for people, beside those that a lease names as its holder."""
        self._users = users
        self.guard = threading.RLock()
        self._held: dict[FileId, list[UriLease]] = {}

    def take(self, layer: Layer, *, exclusive: bool, holder: str = "") -> UriLease:
        """A lease, or a JobError busy."""
        with self.guard:
            self.refuse(layer, exclusive=exclusive)
            lease = UriLease(self, layer, exclusive=exclusive, holder=holder)
            self._held.setdefault(layer.file, []).append(lease)
            return lease

    def refuse(self, layer: Layer, *, exclusive: bool, besides: UriLease | None = None) -> None:
        """Raise busy when such a lease cannot be had."""
        with self.guard:
            others = [lease for lease in self._held.get(layer.file, ()) if lease is not besides]
        if any(exclusive or lease.is_exclusive for lease in others):
            written = any(lease.is_exclusive for lease in others)
            users = sorted({*self._users(layer.file), *(lease.holder for lease in others if lease.holder)})
            raise JobError(
                "busy",
                f"{layer.path!r} is being {'written' if written else 'read'} by {', '.join(users) or 'somebody here'}",
                field="path",
                value=layer.path,
                remedy="wait until that has ended, or end it: see `hostagent export list` and `hostagent job list`",
                holders=users,
            )

    def forget(self, lease: UriLease) -> None:
        with self.guard:
            held = self._held.get(lease.layer.file, [])
            if lease in held:
                held.remove(lease)
            if not held:
                self._held.pop(lease.layer.file, None)
