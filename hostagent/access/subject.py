"""The hypervisor user, who is given access and loses it, and who can be asked whether it has any."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, Protocol

Mode = Literal["r", "rw"]


@dataclass(frozen=True, slots=True)
class Subject:
    """The hypervisor user. `own` says that it is the agent's own user: then files are opened by right, not by grant."""

    name: str
    uid: int
    groups: tuple[int, ...]
    own: bool


class Probe(Protocol):
    """Whether the user can open the file of any descriptor; proven, not reckoned."""

    def can_open(self, fd: int, mode: Mode) -> bool: ...

    def close(self) -> None: ...


class OwnProbe:
    """In place of the prober when the agent is the hypervisor user itself: its own opening is the proof."""

    def can_open(self, fd: int, mode: Mode) -> bool:
        return os.access(f"/proc/self/fd/{fd}", os.R_OK if mode == "r" else os.R_OK | os.W_OK)

    def close(self) -> None:
        pass
