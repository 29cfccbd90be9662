"""The REST routes: each translates one request into one call of the service, and its answer into JSON.

Nothing is decided here but HTTP itself: status, ETag, Location, long polling. What starts work answers 202 with
`Location` and the object; a repeated id with the same body answers 200 with the first result. An unknown query
parameter is refused like an unknown field.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from starlette.responses import Response

from events.bus import Bus
from hostagent.api import models
from hostagent.api.gate import PEER_KEY, ROUTE_KEY
from hostagent.api.peer import NOBODY, Peer
from hostagent.api.problem import nearest
from hostagent.api.sse import Streams
from hostagent.api.usecases import Json, Service
from hostagent.errors import AgentError
from jobs.model import State

PAGE_MAX = 10000  # as high as api.list_limit can be set

Wait = Callable[[int | None, float], Awaitable[Json]]


@dataclass(frozen=True, slots=True)
class Front:
    """What the routes work with; `app.state.front`. `metrics` gives the exposition and its content type."""

    service: Service
    bus: Bus
    streams: Streams
    metrics: Callable[[], tuple[bytes, str]]
    wait_limit: float
    list_limit: int


async def front_of(request: Request) -> Front:
    front: Front = request.app.state.front
    return front


async def peer_of(request: Request) -> Peer:
    peer: Peer = request.scope.get(PEER_KEY, NOBODY)
    return peer


async def only_as_judged(request: Request) -> None:
    """The second lock: a route that is not the one by which the gate let the caller in answers nothing."""
    if request.scope.get(ROUTE_KEY) != request.scope["route"].path:
        raise AgentError("denied", "that is not what was asked for")


async def only_known_query(request: Request) -> None:
    """Refuse a query parameter that the published document does not name."""
    route = request.scope["route"]
    operation = request.app.openapi()["paths"].get(route.path, {}).get(request.method.lower(), {})
    known = [item["name"] for item in operation.get("parameters", []) if item["in"] == "query"]
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise AgentError(
                "invalid", f"unknown query parameter {name}", field=name, value=value, remedy=nearest(name, known)
            )


@dataclass(frozen=True, slots=True)
class Page:
    limit: int
    after: str | None


async def page_of(
    front: Annotated[Front, Depends(front_of)],
    limit: Annotated[
        int, Query(ge=1, le=PAGE_MAX, description="Objects on one page; api.list_limit is never passed.")
    ] = 100,
    after: Annotated[str | None, Query(max_length=256, description="`next` of the page before.")] = None,
) -> Page:
    return Page(min(limit, front.list_limit), after)


async def labels_of(
    label: Annotated[
        list[str] | None, Query(max_length=32, description="K=V; may be repeated, all must match.")
    ] = None,
) -> dict[str, str]:
    pairs = [text.partition("=") for text in label or []]
    for key, equals, value in pairs:
        if not key or not equals:
            raise AgentError("invalid", "a label filter is K=V", field="label", value=key + equals + value)
    return {key: value for key, _, value in pairs}


async def known_revision(if_none_match: Annotated[str | None, Header()] = None) -> int | None:
    """The revision that the client has, from If-None-Match."""
    if if_none_match is None:
        return None
    found = re.fullmatch(r'(?:W/)?"(\d{1,18})"', if_none_match.strip())
    if not found:
        raise AgentError(
            "invalid",
            "that is no ETag of ours",
            field="if-none-match",
            value=if_none_match,
            remedy='send the ETag of the object that you have, such as "3"',
        )
    return int(found[1])


TheFront = Annotated[Front, Depends(front_of)]
ThePeer = Annotated[Peer, Depends(peer_of)]
ThePage = Annotated[Page, Depends(page_of)]
TheLabels = Annotated[dict[str, str], Depends(labels_of)]
Revision = Annotated[int | None, Depends(known_revision)]
WaitSeconds = Annotated[float | None, Query(ge=0, allow_inf_nan=False, description="Long poll, in seconds.")]
ImagePath = Annotated[str, Query(min_length=1, max_length=models.PATH_MAX)]
Filter = Annotated[str | None, Query(max_length=models.PATH_MAX)]

STRICT = [Depends(only_as_judged), Depends(only_known_query)]
NEW: dict[int | str, dict[str, Any]] = {
    200: {"description": "Nothing was started: the id and body were seen before, or it was a dry run"}
}
UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "Still the revision of If-None-Match"}}

probes = APIRouter(tags=["agent"], dependencies=STRICT)
jobs = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=STRICT)
groups = APIRouter(prefix="/v1/groups", tags=["jobs"], dependencies=STRICT)
exports = APIRouter(prefix="/v1/exports", tags=["exports"], dependencies=STRICT)
images = APIRouter(prefix="/v1/images", tags=["images"], dependencies=STRICT)
grants = APIRouter(prefix="/v1/grants", tags=["grants"], dependencies=STRICT)
events = APIRouter(prefix="/v1/events", tags=["events"], dependencies=STRICT)
ALL = (probes, jobs, groups, exports, images, grants, events)


@probes.get("/healthz", response_model=models.Health)
async def healthz() -> Response:
    """The agent's loop turns. Nothing else is looked at."""
    return answer({"ok": True})


