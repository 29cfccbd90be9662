"""CloudStack's control dialect: register, unregister and status, and what its clients ask of a transfer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hostagent.data.cloudstack import spec_of
from hostagent.data.errors import HttpError
from tests.data.daemons import Ours
from tests.data.exports import Qsd
from tests.data.wire import unix
from tests.zygote import Spawned

SIZE = 4 << 20


class Stack(Ours):
    """Our daemon with CloudStack's socket."""

    @property
    def stack_path(self) -> str:
        return str(self.runtime / "image-server.sock")

    def spawn(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | Spawned:
        self.settings["cloudstack_socket"] = self.stack_path
        return super().spawn(environment)

    def say(self, line: bytes) -> dict[str, Any]:
        with unix(self.stack_path) as sock:
            sock.settimeout(30)
            sock.sendall(line)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := sock.recv(4096):
                answer += piece
            assert answer.endswith(b"\n")
            found: dict[str, Any] = json.loads(answer)
            return found

    def ask(self, action: str, **fields: Any) -> dict[str, Any]:
        return self.say(json.dumps({"action": action, **fields}).encode() + b"\n")

    def register(self, transfer: str, **config: Any) -> None:
        answer = self.ask("register", transfer_id=transfer, config=config)
        assert answer["status"] == "ok", answer


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack"), settings={"cloudstack_drain": 20}) as daemon:
        assert isinstance(daemon, Stack)
        yield daemon


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Qsd]:
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(SIZE))
    with Qsd(image) as server:
        assert isinstance(server, Qsd)
        yield server


def test_a_transfer_is_registered_used_and_unregistered(stack: Stack, export: Qsd) -> None:
    before = stack.ask("status")["active_transfers"]
    stack.register("T1", socket=export.socket, export=export.NAME)
    assert stack.ask("status") == {"status": "ok", "active_transfers": before + 1}
    stack.register("T1", socket=export.socket, export=export.NAME)
    assert stack.ask("status")["active_transfers"] == before + 1, "in place of the one before"
    with stack.tcp() as wire:
        assert wire.ask("GET", "/images/T1").body == export.image.read_bytes()
        found = wire.ask("OPTIONS", "/images/T1").json
        assert found["size"] == SIZE
        data = os.urandom(5000)
        reply = wire.ask("PATCH", "/images/T1", {"Range": "bytes=1000-5999", "Content-Type": "x/y"}, body=data)
        assert reply.json == {"ok": True, "bytes_written": 5000}
        assert wire.ask("POST", "/images/T1/flush").json == {"ok": True}
        assert wire.ask("GET", "/images/T1", {"Range": "bytes=1000-5999"}).body == data
        assert wire.ask_json("PATCH", "/images/T1", {"op": "zero", "size": 4096}).status == 200
    assert export.image.read_bytes()[1000:6000] == bytes(4096 - 1000) + data[4096 - 1000 :]
    assert stack.ask("unregister", transfer_id="T1") == {"status": "ok", "active_transfers": before}
    assert stack.ask("unregister", transfer_id="T1")["status"] == "ok", "once more is nothing"
    with stack.tcp() as wire:
        assert wire.ask("GET", "/images/T1").status == 403


def test_to_unregister_waits_for_what_runs(stack: Stack, export: Qsd) -> None:
    stack.register("T2", socket=export.socket, export=export.NAME)
    with stack.tcp(receive_buffer=4096) as wire:
        wire.request("GET", "/images/T2")
        time.sleep(0.3)
        ended = threading.Event()

        def unregister() -> None:
            assert stack.ask("unregister", transfer_id="T2")["status"] == "ok"
            ended.set()

        thread = threading.Thread(target=unregister)
        thread.start()
        assert not ended.wait(0.5), "the download has not been read"
        with stack.tcp() as other:
            assert other.ask("OPTIONS", "/images/T2").status == 403, "nothing new begins"
        assert wire.reply().body == export.image.read_bytes()
        thread.join(20)
        assert ended.is_set()


