"""Work on files in threads, within a time, and never two works on one file at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from jobs.errors import JobError
from jobs.model import FileId

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_LATE = 4
"""Works on one file system that have not returned: each keeps one of the agent's threads."""


class Threads:
    """`timeout` is access.converge_timeout, in seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._late: set[FileId] = set()

    async def run(self, file: FileId, work: Callable[[], T]) -> T:
        """The work's result. While work that came late still hangs, no other is begun: it could undo, when it comes
        through, what was given in the meantime.

        JobError timeout, or io_error; FileNotFoundError as it comes.
        """
        if file in self._late:
            raise JobError("timeout", "an earlier change of the file's access still hangs", remedy="see its storage")
        if sum(late.dev == file.dev for late in self._late) >= MOST_LATE:
            raise JobError("timeout", "its storage hangs, with other files of it", remedy="see that storage")
        future = asyncio.get_running_loop().run_in_executor(None, work)
        try:
            return await asyncio.wait_for(asyncio.shield(future), self._timeout)
        except (TimeoutError, asyncio.CancelledError) as error:
            if not future.done():
                self._late.add(file)
                future.add_done_callback(lambda done: self._came_late(file, done))
            if isinstance(error, asyncio.CancelledError):
                raise
            raise JobError(
                "timeout",
                f"access could not be changed within {self._timeout:g} s (access.converge_timeout)",
                remedy="see whether the file's storage hangs",
            ) from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise JobError("io_error", f"access could not be changed: {error}", remedy="look at the storage") from error

    def _came_late(self, file: FileId, work: asyncio.Future[Any]) -> None:
        self._late.discard(file)
        if not work.cancelled() and (error := work.exception()) is not None:
            log.warning("a late change of access failed", extra={"fields": {"error": str(error)}})
