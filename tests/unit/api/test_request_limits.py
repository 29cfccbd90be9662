from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running_agent import UnixConnection

from hostagent.api import bounded, peercred
from hostagent.api.limits import check_json, nesting
from hostagent.api.peer import Peer, Places
from hostagent.api.peercred import PeerPolicy
from hostagent.errors import AgentError


def exchange(agent, *parts, pause=0.0):
    """Send raw bytes, read until the agent closes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(agent.path))
        for part in parts:
            client.sendall(part)
            time.sleep(pause)
        data = b""
        while chunk := client.recv(65536):
            data += chunk
        return data


HEAD = b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"


def test_who_was_just_let_in_when_the_agent_stops_is_answered(serve, monkeypatch):
    monkeypatch.setattr(bounded, "LAST", 3.0)
    with serve() as agent, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(agent.path))
        assert _until(lambda: agent.server.server_state.connections)
        agent.server.should_exit = True
        time.sleep(0.5)  # it has seen that, and ends what has nothing to do
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def _until(true):
    deadline = time.monotonic() + 5
    while not (value := true()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(agent):
    answer = exchange(agent, HEAD + b"content-length: 99999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code": "too_large"' in answer


def test_a_chunked_body_is_refused_when_it_grows_too_large(serve):
    with serve(max_body=1000) as agent:
        chunk = b"258\r\n" + b" " * 600 + b"\r\n"
        answer = exchange(agent, HEAD + b"transfer-encoding: chunked\r\n\r\n", chunk, chunk, pause=0.05)
        assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_of_exactly_the_limit_is_read(serve):
    with serve(max_body=1000) as agent:
        body = b'{"operation": "pull", "target": "/a"}'.ljust(1000)
        assert agent.call("POST", "/v1/jobs", body).status == 202
        # In one piece: a refusal does not wait for a body, and a client that sends it later finds the door closed.
        answer = exchange(agent, HEAD + b"content-length: 1001\r\n\r\n" + body + b" ")
        assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_not_waited_for(serve):
    with serve(body_timeout=0.2) as agent:
        answer = exchange(agent, HEAD + b"content-length: 10\r\n\r\n")
        assert b'"code": "timeout"' in answer


def test_a_request_that_is_never_finished_ends_with_the_connection(serve):
    with serve(body_timeout=0.2) as agent:
        began = time.monotonic()
        assert exchange(agent, b"GET /healthz HTTP/1.1\r\n") == b""
        assert exchange(agent) == b""
        assert time.monotonic() - began < 3


def test_what_is_no_http_is_answered_with_a_problem(agent):
    assert b"application/problem+json" in exchange(agent, b"\x16\x03\x01 hello\r\n\r\n")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 17 + b"]" * 17,
        b'{"operation":"pull","operation":"copy","target":"/a"}',
        b'{"operation": "pull", "target": "/a", "labels": {"k": "1", "k": "2"}}',
        b'{"bandwidth": NaN}',
        b'{"bandwidth": ' + b"9" * 5000 + b"}",
        b"{",
        b"\xff\xfe{\x00}\x00",
        b"hello",
    ],
)
def test_json_that_means_nothing_or_two_things_is_refused(agent, body):
    reply = agent.call("POST", "/v1/jobs", body)
    assert (reply.status, reply.body["code"]) == (400, "invalid")
    assert "sys." not in reply.body["detail"]
    assert agent.service.calls == []


def test_another_content_type_is_refused_with_the_right_one(agent):
    reply = agent.call("POST", "/v1/jobs", b"{}", {"content-type": "application/x-www-form-urlencoded"})
    assert (reply.status, reply.body["field"]) == (400, "content-type")


def test_requests_beyond_the_limit_are_refused_while_others_run(serve):
    with serve(max_connections=2) as agent:
        id = agent.call("POST", "/v1/jobs", {"operation": "pull", "target": "/a"}).body["id"]
        polls = [threading.Thread(target=lambda: agent.call("GET", f"/v1/jobs/{id}?wait=1")) for _ in range(2)]
        for poll in polls:
            poll.start()
        time.sleep(0.3)
        reply = agent.call("GET", "/healthz")
        assert (reply.status, reply.body["code"], reply.body["field"]) == (429, "limit", "api.max_connections")
        assert agent.refusals in (["requests"], ["local_connections"])
        # Who is slow to ask hears the reason, too, and is no broken pipe; but those who wait to ask are bounded.
        slow = [UnixConnection(agent.path) for _ in range(3)]
        for connection in slow:
            connection.connect()
        assert slow[2].sock.recv(65536).startswith(b"HTTP/1.1 429 ")
        slow[0].request("GET", "/healthz")
        assert slow[0].getresponse().status == 429
        for connection in slow:
            connection.close()
        for poll in polls:
            poll.join(5)
        assert agent.call("GET", "/healthz").status == 200


def test_others_who_take_up_all_places_keep_no_owner_out(serve, monkeypatch):
    """By half-sent requests of members of the socket's group."""
    callers = peercred.peer_of
    monkeypatch.setattr(peercred, "peer_of", lambda sock: callers(sock)._replace(uid=4711))
    policy = PeerPolicy(uids=frozenset({0, os.geteuid(), 4711}), gids=frozenset())
    with serve(max_connections=2, policy=policy) as agent:
        half = [UnixConnection(agent.path) for _ in range(2)]
        for connection in half:
            connection.connect()
            connection.sock.sendall(b"GET /healthz HTTP/1.1\r\n")
        time.sleep(0.1)
        assert agent.call("GET", "/healthz").status == 429
        monkeypatch.setattr(peercred, "peer_of", callers)
        assert agent.call("GET", "/healthz").status == 200
        for connection in half:
            connection.close()


def test_places_are_given_back_to_whom_they_were_taken_from():
    places, owner, other = Places(1), Peer(1, 0, 0), Peer(2, 4711, 4711)
    assert (places.take(other), places.take(other), places.take(owner), len(places)) == (True, False, True, 2)
    places.leave(other)
    assert (places.take(owner), places.take(other)) == (False, True)


def test_a_connection_serves_one_request_after_another(agent):
    connection = UnixConnection(agent.path)
    for _ in range(3):
        connection.request(
            "POST", "/v1/jobs", b'{"operation": "pull", "target": "/a"}', {"content-type": "application/json"}
        )
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 202
    connection.close()


json_values = st.recursive(
    st.none() | st.integers() | st.text('[]{}"\\a'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('[{"\\'), inner),
)


def depth(value):
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(json_values)
def test_nesting_is_counted_outside_strings_only(value):
    import json

    body = json.dumps(value).encode()
    assert nesting(body) == depth(value)
    check_json(body, depth=depth(value))
    if depth(value):
        with pytest.raises(AgentError, match="nested deeper"):
            check_json(body, depth=depth(value) - 1)


@given(st.binary(max_size=200))
def test_any_bytes_are_judged_without_a_crash(body):
    try:
        check_json(body, depth=4)
    except AgentError as error:
        assert error.code == "invalid"
