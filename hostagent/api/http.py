"""The HTTP front-end: the application, and the server that runs it on a socket that is already bound.

Around the routes, from the outside in: the connection (who is there: peercred.py, remote.py), the request's id, faults
(problem.py), whether the caller may (gate.py), limits (limits.py), then FastAPI. The document at /openapi.json is the
contract in machine-readable form; there is no page that would load scripts from elsewhere.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute

from events.bus import Bus
from hostagent import __version__
from hostagent.api import models, problem, routes, scopes
from hostagent.api.audited import Tell
from hostagent.api.gate import Gate, RequestIds
from hostagent.api.limits import Limits, RequestLimits
from hostagent.api.peercred import PeerPolicy, protocol
from hostagent.api.remote import Doors
from hostagent.api.sse import Streams, StreamSettings
from hostagent.api.usecases import Service
from hostagent.errors import CODES

KNOWN = ", ".join(f"{code} ({entry.http})" for code, entry in CODES.items())
PROBLEM: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": f"What went wrong (RFC 9457). `code` is one of these, with its status: {KNOWN}.",
        "content": {problem.MEDIA_TYPE: {"schema": models.Problem.model_json_schema()}},
    }
}


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Named as in the configuration: [agent] host and stop_timeout, all else from [api]."""

    host: str
    max_body: int = 65536
    max_json_depth: int = 16
    body_timeout: float = 10.0
    max_connections: int = 256
    wait_limit: float = 60.0
    list_limit: int = 1000
    sse_heartbeat: float = 15.0
    sse_subscribers: int = 64
    sse_queue: int = 1000
    keepalive: float = 5.0
    stop_timeout: float = 10.0


def build_app(
    service: Service,
    bus: Bus,
    *,
    settings: HttpSettings,
    metrics: Callable[[], tuple[bytes, str]],
    told: Callable[[str], None] = lambda reason: None,
    audit: Tell = lambda what, result, **_: None,
) -> FastAPI:
    """`metrics` gives the exposition and its content type (`Metrics.render`); `told` hears why somebody was turned
    away, `audit` what they were kept from changing. Of what is changed tells the service (audited.py)."""
    _every_route_has_its_rule()
    app = FastAPI(
        title="hostagent",
        version=__version__,
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=PROBLEM,
    )
    app.state.front = routes.Front(
        service=service,
        bus=bus,
        streams=Streams(service, bus, _stream_settings(settings)),
        metrics=metrics,
        wait_limit=settings.wait_limit,
        list_limit=settings.list_limit,
    )
    app.add_middleware(Limits, limits=_request_limits(settings), told=told)
    app.add_middleware(Gate, told=told, audit=audit, max_body=settings.max_body)
    problem.install(app)  # around all that may fail
    app.add_middleware(RequestIds)
    for router in routes.ALL:
        app.include_router(router)
    return app


class QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers, which are the daemon's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def install_signal_handlers(self) -> None:
        """What uvicorn before 0.29 has in place of capture_signals."""


def _every_route_has_its_rule() -> None:
    found = {
        (method, route.path)
        for router in routes.ALL
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    if found ^ (scopes.ROUTES.keys() - {("GET", "/openapi.json")}):
        raise RuntimeError(f"routes and scopes differ: {found ^ scopes.ROUTES.keys()}")


class Server(QuietServer):
    """The API's. Stopping ends the event streams and long polls. `doors` are what it listens on besides the sockets
    that `serve` is given; `told` hears whom those turned away."""

    def __init__(
        self,
        app: FastAPI,
        bus: Bus,
        *,
        policy: PeerPolicy,
        settings: HttpSettings,
        doors: Doors | None = None,
        told: Callable[[str], None] = lambda reason: None,
    ) -> None:
        most, stall = settings.max_connections, settings.body_timeout
        http = protocol(policy, max_connections=most, stall_timeout=stall, told=told)
        super().__init__(
            uvicorn.Config(
                app,
                http=http,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=max(1, round(settings.keepalive)),
                timeout_graceful_shutdown=max(1, round(settings.stop_timeout)),
            )
        )
        self._bus = bus
        self._doors = doors

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._doors is not None:
            self._doors.open(self.config, self.server_state)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._bus.close()
        if self._doors is not None:
            await self._doors.close()
        await super().shutdown(sockets)


def _request_limits(settings: HttpSettings) -> RequestLimits:
    return RequestLimits(
        max_body=settings.max_body,
        max_json_depth=settings.max_json_depth,
        body_timeout=settings.body_timeout,
        max_connections=settings.max_connections,
    )


def _stream_settings(settings: HttpSettings) -> StreamSettings:
    return StreamSettings(
        host=settings.host,
        heartbeat=settings.sse_heartbeat,
        queue=settings.sse_queue,
        subscribers=settings.sse_subscribers,
    )
