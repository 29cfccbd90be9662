"""A data daemon in memory, which fails when it is told to, and forgets what was not flushed.

What a connection has written is in `volatile` until a flush over the same connection succeeds; a connection that breaks
loses it. So whoever takes an unflushed byte for written ends with an image that differs.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TICKET = "9b1c4e2a-secret-ticket"
ALL = ("checksum", "extents", "flush", "zero")


class Broken(Exception):
    """The connection ends here."""


@dataclass
class Model:
    """`fault(request, number)` is asked before each request is obeyed: None, or a status, or one of the words "before"
    and "after" (the connection breaks before or after it was obeyed), "half" (within the body)."""

    size: int
    features: tuple[str, ...] = ALL
    options_status: int = 200
    workers: int = 8
    etag: str | None = None
    partial: bool = True
    closes: bool = False
    unix_socket: str | None = None
    host: str = "127.0.0.1"
    tell_size: bool = True
    fault: Callable[[str, int], object] = lambda request, number: None
    extents: list[dict[str, Any]] | None = None
    checksum: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    durable: bytearray = field(default_factory=bytearray)
    log: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    connections: int = 0

    def __post_init__(self) -> None:
        self.durable = bytearray(self.durable or bytes(self.size))
        model = self

        class Handler(_Handler):
            image = model

        self.server = ThreadingHTTPServer((self.host, 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server.server_address[1]}/images/{TICKET}"

    def __enter__(self) -> Model:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def count(self, method: str) -> int:
        with self.lock:
            return sum(line.startswith(method) for line in self.log)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    image: Model

    def setup(self) -> None:
        super().setup()
        self.volatile: list[tuple[int, bytes]] = []
        with self.image.lock:
            self.image.connections += 1

    def log_message(self, *_: object) -> None:
        pass

    def do(self) -> None:
        model = self.image
        with model.lock:
            model.log.append(f"{self.command} {self.path} {self.headers.get('range') or ''}".strip())
            number = len(model.log)
        if model.closes:
            self.close_connection = True
        fault = model.fault(f"{self.command} {self.path}", number)
        try:
            if isinstance(fault, int):
                self._drain()
                self._answer(fault, b"a fault with ticket " + TICKET.encode(), "text/plain")
                return
            if fault == "before":
                raise Broken
            if model.etag and self.headers.get("if-match", f'"{model.etag}"') != f'"{model.etag}"':
                self._drain()
                self._answer(412, b"another generation", "text/plain")
                return
            getattr(self, f"_{self.command.lower()}")(fault)
            if fault == "after":
                raise Broken
        except Broken:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_OPTIONS = do_GET = do_PUT = do_PATCH = do

    def _options(self, fault: object) -> None:
        model = self.image
        if model.options_status != 200:
            self._answer(model.options_status, b"")
            return
        found: dict[str, Any] = {"features": list(model.features), "max_readers": model.workers}
        found["max_writers"] = model.workers
        if model.unix_socket:
            found["unix_socket"] = model.unix_socket
        if model.tell_size:
            found |= {"size": model.size}
        if model.etag:
            found["generation"] = model.etag
        self._answer(200, json.dumps(found).encode(), "application/json", {"allow": "OPTIONS,GET,PUT,PATCH"})

    def _get(self, fault: object) -> None:
        model = self.image
        if "/extents" in self.path:
            whole = [{"start": 0, "length": model.size, "zero": False, "hole": False}]
            self._answer(200, json.dumps(model.extents or whole).encode(), "application/json")
            return
        if "/checksum" in self.path:
            self._answer(200, json.dumps(model.checksum).encode(), "application/json")
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range") or "")
        if match is None or not model.partial:
            self._send(200, bytes(model.durable), fault, {})
            return
        first, last = int(match[1]), int(match[2])
        body = bytes(model.durable[first : last + 1])
        self._send(206, body, fault, {"content-range": f"bytes {first}-{last}/{model.size}"})

    def _put(self, fault: object) -> None:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/\*", self.headers.get("content-range") or "")
        assert match, self.headers
        length = int(self.headers["content-length"])
        if fault == "half":
            self.rfile.read(length // 2)
            raise Broken
        body = self.rfile.read(length)
        if len(body) < length:
            raise Broken
        self.volatile.append((int(match[1]), body))
        if self.path.endswith("flush=y"):
            self._flush()
        if fault != "after":
            self._answer(200, b"")

    def _patch(self, fault: object) -> None:
        message = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if message["op"] == "zero":
            self.volatile.append((message["offset"], bytes(message["size"])))
        if message["op"] == "flush" or message["flush"]:
            self._flush()
        if fault != "after":
            self._answer(200, b"")

    def _flush(self) -> None:
        with self.image.lock:
            for offset, data in self.volatile:
                assert offset + len(data) <= self.image.size
                self.image.durable[offset : offset + len(data)] = data
        self.volatile = []

    def _send(self, status: int, body: bytes, fault: object, headers: dict[str, str]) -> None:
        self._head(status, len(body), "application/octet-stream", headers)
        self.wfile.write(body[: len(body) // 2] if fault == "half" else body)
        if fault == "half":
            raise Broken

    def _answer(self, status: int, body: bytes, kind: str = "", headers: dict[str, str] | None = None) -> None:
        self._head(status, len(body), kind, headers or {})
        self.wfile.write(body)

    def _head(self, status: int, length: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("content-length", str(length))
        if kind:
            self.send_header("content-type", kind)
        if self.close_connection:
            self.send_header("connection", "close")
        for name, value in (headers | self.image.headers).items():
            self.send_header(name, value)
        self.end_headers()

    def _drain(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
