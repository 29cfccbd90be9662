"""Sizes, rates and durations as people write and read them.

`K M G T P` and `KiB MiB …` are powers of 1024, `KB MB …` powers of 1000, as QEMU's and coreutils' users expect. A rate
needs its unit: virsh takes a bare number as MiB/s, others as bytes/s, and a job that is a million times too slow looks
like one that hangs. Inside the program there are only bytes, bytes per second and seconds.
"""

from __future__ import annotations

import re
from fractions import Fraction

from hostagent.errors import AgentError

_NUMBER = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?) ?(?P<unit>[A-Za-z]*)", re.ASCII)
_LETTERS = "KMGTP"
_LARGEST = 2**63 - 1  # an off_t: no file, and no field of a block job, goes beyond it
_LONGEST = 40  # characters; nobody writes more, and int() of megabytes of digits is slow

UNLIMITED = 0


def parse_size(text: str, *, field: str = "size") -> int:
    """Bytes of `64M`, `1GiB`, `512k`, `1.5 GB` or `1048576`."""
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    factor = _factor(match["unit"]) if match else None
    if match is None or factor is None:
        raise AgentError(
            "invalid",
            f"{text[:_LONGEST]!r} is not a size",
            field=field,
            value=text[:_LONGEST],
            remedy="write bytes, or a number with a unit: 1048576, 512K, 64MiB, 1GiB (powers of 1024), 10MB (of 1000)",
        )
    size = Fraction(match["number"]) * factor
    if size.denominator != 1 or size > _LARGEST:
        why = "is not a whole number of bytes" if size.denominator != 1 else "is beyond 8 EiB"
        raise AgentError("invalid", f"the size {text!r} {why}", field=field, value=text)
    return int(size)


def parse_rate(text: str, *, field: str = "bandwidth") -> int:
    """Bytes per second of `50MiB/s`; 0 of `0` and `unlimited`, which both mean no limit."""
    rate = text.strip()
    if rate in ("0", "unlimited"):
        return UNLIMITED
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?(/s)?", rate, re.ASCII):
        number = rate.removesuffix("/s")[:_LONGEST]
        raise AgentError(
            "invalid",
            f"the rate {rate[:_LONGEST]!r} has no unit",
            field=field,
            value=rate[:_LONGEST],
            remedy=f"virsh's means MiB/s; write {number}MiB/s (or {number}B/s for bytes per second)",
        )
    try:
        return parse_size(rate.removesuffix("/s"), field=field)
    except AgentError as error:
        shown = rate[:_LONGEST]
        remedy = "write 50MiB/s, or `unlimited`"
        raise AgentError("invalid", f"{shown!r} is not a rate", field=field, value=shown, remedy=remedy) from error


def format_size(size: float) -> str:
    """`1.5 GiB`: three significant digits at most, for people; programs get bytes."""
    if size < 0:
        return f"-{format_size(-size)}"
    value, unit = float(size), "B"
    for letter in _LETTERS + "E":
        if value < 1023.5:
            break
        value, unit = value / 1024, f"{letter}iB"
    return f"{_short(value)} {unit}"


def format_rate(rate: float) -> str:
    return f"{format_size(rate)}/s"


def format_duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 14 min`, `3 d 4 h`."""
    if seconds < 0:
        return f"-{format_duration(-seconds)}"
    if seconds < 9.95:
        return f"{_short(round(seconds, 1))} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _factor(unit: str) -> int | None:
    if unit in ("", "B"):
        return 1
    letter, rest = unit[0].upper(), unit[1:]
    if letter not in _LETTERS or rest not in ("", "iB", "B"):
        return None
    base = 1000 if rest == "B" else 1024
    return int(base ** (_LETTERS.index(letter) + 1))


def _short(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
