"""Another data daemon as the place of images: the promises of a backend over ours and over ovirt-imageio, its ends, and
what clients see through a daemon that stands before another one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostagent.data.backends.base import ImageBackend
from hostagent.data.backends.http import daemons
from hostagent.data.backends.origin import ProxyWaits
from hostagent.data.backends.registry import Opening
from hostagent.data.streams import PeerGone, Stopped
from hostagent.errors import AgentError
from hostagent.extents import merged
from tests.contract.backend_guards import StallSuite, ended_by
from tests.contract.backend_laws import ExtentsSuite
from tests.contract.backend_suite import MIB, Collected, Given, RangeSuite, Rig, pattern
from tests.data.both import OURS, THEIRS
from tests.data.daemons import Daemon, Imageio, Ours
from tests.data.exports import Qsd
from tests.data.pki import Pki
from tests.harness import overlay, stand_still

SIZE = 6 * MIB + 5 * 512
HERE = ["127.0.0.1"]


def opened(
    url: str, *, writable: bool = False, ca: Path | None = None, waits: ProxyWaits | None = None
) -> ImageBackend:
    return daemons(HERE, ca, waits or ProxyWaits())(Opening(url, SIZE, writable=writable))


def with_holes(path: Path) -> Path:
    with path.open("wb") as image:
        image.truncate(SIZE)
        for offset in (0, 2 * MIB, SIZE - 4096):
            image.seek(offset)
            image.write(pattern(4096, offset % 101))
    return path


class ProxySuite(RangeSuite, ExtentsSuite, StallSuite):
    @abstractmethod
    def origin(self, folder: Path) -> Daemon:
        """The other daemon."""

    @contextlib.contextmanager
    def make(self, folder: Path) -> Iterator[Rig]:
        path = with_holes(folder / "disk.raw")
        with self.origin(folder) as daemon:

            def open_(writable: bool = True) -> ImageBackend:
                ops = ("read", "write") if writable else ("read",)
                return opened(daemon.url(daemon.ticket(f"file://{path}", SIZE, *ops)), writable=writable)

            yield Rig(open_, path.read_bytes(), path.read_bytes, lambda: stopped(daemon))


@contextlib.contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    stand_still(daemon.pid)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
        time.sleep(0.1)  # a SIGTERM that comes too soon goes to some other thread, which has nobody woken


class TestOurs(ProxySuite):
    def origin(self, folder: Path) -> Daemon:
        return Ours(folder)


class TestImageio(ProxySuite):
    def origin(self, folder: Path) -> Daemon:
        return Imageio(folder)


# What is asked of whom


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.2:1/images/x", "denied"),
        ("http://127.0.0.1.example/images/x", "denied"),
        ("http://127.0.0.1:1/tickets/x", "invalid"),
        ("http://127.0.0.1:1/images/", "invalid"),
        ("http://127.0.0.1:1/images/x/../../tickets/x", "invalid"),
        ("http://127.0.0.1:1/images/x?a=b", "invalid"),
        ("http://me@127.0.0.1:1/images/x", "invalid"),
        ("http://127.0.0.1:99999/images/x", "invalid"),
        ("http:///images/x", "invalid"),
    ],
)
def test_only_images_of_allowed_daemons_are_asked_for(url: str, code: str) -> None:
    with pytest.raises(AgentError) as caught:
        opened(url)
    assert caught.value.code == code
    assert caught.value.remedy


def test_a_port_that_is_not_allowed_is_not_asked() -> None:
    factory = daemons(["127.0.0.1:54322"], None, ProxyWaits())
    factory(Opening("https://127.0.0.1:54322/images/x", 1))
    with pytest.raises(AgentError, match="54323"):
        factory(Opening("https://127.0.0.1:54323/images/x", 1))


@pytest.fixture(params=[OURS, THEIRS])
def origin(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    with request.param(tmp_path) as daemon:
        yield daemon


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return with_holes(tmp_path / "disk.raw")


def code(call: Callable[[], object]) -> AgentError:
    with pytest.raises(AgentError) as caught:
        call()
    assert caught.value.remedy
    return caught.value


def test_what_it_can_is_what_the_other_daemon_says(origin: Daemon, image: Path) -> None:
    with opened(origin.url(origin.ticket(f"file://{image}", SIZE)), writable=True) as backend:
        assert backend.get_capabilities() == {"read_only": True, "can_flush": False, "can_zero": False}
        assert backend.max_readers == 8
        assert code(lambda: backend.write(b"x", 0)).code == "denied"
    assert image.read_bytes() == with_holes(image.with_name("again")).read_bytes()


def test_a_ticket_that_is_no_more_is_refused_without_its_name(origin: Daemon, image: Path) -> None:
    ticket = origin.ticket(f"file://{image}", SIZE)
    with opened(origin.url(ticket)) as backend:
        assert backend.read(0, 4096) == image.read_bytes()[:4096]
        assert origin.delete(ticket).status == 204
        error = code(lambda: backend.read(0, 10))
        assert error.code in ("denied", "unavailable")
    with opened(origin.url(ticket)) as backend:
        error = code(backend.size)
        assert error.code == "denied"
        assert ticket not in f"{error.message}{error.remedy}{error.details}"


def test_extents_of_layers_and_bitmaps_are_passed_on(origin: Daemon, image: Path, tmp_path: Path) -> None:
    top = overlay(tmp_path / "top.qcow2", image)
    with (
        Qsd(top, "qcow2", read_only=True) as export,
        origin.tcp() as wire,
        opened(origin.url(origin.ticket(export.url, SIZE))) as backend,
    ):
        told = wire.ask("GET", f"/images/{origin.ticket(export.url, SIZE)}/extents").json
        assert [one._asdict() for one in merged(backend.extents(0, SIZE))] == told
        part = list(backend.extents(MIB + 1, 2 * MIB))
        assert part[0].start == MIB + 1
        assert sum(one.length for one in part) == 2 * MIB
        assert code(lambda: list(backend.dirty_extents(0, SIZE))).code == "not_found"


def test_extents_that_are_left_half_read_disturb_nothing(origin: Daemon, image: Path) -> None:
    with opened(origin.url(origin.ticket(f"file://{image}", SIZE))) as backend:
        found = backend.extents(0, SIZE)
        first = next(found)
        assert backend.read(0, 100) == image.read_bytes()[:100]
        assert [first, *found][-1].length > 0


# Ends


def test_a_full_disk_over_there_is_said_so(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts need root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(small)], check=True)
    try:
        image = small / "disk.raw"
        with image.open("wb") as file:
            file.truncate(SIZE)
        with Ours(tmp_path) as origin:
            url = origin.url(origin.ticket(f"file://{image}", SIZE, "read", "write"))
            with opened(url, writable=True) as backend:
                data = pattern(SIZE)
                assert code(lambda: backend.write_from(Given(data), 0, len(data))).code == "no_space"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_connection_that_ended_between_two_requests_is_made_again(origin: Daemon, image: Path) -> None:
    with opened(origin.url(origin.ticket(f"file://{image}", SIZE))) as backend:
        assert backend.read(0, 10) == image.read_bytes()[:10]
        backend.origin._socket.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
        assert backend.read(0, 10) == image.read_bytes()[:10]


def test_writes_that_may_be_lost_are_never_flushed_by_another_connection(origin: Daemon, image: Path) -> None:
    url = origin.url(origin.ticket(f"file://{image}", SIZE, "read", "write"))
    with opened(url, writable=True) as backend:
        backend.write(b"x" * 512, 0)
        backend.origin._socket.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
        assert code(backend.flush).code == "io_error"
        assert code(backend.flush).code == "io_error"
        assert code(lambda: backend.write(b"x", 0)).code == "io_error"
    with opened(url, writable=True) as backend:
        backend.write(b"y" * 512, 0)
        backend.flush()
        backend.origin._socket.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
        backend.flush()


def test_a_flush_says_nothing_of_what_another_connection_wrote(origin: Daemon, image: Path) -> None:
    """The other host may have lost its power since: no connection that is idle tells of that."""
    with opened(origin.url(origin.ticket(f"file://{image}", SIZE, "read", "write")), writable=True) as backend:
        assert not backend.flush_covers_all


def test_a_client_that_breaks_off_leaves_no_half_request(origin: Daemon, image: Path) -> None:
    url = origin.url(origin.ticket(f"file://{image}", SIZE, "read", "write"))
    with opened(url, writable=True) as backend, pytest.raises((Stopped, PeerGone)):
        backend.write_from(Given(pattern(SIZE), stop=2 * MIB), 0, SIZE)
    with opened(url, writable=True) as backend:
        assert backend.read(0, 2 * MIB) == pattern(2 * MIB)
        assert backend.read(4 * MIB, 100) == with_holes(image.with_name("again")).read_bytes()[4 * MIB : 4 * MIB + 100]


def test_a_daemon_that_was_killed_is_said_to_be(image: Path, tmp_path: Path) -> None:
    with Ours(tmp_path) as origin:
        backend = opened(origin.url(origin.ticket(f"file://{image}", SIZE)))
        session = backend.open_session()
        sink = Collected()
        real = sink.write

        def write(data: memoryview | bytes | bytearray) -> None:
            if not sink.data:
                origin.kill()
            real(data)

        sink.write = write  # type: ignore[method-assign]
        error = code(lambda: session.copy_to(sink, 0, SIZE))
        assert error.code == "unavailable"
        assert len(sink.data) < SIZE
        assert code(lambda: backend.read(0, 1)).code == "unavailable"


def test_nobody_is_waited_for_longer_than_said(tmp_path: Path, image: Path) -> None:
    with Ours(tmp_path) as origin:
        url = origin.url(origin.ticket(f"file://{image}", SIZE))
        with opened(url, waits=ProxyWaits(silence=2.0)) as backend:
            backend.size()
            with stopped(origin):
                error = code(lambda: backend.read(0, 1))
            assert error.code == "timeout"
            assert "data.proxy_timeout" in error.message


def test_a_fence_ends_a_handshake_that_hangs(pki: Pki) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        backend = opened(f"https://127.0.0.1:{silent.getsockname()[1]}/images/x", ca=pki.ca)
        assert isinstance(ended_by(backend.fence, backend.size), Stopped | AgentError)


# TLS


def test_a_certificate_is_verified(pki: Pki, tmp_path: Path, image: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with Ours(tmp_path, tls=pki) as origin:
        url = origin.url(origin.ticket(f"file://{image}", SIZE))
        with opened(url, ca=pki.ca) as backend:
            assert backend.read(0, SIZE) == image.read_bytes()
        for authority in (Pki(other).ca, None):
            error = code(opened(url, ca=authority).size)
            assert error.code == "unavailable"
            assert "data.proxy_ca" in (error.remedy or "")
        assert code(opened(url.replace("https", "http")).size).code == "unavailable"


def test_an_authority_that_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    assert "data.proxy_ca" in (code(lambda: opened("https://127.0.0.1/images/x", ca=tmp_path / "none")).remedy or "")


# What is no data daemon


@contextlib.contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """A server that reads a request's head and gives the next of these answers; the last again and again."""
    listener = socket.create_server(("127.0.0.1", 0))
    left = list(answers)

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(10)
            while connection.recv(65536):
                connection.sendall(left.pop(0) if len(left) > 1 else left[0])

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/images/secret"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def http(status: str, body: str = "", *headers: str) -> bytes:
    head = "".join(f"{one}\r\n" for one in (*headers, f"Content-Length: {len(body)}"))
    return f"HTTP/1.1 {status}\r\n{head}\r\n{body}".encode()


