"""What one check of `hostagent doctor` found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Result(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    result: Result
    message: str
    remedy: str | None = None

    def to_json(self) -> dict[str, str | None]:
        return {"name": self.name, "result": self.result.value, "message": self.message, "remedy": self.remedy}


def ok(name: str, message: str, remedy: str | None = None) -> Finding:
    return Finding(name, Result.OK, message, remedy)


def warn(name: str, message: str, remedy: str | None = None) -> Finding:
    return Finding(name, Result.WARN, message, remedy)


def fail(name: str, message: str, remedy: str | None = None) -> Finding:
    return Finding(name, Result.FAIL, message, remedy)
