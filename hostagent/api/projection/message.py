"""D-Bus messages as plain values, whatever library marshals them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple


class Kind(IntEnum):
    CALL = 1
    REPLY = 2
    ERROR = 3
    SIGNAL = 4


NO_REPLY = 0x1
INTERACTIVE = 0x4
"""Flags of a call: nobody waits for an answer; whoever calls can be asked for a password meanwhile."""


class Variant(NamedTuple):
    """A value with its type. What comes in has none: it is the bare value, as JSON would have it."""

    signature: str
    value: Any


@dataclass(frozen=True, slots=True)
class Message:
    kind: Kind
    path: str = ""
    interface: str = ""
    member: str = ""
    signature: str = ""
    body: tuple[Any, ...] = ()
    destination: str = ""
    sender: str = ""
    error: str = ""
    reply_to: int = 0
    serial: int = 0
    flags: int = 0


def to_bus(member: str, signature: str = "", *body: Any) -> Message:
    """A call of the bus itself."""
    bus = "org.freedesktop.DBus"
    path = "/org/freedesktop/DBus"
    return Message(Kind.CALL, path, bus, member, signature, body, destination=bus)


class BusError(Exception):
    """An answer that is an error: its name on the bus, and what it says."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


STANDARD = "org.freedesktop.DBus.Error."
"""Before the names of errors that are the protocol's, and not ours."""


def text(value: object) -> str:
    """As D-Bus can carry it: UTF-8 (a path need not be), and no NUL (a label may have one). The bus cuts off who sends
    anything else."""
    return str(value).encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
