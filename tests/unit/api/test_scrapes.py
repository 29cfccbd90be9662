"""The listener of the metrics alone, run by uvicorn in a thread, on a real TCP socket."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hostagent.api import scrapes
from hostagent.api.scrapes import Bounds, ScrapeServer
from hostagent.errors import AgentError

Scraped = Callable[..., http.client.HTTPResponse]


class Served:
    """`size` are the bytes that an exposition has at least, `slow` the seconds that it takes."""

    def __init__(self, address: tuple[str, int], *, size: int = 0, slow: float = 0, **bounds: Any) -> None:
        self.rendered, self._size, self._slow = 0, size, slow
        self._listener = scrapes.listener_of(address, 4)
        self.address = self._listener.getsockname()[:2]
        wanted = {"max_connections": 4, "max_head": 1024, "timeout": 5, **bounds}
        self._server = ScrapeServer(self._render, Bounds(**wanted))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[self._listener])))

    def _render(self) -> tuple[bytes, str]:
        self.rendered += 1
        time.sleep(self._slow)
        text = b"m %d\n" % self.rendered
        return text + b"#" * (self._size - len(text)), "text/plain; version=0.0.4; charset=utf-8"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def ask(self, method: str = "GET", path: str = "/metrics", body: bytes | None = None) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=10)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=10)


@contextmanager
def serving(address: tuple[str, int] = ("127.0.0.1", 0), **more: Any) -> Iterator[Served]:
    served = Served(address, **more)
    served.start()
    try:
        yield served
    finally:
        served.stop()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


def ends(connection: socket.socket) -> bytes:
    """All that is still said on it; it must end."""
    said = b""
    try:
        while chunk := connection.recv(65536):
            said += chunk
    except ConnectionResetError:
        pass
    return said


def test_a_scrape_gets_the_exposition_and_the_connection_ends(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _, body = ends(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and b"connection: close" in head
    assert b"content-type: text/plain; version=0.0.4; charset=utf-8" in head
    assert body.startswith(b"m ")


def test_head_is_the_same_without_the_body(served: Served) -> None:
    status, headers, body = served.ask("HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) == len(served.ask()[2])


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/jobs", "/v1/host", "/openapi.json", "/metrics/", "//metrics"])
def test_there_is_nothing_else(served: Served, path: str) -> None:
    assert served.ask(path=path)[0] == 404
    assert served.ask("POST", path, b"{}")[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_done(served: Served, method: str) -> None:
    status, headers, _ = served.ask(method, body=b"x" * 100)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_who_asks_again_at_once_is_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrapes, "FRESH", 3600)
    with serving() as served:
        assert {served.ask()[2] for _ in range(5)} == {b"m 1\n"}
        monkeypatch.setattr(scrapes, "FRESH", 0)
        monkeypatch.setattr(scrapes, "REST", 0)
        assert served.ask()[2] == b"m 2\n"


def test_what_takes_long_to_make_is_made_the_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrapes, "FRESH", 0)
    with serving(slow=0.2) as served:
        assert {served.ask()[2] for _ in range(5)} == {b"m 1\n"}


def test_a_crowd_is_let_in_by_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio accepts as many in one turn of the loop as the backlog has."""
    accepted: list[int] = []
    real = asyncio.base_events.Server._start_serving  # type: ignore[attr-defined]

    def started(server: Any) -> None:
        accepted.append(server._backlog)
        real(server)

    monkeypatch.setattr(asyncio.base_events.Server, "_start_serving", started)
    with serving() as served:
        assert served.ask()[0] == 200
    assert accepted == [4]


def test_a_head_that_is_too_long_is_refused(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nx: " + b"y" * 2000)
        assert ends(connection).startswith(b"HTTP/1.1 400 ")
    with served.connect() as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 800 + b"\r\n\r\n")
        assert ends(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\n", b"GET /metrics HTTP/1.1\r\nhost: x\r\n"])
def test_who_does_not_go_on_is_cut(sent: bytes) -> None:
    with serving(timeout=0.3) as served, served.connect() as connection:
        connection.sendall(sent)
        began = time.monotonic()
        assert ends(connection) == b""
        assert time.monotonic() - began < 5


def test_who_sends_byte_by_byte_is_cut_in_the_same_time() -> None:
    with serving(timeout=0.5) as served, served.connect() as connection:
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 8:
                connection.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() - began < 6


def refused(served: Served) -> bool:
    try:
        return served.ask(path="/nothing")[0] != 404
    except (OSError, http.client.HTTPException):
        return True


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_who_reads_nothing_gives_his_place_back_in_the_same_time() -> None:
    with serving(timeout=1, max_connections=1, size=32 << 20) as served, served.connect() as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        until(lambda: served.rendered)
        until(lambda: not refused(served))
        assert len(ends(connection)) < 32 << 20


def test_more_connections_than_there_may_be_are_closed() -> None:
    with serving(max_connections=2, timeout=60, size=32 << 20) as served:
        with served.connect() as one, served.connect() as two:
            for unread in (one, two):
                unread.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
                assert unread.recv(12) == b"HTTP/1.1 200"
            until(lambda: refused(served))
        until(lambda: not refused(served))


def test_the_oldest_that_has_not_sent_its_head_makes_room() -> None:
    """Those who are being answered stay."""
    with (
        serving(max_connections=3, timeout=60, size=32 << 20) as served,
        served.connect() as unread,
        served.connect() as old,
        served.connect() as young,
    ):
        unread.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        assert unread.recv(12) == b"HTTP/1.1 200"
        for silent in (old, young):
            silent.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n")
        assert served.ask(path="/nothing")[0] == 404
        assert ends(old) == b""
        young.sendall(b"connection: close\r\n\r\n")
        assert young.recv(12) == b"HTTP/1.1 200"
        assert len(ends(unread)) >= 32 << 20


def test_ipv6(served: Served) -> None:
    try:
        with serving(("::1", 0)) as other:
            assert other.ask()[0] == 200
    except AgentError as error:
        pytest.skip(f"no IPv6 here: {error.message}")


def test_an_address_that_is_taken_is_refused_by_name(served: Served) -> None:
    with pytest.raises(AgentError) as refused:
        scrapes.listener_of(served.address, 4)
    assert (refused.value.field, refused.value.value) == ("metrics.listen", f"127.0.0.1:{served.address[1]}")
    assert "Address already in use" in refused.value.message
