"""One setting: its type by its default, what it must be, and its manual."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be, beyond its type, and its manual.

    `unset` says what stands for an empty default, `usual` is what root gets then. A list is of paths, unless it is of
    `servers` or of `words`, which who uses them checks.
    """

    manual: str
    low: float | None = None
    high: float | None = None
    size: bool = False
    choices: tuple[str, ...] = ()
    unset: str = ""
    usual: str = ""
    servers: bool = False
    address: bool = False
    words: bool = False


def setting(
    default: T,
    manual: str,
    *,
    low: float | None = None,
    high: float | None = None,
    size: bool = False,
    choices: tuple[str, ...] = (),
    unset: str = "",
    usual: str = "",
    servers: bool = False,
    address: bool = False,
    words: bool = False,
) -> T:
    rule = Rule(manual, low, high, size, choices, unset, usual, servers, address, words)
    return field(default=default, metadata={"rule": rule})


UNSET = Path()
