"""The real application, run by uvicorn in a thread, on a real unix socket."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_service import FakeService

from events.bus import Bus
from hostagent import calls
from hostagent.api.audited import audited
from hostagent.api.http import HttpSettings, Server, build_app
from hostagent.api.peercred import PeerPolicy
from hostagent.api.remote import Doors

JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: Any


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Agent:
    def __init__(
        self, path: Path, settings: HttpSettings, policy: PeerPolicy, doors: Callable[[Agent], Doors] | None = None
    ) -> None:
        self.path = path
        self.refusals: list[str] = []
        self.audit: list[dict[str, Any]] = []
        self.doors = doors(self) if doors else None
        self._settings = settings
        self._policy = policy
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.bus = Bus()
        self.service = FakeService(self.bus)
        app = build_app(
            audited(self.service, self._tell),
            self.bus,
            settings=self._settings,
            metrics=lambda: (b"m 1\n", "text/plain"),
            told=self.refusals.append,
            audit=self._tell,
        )
        self.front = app.state.front
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        told = self.refusals.append
        self.server = Server(
            app, self.bus, policy=self._policy, settings=self._settings, doors=self.doors, told=told
        )
        self._listening.set()
        await self.server.serve(sockets=[listener])

    def _tell(self, what: str, result: str, *, call: calls.Call | None = None, **details: object) -> None:
        call = call or calls.present()
        assert call is not None
        self.audit.append({"what": what, "result": result, "who": call.who, "from": call.origin, **details})

    def start(self) -> None:
        self._thread.start()
        assert self._listening.wait(10)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = UnixConnection(self.path)
        try:
            connection.request(method, path, raw, {**(JSON if raw is not None else {}), **(headers or {})})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        names = {name.lower(): value for name, value in answer.getheaders()}
        parsed = json.loads(content) if content and "json" in names.get("content-type", "") else content
        return Reply(answer.status, names, parsed)

    def on_loop(self, act: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return act()

        return self.run(run())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)


@contextmanager
def serving(
    path: Path,
    *,
    policy: PeerPolicy | None = None,
    doors: Callable[[Agent], Doors] | None = None,
    **settings: Any,
) -> Iterator[Agent]:
    agent = Agent(path, HttpSettings(host="h1", **settings), policy or PeerPolicy.for_group(), doors)
    agent.start()
    try:
        yield agent
    finally:
        agent.stop()
