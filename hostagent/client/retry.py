"""How long what failed is tried again: with pauses that grow, until nothing has moved for too long."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from hostagent.client.options import Patience
from hostagent.client.trouble import Retry
from hostagent.errors import AgentError
from hostagent.sizes import format_duration


class Retries:
    """One caller's. `limit`: seconds without progress; `told` hears why it waits."""

    def __init__(
        self,
        patience: Patience,
        *,
        limit: float | None = None,
        stop: threading.Event | None = None,
        told: Callable[[str], None] | None = None,
    ) -> None:
        self._patience = patience
        self._limit = patience.retry_for if limit is None else limit
        self._stop = stop or threading.Event()
        self._told = told or (lambda _: None)
        self._failures = 0
        self._since = time.monotonic()

    def progress(self) -> None:
        """Something was done: what failed before counts no more."""
        self._failures = 0
        self._since = time.monotonic()

    def wait(self, error: AgentError) -> None:
        """Until the next try. Raises the error when there shall be none."""
        if not isinstance(error, Retry) or self._stop.is_set():
            raise error
        if self._failures == 0:
            self._since = time.monotonic()
        self._failures += 1
        pause = self._patience.retry_wait * 2 ** min(self._failures - 1, 20) * random.uniform(0.75, 1.25)  # noqa: S311
        pause = max(min(pause, self._patience.retry_wait_max), min(error.after, self._patience.retry_wait_max))
        left = self._since + self._limit - time.monotonic()
        if left <= 0:
            raise AgentError(
                error.code,
                f"{error.message}; given up after {self._failures} tries in {format_duration(self._limit)}",
                remedy=error.remedy,
            ) from error
        if self._failures == 1:
            self._told(f"{error.message}; trying again")
        self._stop.wait(min(pause, left))