def test_time_is_over_only_when_nothing_runs(stack: Stack, export: Qsd) -> None:
    stack.register("T3", socket=export.socket, export=export.NAME, idle_timeout_seconds=1)
    with stack.tcp(receive_buffer=4096) as wire:
        wire.request("GET", "/images/T3")
        time.sleep(2.5)
        assert wire.reply().body == export.image.read_bytes()
        assert wire.ask("OPTIONS", "/images/T3").status == 200, "it begins anew with the end of what ran"
    time.sleep(1.5)
    with stack.tcp() as wire:
        assert wire.ask("OPTIONS", "/images/T3").status == 403


def test_without_a_bitmap_everything_is_dirty_and_that_is_said(stack: Stack, export: Qsd) -> None:
    stack.register("T4", socket=export.socket, export=export.NAME)
    with stack.tcp() as wire:
        reply = wire.ask("GET", "/images/T4/extents?context=dirty")
        assert sum(one["length"] for one in reply.json) == SIZE
        assert all(one["dirty"] for one in reply.json)
        assert "everything is called dirty" in (reply.get("warning") or "")
    with stack.control() as wire:
        assert b"hostagent_data_dirty_fallbacks_total 1.0" in wire.ask("GET", "/metrics").body
    with stack.tcp() as wire:
        plain = wire.ask("GET", f"/images/{stack.ticket(export.url, SIZE, dirty=True)}/extents?context=dirty")
        assert plain.status == 404, "never for a ticket of the other dialect"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "not a JSON object"),
        (b"nonsense\n", "not a JSON object"),
        (b"[]\n", "expecting an object"),
        (b'{"action": "fly"}\n', "unknown action: fly"),
        (b'{"action": "register"}\n', "transfer_id"),
        (b'{"action": "unregister"}\n', "transfer_id"),
        (b'{"action": "register", "transfer_id": "a/b", "config": {}}\n', "transfer_id"),
        (b'{"action": "register", "transfer_id": "..", "config": {}}\n', "transfer_id"),
        (b'{"action": "register", "transfer_id": "a"}\n', "config"),
        (b'{"action": "register", "transfer_id": "a", "config": {"backend": "tape"}}\n', "unknown backend"),
        (b'{"action": "register", "transfer_id": "a", "config": {"socket": "x"}}\n', "socket"),
        (b'{"action": "register", "transfer_id": "a", "config": {"socket": "/a/../b"}}\n', "socket"),
        (b'{"action": "status", "x": "' + b"y" * 5000 + b'"}\n', "not a JSON object"),
    ],
)
def test_what_is_wrong_is_said_and_changes_nothing(stack: Stack, line: bytes, message: str) -> None:
    before = stack.ask("status")
    answer = stack.say(line)
    assert answer["status"] == "error"
    assert message in answer["message"]
    assert stack.ask("status") == before


def test_times_are_those_of_the_other_server() -> None:
    config = {"socket": "/s"}
    assert spec_of("t", config, 60).timeout == 600
    assert spec_of("t", config | {"idle_timeout_seconds": 5}, 60).timeout == 5
    assert spec_of("t", config | {"idle_timeout_seconds": 0}, 60).timeout == 86400
    for wrong in ("5", True, 1.5, None):
        with pytest.raises(HttpError, match="idle_timeout_seconds"):
            spec_of("t", config | {"idle_timeout_seconds": wrong}, 60)


@pytest.mark.parametrize("range_", ["bytes=0-", "bytes=-5", "bytes=0-4"])
def test_a_range_that_does_not_fit_its_body_is_refused(stack: Stack, export: Qsd, range_: str) -> None:
    stack.register("T5", socket=export.socket, export=export.NAME)
    with stack.tcp() as wire:
        reply = wire.ask("PATCH", "/images/T5", {"Range": range_, "Content-Type": "x/y"}, body=b"1234")
        assert reply.status == 400
