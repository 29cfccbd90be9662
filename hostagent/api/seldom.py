"""Warnings of what may come in floods: a line for each of whom it is said and second, with how often it was."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

INTERVAL = 1.0  # seconds


class Seldom:
    """For the event loop's thread."""

    def __init__(self, log: logging.Logger, message: str, **fields: object) -> None:
        self._log = log
        self._message = message
        self._fields = fields
        self._of: dict[str, tuple[int, Mapping[str, object]]] = {}

    def __call__(self, whose: str, **fields: object) -> None:
        """`fields` are of the last time."""
        if not self._of:
            asyncio.get_running_loop().call_later(INTERVAL, self._tell)
        times, _ = self._of.get(whose, (0, {}))
        self._of[whose] = times + 1, fields

    def _tell(self) -> None:
        found, self._of = self._of, {}
        for times, fields in found.values():
            self._log.warning(self._message, extra={"fields": {**fields, **self._fields, "times": times}})
