"""The use-cases, with a line in the audit for each call that changes something, whichever front-end it came through.

A call that was refused before it reached a use-case, because of who asked, has its line from the gate (gate.py); one
that was no call at all (a body that means nothing) has none, for nothing could have changed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, cast

from hostagent import calls
from hostagent.api.usecases import Json, Service
from hostagent.errors import AgentError
from jobs.errors import JobError


class Tell(Protocol):
    def __call__(self, what: str, result: str, *, call: calls.Call | None = None, **details: object) -> None:
        """`call` None is the present one."""


_SPEC = (
    *("operation", "target", "dest", "image", "base", "top", "writable", "tcp", "tls", "delete", "completion"),
    *("reuse_external", "bitmaps", "disks", "name", "source", "source_name"),
)
"""What of a request's body a line shows."""


def _asked(spec: Mapping[str, Any]) -> Json:
    return {name: spec[name] for name in _SPEC if spec.get(name)}


DEEDS: dict[str, tuple[str, Callable[..., Json]]] = {
    "start_job": ("job start", lambda spec, **_: _asked(spec)),
    "patch_job": ("job speed", lambda id, bandwidth: {"id": id, "bandwidth": bandwidth}),
    "next_job": ("job next", lambda id, cursor: {"id": id}),
    "abort_job": ("job abort", lambda id, force: {"id": id, "force": force}),
    "pause_job": ("job pause", lambda id: {"id": id}),
    "resume_job": ("job resume", lambda id: {"id": id}),
    "complete_job": ("job complete", lambda id, completion: {"id": id, "completion": completion}),
    "delete_job": ("job delete", lambda id: {"id": id}),
    "start_group": ("group start", lambda spec, **_: _asked(spec)),
    "start_export": ("export start", lambda spec, **_: _asked(spec)),
    "stop_export": ("export stop", lambda id, force: {"id": id, "force": force}),
    "add_bitmap": ("bitmap add", lambda path, spec, **_: {"target": path, **_asked(spec)}),
    "remove_bitmap": ("bitmap remove", lambda path, name, **_: {"target": path, "name": name}),
    "merge_bitmap": ("bitmap merge", lambda path, spec, **_: {"target": path, **_asked(spec)}),
    "revoke_grant": ("grant revoke", lambda id: {"id": id}),
    "undo_grant": ("grant undo", lambda id, **_: {"id": id}),
    "drain": ("drain", lambda pause, **_: {"pause": pause}),
    "lift_drain": ("drain lift", lambda **_: {}),
}
"""The use-cases that change something: what they are called, and what a line tells of their arguments."""


def audited(service: Service, tell: Tell) -> Service:
    return cast(Service, _Audited(service, tell))


class _Audited:
    def __init__(self, service: Service, tell: Tell) -> None:
        self._service = service
        self._tell = tell

    def __getattr__(self, name: str) -> Any:
        act = getattr(self._service, name)
        if name not in DEEDS:
            return act
        what, of = DEEDS[name]

        async def told(*args: Any, **kwargs: Any) -> Any:
            return await self._told(what, of(*args, **kwargs), act(*args, **kwargs))

        return told

    async def _told(self, what: str, details: Json, act: Awaitable[Any]) -> Any:
        call = calls.present()  # who asked may be gone before it is done
        began, result = time.monotonic(), "internal"
        try:
            done = await act
            result = "ok"
            details |= _made(done)
            return done
        except (AgentError, JobError) as error:
            result = error.code
            raise
        except asyncio.CancelledError:
            result = "cancelled"
            raise
        finally:
            self._tell(what, result, call=call, **details, seconds=round(time.monotonic() - began, 3))


def _made(done: Any) -> Json:
    """The id of what a call made, or has changed."""
    found, created = done if isinstance(done, tuple) else (done, None)
    made = {"id": found["id"]} if isinstance(found, dict) and "id" in found else {}
    return made if created is None else {**made, "new": created}