@probes.get("/readyz", response_model=models.Ready, responses={503: {"model": models.Ready}})
async def readyz(front: TheFront) -> Response:
    """Whether the agent takes work. A 503 says in `checks` what is in the way."""
    state = await front.service.ready()
    return answer(state, 200 if state["ready"] else 503)


@probes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(front: TheFront) -> Response:
    """Prometheus' text format, from memory: a scrape calls no hypervisor."""
    exposition, media_type = front.metrics()
    return Response(exposition, headers={"content-type": media_type})


@probes.get("/v1/host", response_model=models.Host)
async def host(front: TheFront) -> Response:
    """The agent, and what needs a person: silent storage daemons, changed files, owed revocations, last errors."""
    return answer(await front.service.host())


@probes.get("/v1/host/drain", response_model=models.Drain)
async def drain_state(front: TheFront) -> Response:
    """Whether the host takes new work, and what is not at rest yet."""
    return answer(await front.service.drain_state())


@probes.post("/v1/host/drain", response_model=models.Drain)
async def drain(front: TheFront, peer: ThePeer, body: models.DrainBody | None = None) -> Response:
    """Take no new work, also after a restart, until it is lifted. A second time may add `pause`."""
    return answer(await front.service.drain(body.pause if body else False, peer=peer))


@probes.delete("/v1/host/drain", response_model=models.Drain)
async def lift_drain(front: TheFront, peer: ThePeer) -> Response:
    """Take new work again, and resume the jobs that draining has paused."""
    return answer(await front.service.lift_drain(peer=peer))


@jobs.get("", response_model=models.JobPage)
async def list_jobs(
    front: TheFront,
    page: ThePage,
    labels: TheLabels,
    state: State | None = None,
    target: Filter = None,
    origin: Filter = None,
    group: Filter = None,
) -> Response:
    """Jobs, the newest first; finished ones for as long as jobs.retention_days and retention_count say."""
    return answer(
        await front.service.list_jobs(
            state=state, target=target, labels=labels, origin=origin, group=group, limit=page.limit, after=page.after
        )
    )


@jobs.post("", status_code=202, response_model=models.Job, responses=NEW)
async def start_job(front: TheFront, peer: ThePeer, body: models.JobCreate) -> Response:
    """Start a job, or with `dry_run` say (200) what it would do."""
    spec = body.spec()
    if spec.pop("dry_run", False):
        return answer(await front.service.plan_job(spec, peer=peer))
    job, created = await front.service.start_job(spec, peer=peer)
    return started(job, "/v1/jobs", created=created)


@jobs.get("/{id}", response_model=models.Job, responses=UNCHANGED)
async def get_job(front: TheFront, id: str, revision: Revision, wait: WaitSeconds = None) -> Response:
    """A job. With `wait`, once its revision is another one than that of If-None-Match, or than it is now."""
    service = front.service
    job = await polled(front, service.get_job(id), _waiter(service.wait_job, id), revision, wait)
    return current(job, revision)


@jobs.patch("/{id}", response_model=models.Job)
async def patch_job(front: TheFront, id: str, body: models.JobPatch) -> Response:
    """Another bandwidth limit, at once."""
    return current(await front.service.patch_job(id, body.bandwidth))


@jobs.delete("/{id}", status_code=204, response_class=Response)
async def delete_job(front: TheFront, id: str) -> Response:
    """Forget a finished job."""
    await front.service.delete_job(id)
    return Response(status_code=204)


