"""The data daemon as the agent's child: it outlives the agent, and is started again when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent.api.peer import Peer
from hostagent.api.peercred import PeerPolicy
from hostagent.errors import AgentError
from hostagent.transfers.control import Control
from hostagent.unix_http import UnixConnection
from tests.harness import AgentProcess

pytestmark = pytest.mark.qemu

PATIENCE = 30.0


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with AgentProcess(tmp_path, {"DATA_START": "true", "DATA_PORT": "0", "QSD_PROBE_INTERVAL": "0.1"}) as started:
        pids: set[int] = set()
        try:
            yield started
        finally:
            with contextlib.suppress(AgentError):
                pids.add(control(started).health()["pid"])
            started.close()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def control(agent: AgentProcess) -> Control:
    folder = agent.runtime
    return Control(folder / "data-control.sock", folder / "data-handover.sock", timeout=5, revoke=5)


def until(found: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(AgentError):
            if value := found():
                return value
        assert time.monotonic() < end, "in vain"
        time.sleep(0.05)


def pid_of(agent: AgentProcess) -> int:
    return int(until(lambda: control(agent).health()["pid"]))


def data(agent: AgentProcess, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = UnixConnection(agent.runtime / "data.sock", timeout=20)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def ticket(url: str, size: int, *ops: str) -> dict[str, Any]:
    return {"uuid": str(uuid.uuid4()), "size": size, "ops": list(ops), "timeout": 300, "url": url}


def test_it_runs_as_nobody_and_the_agent_says_so(agent: AgentProcess) -> None:
    pid = pid_of(agent)
    until(lambda: agent.get("/v1/host")["data_daemon"]["running"])
    assert agent.get("/v1/host")["data_daemon"] == {
        "running": True, "starting": False, "pid": pid, "error": None, "outdated": False
    }  # fmt: skip
    status = Path(f"/proc/{pid}/status").read_text()
    if os.geteuid() == 0:
        assert "Uid:\t0" not in status
        assert "CapEff:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status


def test_it_has_no_say_in_the_agents_api(agent: AgentProcess) -> None:
    """Although the group of the exports, in which it is, is that of the API."""
    status = Path(f"/proc/{pid_of(agent)}/status").read_text()
    if os.geteuid() != 0:
        return
    uid = int(re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]
    policy = PeerPolicy(frozenset({0}), frozenset({5}), frozenset({uid}))
    assert not policy.allows(Peer(1, uid, uid, (5,)))
    assert policy.allows(Peer(1, uid + 1, 7, (5,)))
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
    code += "s.sendall(b'GET /healthz HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); print(s.recv(100))"
    agent.socket.chmod(0o666)  # as if its group let it
    command = ["/usr/bin/python3", "-c", code, str(agent.socket)]
    done = subprocess.run(command, user=uid, group=uid, extra_groups=[], capture_output=True, text=True, timeout=30)
    assert "403" in done.stdout, done


def test_an_end_is_told_and_so_is_the_new_begin(agent: AgentProcess) -> None:
    pid = pid_of(agent)
    until(lambda: agent.get("/v1/host")["data_daemon"]["running"])
    os.kill(pid, signal.SIGKILL)
    until(lambda: control(agent).health()["pid"] != pid)
    told = [event for event in agent.events() if "data-daemon" in json.dumps(event)]
    kinds = [event["type"].split(".")[3] for event in told]
    until(lambda: agent.get("/v1/host")["data_daemon"]["running"])
    assert kinds[:2] == ["connected", "disconnected"], told


def test_it_outlives_the_agent_with_its_tickets_and_is_found_again(agent: AgentProcess) -> None:
    pid = pid_of(agent)
    one = ticket("nbd:unix:/nowhere", 4096, "read")
    control(agent).add(one)
    agent.kill()
    agent.start()
    assert until(lambda: agent.get("/v1/host")["data_daemon"]["running"])
    assert pid_of(agent) == pid
    agent.stop()
    assert control(agent).show(one["uuid"])["size"] == 4096, "somebody has a ticket"
    agent.start()
    assert pid_of(agent) == pid
    control(agent).extend(one["uuid"], 0)
    assert control(agent).show(one["uuid"])["expires_in"] == 0, "it is over: it is kept for data.keep_expired"
    agent.stop()
    assert until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())


def test_one_with_other_settings_ends_as_soon_as_nobody_has_a_ticket(agent: AgentProcess) -> None:
    pid = pid_of(agent)
    one = ticket("nbd:unix:/nowhere", 4096, "read")
    control(agent).add(one)
    agent.kill()
    agent.settings = {**agent.settings, "DATA_MAX_CONNECTIONS": "77"}
    agent.start()
    assert until(lambda: agent.get("/v1/host")["data_daemon"]["outdated"])
    time.sleep(1)  # some looks
    assert pid_of(agent) == pid
    control(agent).remove(one["uuid"])
    again = until(lambda: (found := control(agent).health()["pid"]) != pid and found)
    assert until(lambda: (found := agent.get("/v1/host")["data_daemon"])["running"] and not found["outdated"])
    assert pid_of(agent) == again


def test_one_that_was_killed_is_started_again(agent: AgentProcess) -> None:
    pid = pid_of(agent)
    os.kill(pid, signal.SIGKILL)
    again = until(lambda: (found := control(agent).health()["pid"]) != pid and found)
    assert until(lambda: agent.get("/v1/host")["data_daemon"]["pid"] == again)


def test_an_image_that_it_may_not_open_is_handed_over(agent: AgentProcess, tmp_path: Path) -> None:
    pid_of(agent)
    content = os.urandom(1 << 20)
    image = tmp_path / "image.raw"
    image.write_bytes(content)
    image.chmod(0o600)
    one, other = (ticket("fd:disk", len(content), "read") for _ in range(2))
    with image.open("rb") as file:
        control(agent).hand_over(one["uuid"], "disk", [file.fileno()])
    control(agent).add(one)
    control(agent).add(other)
    assert data(agent, "GET", f"/images/{one['uuid']}") == (200, content)
    assert data(agent, "GET", f"/images/{other['uuid']}")[0] == 404, "it is the other ticket's"
    assert str(image) in open_in(pid_of(agent))
    control(agent).remove(one["uuid"])
    assert str(image) not in open_in(pid_of(agent)), "it goes with its ticket"
    control(agent).add(one)
    assert data(agent, "GET", f"/images/{one['uuid']}")[0] == 404, "nor is it another's of the same id"
    with image.open("rb") as file:
        control(agent).hand_over(other["uuid"], "disk", [file.fileno()])
        control(agent).hand_over(one["uuid"], "disk", [file.fileno()])
    control(agent).hand_over(one["uuid"], "disk", [])
    control(agent).add(one)
    assert data(agent, "GET", f"/images/{one['uuid']}")[0] == 404, "it was taken back"
    control(agent).add(other)
    assert data(agent, "GET", f"/images/{other['uuid']}") == (200, content)
    with pytest.raises(AgentError, match="not understood"):
        control(agent).hand_over("", "disk", [])


def open_in(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(link.readlink()))
    return found


def test_what_is_no_handover_is_refused_and_the_next_one_is_taken(agent: AgentProcess, tmp_path: Path) -> None:
    pid_of(agent)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, (tmp_path / "f").open("w+b") as file:
        sock.settimeout(10)
        sock.connect(str(agent.runtime / "data-handover.sock"))
        for message in (
            b"nonsense",
            b"[" * 5000,
            b"[]",
            b'{"ticket": "t", "name": 5, "files": 1}',
            b'{"name": "x", "files": 1}',
            b'{"ticket": "t", "name": "x", "files": 2}',
        ):
            socket.send_fds(sock, [message], [file.fileno()])
            assert b"error" in sock.recv(1000)
        socket.send_fds(sock, [b'{"ticket": "t", "name": "x", "files": 1}'], [file.fileno()])
        assert sock.recv(1000) == b'{"ok": true}'
