"""The metrics, and nothing else, on a TCP address of their own: for a Prometheus that cannot use the API's socket.

Nobody has an identity here, so nothing can be asked but GET /metrics, and one connection is one answer. It is bounded
from its begin to its end, and what was just rendered is said again: whoever asks without an end takes little from the
agent.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import h11
import uvicorn
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hostagent.addresses import listener
from hostagent.api.bounded import Deadline
from hostagent.api.http import QuietServer
from hostagent.errors import AgentError

FRESH = 0.5
"""Seconds for which an exposition is answered again, at least: nobody who scrapes does it that often."""
REST = 20
"""And so many times what it took to make: strangers get a twentieth of the agent's time, however large it is."""

log = logging.getLogger(__name__)
quiet = logging.getLogger(f"{__name__}.clients")
quiet.setLevel(logging.ERROR)  # what strangers send is no news


@dataclass(frozen=True, slots=True)
class Bounds:
    """Named as in the configuration's [metrics] section."""

    max_connections: int
    max_head: int
    timeout: float


class Scraping:
    """The server, as soon as `address` is free: somebody who has it keeps nobody's image from being looked after. It is
    tried again every `again` seconds."""

    def __init__(
        self, address: tuple[str, int], render: Callable[[], tuple[bytes, str]], bounds: Bounds, again: float
    ) -> None:
        self._address = address
        self._server = ScrapeServer(render, bounds)
        self._backlog = bounds.max_connections
        self._again = again

    async def run(self) -> None:
        """Until `stop`, or cancelled."""
        listener = await self._bound()
        log.info("metrics", extra={"fields": {"address": "{}:{}".format(*listener.getsockname()[:2])}})
        await self._server.serve(sockets=[listener])

    def stop(self) -> None:
        self._server.should_exit = True

    async def _bound(self) -> socket.socket:
        told = False
        while True:
            try:
                return listener_of(self._address, self._backlog)
            except AgentError as error:
                if not told:
                    fields = {"error": error.message, "remedy": error.remedy}
                    log.error("no metrics on metrics.listen, as yet", extra={"fields": fields})
                told = True
                await asyncio.sleep(self._again)


def listener_of(address: tuple[str, int], backlog: int) -> socket.socket:
    value = "{}:{}".format(*address)
    found = listener(*address, backlog=backlog, setting="metrics.listen", value=value)
    found.setblocking(False)
    return found


class ScrapeServer(QuietServer):
    """`render` gives the exposition and its content type."""

    def __init__(self, render: Callable[[], tuple[bytes, str]], bounds: Bounds) -> None:
        super().__init__(
            uvicorn.Config(
                Scrapes(render),
                http=_protocol(bounds),
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=bounds.max_head,
                backlog=bounds.max_connections,  # so many are accepted in one turn of the loop
                timeout_graceful_shutdown=1,
            )
        )


class Scrapes:
    """The application."""

    def __init__(self, render: Callable[[], tuple[bytes, str]]) -> None:
        self._render = render
        self._made = -FRESH
        self._took = 0.0
        self._last: tuple[bytes, str] = (b"", "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer(scope["method"], scope["path"])
        answer.headers["connection"] = "close"
        await answer(scope, receive, send)

    def _answer(self, method: str, path: str) -> Response:
        if path != "/metrics":
            return PlainTextResponse("there is /metrics only\n", 404)
        if method not in ("GET", "HEAD"):
            return PlainTextResponse("GET or HEAD\n", 405, {"allow": "GET, HEAD"})
        if (began := time.monotonic()) - self._made >= max(FRESH, REST * self._took):
            self._last = self._render()
            self._made = time.monotonic()
            self._took = self._made - began
        exposition, media_type = self._last
        return Response(exposition, media_type=media_type)


def _protocol(bounds: Bounds) -> type[H11Protocol]:
    """The class that uvicorn makes one of for each connection. Where all places are taken, the oldest connection whose
    head has not come makes room: who sends heads slowly, or none, keeps nobody from scraping."""
    headless: dict[Scrape, None] = {}  # oldest first

    class Scrape(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.logger = quiet
            self._end = Deadline(bounds.timeout, transport.abort)
            self._end.start()
            if len(self.connections) > bounds.max_connections:
                next(iter(headless), self).cut()
            if self in self.connections:
                headless[self] = None

        def cut(self) -> None:
            headless.pop(self, None)
            self.connections.discard(self)  # its place is free now, and not first when the loop tells of its end
            self.transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                headless.pop(self, None)

        def connection_lost(self, exc: Exception | None) -> None:
            headless.pop(self, None)
            self._end.stop()
            super().connection_lost(exc)

    return Scrape
