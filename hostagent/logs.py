"""One structured log line for each change of state.

`log.info("job completed", extra={"fields": {"job": id, "seconds": 1.2}})` is a line of text on a terminal and a JSON
object elsewhere, so that the journal can be searched by field. Messages and values may hold file names that a guest's
owner chose: control characters are escaped, and a line never becomes two.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from hostagent import calls

# qemu.qmp logs each lost connection as an ERROR with a traceback. A storage daemon that ends is a normal event here,
# and our own code says what it means.
_TOO_LOUD = {"qemu.qmp": logging.CRITICAL, "asyncio": logging.WARNING, "uvicorn": logging.WARNING}
_LONGEST_VALUE = 2000  # characters; a chain of 200 long names must not fill the journal


def setup(level: str, format: str, stream: TextIO) -> None:
    """Make the root logger write to `stream`. `format` is text, json, or auto: text on a terminal, json elsewhere."""
    text = format == "text" or (format == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name, least in _TOO_LOUD.items():
        logging.getLogger(name).setLevel(least)


class TextFormatter(logging.Formatter):
    """`12:00:01 INFO    job completed  job=… seconds=1.2  (hostagent.daemon)`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone()
        line = f"{time:%H:%M:%S} {record.levelname:<7} {escape(record.getMessage())}"
        words = [f"{key}={_word(value)}" for key, value in _fields(record).items()]
        if words:
            line = f"{line}  {' '.join(words)}"
        if record.levelno != logging.INFO:
            line = f"{line}  ({record.name})"
        if record.exc_info:
            line = f"{line}\n{self._traceback(record)}"
        return line

    def _traceback(self, record: logging.LogRecord) -> str:
        text = self.formatException(record.exc_info) if record.exc_info else ""
        return "\n".join(f"    {escape(line)}" for line in text.split("\n"))


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, then the fields. A field cannot replace one of the four."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_LONGEST_VALUE],
        }
        for key, value in _fields(record).items():
            entry.setdefault(key, value if isinstance(value, int | float | None) else _clip(value))
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def escape(text: str) -> str:
    """`text` on one line and without anything that a terminal obeys: control characters become `\\x1b` and the like."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    given = getattr(record, "fields", None)
    fields: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    call = calls.present()
    return {**fields, "request": call.id} if call else fields


def _clip(value: object) -> object:
    if isinstance(value, str):
        return value[:_LONGEST_VALUE]
    if isinstance(value, list | tuple):
        return [_clip(item) for item in value[:100]]
    if isinstance(value, Mapping):
        return {str(key): _clip(item) for key, item in list(value.items())[:100]}
    return value if isinstance(value, int | float | None) else str(value)[:_LONGEST_VALUE]


def _word(value: object) -> str:
    text = escape(str(value))[:_LONGEST_VALUE]
    return text if text and " " not in text and '"' not in text else json.dumps(text, ensure_ascii=False)
