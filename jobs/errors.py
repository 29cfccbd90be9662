"""The one error of this package: a stable code, and what a person can do about it."""

from __future__ import annotations

from typing import Any


class JobError(Exception):
    """Something about a job that its user must know.

    `code` is one of the codes in hostagent.errors.CODES; `field` and `value` name what was wrong with the request,
    `remedy` says what to do, `details` is further data for programs (JSON types only).
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        remedy: str | None = None,
        field: str | None = None,
        value: object = None,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy
        self.field = field
        self.value = value
        self.details = details
