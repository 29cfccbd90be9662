from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from running_agent import UnixConnection, serving

from hostagent.api.peer import NOBODY, Peer
from hostagent.api.peercred import PeerPolicy, peer_of

PULL = {"operation": "pull", "target": "/img/top.qcow2"}


def test_the_kernel_says_who_is_connected():
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        peer = peer_of(left)
    assert peer[:3] == (os.getpid(), os.geteuid(), os.getegid())
    assert sorted(peer.groups) == sorted(os.getgroups())


def test_a_socket_without_credentials_is_nobody():
    left, right = socket.socketpair(socket.AF_UNIX)
    left.close()
    right.close()
    assert peer_of(left) == NOBODY
    assert peer_of(None) == NOBODY
    assert not PeerPolicy.for_group("no-such-group-here").allows(NOBODY)


@pytest.mark.parametrize(
    ("peer", "allowed"),
    [
        (Peer(1, 0, 0), True),
        (Peer(1, 1000, 1000), False),
        (Peer(1, 1000, 64055), True),
        (Peer(1, 1000, 1000, (4, 64055)), True),
        (Peer(1, 1000, 1000, (4, 24)), False),
    ],
)
def test_root_and_the_group_may_connect(peer, allowed):
    assert PeerPolicy(uids=frozenset({0}), gids=frozenset({64055})).allows(peer) is allowed


def test_the_service_learns_which_process_asks(agent):
    agent.call("POST", "/v1/jobs", PULL)
    _, (_, peer) = agent.service.calls[0]
    assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())


def test_a_peer_that_is_not_allowed_is_denied_everything(serve):
    with serve(policy=PeerPolicy(uids=frozenset(), gids=frozenset())) as agent:
        for method, path in [("GET", "/healthz"), ("GET", "/openapi.json"), ("POST", "/v1/jobs"), ("GET", "/nowhere")]:
            reply = agent.call(method, path, PULL if method == "POST" else None)
            assert (reply.status, reply.body["code"]) == (403, "denied")
        assert agent.service.calls == []
        assert agent.refusals == ["local_user"] * 4
        (line,) = agent.audit
        assert (line["what"], line["who"], line["result"]) == ("POST /v1/jobs", f"uid {os.geteuid()}", "denied")


def test_a_crowd_that_is_turned_away_fills_no_log(serve, caplog):
    with serve(max_connections=2) as agent:
        crowd = [UnixConnection(agent.path) for _ in range(30)]
        for connection in crowd[:2]:
            connection.connect()
        for connection in crowd[2:]:
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 429
        until = time.monotonic() + 10
        while agent.refusals.count("local_connections") < 28 or sum(told(caplog)) < 28:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert len(told(caplog)) < 14, "one a second"
        for connection in crowd:
            connection.close()


def told(caplog):
    """How many refusals each line of the log stands for."""
    lines = [record for record in caplog.records if record.name == "hostagent.api.peercred"]
    assert all(line.fields["uid"] == os.geteuid() and line.fields["pid"] == os.getpid() for line in lines)
    return [line.fields["times"] for line in lines]


CLIENT = """
import http.client, socket, sys
connection = http.client.HTTPConnection("localhost")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(sys.argv[1])
connection.request("GET", "/healthz")
print(connection.getresponse().status)
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")
@pytest.mark.parametrize(("groups", "status"), [([], "403"), ([54321], "200")])
def test_another_user_is_let_in_by_a_supplementary_group_only(groups, status):
    policy = PeerPolicy(uids=frozenset({0}), gids=frozenset({54321}))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        with serving(Path(folder) / "s", policy=policy) as agent:
            agent.path.chmod(0o666)
            done = subprocess.run(
                [sys.executable, "-c", CLIENT, str(agent.path)],
                user=65534, group=65534, extra_groups=groups, cwd="/", capture_output=True, text=True, timeout=20,
            )  # fmt: skip
    assert done.stdout.strip() == status, done.stderr
