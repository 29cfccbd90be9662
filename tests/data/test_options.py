"""OPTIONS of an image, CORS, /info/, and what has no route."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.both import only_ours
from tests.data.daemons import Daemon
from tests.data.exports import QemuNbd
from tests.data.table import Answer, Row, check, refused
from tests.data.wire import Wire

SIZE = 1 << 20
READ, WRITE = "OPTIONS,GET", "OPTIONS,GET,PUT,PATCH"


@pytest.fixture(scope="module")
def export(home: Path) -> Iterator[QemuNbd]:
    image = home / "image.raw"
    image.write_bytes(bytes(SIZE))
    with QemuNbd(image) as server:
        yield server


def methods(wire: Wire, target: str) -> set[str]:
    return {method.strip() for method in (wire.ask("OPTIONS", target).get("allow") or "").split(",")}


@pytest.mark.parametrize(
    ("ops", "allow", "features"),
    [
        pytest.param(["read"], READ, ["checksum", "extents"], id="read"),
        pytest.param(["write"], WRITE, ["checksum", "extents", "flush", "zero"], id="write"),
        pytest.param(["read", "write"], WRITE, ["checksum", "extents", "flush", "zero"], id="both"),
    ],
)
def test_options_say_what_this_ticket_may_do(
    daemon: Daemon, export: QemuNbd, ops: list[str], allow: str, features: list[str]
) -> None:
    ticket = daemon.ticket(export.url, SIZE, *ops)
    with daemon.tcp() as wire:
        reply = wire.ask("OPTIONS", f"/images/{ticket}")
        assert reply.status == 200
        assert set(allow.split(",")) <= methods(wire, f"/images/{ticket}") <= set(allow.split(",")) | {"HEAD"}
    said = reply.json
    assert said["features"] == features
    assert said["unix_socket"] == daemon.local_path
    assert said["max_readers"] >= 1 and said["max_writers"] >= 1


def test_options_of_everything_need_no_ticket(daemon: Daemon) -> None:
    with daemon.tcp() as wire:
        said = wire.ask("OPTIONS", "/images/*").json
        assert set(WRITE.split(",")) <= methods(wire, "/images/*") <= {*WRITE.split(","), "HEAD"}
    assert said["features"] == ["checksum", "extents", "flush", "zero"]
    assert said["unix_socket"] == daemon.local_path
    assert "max_readers" not in said or daemon.name == "ours"


@only_ours
def test_options_tell_what_a_client_would_have_to_guess(daemon: Daemon, export: QemuNbd) -> None:
    ticket = daemon.ticket(export.url, SIZE)
    with daemon.tcp() as wire:
        said = wire.ask("OPTIONS", f"/images/{ticket}").json
    assert said["size"] == SIZE
    assert said["block_size"] >= 1


def test_as_many_readers_as_options_promise_are_served_at_once(daemon: Daemon, export: QemuNbd) -> None:
    ticket = daemon.ticket(export.url, SIZE)
    with daemon.tcp() as wire:
        most = wire.ask("OPTIONS", f"/images/{ticket}").json["max_readers"]
    with contextlib.ExitStack() as open_:
        for wire in [open_.enter_context(daemon.tcp()) for _ in range(most)]:
            assert wire.ask("GET", f"/images/{ticket}").body == bytes(SIZE)


@only_ours
def test_an_nbd_server_that_takes_fewer_connections_than_it_let_hope_for(
    daemon: Daemon, home: Path, tmp_path: Path
) -> None:
    """qemu-nbd accepts what it was told to share, says of none that it is the last, and lets further ones wait: theirs
    waits with it for ever."""
    with QemuNbd(home / "image.raw", shared=2, read_only=True) as server, contextlib.ExitStack() as open_:
        hasty = open_.enter_context(type(daemon)(tmp_path, settings={"nbd_connect_timeout": 1.0}))
        ticket = hasty.ticket(server.url, SIZE)
        wires = [open_.enter_context(hasty.tcp()) for _ in range(3)]
        for wire in wires[:2]:
            assert wire.ask("GET", f"/images/{ticket}").body == bytes(SIZE)
        assert wires[2].ask("GET", f"/images/{ticket}").status in (503, 504)
        assert wires[0].ask("GET", f"/images/{ticket}").body == bytes(SIZE)


@only_ours
def test_a_read_only_export_is_never_said_to_be_writable(daemon: Daemon, home: Path) -> None:
    with QemuNbd(home / "image.raw", read_only=True) as server:
        ticket = daemon.ticket(server.url, SIZE, "read", "write")
        with daemon.tcp() as wire:
            assert not methods(wire, f"/images/{ticket}") & {"PUT", "PATCH"}
            assert not {"zero", "flush"} & set(wire.ask("OPTIONS", f"/images/{ticket}").json["features"])
            assert wire.ask("PUT", f"/images/{ticket}", None, b"x").status == 403
        with daemon.tcp() as wire:
            assert wire.ask_json("PATCH", f"/images/{ticket}", {"op": "zero", "size": 1}).status == 403


FORBIDDEN = refused(403, "^You are not allowed to access this resource: ", closes=True)


@pytest.mark.parametrize("method", ["OPTIONS", "GET", "PUT", "PATCH"])
@pytest.mark.parametrize("path", ["/images/nobody", "/images/%2e%2e", "/images/%00", "/images/nobody%0d%0aX:%20y"])
def test_without_a_ticket_nothing_is_told_and_the_connection_ends(daemon: Daemon, method: str, path: str) -> None:
    body = {"GET": None, "OPTIONS": None, "PUT": b"xx", "PATCH": b'{"op": "flush"}'}[method]
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", method, path, FORBIDDEN, body=body))


@pytest.mark.parametrize("path", ["/images/nobody/extents", "/images/nobody/checksum"])
def test_nor_are_extents_and_checksums(daemon: Daemon, path: str) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", "GET", path, refused(403, "^You are not allowed to access this resource: ")))


@pytest.mark.parametrize("method", ["OPTIONS", "GET", "PUT", "PATCH"])
def test_an_id_is_required(daemon: Daemon, method: str) -> None:
    body = {"GET": None, "OPTIONS": None, "PUT": b"xx", "PATCH": b'{"op": "flush"}'}[method]
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", method, "/images/", refused(400, "Ticket id is required"), body=body))


# CORS


def test_a_browser_may_ask_before_it_asks(daemon: Daemon) -> None:
    asked = {
        "Origin": "https://engine",
        "Access-Control-Request-Headers": "Range",
        "Access-Control-Request-Method": "PUT",
    }
    answer = Answer(
        200,
        {"access-control-allow-origin": "*", "access-control-allow-headers": "*", "access-control-max-age": "86400"},
    )
    with daemon.tcp() as wire:
        reply = check(daemon, wire, Row("", "OPTIONS", "/images/*", answer, headers=asked))
    assert reply and {"OPTIONS", "GET", "PUT"} <= set((reply.get("access-control-allow-methods") or "").split(","))


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/images/nobody"), ("PUT", "/images/nobody"), ("OPTIONS", "/images/nobody"), ("GET", "/info/")],
)
def test_a_script_of_another_origin_may_read_the_answer_also_when_it_is_an_error(
    daemon: Daemon, method: str, path: str
) -> None:
    with daemon.tcp() as wire:
        reply = wire.ask(method, path, {"Origin": "https://engine"}, b"x" if method == "PUT" else None)
        assert reply.get("access-control-allow-origin") == "*", reply
    with daemon.tcp() as wire:
        reply = wire.ask(method, path, None, b"x" if method == "PUT" else None)
        assert reply.get("access-control-allow-origin") is None, reply


# The rest


def test_what_an_image_has_not_is_not_found(daemon: Daemon) -> None:
    """Theirs takes it for the id of another ticket, and a typing error for a lack of rights."""
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", "GET", "/images/nobody/extent", refused(404, "."), refused(403, ".")))


def test_info_tells_a_version(daemon: Daemon) -> None:
    with daemon.tcp() as wire:
        assert isinstance(wire.ask("GET", "/info/").json["version"], str)


@pytest.mark.parametrize("path", ["/", "/info", "/images", "/tickets/x", "/nothing", "/image/x", "/metrics"])
def test_what_has_no_route_is_not_found(daemon: Daemon, path: str) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", "GET", path, refused(404, ".")))


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/images/x"), ("DELETE", "/images/x"), ("PUT", "/images/x/extents")]
)
def test_a_method_that_a_resource_has_not(daemon: Daemon, method: str, path: str) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", method, path, refused(405, "Method .* not defined for|not allowed")))


@pytest.mark.parametrize("method", ["FOO", "TRACE", "CONNECT", "get"])
def test_a_method_that_nothing_has(daemon: Daemon, method: str) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", method, "/images/x", Answer(405)))


def test_the_local_socket_serves_images_and_no_tickets(daemon: Daemon, export: QemuNbd) -> None:
    ticket = daemon.ticket(export.url, SIZE)
    with daemon.local() as wire:
        check(daemon, wire, Row("", "GET", f"/images/{ticket}", Answer(200, {}, bytes(SIZE))))
        check(daemon, wire, Row("", "GET", "/tickets/x", refused(404, ".")))


def test_the_control_socket_serves_tickets_and_no_images(daemon: Daemon, export: QemuNbd) -> None:
    ticket = daemon.ticket(export.url, SIZE)
    with daemon.control() as wire:
        reply = wire.ask("GET", f"/images/{ticket}")
    assert reply.status == 404


@only_ours
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/images/nobody", 403), ("GET", "/nothing", 404), ("POST", "/images/x", 405), ("GET", "/images/", 400)],
)
def test_problem_details_for_who_asks_for_them(daemon: Daemon, method: str, path: str, status: int) -> None:
    """RFC 9457."""
    with daemon.tcp() as wire:
        reply = wire.ask(method, path, {"Accept": "application/problem+json"})
    assert reply.get("content-type") == "application/problem+json"
    assert reply.json["status"] == reply.status == status
    assert reply.json["detail"] and reply.json["title"] and reply.json["code"]
