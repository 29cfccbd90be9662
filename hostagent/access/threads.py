"""Work on files in threads, within a time, and never two works on one file at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hostagent.looks import Late, Looks
from jobs.errors import JobError
from jobs.model import FileId

T = TypeVar("T")


class Threads:
    """`timeout` is access.converge_timeout, in seconds."""

    def __init__(self, timeout: float) -> None:
        self._looks = Looks(timeout)

    async def run(self, file: FileId, work: Callable[[], T]) -> T:
        """The work's result. While work that came late still hangs, no other is begun: it could undo, when it comes
        through, what was given in the meantime.

        JobError timeout, or io_error; FileNotFoundError as it comes.
        """
        try:
            return await self._looks.look(file, work, place=file.dev)
        except Late as late:
            message = f"access could not be changed within {self._looks.timeout:g} s (access.converge_timeout): {late}"
            raise JobError("timeout", message, remedy="see whether the file's storage hangs") from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise JobError("io_error", f"access could not be changed: {error}", remedy="look at the storage") from error