@jobs.post("/{id}/next", status_code=202, response_model=models.Job)
async def next_job(front: TheFront, id: str, body: models.NextBody | None = None) -> Response:
    """The next increment. With `cursor`, a job that is already past it only answers: a retry is safe."""
    return started(await front.service.next_job(id, body.cursor if body else None), "/v1/jobs")


@jobs.post("/{id}/abort", status_code=202, response_model=models.Job)
async def abort_job(front: TheFront, id: str, body: models.AbortBody | None = None) -> Response:
    """End a job; what was copied stays. `force` kills its storage daemon, after jobs.abort_timeout only."""
    return started(await front.service.abort_job(id, body.force if body else False), "/v1/jobs")


@jobs.post("/{id}/pause", response_model=models.Job)
async def pause_job(front: TheFront, id: str, body: models.EmptyBody | None = None) -> Response:
    """Stop copying, keep the job."""
    return current(await front.service.pause_job(id))


@jobs.post("/{id}/resume", response_model=models.Job)
async def resume_job(front: TheFront, id: str, body: models.EmptyBody | None = None) -> Response:
    """Go on copying."""
    return current(await front.service.resume_job(id))


@jobs.post("/{id}/complete", status_code=202, response_model=models.Job)
async def complete_job(front: TheFront, id: str, body: models.CompleteBody | None = None) -> Response:
    """End a ready job: pivot to the result, or finish and stay. Default: as the job was asked for."""
    return started(await front.service.complete_job(id, body.completion if body else None), "/v1/jobs")


@groups.post("", status_code=202, response_model=models.Group, responses=NEW)
async def start_group(front: TheFront, peer: ThePeer, body: models.GroupCreate) -> Response:
    """Copy several disks, that complete together or not at all; or with `dry_run` say (200) what that would do."""
    spec = body.spec()
    if spec.pop("dry_run", False):
        return answer(await front.service.plan_group(spec, peer=peer))
    group, created = await front.service.start_group(spec, peer=peer)
    return answer(group, 202 if created else 200, {"location": f"/v1/groups/{group['id']}"})


@groups.get("/{id}", response_model=models.Group)
async def get_group(front: TheFront, id: str) -> Response:
    """The group's jobs, in the order in which they were asked for; those that were deleted are left out."""
    return answer(await front.service.get_group(id))


@exports.get("", response_model=models.ExportPage)
async def list_exports(
    front: TheFront,
    page: ThePage,
    labels: TheLabels,
    state: Literal["starting", "running", "stopping", "stopped", "lost"] | None = None,
    target: Filter = None,
) -> Response:
    """Exports, the newest first; ended ones as far as exports.retention_count says."""
    return answer(
        await front.service.list_exports(state=state, target=target, labels=labels, limit=page.limit, after=page.after)
    )


@exports.post("", status_code=202, response_model=models.Export, responses=NEW)
async def start_export(front: TheFront, peer: ThePeer, body: models.ExportCreate) -> Response:
    """Serve an image over NBD, read-only unless `writable`."""
    export, created = await front.service.start_export(body.spec(), peer=peer)
    return started(export, "/v1/exports", created=created)


@exports.get("/{id}", response_model=models.Export, responses=UNCHANGED)
async def get_export(front: TheFront, id: str, revision: Revision, wait: WaitSeconds = None) -> Response:
    """An export and its present clients. `wait` as for a job; clients alone make no new revision."""
    service = front.service
    export = await polled(front, service.get_export(id), _waiter(service.wait_export, id), revision, wait)
    return current(export, revision)


@exports.delete("/{id}", response_model=models.Export)
async def stop_export(front: TheFront, id: str, force: bool = False) -> Response:
    """End an export: `busy` while clients are connected, unless `force` cuts them off."""
    return current(await front.service.stop_export(id, force))


@images.get("/inspect", response_model=models.Image)
async def inspect_image(
    front: TheFront,
    peer: ThePeer,
    path: ImagePath,
    format: Literal["raw", "qcow2"] | None = None,
) -> Response:
    """What the headers of an image and its backing chain say. A member that lies where it may not is not read."""
    return answer(await front.service.inspect_image(path, format, peer=peer))