OPTIONS = http("200 OK", json.dumps({"features": ["extents"], "size": 100}), "Allow: OPTIONS,GET")


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        http("200 OK", "x" * 100, "Content-Range: bytes 0-9/100"),
        http("206 Partial", "x" * 10, "Content-Range: bytes 10-19/100"),
        http("206 Partial", "x" * 9, "Content-Range: bytes 0-9/100"),
        b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-9/100\r\n\r\n0123456789",
        http("302 Found", "", "Location: http://127.0.0.1/images/other"),
        http("500 Oops", "what secret is\x1b[31m this"),
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000,
    ],
)
def test_a_strange_download_is_refused(answer: bytes) -> None:
    with answering(OPTIONS, answer) as url, opened(url) as backend:
        error = code(lambda: backend.read(0, 10))
        assert error.code == "unavailable"
        assert "secret" not in error.message
        assert "\x1b" not in error.message


@pytest.mark.parametrize("answer", [http("200 OK", "[]"), http("200 OK", "nonsense"), http("200 OK", "x" * 100_000)])
def test_strange_options_are_refused(answer: bytes) -> None:
    with answering(answer) as url, opened(url) as backend:
        assert code(backend.size).code == "unavailable"


def test_an_old_daemon_without_options_is_believed_to_do_little() -> None:
    whole = http("200 OK", "x" * 100)
    with answering(http("405 No"), whole) as url, opened(url, writable=True) as backend:
        assert backend.size() == 100
        assert (backend.max_readers, backend.max_writers) == (1, 1)
        assert not backend.supports_extents
        assert code(backend.flush).code == "not_supported"
        assert code(lambda: list(backend.extents(0, 10))).code == "not_supported"


