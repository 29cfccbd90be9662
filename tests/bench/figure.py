"""A figure and its results: plain values, and the two statistics that are used."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """One number with its target. `reached` None was not measured, and `why` says the reason."""

    what: str
    reached: float | None
    target: float
    unit: str
    at_least: bool = False
    why: str = ""

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached >= self.target if self.at_least else self.reached <= self.target

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "reached": self.reached,
            "target": self.target,
            "target_is": "at least" if self.at_least else "at most",
            "unit": self.unit,
            "met": self.met,
            "why_not_measured": self.why or None,
        }


@dataclass(frozen=True, slots=True)
class Figure:
    """`name` is what the command line takes. `details` are numbers beside the results, with their unit in the key."""

    name: str
    measured: str
    peer: str
    runs: int
    results: tuple[Result, ...]
    details: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "measured": self.measured,
            "peer": self.peer,
            "runs": self.runs,
            "results": [result.as_json() for result in self.results],
            "details": self.details,
        }


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """By nearest rank: a value that was really measured, at or below which `percent` of them lie."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
