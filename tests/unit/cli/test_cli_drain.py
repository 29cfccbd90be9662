"""`hostagent drain` against a scripted agent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_agent import ID, FakeAgent
from test_cli_objects import host

from hostagent.cli import drain
from hostagent.cli.terminal import Terminal

ADDRESS = "/v1/host/drain"


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostagent.cli.drain.POLL", 0.0)


def state(**more: Any) -> dict[str, Any]:
    return {
        "draining": True, "since": "2024-05-01T10:00:00Z", "pause": False, "paused": [], "drained": False, "jobs": [],
        "exports": [], "revocations": 0, "beginning": 0, **more,
    }  # fmt: skip


JOB = {"id": ID, "operation": "pull", "target": "/images/top.qcow2", "state": "running",
       "cursor": {"cur": 1 << 20, "end": 1 << 30}}  # fmt: skip
CLIENT = {"pid": 77, "name": "nbdcopy", "uid": 0}
EXPORT = {"id": "e1", "image": "/images/a.qcow2", "state": "running", "clients": [CLIENT]}
IDLE = {"id": "e2", "image": "/images/b.qcow2", "state": "running", "clients": []}


def test_it_says_what_holds_and_by_whom(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", ADDRESS, (200, state(jobs=[JOB], exports=[EXPORT, IDLE], revocations=2)))
    assert run("drain") == 0
    out = capsys.readouterr().out
    for words in ("1 job, 2 exports, 2 revocations", "/images/top.qcow2", "1 MiB / 1 GiB", "nbdcopy (pid 77)",
                  "hostagent export stop", "hostagent grant list"):  # fmt: skip
        assert words in out
    assert agent.calls[0].body == {"pause": False}


def test_ids_stay_whole_on_a_narrow_terminal(monkeypatch, capsys) -> None:
    """They are there to be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    image = "/var/lib/libvirt/images/a-guest-with-a-name/disk-0123456789.qcow2"
    drain._print_what_holds(Terminal(), state(jobs=[{**JOB, "target": image}], exports=[{**EXPORT, "id": ID}]))
    assert capsys.readouterr().out.count(ID) == 2


def test_it_waits_until_nothing_holds_and_says_what_it_waits_for_once(agent: FakeAgent, run, capsys, no_pause) -> None:
    agent.on("POST", ADDRESS, (200, state(jobs=[JOB])))
    held, free = (200, state(exports=[EXPORT])), (200, state(drained=True))
    agent.on("GET", ADDRESS, (200, state(jobs=[JOB])), held, held, free)
    assert run("drain", "--wait", "--pause") == 0
    told = capsys.readouterr()
    assert told.err.count("waiting for 1 job") == told.err.count("waiting for 1 export") == 1
    assert told.out.startswith("drained")
    assert agent.calls[0].body == {"pause": True}


def test_the_time_being_up_exits_5_with_what_holds(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", ADDRESS, (200, state(jobs=[JOB])))
    agent.on("GET", ADDRESS, (200, state(jobs=[JOB])))
    assert run("drain", "--wait", "--timeout", "0.05", "--json") == 5
    told = capsys.readouterr()
    assert [job["id"] for job in json.loads(told.out)["jobs"]] == [ID]
    assert "--undo" in told.err


def test_who_waits_hears_that_another_has_lifted_it(agent: FakeAgent, run, capsys, no_pause) -> None:
    agent.on("POST", ADDRESS, (200, state(jobs=[JOB])))
    agent.on("GET", ADDRESS, (200, state(draining=False, since=None)))
    assert run("drain", "--wait") == 6
    assert "lifted" in capsys.readouterr().err


def test_it_is_lifted(agent: FakeAgent, run, capsys) -> None:
    agent.on("DELETE", ADDRESS, (200, state(draining=False, since=None)))
    assert run("drain", "--undo") == 0
    assert capsys.readouterr().out == "new work is taken\n"


def test_a_check_changes_nothing_and_exits_6_while_something_holds(agent: FakeAgent, run, capsys) -> None:
    calm = state(draining=False, since=None)
    agent.on("GET", ADDRESS, (200, calm | {"exports": [EXPORT]}), (200, calm | {"revocations": 1}), (200, calm))
    assert run("drain", "--check") == 6
    assert "1 export still here" in (out := capsys.readouterr().out) and "nbdcopy (pid 77)" in out
    assert run("drain", "--check", "--json") == 6
    assert json.loads(capsys.readouterr().out)["revocations"] == 1
    assert run("drain", "--check") == 0
    assert capsys.readouterr().out == "nothing holds this host\n"
    assert {call.method for call in agent.calls} == {"GET"}


def test_what_makes_no_sense_together_is_a_usage_error(agent: FakeAgent, run) -> None:
    for words in (["--undo", "--pause"], ["--undo", "--wait"], ["--timeout", "3"], ["--check", "--wait"]):
        assert run("drain", *words) == 2
    assert agent.calls == []


def test_status_shows_it_and_doctor_only_warns(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", "/v1/host", (200, host(drain={"draining": True, "since": "2024-05-01T10:00:00Z"})))
    for path in ("/v1/exports", "/v1/jobs", "/v1/grants"):
        agent.on("GET", path, (200, {"items": [], "next": None}))
    checks = {"store": {"ok": True, "detail": "writable"}, "drain": {"ok": False, "detail": "since yesterday"}}
    agent.on("GET", "/readyz", (503, {"ready": False, "checks": checks}))
    assert run("status") == 0
    out = capsys.readouterr().out
    assert "no new work is taken" in out
    assert "nothing needs attention" not in out
    run("doctor", "--json")
    found = {(one["name"], one["result"]) for one in json.loads(capsys.readouterr().out)["checks"]}
    assert {("agent", "ok"), ("agent: drain", "warn"), ("agent: store", "ok")} <= found
