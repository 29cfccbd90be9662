"""`hostagent events`: the log, then live, without a gap and without a duplicate."""

from __future__ import annotations

import json
import threading
import time

import pytest
from fake_agent import Call, FakeAgent, Stream, event

from hostagent.cli import events_cmd

NOW = "2999-01-01T00:00:00Z"


def test_without_follow_it_prints_the_log_and_ends(agent: FakeAgent, run, capsys) -> None:
    agent.on(
        "GET", "/v1/events", (200, Stream("retry: 1000\n\n", event(1), event(2, path="/a", status="COMPLETED"), stay=3))
    )
    started = time.monotonic()
    assert run("events", "--since", "0", "--json") == 0
    assert time.monotonic() - started < 2
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["1", "2"]
    assert agent.calls[0].query == {"since": ["0"]}


@pytest.mark.parametrize(
    "live",
    [event(3, time=NOW), "event: org.hostagent.job.progress.v1\ndata: {}\n\n"],
    ids=["a-later-event", "progress"],
)
def test_without_follow_it_ends_where_the_live_events_begin(agent: FakeAgent, run, capsys, live: str) -> None:
    agent.on("GET", "/v1/events", (200, Stream(event(1), live, event(4, time=NOW), stay=0.2)))
    assert run("events", "--json") == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["1"]


def test_a_line_for_people_says_what_happened(agent: FakeAgent, run, capsys) -> None:
    failed = event(7, "job.failed", path="/a\x1b[2J", cur=5, end=9, status="FAILED", reason="cancelled")
    kept = event(8, "grant.kept", path="/base", mode="r", trigger="job", reason="mode 0644 lets everybody read")
    agent.on("GET", "/v1/events", (200, Stream(failed, kept)))
    assert run("events") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "job.failed" in first and "/a\\x1b[2J  5/9  FAILED (cancelled)" in first
    assert "grant.kept" in second and "mode 0644 lets everybody read" in second


def test_what_the_log_has_lost_is_said(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", "/v1/events", (200, Stream('id: 90\nevent: resync\ndata: {"from": 90}\n\n')))
    assert run("events", "--since", "1") == 0
    assert "before number 90" in capsys.readouterr().err


def test_follow_goes_on_after_the_last_event_when_the_agent_restarts(
    agent: FakeAgent, run, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(events_cmd, "PATIENCE", 0.5)

    def later(call: Call) -> tuple[int, object]:
        threading.Timer(0.3, agent.stop).start()
        return 200, Stream(event(2), stay=0.1)

    agent.on("GET", "/v1/events", (200, Stream(": heartbeat\n\n", event(1))), later)
    assert run("events", "--follow", "--json") == 8
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()][:2] == ["1", "2"]
    first, second = agent.asked("GET", "/v1/events")[:2]
    assert "since" not in first.query
    assert second.query == {"since": ["1"]}


def test_a_number_that_is_none_is_a_usage_error(run) -> None:
    assert run("events", "--since", "-1") == 2