@pytest.mark.parametrize(
    "extents",
    [
        "{}",
        "[]",
        '[{"start": 0, "length": 50, "zero": true}]',
        '[{"start": 0, "length": 50, "zero": true}, {"start": 60, "length": 40, "zero": true}]',
        '[{"start": 10, "length": 90, "zero": true}]',
        '[{"start": 0, "length": 0, "zero": true}]',
        '[{"start": 0, "length": true, "zero": true}]',
        '[{"start": 0, "length": 100, "zero": 1}]',
        '[{"start": 0, "length": 1e2, "zero": true}]',
        "[1]",
    ],
)
def test_strange_extents_are_refused(extents: str) -> None:
    with answering(OPTIONS, http("200 OK", extents)) as url, opened(url) as backend:
        assert code(lambda: list(backend.extents(0, 100))).code == "unavailable"


# Through a whole daemon


@pytest.fixture
def before(tmp_path: Path) -> Iterator[Daemon]:
    """Stands before the other one."""
    folder = tmp_path / "before"
    folder.mkdir()
    with Ours(folder, settings={"proxy": HERE}) as daemon:
        yield daemon


def test_a_client_works_through_it_as_with_the_other_one(before: Daemon, origin: Daemon, image: Path) -> None:
    there = origin.ticket(f"file://{image}", SIZE, "read", "write")
    ticket = before.ticket(origin.url(there), SIZE, "read", "write")
    expected = bytearray(image.read_bytes())
    with before.tcp() as wire:
        assert wire.ask("OPTIONS", f"/images/{ticket}").json["max_readers"] == 8
        assert wire.ask("GET", f"/images/{ticket}").body == expected
        data = pattern(3 * MIB, 5)
        head = {"Content-Range": f"bytes {MIB}-{4 * MIB - 1}/*"}
        assert wire.ask("PUT", f"/images/{ticket}", head, data).status == 200
        expected[MIB : 4 * MIB] = data
        zero = {"op": "zero", "offset": 2 * MIB + 5, "size": 1000, "flush": True}
        assert wire.ask_json("PATCH", f"/images/{ticket}", zero).status == 200
        expected[2 * MIB + 5 : 2 * MIB + 1005] = bytes(1000)
        assert wire.ask("GET", f"/images/{ticket}", {"Range": "bytes=100-5000000"}).body == expected[100:5000001]
        assert sum(one["length"] for one in wire.ask("GET", f"/images/{ticket}/extents").json) == SIZE
        sums = [wire.ask("GET", f"/images/{ticket}/checksum").json["checksum"]]
    assert image.read_bytes() == expected
    assert origin.delete(there).status == 204  # nobody has it open for writing then
    with origin.tcp() as wire:
        direct = origin.ticket(f"file://{image}", SIZE)
        sums.append(wire.ask("GET", f"/images/{direct}/checksum").json["checksum"])
    assert sums[0] == sums[1]


def test_a_revocation_reaches_a_download_of_a_daemon_that_hangs(before: Daemon, origin: Daemon, image: Path) -> None:
    ticket = before.ticket(origin.url(origin.ticket(f"file://{image}", SIZE)), SIZE)
    with before.tcp() as wire:
        assert wire.ask("GET", f"/images/{ticket}", {"Range": "bytes=0-9"}).status == 206
        with stopped(origin):
            wire.request("GET", f"/images/{ticket}")
            time.sleep(0.3)
            assert before.delete(ticket).status == 204


def test_a_place_that_is_not_allowed_gives_no_ticket(before: Daemon) -> None:
    ticket = {"uuid": "x", "size": 1, "ops": ["read"], "timeout": 10, "url": "https://elsewhere.example/images/x"}
    assert before.put(ticket).status == 403
