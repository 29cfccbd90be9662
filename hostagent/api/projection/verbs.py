"""The methods of our interfaces: each asks one use-case, and nothing is decided here.

Arguments are checked as those of REST are, by the same models.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError

from hostagent.api import models, problem
from hostagent.api.peer import Peer
from hostagent.api.projection.interface import EXPORT, GRANT, JOB, MANAGER
from hostagent.api.usecases import Json, Service
from hostagent.errors import AgentError

IGNORED = "auth.no_user_interaction"
"""An option of UDisks' clients. Whether somebody may be asked is a flag of the message."""


class Shows(Protocol):
    """The part of the projection that verbs work with."""

    async def show(self, kind: str, id: str, *, uid: int | None = None) -> str:
        """Show the object as it is now, and say where; `uid` started it."""

    async def drop(self, kind: str, id: str) -> None: ...
    def where(self, kind: str, id: str) -> str: ...


@dataclass(frozen=True, slots=True)
class Call:
    """`id` is that of the object that is called; `args` as the interface says, with the options taken out."""

    service: Service
    shows: Shows
    peer: Peer
    id: str
    args: Sequence[Any]
    options: Json


class Verb(NamedTuple):
    """`action` is the authorisation that it takes (polkit.ACTIONS); None for one that changes nothing."""

    action: str | None
    run: Callable[[Call], Awaitable[tuple[Any, ...]]]


def checked(model: type[models.Request], spec: Json) -> Json:
    """The spec, when it is one. Raises AgentError invalid, which names the field."""
    try:
        return model.model_validate(spec).spec()
    except ValidationError as error:
        raise problem.first_of([{**one, "loc": ("options", *one["loc"])} for one in error.errors()]) from None


async def _start_job(call: Call) -> tuple[Any, ...]:
    operation, target = call.args
    spec = checked(models.JobCreate, _with(call.options, operation=operation, target=target))
    if spec.pop("dry_run", False):
        raise AgentError(
            "invalid",
            "a dry run is not for D-Bus",
            field="dry_run",
            remedy="ask by REST (POST /v1/jobs), or leave it out",
        )
    job, created = await call.service.start_job(spec, peer=call.peer)
    return (await call.shows.show("job", job["id"], uid=call.peer.uid if created else None),)


async def _start_export(call: Call) -> tuple[Any, ...]:
    spec = checked(models.ExportCreate, _with(call.options, image=call.args[0]))
    export, _ = await call.service.start_export(spec, peer=call.peer)
    return (await call.shows.show("export", export["id"]),)


async def _get_job(call: Call) -> tuple[Any, ...]:
    return (call.shows.where("job", call.args[0]),)


async def _cancel(call: Call) -> tuple[Any, ...]:
    await call.service.abort_job(call.id, checked(models.AbortBody, call.options)["force"])
    return ()


async def _pause(call: Call) -> tuple[Any, ...]:
    checked(models.EmptyBody, call.options)
    await call.service.pause_job(call.id)
    return ()


async def _resume(call: Call) -> tuple[Any, ...]:
    checked(models.EmptyBody, call.options)
    await call.service.resume_job(call.id)
    return ()


async def _complete(call: Call) -> tuple[Any, ...]:
    await call.service.complete_job(call.id, checked(models.CompleteBody, call.options).get("completion"))
    return ()


async def _next(call: Call) -> tuple[Any, ...]:
    await call.service.next_job(call.id, checked(models.NextBody, call.options).get("cursor"))
    return ()


async def _set_bandwidth(call: Call) -> tuple[Any, ...]:
    checked(models.EmptyBody, call.options)
    await call.service.patch_job(call.id, checked(models.JobPatch, {"bandwidth": call.args[0]})["bandwidth"])
    return ()


async def _delete(call: Call) -> tuple[Any, ...]:
    checked(models.EmptyBody, call.options)
    await call.service.delete_job(call.id)
    await call.shows.drop("job", call.id)
    return ()


async def _stop(call: Call) -> tuple[Any, ...]:
    await call.service.stop_export(call.id, checked(models.AbortBody, call.options)["force"])
    return ()


async def _revoke(call: Call) -> tuple[Any, ...]:
    checked(models.EmptyBody, call.options)
    await call.service.revoke_grant(call.id)
    return ()


async def _undo(call: Call) -> tuple[Any, ...]:
    checked(models.EmptyBody, call.options)
    await call.service.undo_grant(call.id, peer=call.peer)
    return ()


def table() -> str:
    """Markdown, for SECURITY.md: who may call what."""
    rows = ["| Interface | Method | root, the agent's user | others |", "| --- | --- | --- | --- |"]
    for (interface, member), verb in VERBS.items():
        others = "yes" if verb.action is None else f"if polkit grants `org.hostagent1.{verb.action}`"
        rows.append(f"| `{interface}` | `{member}` | yes | {others} |")
    return "\n".join(rows) + "\n"


def _with(options: Json, **arguments: Any) -> Json:
    """A request of its arguments and its options, which must not say the same."""
    for name in arguments.keys() & options.keys():
        raise AgentError(
            "invalid",
            f"{name} is an argument of its own",
            field=name,
            value=options[name],
            remedy="leave the option out",
        )
    return {**options, **arguments}


VERBS: dict[tuple[str, str], Verb] = {
    (MANAGER, "StartJob"): Verb("job-start", _start_job),
    (MANAGER, "StartExport"): Verb("export", _start_export),
    (MANAGER, "GetJob"): Verb(None, _get_job),
    (JOB, "Cancel"): Verb("job-control", _cancel),
    (JOB, "Pause"): Verb("job-control", _pause),
    (JOB, "Resume"): Verb("job-control", _resume),
    (JOB, "Complete"): Verb("job-control", _complete),
    (JOB, "Next"): Verb("job-control", _next),
    (JOB, "SetBandwidth"): Verb("job-control", _set_bandwidth),
    (JOB, "Delete"): Verb("job-control", _delete),
    (EXPORT, "Stop"): Verb("export", _stop),
    (GRANT, "Revoke"): Verb("grant-revoke", _revoke),
    (GRANT, "Undo"): Verb("grant-revoke", _undo),
}
