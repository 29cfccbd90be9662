"""The audit: who did what, to what, from where, and how it ended; a JSON object a line, appended and never changed.

A line is written when its call has ended, by a thread of its own: a disk that is slow or full keeps no call waiting and
changes no outcome. What could not be written is counted, and told in the log. Calls that changed nothing have lines as
far as refusals.py lets them, and short ones. The file is bounded: past its size it becomes FILE.1, and so on; whoever
moves it himself (logrotate) sends SIGHUP.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from hostagent import calls, refusals

log = logging.getLogger(__name__)

_LONGEST_VALUE = 4096  # characters; a path has no more
_LONGEST_LIST = 100
_LONGEST_ID = 64  # characters; ours have 36, and what is longer can be none
_BRIEF = 256  # characters of a value of what was refused
_BRIEF_LIST = 4
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Settings:
    """Named as in [audit]."""

    file: Path
    size: int
    keep: int
    queue: int
    refusals: int


class Audit:
    """`lost` hears of each line that could not be written, on any thread."""

    def __init__(self, settings: Settings, lost: Callable[[], None]) -> None:
        self._settings = settings
        self._lost = lost
        self._lines: queue.Queue[bytes | None] = queue.Queue(settings.queue)
        self._refusals = refusals.Refusals(settings.refusals)
        self._reopen = threading.Event()
        self._failing = False
        self._fd: int | None = None
        self._size = 0
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def tell(self, what: str, result: str, *, call: calls.Call | None = None, **details: object) -> None:
        """Of a call, or else of the present one. Waits for nothing."""
        call = call or calls.present()
        refused = result in refusals.CODES or details.get("new") is False  # asked for again
        if refused and not self._refusals.whole(call, what, result):
            return
        bounds = (_BRIEF, _BRIEF_LIST) if refused else (_LONGEST_VALUE, _LONGEST_LIST)
        found = {name: shown(value, *bounds) for name, value in details.items() if value is not None}
        if "id" in found:
            found["id"] = str(found["id"])[:_LONGEST_ID]
        try:
            self._lines.put_nowait(_line(call or calls.Call(""), what, result, found))
        except queue.Full:
            self._fail("api calls come faster than the audit is written (audit.queue)", 1)

    def reopen(self) -> None:
        """The file was moved: write to a new one from now on."""
        self._reopen.set()

    def close(self, timeout: float) -> None:
        """Write what there is, for at most `timeout` seconds."""
        try:
            self._lines.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _run(self) -> None:
        ending = False
        while not ending:
            batch = self._batch()
            ending = None in batch
            lines = [line for line in batch if line is not None]
            lines += [_summary(beyond) for beyond in self._refusals.over(now=ending)]
            if not lines:
                continue
            try:
                self._write(lines)
                self._failing = False
            except OSError as error:
                self._close_file()
                self._fail(f"{self._settings.file}: {error.strerror}", len(lines))
        self._close_file()

    def _batch(self) -> list[bytes | None]:
        """What waits to be written; nothing when a minute of refusals is over."""
        try:
            batch = [self._lines.get(timeout=self._refusals.left())]
        except queue.Empty:
            return []
        while len(batch) < _BATCH and not self._lines.empty():
            batch.append(self._lines.get_nowait())
        return batch

    def _write(self, lines: list[bytes]) -> None:
        if self._reopen.is_set():
            self._reopen.clear()
            self._close_file()
        text = b"".join(lines)
        if self._fd is not None and self._size + len(text) > self._settings.size:
            self._close_file()
            self._rotate()
        if self._fd is None:
            self._open()
        assert self._fd is not None
        while text:
            written = os.write(self._fd, text)
            self._size += written
            text = text[written:]

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        fd = os.open(self._settings.file, flags, 0o600)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise OSError(0, "it is no file")
        self._fd, self._size = fd, found.st_size

    def _rotate(self) -> None:
        file, keep = self._settings.file, self._settings.keep
        for number in range(keep, 0, -1):
            newer = file.with_name(f"{file.name}.{number - 1}") if number > 1 else file
            if newer.exists():
                newer.replace(file.with_name(f"{file.name}.{number}"))
        if not keep:
            file.unlink(missing_ok=True)

    def _close_file(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None

    def _fail(self, why: str, lines: int) -> None:
        for _ in range(lines):
            self._lost()
        if not self._failing:
            self._failing = True
            remedy = "make space there, or set audit.file"
            log.error("the audit cannot be written", extra={"fields": {"error": why, "lost": lines, "remedy": remedy}})


def _line(call: calls.Call, what: str, result: str, details: Mapping[str, object]) -> bytes:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request": call.id,
        "who": call.who,
        "surface": call.surface,
        "from": call.origin,
        "what": what,
        **details,
        "result": result,
    }
    return json.dumps(line).encode() + b"\n"


def _summary(beyond: refusals.Beyond) -> bytes:
    """Of what one caller had no lines for."""
    call = calls.Call("", beyond.surface, beyond.who, beyond.origin)
    return _line(call, "refused calls", "limit", {"times": beyond.calls.total(), "calls": beyond.calls})


def shown(value: object, longest: int = _LONGEST_VALUE, most: int = _LONGEST_LIST) -> object:
    """A value without what may be a secret: of a URI only its server and path. A text has at most `longest` characters,
    a list `most` items."""
    if isinstance(value, str):
        return _without_secrets(value)[:longest]
    if isinstance(value, list | tuple):
        return [shown(item, longest, most) for item in value[:most]]
    if isinstance(value, Mapping):
        return {str(key): shown(item, longest, most) for key, item in list(value.items())[:_LONGEST_LIST]}
    return value if isinstance(value, int | float | None) else str(value)[:longest]


def _without_secrets(text: str) -> str:
    if "://" not in text:
        return text
    try:
        parts = urlsplit(text)
    except ValueError:  # it is no URI, and may have a secret all the same
        return text.partition("://")[0] + "://"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