@images.get("/bitmaps", response_model=models.BitmapList)
async def list_bitmaps(front: TheFront, peer: ThePeer, path: ImagePath) -> Response:
    """The dirty bitmaps that the image has on stable storage."""
    return answer(await front.service.list_bitmaps(path, peer=peer))


@images.post("/bitmaps", response_model=models.BitmapList)
async def add_bitmap(front: TheFront, peer: ThePeer, path: ImagePath, body: models.BitmapCreate) -> Response:
    """A new, empty bitmap. The answer, here and below, is what the image has on stable storage then."""
    return answer(await front.service.add_bitmap(path, body.spec(), peer=peer))


@images.delete("/bitmaps", response_model=models.BitmapList)
async def remove_bitmap(
    front: TheFront,
    peer: ThePeer,
    path: ImagePath,
    name: Annotated[str, Query(min_length=1, max_length=1023, description="Also of one that is inconsistent.")],
) -> Response:
    """Remove a bitmap."""
    return answer(await front.service.remove_bitmap(path, name, peer=peer))


@images.post("/bitmaps/merge", response_model=models.BitmapList)
async def merge_bitmap(front: TheFront, peer: ThePeer, path: ImagePath, body: models.BitmapMerge) -> Response:
    """The bits of one bitmap come into another as well."""
    return answer(await front.service.merge_bitmap(path, body.spec(), peer=peer))


@grants.get("", response_model=models.GrantPage)
async def list_grants(front: TheFront, page: ThePage, path: Filter = None, holder: Filter = None) -> Response:
    """Who needs which file and why; also files that nobody needs and that could not be closed, or got another owner."""
    return answer(await front.service.list_grants(path=path, holder=holder, limit=page.limit, after=page.after))


@grants.get("/{id}", response_model=models.Grant)
async def get_grant(front: TheFront, id: str) -> Response:
    """One of them."""
    return answer(await front.service.get_grant(id))


@grants.delete("/{id}", response_model=models.Grant)
async def revoke_grant(front: TheFront, id: str) -> Response:
    """Take back what nobody who lives needs; else `busy`, naming the holders."""
    return answer(await front.service.revoke_grant(id))


@grants.post("/{id}/undo", response_model=models.Grant)
async def undo_grant(front: TheFront, peer: ThePeer, id: str) -> Response:
    """Restore the owner that a revocation changed, if nobody changed it since."""
    return answer(await front.service.undo_grant(id, peer=peer))


@events.get("", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def stream_events(
    front: TheFront,
    since: Annotated[int | None, Query(ge=0, le=models.INT_MAX, description="The last number that you have.")] = None,
    last_event_id: Annotated[int | None, Header(ge=0, le=models.INT_MAX)] = None,
) -> Response:
    """Events from the log, then live. Last-Event-ID, which a client sends when it comes back, wins over `since`."""
    return front.streams.response(since if last_event_id is None else last_event_id)


def answer(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # ASCII only: a path that is no UTF-8 has lone surrogates, which JSON can escape and UTF-8 cannot encode.
    content = json.dumps(body, allow_nan=False)
    return Response(content, status_code=status, headers=dict(headers or {}), media_type="application/json")


def started(item: Json, where: str, *, created: bool = True) -> Response:
    headers = {"location": f"{where}/{item['id']}", "etag": _etag(item)}
    return answer(item, 202 if created else 200, headers)


def current(item: Json, known: int | None = None) -> Response:
    if item["revision"] == known:
        return Response(status_code=304, headers={"etag": _etag(item)})
    return answer(item, 200, {"etag": _etag(item)})


async def polled(front: Front, get: Awaitable[Json], wait: Wait, revision: int | None, seconds: float | None) -> Json:
    """The object; with `?wait=` once it has changed, the time is up, or the agent stops."""
    found = await get
    if not seconds or (revision is not None and found["revision"] != revision):
        return found
    changed = asyncio.ensure_future(wait(found["revision"], min(seconds, front.wait_limit)))
    stopping = asyncio.ensure_future(front.bus.closed.wait())
    try:
        await asyncio.wait({changed, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return changed.result() if changed.done() else found
    finally:
        changed.cancel()
        stopping.cancel()


def _waiter(wait: Callable[..., Awaitable[Json]], id: str) -> Wait:
    return lambda revision, timeout: wait(id, revision=revision, timeout=timeout)


def _etag(item: Json) -> str:
    return f'"{item["revision"]}"'
