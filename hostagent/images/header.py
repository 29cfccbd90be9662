"""hostagent.qcow2 for those who speak of jobs: the same answers, and JobError in place of AgentError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hostagent import qcow2
from hostagent.errors import AgentError
from hostagent.qcow2 import MAGIC, READ_SIZE, SIZE_MAX, BitmapDirectory, Qcow2Header, is_plain, shown
from jobs.errors import JobError

__all__ = [
    "MAGIC",
    "READ_SIZE",
    "SIZE_MAX",
    "BitmapDirectory",
    "Qcow2Header",
    "is_empty",
    "is_plain",
    "read_backing",
    "read_header",
    "shown",
]


def read_header(fd: int) -> Qcow2Header | None:
    with _as_job_error():
        return qcow2.read_header(fd)


def read_backing(fd: int) -> str | None:
    with _as_job_error():
        return qcow2.read_backing(fd)


def is_empty(fd: int) -> bool:
    with _as_job_error():
        return qcow2.is_empty(fd)


@contextmanager
def _as_job_error() -> Iterator[None]:
    try:
        yield
    except AgentError as error:
        raise JobError(error.code, error.message, remedy=error.remedy, value=error.value) from error
