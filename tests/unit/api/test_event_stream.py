from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from running_agent import UnixConnection


@pytest.fixture
def agent(serve):
    """One for each test: a stream that is still closing must not see the next test's events."""
    with serve() as running:
        yield running


class Stream:
    """A reader of text/event-stream: blocks of fields, comments under the name "comment"."""

    def __init__(self, response):
        self._response = response
        self.status = response.status

    def block(self):
        fields = {}
        while line := self._response.readline().decode().rstrip("\n"):
            name, _, value = line.partition(": ")
            fields[name or "comment"] = value
        return fields

    def event(self):
        while "event" not in (fields := self.block()):
            if not fields:
                raise EOFError
        return fields

    def subjects(self, count):
        return [json.loads(self.event()["data"])["subject"] for _ in range(count)]


@contextmanager
def streaming(agent, query="", headers=None):
    connection = UnixConnection(agent.path)
    connection.request("GET", f"/v1/events{query}", headers=headers or {})
    response = connection.getresponse()
    try:
        stream = Stream(response)
        if response.status == 200:
            assert stream.block() == {"retry": "1000"}
        yield stream
    finally:
        response.close()
        connection.close()


def happen(agent, *subjects, **how):
    for subject in subjects:
        agent.on_loop(lambda subject=subject: agent.service.happen(subject, **how))


def settled(agent):
    """Wait until the stream has read the log and waits for live records."""
    time.sleep(0.1)


def test_without_a_number_the_stream_is_live_from_now_on(agent):
    happen(agent, "old")
    with streaming(agent) as stream:
        settled(agent)
        happen(agent, "new")
        event = stream.event()
    assert (event["id"], event["event"]) == ("2", "org.hostagent.host.connected.v1")
    envelope = json.loads(event["data"])
    assert (envelope["id"], envelope["source"], envelope["subject"]) == ("2", "/hosts/h1", "new")


def test_a_client_that_comes_back_gets_what_it_missed_then_live(agent):
    happen(agent, "1", "2", "3")
    with streaming(agent, headers={"last-event-id": "1"}) as stream:
        assert stream.subjects(2) == ["2", "3"]
        happen(agent, "4")
        assert stream.subjects(1) == ["4"]


def test_the_header_wins_over_the_address(agent):
    happen(agent, "1", "2", "3")
    with streaming(agent, "?since=0", {"last-event-id": "2"}) as stream:
        assert stream.subjects(1) == ["3"]


def test_there_is_no_gap_and_no_duplicate_while_events_keep_coming(agent):
    happen(agent, *map(str, range(1, 501)))
    writer = threading.Thread(target=lambda: happen(agent, *map(str, range(501, 1501))))
    writer.start()
    with streaming(agent, "?since=0") as stream:
        assert stream.subjects(1500) == [str(n) for n in range(1, 1501)]
    writer.join()


def test_a_stream_that_fell_behind_reads_the_log_again(serve):
    with serve(sse_queue=2) as agent, streaming(agent, "?since=0") as stream:
        settled(agent)
        agent.on_loop(lambda: [agent.service.happen(str(n)) for n in range(1, 51)])
        assert stream.subjects(50) == [str(n) for n in range(1, 51)]
        assert agent.bus.dropped == {"sse": 48}


def test_records_that_are_published_out_of_order_arrive_in_order(agent):
    with streaming(agent, "?since=0") as stream:
        settled(agent)

        def swap():
            first = agent.service.happen("1", published=False)
            agent.service.happen("2")
            agent.bus.publish(first)

        agent.on_loop(swap)
        happen(agent, "3")
        assert stream.subjects(3) == ["1", "2", "3"]


def test_a_number_older_than_the_log_gets_a_resync_then_live(agent):
    happen(agent, "1", "2", "3")
    agent.service.forgotten = 2
    with streaming(agent, "?since=1") as stream:
        event = stream.event()
        assert (event["event"], event["id"], json.loads(event["data"])) == ("resync", "3", {"from": 3})
        happen(agent, "4")
        assert stream.subjects(1) == ["4"]


def test_a_number_from_the_future_gets_a_resync(agent):
    happen(agent, "1")
    with streaming(agent, "?since=99") as stream:
        assert stream.event()["event"] == "resync"
        happen(agent, "2")
        assert stream.subjects(1) == ["2"]


def test_progress_has_no_number(agent):
    with streaming(agent) as stream:
        settled(agent)
        agent.on_loop(lambda: agent.service.progress("j"))
        event = stream.event()
        assert event["event"] == "org.hostagent.job.progress.v1"
        assert "id" not in event
        happen(agent, "1")
        assert stream.event()["id"] == "1"


def test_a_silent_stream_has_a_heartbeat(serve):
    with serve(sse_heartbeat=0.1) as agent, streaming(agent) as stream:
        assert stream.block() == {"comment": "heartbeat"}


def test_streams_are_bounded_and_a_place_is_given_back(serve):
    with serve(sse_subscribers=1) as agent:
        with streaming(agent), streaming(agent) as refused:
            assert refused.status == 429
        deadline = time.monotonic() + 5
        while len(agent.front.streams.places) and time.monotonic() < deadline:
            time.sleep(0.02)
        with streaming(agent) as stream:
            assert stream.status == 200


def test_a_stream_ends_when_the_agent_stops(serve):
    with serve() as agent:
        connection = UnixConnection(agent.path)
        connection.request("GET", "/v1/events")
        response = connection.getresponse()
        settled(agent)
        began = time.monotonic()
    assert response.read() == b"retry: 1000\n\n"
    assert time.monotonic() - began < 5
    connection.close()


def test_a_client_that_does_not_read_is_cut_off(serve):
    with serve(body_timeout=0.3, sse_queue=10) as agent, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(agent.path))
        client.sendall(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        deadline = time.monotonic() + 20
        assert len(agent.front.streams.places) == 1
        while len(agent.front.streams.places) and time.monotonic() < deadline:
            agent.on_loop(lambda: [agent.service.happen("x" * 1000) for _ in range(100)])
        assert len(agent.front.streams.places) == 0


def test_a_client_that_leaves_during_the_replay_gets_no_more(agent, monkeypatch, caplog):
    happen(agent, *map(str, range(400)))
    told = 0
    with socket.socket(socket.AF_UNIX) as client:
        events_since, event = agent.service.events_since, agent.front.streams._event

        async def leaving(since, limit):
            client.close()
            return await events_since(since, limit)

        def counted(record):
            nonlocal told
            told += 1
            return event(record)

        monkeypatch.setattr(agent.service, "events_since", leaving)
        monkeypatch.setattr(agent.front.streams, "_event", counted)
        client.connect(str(agent.path))
        client.sendall(b"GET /v1/events?since=0 HTTP/1.1\r\nhost: x\r\n\r\n")
        deadline = time.monotonic() + 30
        while (len(agent.front.streams.places) or not told) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert 0 < told < 10
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


def test_a_bad_number_is_refused(agent):
    with streaming(agent, headers={"last-event-id": "x"}) as stream:
        assert stream.status == 400
