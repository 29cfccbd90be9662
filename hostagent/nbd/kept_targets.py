"""The targets of a group's members that are whole, and whose storage daemon died before the group was decided.

Such a member still completes, so nobody may write its target until it has its name. The lease that its chain had is
kept here, and shared from then on: the dead daemon's own locks are gone, and a shared lease is what QEMU respects.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from jobs.errors import JobError
from jobs.model import FileId

if TYPE_CHECKING:
    from hostagent.nbd.prepared import Lease, Leasing

log = logging.getLogger(__name__)


class KeptTargets:
    """By file. What blocks says so."""

    def __init__(self, leasing: Leasing) -> None:
        self._leasing = leasing
        self._kept: dict[FileId, tuple[int, Lease]] = {}

    def keep(self, file: FileId, fd: int, lease: Lease) -> None:
        """Take over the descriptor and the lease, until `release`; `share` it then."""
        self.release(file)
        self._kept[file] = (fd, lease)

    def share(self, file: FileId) -> None:
        """Keep QEMU's writers away. Blocking."""
        if (kept := self._kept.get(file)) is None:
            return
        try:
            kept[1].share(ours=())
        except JobError as error:  # somebody was quicker, or it ended meanwhile: our agents are kept away at least
            log.warning("a lease was lost", extra={"fields": {"file": str(file), "error": error.message}})

    def take(self, file: FileId, fd: int) -> None:
        """Lease it again after a restart; `fd` is ours to close. Blocking; raises JobError busy."""
        try:
            lease = self._leasing(fd, exclusive=False, ours=())
        except BaseException:
            os.close(fd)
            raise
        self.keep(file, fd, lease)

    def release(self, file: FileId) -> None:
        """Idempotent."""
        if (kept := self._kept.pop(file, None)) is not None:
            fd, lease = kept
            lease.release()
            os.close(fd)
