"""The call that is being served: its id for log lines and answers, and who it is of, for the audit.

Whatever a call starts and leaves running inherits its context (contextvars), and is no part of it once it has been
answered: then there is no present call any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Call:
    """`surface` is unix, tcp or dbus; `who` a uid, a token's or a certificate's name; `origin` where it comes from."""

    id: str
    surface: str = ""
    who: str = ""
    origin: str = ""
    running: bool = True


_present: ContextVar[Call | None] = ContextVar("call", default=None)


def present() -> Call | None:
    call = _present.get()
    return call if call is not None and call.running else None


@contextmanager
def serving(call: Call) -> Iterator[Call]:
    before = _present.set(call)
    try:
        yield call
    finally:
        call.running = False
        _present.reset(before)
