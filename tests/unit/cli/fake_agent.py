"""A scripted agent on a real unix socket: what the command line sees of the real one is HTTP, and nothing else."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, Any] | Callable[["Call"], tuple[int, Any]]


class Call:
    def __init__(self, method: str, path: str, query: dict[str, list[str]], body: Any, headers: dict[str, str]) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.body = body
        self.headers = headers


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64
    agent: FakeAgent

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away is part of the tests."""


class FakeAgent:
    """`on("GET", "/v1/jobs/1", first, second)`: the answers in order, the last one again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[Call] = []
        self._script: dict[tuple[str, str], list[Answer]] = {}
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = _Server(str(self.path), _Handler)
        self._server.agent = self
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self.path.unlink(missing_ok=True)

    def on(self, method: str, path: str, *answers: Answer) -> None:
        with self._lock:
            self._script[method, path] = list(answers)

    def answer(self, call: Call) -> tuple[int, Any]:
        with self._lock:
            self.calls.append(call)
            answers = self._script.get((call.method, call.path))
            if not answers:
                return 404, problem("not_found", f"no {call.path}")
            found = answers.pop(0) if len(answers) > 1 else answers[0]
        return found(call) if callable(found) else found

    def asked(self, method: str, path: str) -> list[Call]:
        with self._lock:
            return [call for call in self.calls if (call.method, call.path) == (method, path)]


class _Handler(BaseHTTPRequestHandler):
    def _any(self) -> None:
        address = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        call = Call(self.command, address.path, parse_qs(address.query), body, dict(self.headers))
        agent: FakeAgent = self.server.agent  # type: ignore[attr-defined]
        status, data = agent.answer(call)
        if status == 0:
            return  # the connection ends without an answer
        self.send_response(status)
        if isinstance(data, Stream):
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            data.write(self.wfile)
            return
        text = b"" if data is None else json.dumps(data).encode()
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = do_DELETE = _any

    def log_message(self, *words: Any) -> None:
        pass

    def address_string(self) -> str:
        return "unix"


class Stream:
    """Chunks of an event stream, then `stay` seconds of silence before it ends."""

    def __init__(self, *chunks: str, stay: float = 0.0) -> None:
        self._chunks = chunks
        self._stay = stay

    def write(self, out: Any) -> None:
        for chunk in self._chunks:
            out.write(chunk.encode())
            out.flush()
        time.sleep(self._stay)


def problem(code: str, detail: str, *, remedy: str | None = None, status: int = 0) -> dict[str, Any]:
    return {"type": f"urn:hostagent:problem:{code}", "title": code, "status": status, "detail": detail,
            "code": code, "remedy": remedy}  # fmt: skip


ID = "11111111-2222-3333-4444-555555555555"


def job(state: str = "running", cur: int = 0, *, revision: int = 1, **more: Any) -> dict[str, Any]:
    """A job as the API shows it."""
    return {
        "id": ID, "operation": "pull", "target": "/images/top.qcow2", "path": "/images/top.qcow2", "domain": "",
        "disk": "", "state": state, "cursor": {"cur": cur, "end": 1 << 30}, "upto": None, "bandwidth": 0, "base": None,
        "increment": None, "check": "auto", "labels": {}, "origin": "agent", "revision": revision,
        "created": "2024-05-01T10:00:00Z", "since": "2024-05-01T10:00:01Z", "started": "2024-05-01T10:00:01Z",
        "finished": "2024-05-01T10:00:13Z" if state in ("completed", "failed", "aborted") else None, "error": None,
        "revocation": "none", "rate": 1 << 20, "eta": 30.0, "stalled_seconds": 0, "warnings": [], "dest": None, "completion": None,
        "chain": {"before": ["/images/top.qcow2", "/images/base.qcow2"], "after": ["/images/top.qcow2"],
                  "revoked": [], "kept": []},
        **more,
    }  # fmt: skip


def event(seq: int, kind: str = "job.completed", *, time: str = "2024-05-01T10:00:00Z", **data: Any) -> str:
    body = {"specversion": "1.0", "id": str(seq), "type": f"org.hostagent.{kind}.v1", "subject": ID, "time": time,
            "data": data}  # fmt: skip
    return f"id: {seq}\nevent: {body['type']}\ndata: {json.dumps(body)}\n\n"
