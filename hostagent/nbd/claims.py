"""What a writable export needs: its top for itself, and proof that nobody stands on it.

QEMU's locks stop other writers, but not a reader who does not lock, and not an overlay that is closed now and would
read other data tomorrow. So everybody is asked before the first byte can be written: the ledger (exports, jobs, and
images that an ended job left on the file), jobs that wait and have nothing open, the leases, the processes that have
the file open, and the header of every image that could name it. The lease is taken before the last two, so that nobody
can come in between unseen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from hostagent.nbd.operations import Search, refuse_dependents
from hostagent.nbd.prepared import PreparedChain
from hostagent.nbd.uri import file_of, is_uri
from hostagent.records import AccessRow
from jobs.errors import JobError
from jobs.model import FileId, Holder, Job, Layer

LOOKS, PAUSE = 3, 0.1
"""A process counts when it has the file open at each of some looks: a child of ours that is just being started, or the
one that tries accesses, may have it for a moment."""


class Rows(Protocol):
    """The access ledger."""

    async def rows(self, file: FileId) -> list[AccessRow]: ...


class Claims:
    """`openers` are the processes that have a file open, other than this one (blocking); `jobs` those not ended."""

    def __init__(
        self, ledger: Rows, search: Search, *, openers: Callable[[FileId], list[str]], jobs: Callable[[], list[Job]]
    ) -> None:
        self._ledger = ledger
        self._search = search
        self._openers = openers
        self._jobs = jobs

    async def claim(self, holder: Holder, chain: PreparedChain) -> None:
        """Take the top's exclusive lease for `holder`; a JobError busy that names who is in the way."""
        top = chain.layers[0]
        if top.file.network:  # NBD has no locks, and no header names it: there is nobody else to ask
            await chain.lease(exclusive=(top.file,))
            self._refuse(top, [str(job.holder) for job in self._jobs() if _goes_to(job, top.file)])
            return
        self._refuse(top, [str(user) for user in chain.users if user != holder])
        await self._refuse_needs(holder, top)
        await chain.lease(exclusive=(top.file,))
        self._refuse(top, await self._processes(top.file))
        members, folder = [layer.file for layer in chain.layers], Path(top.path).parent
        await refuse_dependents(self._search, [top], folders=[folder], skip=members, field="image")

    async def _refuse_needs(self, holder: Holder, top: Layer) -> None:
        jobs = [job.holder for job in self._jobs() if top.file in _files(job)]
        needs = [row.holder for row in await self._ledger.rows(top.file) if row.holder != holder]
        others = {*jobs, *needs} - {Holder("image", top.path)}
        self._refuse(top, sorted(str(other) for other in others))

    async def _processes(self, file: FileId) -> list[str]:
        found = await asyncio.to_thread(self._openers, file)
        for _ in range(LOOKS - 1):
            if not found:
                break
            await asyncio.sleep(PAUSE)
            again = await asyncio.to_thread(self._openers, file)
            found = [process for process in found if process in again]
        return found

    def _refuse(self, top: Layer, others: Sequence[str]) -> None:
        if not others:
            return
        raise JobError(
            "busy",
            f"{top.path!r} is in use by {', '.join(others[:8])}: a writable export needs it for itself",
            field="image",
            value=top.path,
            remedy="end them first, or export it read-only",
            holders=list(others[:8]),
        )


def _goes_to(job: Job, file: FileId) -> bool:
    return job.target is not None and is_uri(job.target.path) and file_of(job.target.path) == file


def _files(job: Job) -> set[FileId]:
    """All files that a job works with, open now or not."""
    files = {layer.file for layer in (*job.before.layers, *job.after.layers)}
    return files | {job.target.file} if job.target and job.target.file else files
