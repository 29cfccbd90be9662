"""`hostagent job`: requests, exit statuses, and following a job to its end."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from fake_agent import ID, Call, FakeAgent, job, problem

from hostagent.cli import client, follow

JOB = f"/v1/jobs/{ID}"


def _json_lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_pull_asks_for_what_was_said_and_prints_the_state(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/jobs", (202, job("queued")))
    words = ["/images/top.qcow2", "--base", "/images/base.qcow2", "--increment", "64M", "--bandwidth", "50MiB/s"]
    assert run("job", "pull", *words, "--check", "never", "--label", "vm=web1", "--label", "note=a=b", "--id", ID) == 0
    assert capsys.readouterr().out == f"job {ID} queued\n"
    assert agent.calls[0].body == {
        "operation": "pull", "target": "/images/top.qcow2", "base": "/images/base.qcow2", "increment": 64 << 20,
        "bandwidth": 50 << 20, "check": "never", "labels": {"vm": "web1", "note": "a=b"}, "id": ID,
    }  # fmt: skip


def test_pull_chooses_an_id_itself(agent: FakeAgent, run) -> None:
    agent.on("POST", "/v1/jobs", (202, job("queued")))
    assert run("job", "pull", "/images/top.qcow2") == 0
    assert uuid.UUID(agent.calls[0].body["id"]).version == 4
    assert set(agent.calls[0].body) == {"operation", "target", "id"}


def test_a_lost_answer_is_asked_for_again_with_the_same_id(agent: FakeAgent, run) -> None:
    agent.on("POST", "/v1/jobs", (0, None), (200, job("running")))
    assert run("job", "pull", "/images/top.qcow2") == 0
    first, second = agent.asked("POST", "/v1/jobs")
    assert first.body == second.body


@pytest.mark.parametrize(
    ("code", "status", "exit_status"),
    [
        ("invalid", 400, 2), ("not_found", 404, 3), ("timeout", 504, 5), ("busy", 409, 6), ("conflict", 409, 6),
        ("denied", 403, 7), ("outside_pools", 422, 7), ("image_corrupt", 422, 1), ("not_supported", 501, 1),
        ("internal", 500, 1), ("a_code_of_tomorrow", 418, 1),
    ],
)  # fmt: skip
def test_a_problem_becomes_its_exit_status_and_says_its_remedy(
    agent: FakeAgent, run, capsys, code: str, status: int, exit_status: int
) -> None:
    agent.on("POST", "/v1/jobs", (status, problem(code, "it is so", remedy="do this")))
    assert run("job", "pull", "/images/top.qcow2") == exit_status
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "hostagent: it is so\n  remedy: do this\n"


def test_without_an_agent_the_exit_status_is_8_at_once(run, capsys) -> None:
    started = time.monotonic()
    assert run("job", "list") == 8
    assert time.monotonic() - started < 2
    assert "hostagent serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["pull"], ["pull", "disk.qcow2"], ["pull", "/d", "--increment", "a lot"], ["pull", "/d", "--bandwidth", "50"],
        ["pull", "/d", "--label", "no-value"], ["pull", "/d", "--id", "7"], ["pull", "/d", "--check", "maybe"],
        ["pull", "/d", "--timeout", "5"], ["pull", "/d", "--wait", "--timeout", "-1"], ["speed", ID], ["dance", ID],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_usage_error_exits_2_and_asks_nothing(agent: FakeAgent, run, words: list[str]) -> None:
    assert run("job", *words) == 2
    assert agent.calls == []


def test_a_rate_without_a_unit_is_refused_with_the_unit(run, capsys) -> None:
    assert run("job", "pull", "/d", "--bandwidth", "50") == 2
    assert "virsh's means MiB/s; write 50MiB/s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "method", "path", "body"),
    [
        (["abort", ID], "POST", f"{JOB}/abort", {}),
        (["abort", ID, "--force"], "POST", f"{JOB}/abort", {"force": True}),
        (["pause", ID], "POST", f"{JOB}/pause", None),
        (["resume", ID], "POST", f"{JOB}/resume", None),
        (["complete", ID], "POST", f"{JOB}/complete", {}),
        (["complete", ID, "--pivot"], "POST", f"{JOB}/complete", {"completion": "pivot"}),
        (["speed", ID, "10MiB/s"], "PATCH", JOB, {"bandwidth": 10 << 20}),
        (["speed", ID, "unlimited"], "PATCH", JOB, {"bandwidth": 0}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_verb_is_one_request(agent: FakeAgent, run, capsys, words, method, path, body) -> None:
    agent.on(method, path, (200, job("running")))
    assert run("job", *words) == 0
    assert [call.body for call in agent.asked(method, path)] == [body]
    assert capsys.readouterr().out == f"job {ID} running\n"


def test_delete_prints_what_it_deleted(agent: FakeAgent, run, capsys) -> None:
    agent.on("DELETE", JOB, (204, None))
    assert run("job", "delete", ID) == 0
    assert capsys.readouterr().out == f"job {ID} deleted\n"


def test_next_names_the_cursor_that_it_steps_from(agent: FakeAgent, run) -> None:
    agent.on("GET", JOB, (200, job("waiting", 4096)))
    agent.on("POST", f"{JOB}/next", (202, job("running", 4096)))
    assert run("job", "next", ID) == 0
    assert agent.asked("POST", f"{JOB}/next")[0].body == {"cursor": 4096}


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (["copy", "/a", "/b"], {"operation": "copy", "target": "/a", "dest": "/b"}),
        (
            ["copy", "/a", "/b", "--pivot", "--format", "raw", "--shallow", "--reuse-external"],
            {
                "operation": "copy", "target": "/a", "dest": "/b", "completion": "pivot",
                "format": "raw", "shallow": True, "reuse_external": True,
            },
        ),
        (
            ["commit", "/a", "--top", "/b", "--base", "/c", "--delete", "--keep-overlay"],
            {
                "operation": "commit", "target": "/a", "top": "/b", "base": "/c",
                "delete": True, "completion": "finish",
            },
        ),
    ],
)  # fmt: skip
def test_copy_and_commit_ask_for_what_was_said(
    agent: FakeAgent, run, words: list[str], body: dict[str, object]
) -> None:
    agent.on("POST", "/v1/jobs", (202, job()))
    assert run("job", *words) == 0
    (asked,) = agent.asked("POST", "/v1/jobs")
    assert {key: value for key, value in asked.body.items() if key != "id"} == body


def test_list_goes_through_all_pages(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", "/v1/jobs", (200, {"items": [job()], "next": "x"}), (200, {"items": [job("failed")], "next": None}))
    assert run("job", "list", "--label", "a=1", "--label", "b=2", "--state", "running", "--json") == 0
    assert [item["state"] for item in json.loads(capsys.readouterr().out)["items"]] == ["running", "failed"]
    first, second = agent.calls
    assert first.query == {"state": ["running"], "label": ["a=1", "b=2"]}
    assert second.query == {"state": ["running"], "label": ["a=1", "b=2"], "after": ["x"]}


def test_a_hostile_file_name_does_not_reach_the_terminal_as_it_is(agent: FakeAgent, run, capsys) -> None:
    name = "/images/\x1b]0;owned\x07\x1b[31m\u202egpj.exe\udc80"
    agent.on("GET", "/v1/jobs", (200, {"items": [job(target=name)], "next": None}))
    agent.on("GET", JOB, (200, job(target=name, error={"code": "io_error", "message": name, "remedy": name})))
    assert run("job", "list") == 0
    assert run("job", "show", ID) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
    assert r"\x1b]0;owned\x07" in out


def test_show_says_everything(agent: FakeAgent, run, capsys) -> None:
    kept = {"path": "/base/base.raw", "reason": "mode 0644 lets everybody read", "holders": ["job:7"]}
    before = ["/images/top.qcow2", "/images/mid.qcow2", "/base/base.raw"]
    chain = {"before": before, "after": before[:1], "revoked": ["/images/mid.qcow2"], "kept": [kept]}
    failure = {"code": "no_space", "message": "the disk is full", "remedy": "make room"}
    agent.on("GET", JOB, (200, job("failed", 1 << 29, chain=chain, error=failure, warnings=["3 leaked clusters"])))
    assert run("job", "show", ID) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "/images/top.qcow2 ← mid.qcow2 ← /base/base.raw",
        "the disk is full (no_space)", "remedy make room", "warning 3 leaked clusters", "512 MiB of 1 GiB, 50 %",
        "revoked /images/mid.qcow2", "kept /base/base.raw: mode 0644 lets everybody read (job:7)", "took 12 s",
    ):  # fmt: skip
        assert words in out


@pytest.mark.parametrize(
    ("verb", "after", "staying"),
    [("copy", ["/images/new.qcow2"], "--finish"), ("commit", ["/images/base.qcow2"], "--keep-overlay")],
)
@pytest.mark.parametrize("completion", ["pivot", None])
def test_a_dry_run_of_what_can_end_in_two_ways_shows_both_or_the_chosen_one(
    agent: FakeAgent, run, capsys, verb: str, after: list[str], staying: str, completion: str | None
) -> None:
    before = ["/images/top.qcow2", "/images/base.qcow2"]
    plan = {"dry_run": True, "completion": completion, "before": before, "after": after, "revoke": [], "keep": []}
    agent.on("POST", "/v1/jobs", (200, {**plan, "space": {}, "warnings": []}))
    words = [*(["/images/new.qcow2"] if verb == "copy" else []), *(["--pivot"] if completion else [])]
    assert run("job", verb, "/images/top.qcow2", *words, "--dry-run") == 0
    out = " ".join(capsys.readouterr().out.split())
    if completion:
        assert f"becomes {after[0]}" in out and "with " not in out
    else:
        assert f"with --pivot {after[0]} with {staying} the chain stays as it is" in out


def test_what_took_no_time_is_not_said_to_have_taken_0_seconds(agent: FakeAgent, run, capsys) -> None:
    times = {"started": "2024-05-01T10:00:00.000Z", "finished": "2024-05-01T10:00:00.020Z"}
    agent.on("GET", JOB, (200, job("completed", **times)))
    assert run("job", "watch", ID) == 0
    assert "completed after less than 0.1 s" in capsys.readouterr().out


def test_a_dry_run_says_what_would_happen(agent: FakeAgent, run, capsys) -> None:
    keep = [{"path": "/images/base.qcow2", "reason": "needed by others", "holders": ["image:/images/b.qcow2"]}]
    before = ["/images/top.qcow2", "/images/mid.qcow2", "/images/base.qcow2"]
    plan = {"dry_run": True, "before": before, "after": before[:1], "revoke": [{"path": "/images/mid.qcow2"}],
            "keep": keep, "space": {"need": 1 << 20, "free": 1 << 33}, "warnings": ["it is late"]}  # fmt: skip
    plan["bitmaps"] = [
        {"name": "daily", "bytes": 131072, "recording": True, "state": "consistent", "pruned": True},
        {"name": "old", "bytes": 65536, "recording": False, "state": "inconsistent", "pruned": False},
    ]
    agent.on("POST", "/v1/jobs", (200, plan))
    assert run("job", "pull", "/images/top.qcow2", "--dry-run") == 0
    out = capsys.readouterr().out
    assert agent.calls[0].body == {"operation": "pull", "target": "/images/top.qcow2", "dry_run": True}
    out = " ".join(out.split())
    for words in (
        "/images/top.qcow2 ← mid.qcow2 ← base.qcow2", "becomes /images/top.qcow2", "would revoke /images/mid.qcow2",
        "would stay open /images/base.qcow2: needed by others (image:/images/b.qcow2)", "space needed at most 1 MiB",
        "space free 8 GiB", "warning it is late", "bitmap daily: 128 KiB in the base, would be removed",
        "old: 64 KiB in the base, disabled, inconsistent",
    ):  # fmt: skip
        assert words in out


# Following


def test_wait_returns_0_when_the_job_completed(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/jobs", (202, job("queued", revision=1)))
    agent.on("GET", JOB, (304, None), (200, job("running", revision=2)), (200, job("completed", revision=3)))
    assert run("job", "pull", "/images/top.qcow2", "--wait") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"job {ID} completed after 12 s\n")
    assert err == ""


def test_wait_asks_by_long_poll_with_the_revision_it_has(agent: FakeAgent, run) -> None:
    agent.on("POST", "/v1/jobs", (202, job("queued", revision=41)))
    agent.on("GET", JOB, (200, job("completed", revision=42)))
    assert run("job", "pull", "/images/top.qcow2", "--wait") == 0
    (poll,) = agent.asked("GET", JOB)
    assert poll.headers["If-None-Match"] == '"41"'
    assert float(poll.query["wait"][0]) == follow.LONG_POLL


@pytest.mark.parametrize("state", ["failed", "aborted"])
def test_wait_returns_4_when_the_job_did_not_complete(agent: FakeAgent, run, capsys, state: str) -> None:
    failure = {"code": "io_error", "message": "the base cannot be read", "remedy": "look at the disk"}
    agent.on("POST", "/v1/jobs", (202, job("queued")))
    agent.on("GET", JOB, (200, job(state, revision=2, error=failure)))
    assert run("job", "pull", "/images/top.qcow2", "--wait") == 4
    out = capsys.readouterr().out
    assert "the base cannot be read (io_error)" in out and "look at the disk" in out


def test_wait_stays_for_the_revocation(agent: FakeAgent, run) -> None:
    agent.on("POST", "/v1/jobs", (202, job("queued")))
    pending = job("completed", revision=2, revocation="pending")
    agent.on("GET", JOB, (200, pending), (200, job("completed", revision=3, revocation="done")))
    assert run("job", "pull", "/images/top.qcow2", "--wait", "--json") == 0
    assert len(agent.asked("GET", JOB)) == 2


def test_wait_gives_up_on_a_revocation_that_does_not_end(agent: FakeAgent, run, capsys, monkeypatch) -> None:
    monkeypatch.setattr(follow, "revocation_wait", lambda: 0.3)
    agent.on("POST", "/v1/jobs", (202, job("completed", revocation="pending")))
    agent.on("GET", JOB, (200, job("completed", revocation="pending")))
    assert run("job", "pull", "/images/top.qcow2", "--wait") == 0
    assert "hostagent status" in capsys.readouterr().out


def test_wait_with_an_increment_calls_next_to_the_end(agent: FakeAgent, run) -> None:
    """Each step is asked for once, from the cursor that was reached."""
    state = {"cur": 0, "revision": 1}

    def step(call: Call) -> tuple[int, object]:
        assert call.body == {"cursor": state["cur"]}
        state["cur"] += 1 << 28
        state["revision"] += 1
        return 202, job("running", state["cur"] - 1, revision=state["revision"])

    def read(call: Call) -> tuple[int, object]:
        state["revision"] += 1
        done = state["cur"] == 1 << 30
        return 200, job("completed" if done else "waiting", state["cur"], revision=state["revision"])

    agent.on("POST", "/v1/jobs", (202, job("starting")))
    agent.on("GET", JOB, read)
    agent.on("POST", f"{JOB}/next", step)
    assert run("job", "pull", "/images/top.qcow2", "--increment", "256M", "--wait") == 0
    assert len(agent.asked("POST", f"{JOB}/next")) == 4


def test_a_step_that_another_client_asked_for_is_no_error(agent: FakeAgent, run) -> None:
    agent.on("POST", "/v1/jobs", (202, job("waiting", 10)))
    agent.on("POST", f"{JOB}/next", (409, problem("conflict", "a step is under way")))
    agent.on("GET", JOB, (200, job("completed", revision=2)))
    assert run("job", "pull", "/images/top.qcow2", "--increment", "64M", "--wait") == 0


def test_the_timeout_aborts_the_job_and_exits_5(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/jobs", (202, job("running")))
    agent.on("GET", JOB, (304, None), (200, job("running")))
    agent.on("POST", f"{JOB}/abort", _aborted_after(agent, job("aborted", revision=3)))
    assert run("job", "pull", "/images/top.qcow2", "--id", ID, "--wait", "--timeout", "0.3") == 5
    assert len(agent.asked("POST", f"{JOB}/abort")) == 1
    assert f"job {ID} aborted" in capsys.readouterr().out


def test_a_job_that_completed_before_its_abort_is_a_success(agent: FakeAgent, run) -> None:
    agent.on("POST", "/v1/jobs", (202, job("running")))
    agent.on("GET", JOB, (200, job("running")))
    agent.on("POST", f"{JOB}/abort", _aborted_after(agent, job("completed", revision=3), status=409))
    assert run("job", "pull", "/images/top.qcow2", "--id", ID, "--wait", "--timeout", "0.3") == 0


def _aborted_after(agent: FakeAgent, end: dict[str, object], *, status: int = 202):
    def abort(call: Call) -> tuple[int, object]:
        agent.on("GET", JOB, (200, end))
        return (202, job("aborting", revision=2)) if status == 202 else (409, problem("conflict", "it has ended"))

    return abort


def test_interrupting_wait_aborts_the_job_and_exits_130(agent: FakeAgent, start) -> None:
    asked = threading.Event()

    def read(call: Call) -> tuple[int, object]:
        asked.set()
        time.sleep(0.05)
        return 200, job("running")

    agent.on("POST", "/v1/jobs", (202, job("running")))
    agent.on("GET", JOB, read)
    agent.on("POST", f"{JOB}/abort", _aborted_after(agent, job("aborted", revision=3)))
    process = start("job", "pull", "/images/top.qcow2", "--id", ID, "--wait")
    assert asked.wait(10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert len(agent.asked("POST", f"{JOB}/abort")) == 1
    assert f"job {ID} aborted" in out and "interrupted: aborting job" in err


def test_interrupting_before_the_job_exists_says_so(agent: FakeAgent, start) -> None:
    asked = threading.Event()

    def slow(call: Call) -> tuple[int, object]:
        asked.set()
        time.sleep(5)
        return 202, job("queued")

    agent.on("POST", "/v1/jobs", slow)
    process = start("job", "pull", "/images/top.qcow2", "--wait")
    assert asked.wait(10)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=4)
    assert process.returncode == 130
    assert "the agent knows no job" in err


def test_interrupting_watch_leaves_the_job_alone(agent: FakeAgent, start) -> None:
    asked = threading.Event()

    def read(call: Call) -> tuple[int, object]:
        asked.set()
        time.sleep(0.05)
        return 200, job("running")

    agent.on("GET", JOB, read)
    process = start("job", "watch", ID)
    assert asked.wait(10)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert not [call for call in agent.calls if call.method != "GET"]


def test_watch_says_how_the_job_ended(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", JOB, (200, job("running")), (200, job("failed", revision=2)))
    assert run("job", "watch", ID) == 4
    assert f"job {ID} failed" in capsys.readouterr().out


def test_an_agent_that_restarts_is_waited_for(agent: FakeAgent, run) -> None:
    def restart(call: Call) -> tuple[int, object]:
        threading.Thread(target=_restart, args=(agent,)).start()
        return 0, None

    agent.on("POST", "/v1/jobs", (202, job("running")))
    agent.on("GET", JOB, restart, (503, problem("unavailable", "starting")), (200, job("completed", revision=2)))
    assert run("job", "pull", "/images/top.qcow2", "--wait") == 0
    assert not agent.asked("POST", f"{JOB}/abort")


def _restart(agent: FakeAgent) -> None:
    agent.stop()
    time.sleep(0.4)
    agent.start()


def test_an_agent_that_stays_away_ends_the_wait_with_8_and_no_abort(agent: FakeAgent, run, monkeypatch, capsys) -> None:
    monkeypatch.setattr(client.patient, "__kwdefaults__", {"patience": 0.5})

    def leave(call: Call) -> tuple[int, object]:
        threading.Thread(target=agent.stop).start()
        return 0, None

    agent.on("POST", "/v1/jobs", (202, job("running")))
    agent.on("GET", JOB, leave)
    assert run("job", "pull", "/images/top.qcow2", "--wait") == 8
    assert not agent.asked("POST", f"{JOB}/abort")


def test_a_terminal_gets_a_bar_on_stderr_and_stdout_stays_data(agent: FakeAgent, socket_path: Path) -> None:
    readings = [job("running", 1 << 28, revision=2), job("completed", 1 << 30, revision=3)]

    def read(call: Call) -> tuple[int, object]:
        time.sleep(0.2)  # long enough for the bar to be drawn
        return 200, readings.pop(0) if len(readings) > 1 else readings[0]

    agent.on("POST", "/v1/jobs", (202, job("queued", target="/images/\x1b[2J.qcow2")))
    agent.on("GET", JOB, read)
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "hostagent.cli.main", "--socket", str(socket_path), "job", "pull", "/x", "--wait"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "140"}
    with subprocess.Popen([*argv, "--json"], stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        out, _ = process.communicate(timeout=20)
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # a terminal whose other end is closed answers EIO when it is empty
        while chunk := os.read(ours, 65536):
            drawn += chunk
    os.close(ours)
    assert json.loads(out)["state"] == "completed"
    assert b"25 %" in drawn and b"256 MiB / 1 GiB" in drawn and b"1 MiB/s, 30 s left" in drawn
    assert b"\\x1b[2J.qcow2" in drawn and b"\x1b[2J" not in drawn


def test_progress_json_is_one_object_a_line_and_the_last_is_the_job(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/jobs", (202, job("queued")))
    agent.on("GET", JOB, (200, job("running", 5, revision=2)), (200, job("completed", 9, revision=3)))
    assert run("job", "pull", "/images/top.qcow2", "--wait", "--progress=json") == 0
    lines = _json_lines(capsys.readouterr().out)
    assert [line["state"] for line in lines] == ["queued", "running", "completed", "completed"]
    assert lines[1]["cursor"] == {"cur": 5, "end": 1 << 30}
    assert "chain" in lines[-1]


def test_with_json_the_progress_goes_to_stderr_and_the_finished_job_to_stdout(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/jobs", (202, job("queued")))
    agent.on("GET", JOB, (200, job("completed", revision=2)))
    assert run("--json", "job", "pull", "/images/top.qcow2", "--wait", "--progress=json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["state"] == "completed"
    assert [line["state"] for line in _json_lines(err)] == ["queued", "completed"]
