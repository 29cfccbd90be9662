"""How a followed job is shown: a bar for people, one JSON object a line for programs, or nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from hostagent.cli.client import Json
from hostagent.cli.follow import LONG_POLL, Display
from hostagent.cli.terminal import STYLES, Terminal
from hostagent.logs import escape
from hostagent.sizes import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from rich.progress import Progress

STALL_SHOWN = 5.0  # seconds; a shorter pause is nothing to tell a person
READING = 0.5  # seconds between two readings that are shown; the agent itself reads the cursor that often


@contextmanager
def shown(how: str, terminal: Terminal) -> Iterator[Display]:
    """The display for `--progress=how`: auto is a bar if stderr is a terminal, else nothing."""
    if how == "json":
        yield Lines(sys.stderr if terminal.json else sys.stdout)
    elif how == "auto" and sys.stderr.isatty():
        with _bar(terminal) as bar:
            yield bar
    else:
        yield Silence()


class Silence:
    interval = LONG_POLL

    def update(self, job: Json) -> None:
        pass


class Lines:
    """One object a line, each time that the state, the cursor or the revocation changed."""

    interval = READING

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last: Json = {}

    def update(self, job: Json) -> None:
        change: Json = {key: job[key] for key in ("state", "cursor", "revocation") if key in job}
        if change != self._last:
            keys = ("id", "operation", "state", "cursor", "rate", "eta", "stalled_seconds", "revocation")
            print(json.dumps({key: job[key] for key in keys if key in job}), file=self._stream, flush=True)
            self._last = change


class Bar:
    interval = READING

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, start=True, percent="", amount="", speed="", state="", style="")

    def update(self, job: Json) -> None:
        cursor = job["cursor"]
        self._progress.update(
            self._task,
            description=escape(f"{job['operation']} {_tail(str(job['target']))}"),
            total=cursor["end"] or None,
            completed=cursor["cur"],
            percent=percent(job),
            amount=f"{format_size(cursor['cur'])} / {format_size(cursor['end'])}" if cursor["end"] else "",
            speed=speed(job),
            state=job["state"],
            style=STYLES.get(job["state"], ""),
        )


@contextmanager
def _bar(terminal: Terminal) -> Iterator[Bar]:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[percent]}", markup=False),
        TextColumn("{task.fields[amount]}", markup=False, style="dim"),
        TextColumn("{task.fields[speed]}", markup=False),
        TextColumn("{task.fields[state]}", markup=False, style="bold"),
    )
    with Progress(*columns, console=terminal.progress_console(), expand=True, transient=True) as progress:
        yield Bar(progress)


def percent(job: Json) -> str:
    """Whole percent, rounded down: 100 % is not said before all is there."""
    cursor = job.get("cursor") or {}
    end = cursor.get("end") or 0
    return f"{cursor.get('cur', 0) * 100 // end} %" if end else ""


def speed(job: Json) -> str:
    """`120 MiB/s, 35 s left`, or that it stands still."""
    stalled = job.get("stalled_seconds") or 0
    if stalled >= STALL_SHOWN:
        return f"no progress for {format_duration(stalled)}"
    if job.get("state") not in ("running", "ready") or job.get("rate") is None:
        return ""
    eta = job.get("eta")
    return format_rate(job["rate"]) + (f", {format_duration(eta)} left" if eta is not None else "")


def _tail(text: str, width: int = 40) -> str:
    return text if len(text) <= width else f"…{text[-width + 1 :]}"
