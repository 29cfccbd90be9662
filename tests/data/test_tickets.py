"""Tickets on the control socket."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.data.both import only_ours
from tests.data.daemons import Daemon, Ours
from tests.data.exports import QemuNbd
from tests.data.table import Answer, compare, refused
from tests.data.wire import PATIENCE, Reply

SIZE = 1 << 20


@pytest.fixture(scope="module")
def image(home: Path) -> Path:
    path = home / "image.raw"
    path.write_bytes(b"x" * SIZE)
    return path


@pytest.fixture(scope="module")
def export(image: Path) -> Iterator[QemuNbd]:
    with QemuNbd(image) as server:
        yield server


def ask(daemon: Daemon, method: str, path: str, value: Any = None) -> Reply:
    with daemon.control() as wire:
        body = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
        return wire.ask(method, path, None, body)


def ticket(export: QemuNbd, **fields: Any) -> dict[str, Any]:
    usual = {"uuid": str(uuid.uuid4()), "size": SIZE, "ops": ["read"], "timeout": 300, "url": export.url}
    return {key: value for key, value in (usual | fields).items() if value is not LEFT_OUT}


LEFT_OUT = object()


def may_read(daemon: Daemon, ticket_id: str) -> bool:
    with daemon.tcp() as wire:
        reply = wire.ask("GET", f"/images/{ticket_id}", {"Range": "bytes=0-0"})
        assert reply.status in (206, 403), reply
        return reply.status == 206


# The protocol that engines use


def test_a_ticket_from_its_first_to_its_last_day(daemon: Daemon, export: QemuNbd) -> None:
    one = ticket(export, transfer_id="a transfer", filename="disk.raw", sparse=True)
    path = f"/tickets/{one['uuid']}"
    assert ask(daemon, "GET", path).status == 404
    compare(ask(daemon, "PUT", path, one), Answer(200, {"content-length": "0"}, b""))
    shown = ask(daemon, "GET", path).json
    for field in ("uuid", "size", "ops", "timeout", "url", "transfer_id", "filename", "sparse"):
        assert shown[field] == one[field], field
    more = {"active": False, "canceled": False, "connections": 0, "idle_time": 0, "dirty": False, "transferred": 0}
    assert {key: shown[key] for key in more} == more
    assert isinstance(shown["expires"], int) and isinstance(shown["inactivity_timeout"], int)
    assert may_read(daemon, one["uuid"])
    compare(ask(daemon, "DELETE", path), Answer(204, {"content-length": "0"}, b""))
    assert not may_read(daemon, one["uuid"])
    compare(ask(daemon, "GET", path), refused(404, "No such ticket"))
    assert ask(daemon, "DELETE", path).status == 204, "to delete it again is no error"


def test_what_was_transferred_is_counted_once(daemon: Daemon, export: QemuNbd) -> None:
    one = daemon.ticket(export.url, SIZE)
    with daemon.tcp() as wire:
        for _ in range(3):
            wire.ask("GET", f"/images/{one}", {"Range": "bytes=0-99999"})
        wire.ask("GET", f"/images/{one}", {"Range": "bytes=50000-199999"})
        assert eventually(lambda: daemon.show(one)["transferred"] == 200000), daemon.show(one)
        assert daemon.show(one)["connections"] == 1
    assert eventually(lambda: daemon.show(one)["connections"] == 0)


def test_a_running_stream_makes_its_ticket_active(daemon: Daemon, home: Path) -> None:
    large = home / "large.raw"
    with large.open("wb") as file:
        file.truncate(64 << 20)
    with QemuNbd(large, read_only=True) as server, daemon.tcp() as wire:
        one = daemon.ticket(server.url, 64 << 20)
        wire.request("GET", f"/images/{one}")
        wire.head()
        assert eventually(lambda: daemon.show(one)["active"])
        assert daemon.show(one)["idle_time"] == 0


def test_more_time_may_be_given_and_taken(daemon: Daemon, export: QemuNbd) -> None:
    one = daemon.ticket(export.url, SIZE)
    before = daemon.show(one)["expires"]
    assert ask(daemon, "PATCH", f"/tickets/{one}", {"timeout": 1000}).status == 200
    after = daemon.show(one)
    assert 690 <= after["expires"] - before <= 710 and after["timeout"] == 300
    assert ask(daemon, "PATCH", f"/tickets/{one}", {"timeout": 0}).status == 200
    assert not may_read(daemon, one)
    assert ask(daemon, "PATCH", f"/tickets/{one}", {"timeout": 300}).status == 200
    assert may_read(daemon, one), "also an expired one may be extended"
    compare(ask(daemon, "PATCH", "/tickets/nobody", {"timeout": 1}), refused(404, "No such ticket"))


def test_a_ticket_expires_and_each_use_puts_that_off(daemon: Daemon, export: QemuNbd) -> None:
    one = daemon.ticket(export.url, SIZE, timeout=2)
    for _ in range(5):
        time.sleep(0.7)
        assert may_read(daemon, one)
    assert eventually(lambda: not may_read(daemon, one), every=2.5)


def eventually(done: Any, every: float = 0.02) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(every)
        if done():
            return True
    return False


@pytest.mark.parametrize("op", [["read"], ["write"], ["read", "write"]])
def test_who_may_write_may_read(daemon: Daemon, export: QemuNbd, op: list[str]) -> None:
    assert may_read(daemon, daemon.ticket(export.url, SIZE, *op))


def test_nothing_is_allowed_by_a_ticket_for_nothing(daemon: Daemon, export: QemuNbd) -> None:
    one = ticket(export, ops=[])
    assert daemon.put(one).status == 200
    assert not may_read(daemon, one["uuid"])


# What is no ticket

MISSING = [(field, "Required ticket parameter is missing") for field in ("uuid", "size", "ops", "timeout", "url")]
WRONG: list[tuple[str, Mapping[str, Any], Answer | None]] = [
    ("size-is-text", {"size": "1"}, None),
    ("size-is-null", {"size": None}, None),
    ("size-is-a-float", {"size": 1.5}, None),
    ("ops-is-text", {"ops": "read"}, None),
    ("timeout-is-text", {"timeout": "300"}, None),
    ("url-is-a-number", {"url": 7}, None),
    ("url-without-scheme", {"url": "/dev/null"}, None),
    ("unknown-scheme", {"url": "foo:bar"}, None),
    ("transfer-id-is-a-number", {"transfer_id": 7}, None),
    ("filename-is-a-list", {"filename": ["x"]}, None),
    ("sparse-is-text", {"sparse": "yes"}, None),
    ("dirty-is-a-number", {"dirty": 1}, None),
    ("inactivity-timeout-is-text", {"inactivity_timeout": "60"}, None),
    # Theirs takes these.
    ("size-is-negative", {"size": -1}, Answer(200)),
    ("size-is-true", {"size": True}, Answer(200)),
    ("size-is-enormous", {"size": 2**64}, Answer(200)),
    ("timeout-is-negative", {"timeout": -1}, Answer(200)),
    ("timeout-is-true", {"timeout": True}, Answer(200)),
    ("unknown-op", {"ops": ["read", "destroy"]}, Answer(200)),
    ("op-is-a-number", {"ops": [1]}, Answer(200)),
]


@pytest.mark.parametrize(("field", "message"), MISSING)
def test_what_a_ticket_must_have(daemon: Daemon, export: QemuNbd, field: str, message: str) -> None:
    one = ticket(export, **{field: LEFT_OUT})
    reply = ask(daemon, "PUT", f"/tickets/{one.get('uuid', 'some')}", one)
    compare(reply, refused(400, f"Invalid ticket: {message}: {field}"))


@pytest.mark.parametrize(("_name", "fields", "flaw"), WRONG, ids=[name for name, _, _ in WRONG])
def test_what_is_wrong_is_named_and_makes_no_ticket(
    daemon: Daemon, export: QemuNbd, _name: str, fields: Mapping[str, Any], flaw: Answer | None
) -> None:
    one = ticket(export, **fields)
    expected = refused(400, f"Invalid ticket: .*{next(iter(fields))}")
    compare(daemon.put(one), flaw if flaw and daemon.name == "imageio" else expected)
    if daemon.name == "ours" or not flaw:
        assert ask(daemon, "GET", f"/tickets/{one['uuid']}").status == 404


@pytest.mark.parametrize("body", [b"{", b"", b"nonsense", b'{"uuid": "\xff"}'])
def test_what_is_no_json(daemon: Daemon, body: bytes) -> None:
    compare(ask(daemon, "PUT", "/tickets/x", body), refused(400, "[Jj][Ss][Oo][Nn]|Content-Length"))


@pytest.mark.parametrize("body", [b"[]", b"7", b"null", b'"x"'])
def test_what_is_no_object(daemon: Daemon, body: bytes) -> None:
    compare(ask(daemon, "PUT", "/tickets/x", body), refused(400, "."))


@pytest.mark.parametrize("timeout", ["x", -1, None, 1.5])
def test_what_is_no_time(daemon: Daemon, export: QemuNbd, timeout: Any) -> None:
    one = daemon.ticket(export.url, SIZE)
    compare(ask(daemon, "PATCH", f"/tickets/{one}", {"timeout": timeout}), refused(400, "."))
    assert may_read(daemon, one)


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_an_id_is_required(daemon: Daemon, export: QemuNbd, method: str) -> None:
    body = {"PUT": ticket(export), "PATCH": {"timeout": 1}}[method]
    compare(ask(daemon, method, "/tickets/", body), refused(400, "Ticket id is required"))


@only_ours
def test_the_id_in_the_url_is_the_tickets(daemon: Daemon, export: QemuNbd) -> None:
    """Theirs ignores the one in the URL."""
    one = ticket(export)
    compare(ask(daemon, "PUT", "/tickets/another", one), refused(400, "uuid"))
    assert not may_read(daemon, one["uuid"])


@only_ours
@pytest.mark.parametrize("path", ["/etc/passwd", "relative.raw", "/allowed/../etc/passwd", ""])
def test_only_files_below_the_allowed_folders(tmp_path: Path, daemon: Daemon, path: str) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (tmp_path / "outside.raw").write_bytes(bytes(SIZE))
    (allowed / "link.raw").symlink_to(tmp_path / "outside.raw")
    (allowed / "inside.raw").write_bytes(bytes(SIZE))
    with type(daemon)(tmp_path, settings={"allow_paths": [str(allowed)]}) as strict:
        for name in (path.replace("/allowed", str(allowed)), str(allowed / "link.raw"), str(tmp_path / "outside.raw")):
            one = {"uuid": "a", "size": SIZE, "ops": ["read"], "timeout": 9, "url": f"file://{name}"}
            if strict.put(one).status == 200:
                with strict.tcp() as wire:
                    assert wire.ask("GET", "/images/a").status in (400, 403, 404)
        assert may_read(strict, strict.ticket(f"file://{allowed / 'inside.raw'}", SIZE))


@only_ours
def test_all_tickets_are_listed_with_their_transfers(daemon: Daemon, export: QemuNbd) -> None:
    mine = {daemon.ticket(export.url, SIZE, transfer_id=f"listed-{number}"): f"listed-{number}" for number in range(3)}
    listed = {one["uuid"]: one["transfer_id"] for one in ask(daemon, "GET", "/tickets/").json}
    assert mine.items() <= listed.items()
    last = max(listed)
    assert ask(daemon, "GET", f"/tickets/?after={last}").json == []


def test_ids_reach_no_log(tmp_path: Path, export: QemuNbd, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is logged."""
    monkeypatch.setattr(Ours, "level", "debug")
    with Ours(tmp_path) as fresh:
        one = fresh.ticket(export.url, SIZE, "read", "write", transfer_id="seen")
        gone = f"{uuid.uuid4()}"
        with fresh.tcp() as wire:
            wire.ask("GET", f"/images/{one}")
            wire.ask("PUT", f"/images/{one}", {"Content-Range": "junk"}, b"x")
            wire.ask("GET", f"/images/{one}/extents")
            wire.ask("GET", f"/images/{one}/checksum?algorithm=no")
            wire.send(f"GET /images/{one} junk HTTP/1.1\r\n\r\n".encode())
            assert wire.reply().status == 400
        with fresh.tcp() as wire:
            wire.ask("GET", f"/images/{gone}")
        fresh.put({"uuid": gone, "size": "x"})
        fresh.put({"uuid": gone, "size": -1, "ops": ["read"], "timeout": 1, "url": f"file:///x/{gone}"})
        ask(fresh, "PATCH", f"/tickets/{one}", {"timeout": 10})
        fresh.delete(one)
        fresh.stop()
        log = fresh.log.read_text()
    assert "seen" in log, "the transfer is named"
    assert one not in log and gone not in log


def test_the_control_sockets_table(daemon: Daemon) -> None:
    with daemon.control() as wire:
        for method, path, status in (("POST", "/tickets/x", 405), ("GET", "/tickets", 404), ("GET", "/", 404)):
            assert wire.ask(method, path).status == status, (method, path)
