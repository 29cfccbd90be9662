"""One table maps an error code to HTTP, to D-Bus, and to the command line's exit status. Nothing else decides these."""

from __future__ import annotations

from typing import Any, NamedTuple

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_JOB_FAILED = 0, 1, 2, 3, 4
EXIT_TIMEOUT, EXIT_BUSY, EXIT_DENIED, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 5, 6, 7, 8, 130


class Code(NamedTuple):
    http: int
    exit: int
    title: str


CODES: dict[str, Code] = {
    "invalid": Code(400, EXIT_USAGE, "The request is not valid"),
    "too_large": Code(413, EXIT_USAGE, "The request is too large"),
    "unauthenticated": Code(401, EXIT_DENIED, "Nobody that is known here"),
    "denied": Code(403, EXIT_DENIED, "Not allowed"),
    "not_found": Code(404, EXIT_NOT_FOUND, "No such object"),
    "busy": Code(409, EXIT_BUSY, "Something else uses it"),
    "conflict": Code(409, EXIT_BUSY, "The request does not fit the present state"),
    "image_changed": Code(409, EXIT_BUSY, "The image is not what it was"),
    "outside_pools": Code(422, EXIT_DENIED, "A chain member lies where it may not"),
    "image_invalid": Code(422, EXIT_ERROR, "The image cannot be used"),
    "image_corrupt": Code(422, EXIT_ERROR, "The image is damaged"),
    "chain_too_deep": Code(422, EXIT_ERROR, "The backing chain is too long"),
    "chain_loop": Code(422, EXIT_ERROR, "The backing chain leads back to itself"),
    "access_refused": Code(422, EXIT_DENIED, "Access cannot be given safely"),
    "range": Code(416, EXIT_USAGE, "Beyond the end of the image"),
    "limit": Code(429, EXIT_BUSY, "A configured limit is reached"),
    "internal": Code(500, EXIT_ERROR, "A fault of the agent"),
    "io_error": Code(500, EXIT_ERROR, "Reading or writing failed"),
    "not_supported": Code(501, EXIT_ERROR, "Not supported yet"),
    "unavailable": Code(503, EXIT_ERROR, "Not available now"),
    "draining": Code(503, EXIT_BUSY, "The host takes no new work"),
    "unresponsive": Code(503, EXIT_ERROR, "A storage daemon or a guest does not answer"),
    "guest_stopped": Code(503, EXIT_ERROR, "The guest ended"),
    "storage_daemon_died": Code(503, EXIT_ERROR, "The storage daemon ended"),
    "timeout": Code(504, EXIT_TIMEOUT, "It took too long"),
    "no_space": Code(507, EXIT_ERROR, "No space left"),
    "store_full": Code(507, EXIT_ERROR, "The agent's store cannot be written"),
    "cancelled": Code(409, EXIT_JOB_FAILED, "The job was cancelled"),
    "unproven": Code(500, EXIT_JOB_FAILED, "The outcome could not be proven"),
    "job_failed": Code(500, EXIT_JOB_FAILED, "The job failed"),
    "mismatch": Code(409, EXIT_JOB_FAILED, "The images differ"),
    "pivot_refused": Code(500, EXIT_JOB_FAILED, "The disk did not go over to its copy"),
    "group_failed": Code(409, EXIT_JOB_FAILED, "Another job of the group failed"),
    "unreachable": Code(503, EXIT_UNREACHABLE, "The agent cannot be reached"),
}


def bus_name(code: str) -> str:
    """The error on D-Bus: no_space is org.hostagent1.Error.NoSpace."""
    known = code if code in CODES else "internal"
    return "org.hostagent1.Error." + "".join(part.capitalize() for part in known.split("_"))


class AgentError(Exception):
    """As jobs.errors.JobError, for code that must not know of jobs: the same attributes, the same table."""

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
