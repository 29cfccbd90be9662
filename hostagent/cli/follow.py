"""Following one job to its end, over restarts of the agent.

The agent answers a long poll when the job changes. A bar needs more than that, so it asks again every half second. An
agent that is away is waited for (`patient`): its jobs run in their storage daemons, so a follower never aborts a job
because it lost the agent.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Protocol

from hostagent import config, config_text
from hostagent.cli.client import RETRY_PAUSE, Client, CliError, Json, patient, quoted
from hostagent.errors import AgentError

TERMINAL = frozenset({"completed", "failed", "aborted"})
LONG_POLL = 30.0  # seconds of one question when nobody watches a bar; the agent allows up to a minute
STEP_POLL = 0.5  # seconds, where `next` was already said and another client may be the one that steps
ABORT_WAIT = 60.0  # seconds; twice jobs.abort_timeout, after which the agent says what hangs


class Display(Protocol):
    interval: float  # seconds between two readings that it wants

    def update(self, job: Json) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """`deadline` is of time.monotonic(), None is no limit. `advance` says `next` whenever an increment is done;
    `ready` is satisfied with a job that is ready and waits for its end to be asked for."""

    deadline: float | None = None
    advance: bool = False
    ready: bool = False


class TimeIsUp(Exception):
    """The follower's time is up; the job goes on."""

    def __init__(self, job: Json) -> None:
        super().__init__("time is up")
        self.job = job


def to_the_end(client: Client, job: Json, display: Display, limits: Limits) -> Json:
    """The job when it is terminal and its revocation is through, or a little later if that is still pending."""
    job = _until_terminal(client, job, display, limits)
    return until_revoked(client, job, display)


def abort_to_the_end(client: Client, job: Json, display: Display) -> Json:
    """Ask for the abort, and wait until the agent has proven how the job ended: it may have completed just before."""
    address = address_of(job)
    try:
        job = patient(lambda: client.post(f"{address}/abort"))
    except CliError as error:
        if error.code not in ("conflict", "busy"):
            raise
        job = patient(lambda: client.get(address).data)  # too late to abort: it has its outcome
    return to_the_end(client, job, display, Limits(deadline=time.monotonic() + ABORT_WAIT))


def address_of(job: Json) -> str:
    return f"/v1/jobs/{quoted(job['id'])}"


def _until_terminal(client: Client, job: Json, display: Display, limits: Limits) -> Json:
    display.update(job)
    while job["state"] not in TERMINAL and not (limits.ready and _waits_for_its_end(job)):
        if limits.deadline is not None and time.monotonic() >= limits.deadline:
            raise TimeIsUp(job)
        before = job
        if limits.advance and job["state"] == "waiting":
            job = _next_increment(client, job)
        if job["state"] not in TERMINAL and job.get("revision") == before.get("revision"):
            job = next_reading(client, job, display, limits)
        display.update(job)
    return job


def _waits_for_its_end(job: Json) -> bool:
    return bool(job["state"] == "ready" and not job.get("completion"))


def _next_increment(client: Client, job: Json) -> Json:
    """One increment more. The cursor makes it safe to ask twice, and harmless if another client asked before."""
    try:
        return patient(lambda: client.post(f"{address_of(job)}/next", {"cursor": job["cursor"]["cur"]}))
    except CliError as error:
        if error.code != "conflict":
            raise
        return job


def _next_reading(client: Client, job: Json, wait: float) -> Json:
    asked = time.monotonic()
    found = patient(lambda: client.changed(address_of(job), revision=job.get("revision"), wait=wait))
    if found.get("revision") == job.get("revision") and time.monotonic() - asked < wait / 2:
        time.sleep(min(RETRY_PAUSE, wait))  # an agent that is stopping answers at once; do not press it
    return found


def next_reading(client: Client, job: Json, display: Display, limits: Limits) -> Json:
    """The job when it has changed, or the display's interval or the time is over."""
    return _next_reading(client, job, _wait(display, limits, job))


def _wait(display: Display, limits: Limits, job: Json) -> float:
    wait = display.interval
    if limits.advance and job["state"] == "waiting":
        wait = min(wait, STEP_POLL)
    if limits.deadline is not None:
        wait = min(wait, limits.deadline - time.monotonic())
    return max(wait, 0.05)


def revocation_wait() -> float:
    """Seconds after the end of a job: access.wait, as this user's settings say."""
    try:
        return config_text.load(file=config_text.default_file(os.environ)).access.wait
    except AgentError:
        return config.Access().wait  # what is wrong with the settings is the agent's to tell


def until_revoked(client: Client, job: Json, display: Display) -> Json:
    end = time.monotonic() + revocation_wait()
    while job.get("revocation") == "pending" and (left := end - time.monotonic()) > 0:
        job = _next_reading(client, job, max(left, 0.05))
        display.update(job)
    return job
