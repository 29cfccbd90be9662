"""Errors as RFC 9457 problem details: one shape for whatever goes wrong.

`hostagent.errors.CODES` decides the HTTP status. A problem names the field and the value that were wrong and, wherever
a person can do something, the remedy. A fault of ours becomes 500 with an id that is in the log beside the traceback;
the traceback itself never leaves the process.
"""

from __future__ import annotations

import difflib
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hostagent import calls
from hostagent.errors import CODES, AgentError
from jobs.errors import JobError

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
VALUE_MAX = 200  # characters of a refused value that are worth sending back
_ROUTER_CODES = {404: "not_found", 413: "too_large"}


def describe(
    code: str,
    detail: str,
    *,
    remedy: str | None = None,
    field: str | None = None,
    value: object = None,
    details: Mapping[str, Any] | None = None,
) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the problem's members; those that have nothing to say are left out."""
    entry = CODES.get(code) or CODES["internal"]
    call = calls.present()
    optional = {
        "remedy": remedy,
        "field": field,
        "value": None if value is None else _short(value),
        "request_id": call.id if call else None,
    }
    return entry.http, {
        **(details or {}),
        "type": f"urn:hostagent:problem:{code}",
        "title": entry.title,
        "status": entry.http,
        "detail": detail,
        "code": code,
        **{key: text for key, text in optional.items() if text is not None},
    }


def answer(
    code: str,
    detail: str,
    *,
    remedy: str | None = None,
    field: str | None = None,
    value: object = None,
    details: Mapping[str, Any] | None = None,
) -> Response:
    status, body = describe(code, detail, remedy=remedy, field=field, value=value, details=details)
    return _respond(status, body)


def of_error(error: JobError | AgentError) -> Response:
    return answer(
        error.code,
        error.message,
        remedy=error.remedy,
        field=error.field,
        value=error.value,
        details=error.details,
    )


def of_validation(errors: Sequence[Mapping[str, Any]]) -> Response:
    return of_error(first_of(errors))


def first_of(errors: Sequence[Mapping[str, Any]]) -> AgentError:
    """The first thing that is wrong with a request. Unknown fields come before values: a typing slip explains both."""
    first = next((error for error in errors if error["type"] == "unknown_field"), errors[0])
    where = [str(part) for part in first["loc"][1:]]  # the first says body, query, path or header
    context = first.get("ctx", {})
    field = ".".join([*where, *([context["name"]] if first["type"] == "unknown_field" else [])]) or "body"
    if first["type"] == "missing":
        return AgentError("invalid", f"{field} is missing", field=field)
    return AgentError(
        "invalid", f"{field}: {first['msg']}", field=field, value=first.get("input"), remedy=context.get("remedy")
    )


def nearest(name: str, known: Sequence[str]) -> str:
    """What to write instead of an unknown name."""
    if not known:
        return "no fields are known here"
    begun = [one for one in known if min(len(one), len(name)) > 2 and (name.startswith(one) or one.startswith(name))]
    close = [max(begun, key=len)] if begun else difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}known fields are {', '.join(sorted(known))}"


class Faults:
    """The outermost layer: whatever no handler expected is logged under an id, and answered with that id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def watched(message: Message) -> None:
            nonlocal began
            began = began or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:  # the root of a request's task: a fault must not become silence
            fault = uuid.uuid4().hex
            log.exception("fault %s in %s %s", fault, scope.get("method"), scope.get("path"))
            if began:
                raise  # half an answer is out: only cutting the connection tells the client
            remedy = f"look for {fault} in the agent's log"
            reply = answer("internal", "the agent has a fault", remedy=remedy, details={"fault": fault})
            await reply(scope, receive, send)


def install(app: FastAPI) -> None:
    app.add_exception_handler(JobError, _on_error)
    app.add_exception_handler(AgentError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_router)
    app.add_middleware(Faults)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, JobError | AgentError)
    return of_error(error)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return of_validation(error.errors())


async def _on_router(request: Request, error: Exception) -> Response:
    """404 and 405 of the router. The status is the router's: an unknown path and an unknown method are no objects."""
    assert isinstance(error, HTTPException)
    code = _ROUTER_CODES.get(error.status_code, "invalid")
    message = f"{request.method} {request.url.path}: {error.detail}"
    _, body = describe(code, message, remedy="see /openapi.json for what there is")
    return _respond(error.status_code, {**body, "status": error.status_code}, error.headers)


def _respond(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    content = json.dumps(body, default=str)
    return Response(content, status_code=status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= VALUE_MAX else text[: VALUE_MAX - 1] + "…"
