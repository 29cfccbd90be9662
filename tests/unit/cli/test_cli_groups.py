"""`hostagent job copy` of several disks: one request, one wait, one abort."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from fake_agent import Call, FakeAgent, job, problem

GROUP = "aaaaaaaa-2222-4333-8444-555555555555"
IDS = [str(uuid.UUID(int=n)) for n in (1, 2)]
WORDS = ["/i/a.qcow2", "/o/a.qcow2", "/i/b.qcow2", "/o/b.qcow2"]


def group(*states: str, revision: int = 1, **more: Any) -> dict[str, Any]:
    of = {"id": GROUP, "jobs": IDS}
    pairs = zip(IDS, states, strict=True)
    return {"id": GROUP, "jobs": [job(state, id=id, group=of, revision=revision, **more) for id, state in pairs]}


def answering(agent: FakeAgent, *found: dict[str, Any]) -> None:
    """The group as it is from one look to the next; and of each job what the last look says."""
    agent.on("GET", f"/v1/groups/{GROUP}", *[(200, one) for one in found])
    for n, id in enumerate(IDS):
        agent.on("GET", f"/v1/jobs/{id}", *[(200, one["jobs"][n]) for one in found])


def test_several_disks_are_asked_for_as_one_group(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/groups", (202, group("queued", "queued")))
    assert run("job", "copy", *WORDS, "--format", "raw", "--pivot", "--bandwidth", "1MiB/s", "--id", GROUP) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [f"group {GROUP}", *(f"job {id} queued" for id in IDS)]
    assert agent.calls[0].body == {
        "id": GROUP, "completion": "pivot", "bandwidth": 1 << 20,
        "disks": [
            {"target": "/i/a.qcow2", "dest": "/o/a.qcow2", "format": "raw"},
            {"target": "/i/b.qcow2", "dest": "/o/b.qcow2", "format": "raw"},
        ],
    }  # fmt: skip


def test_one_disk_is_no_group(agent: FakeAgent, run) -> None:
    agent.on("POST", "/v1/jobs", (202, job("queued")))
    assert run("job", "copy", *WORDS[:2]) == 0
    assert agent.calls[0].body["dest"] == "/o/a.qcow2"


@pytest.mark.parametrize("words", [WORDS[:3], [*WORDS[:2], "b", "/o/b"], [*WORDS[:2], "/i/b", ""]])
def test_half_a_disk_is_a_usage_error(agent: FakeAgent, run, words: list[str]) -> None:
    assert run("job", "copy", *words) == 2
    assert agent.calls == []


def test_a_lost_answer_is_asked_for_again_with_the_same_id(agent: FakeAgent, run) -> None:
    agent.on("POST", "/v1/groups", (0, None), (200, group("running", "running")))
    assert run("job", "copy", *WORDS) == 0
    first, second = agent.asked("POST", "/v1/groups")
    assert first.body == second.body
    assert uuid.UUID(first.body["id"]).version == 4


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (("completed", "completed"), 0),
        (("failed", "failed"), 4),
        (("ready", "ready"), 0),
    ],
)
def test_wait_stays_until_all_have_ended(agent: FakeAgent, run, capsys, states: tuple[str, str], status: int) -> None:
    agent.on("POST", "/v1/groups", (202, group("queued", "queued")))
    answering(agent, group("running", states[1], revision=2), group(*states, revision=3))
    assert run("job", "copy", *WORDS, "--wait", "--id", GROUP) == status
    out = capsys.readouterr().out
    assert all(f"job {id} {state}" in out for id, state in zip(IDS, states, strict=True))


def test_wait_prints_the_group_as_json(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/groups", (202, group("completed", "completed")))
    answering(agent, group("completed", "completed"))
    assert run("--json", "job", "copy", *WORDS, "--wait", "--progress", "json") == 0
    out, err = capsys.readouterr()
    assert [one["state"] for one in json.loads(out)["jobs"]] == ["completed"] * 2
    assert json.loads(err.splitlines()[0])["cursor"] == {"cur": 0, "end": 2 << 30}


def test_the_timeout_aborts_the_group_by_one_of_its_jobs_and_exits_5(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/groups", (202, group("running", "running")))
    answering(agent, group("running", "running"))

    def abort(call: Call) -> tuple[int, Any]:
        answering(agent, group("aborted", "aborted", revision=9))
        return 202, group("aborting", "running", revision=5)["jobs"][0]

    agent.on("POST", f"/v1/jobs/{IDS[0]}/abort", abort)
    assert run("job", "copy", *WORDS, "--wait", "--timeout", "0.3", "--id", GROUP) == 5
    assert len(agent.asked("POST", f"/v1/jobs/{IDS[0]}/abort")) == 1
    assert agent.asked("POST", f"/v1/jobs/{IDS[1]}/abort") == []
    assert f"job {IDS[1]} aborted" in capsys.readouterr().out


def test_a_group_that_is_decided_before_its_abort_is_a_success(agent: FakeAgent, run) -> None:
    agent.on("POST", "/v1/groups", (202, group("running", "running")))
    answering(agent, group("running", "running"))

    def abort(call: Call) -> tuple[int, Any]:
        answering(agent, group("completed", "completed", revision=9))
        return 409, problem("conflict", "it is decided")

    agent.on("POST", f"/v1/jobs/{IDS[0]}/abort", abort)
    assert run("job", "copy", *WORDS, "--wait", "--timeout", "0.3", "--id", GROUP) == 0


def by_its_id(agent: FakeAgent, *found: dict[str, Any]) -> None:
    """As `answering`, for commands that are told the group's id where a job's may stand."""
    agent.on("GET", f"/v1/jobs/{GROUP}", (404, problem("not_found", f"no job {GROUP}")))
    answering(agent, found[0], *found)


def test_a_groups_id_shows_its_jobs(agent: FakeAgent, run, capsys) -> None:
    by_its_id(agent, group("running", "ready"))
    assert run("job", "show", GROUP) == 0
    out = capsys.readouterr().out
    assert [out.count(f"job {id}") for id in IDS] == [1, 1]
    assert run("--json", "job", "show", GROUP) == 0
    assert json.loads(capsys.readouterr().out)["id"] == GROUP


@pytest.mark.parametrize(("states", "status"), [(("completed", "completed"), 0), (("completed", "failed"), 4)])
def test_a_groups_id_is_watched_to_the_end_of_all(
    agent: FakeAgent, run, capsys, states: tuple[str, str], status: int
) -> None:
    by_its_id(agent, group("completed", "running", revision=2), group(*states, revision=3))
    assert run("job", "watch", GROUP) == status
    assert all(f"job {id} {state}" in capsys.readouterr().out for id, state in [(IDS[1], states[1])])
    assert not [call for call in agent.calls if call.method == "POST"]


def test_a_groups_id_aborts_it_by_one_of_its_jobs_that_go_on(agent: FakeAgent, run, capsys) -> None:
    by_its_id(agent, group("aborted", "running"))

    def abort(call: Call) -> tuple[int, Any]:
        answering(agent, group("aborted", "aborting", revision=9))
        return 202, job("aborting", id=IDS[1])

    agent.on("POST", f"/v1/jobs/{IDS[1]}/abort", abort)
    assert run("job", "abort", GROUP) == 0
    assert capsys.readouterr().out.splitlines() == [f"job {IDS[0]} aborted", f"job {IDS[1]} aborting"]


@pytest.mark.parametrize("verb", ["show", "watch", "abort"])
def test_an_id_of_nothing_is_not_found(agent: FakeAgent, run, capsys, verb: str) -> None:
    agent.on("GET", f"/v1/jobs/{GROUP}", (404, problem("not_found", f"no job {GROUP}")))
    agent.on("POST", f"/v1/jobs/{GROUP}/abort", (404, problem("not_found", f"no job {GROUP}")))
    agent.on("GET", f"/v1/groups/{GROUP}", (404, problem("not_found", f"no group {GROUP}")))
    assert run("job", verb, GROUP) == 3
    assert f"no job {GROUP}" in capsys.readouterr().err


def test_a_dry_run_says_what_all_disks_need(agent: FakeAgent, run, capsys) -> None:
    plans = [{"before": [f"/i/{n}"], "after": [f"/o/{n}"], "space": {"need": n << 20}} for n in (3, 4)]
    agent.on("POST", "/v1/groups", (200, {"dry_run": True, "disks": plans}))
    assert run("job", "copy", *WORDS, "--dry-run") == 0
    assert "at most 7 MiB" in capsys.readouterr().out.partition("all 2 disks")[2]
    plans[1]["space"] = {}
    agent.on("POST", "/v1/groups", (200, {"dry_run": True, "disks": plans}))
    assert run("job", "copy", *WORDS, "--dry-run") == 0
    assert "at most 3 MiB, and what 1 of them need" in capsys.readouterr().out.partition("all 2 disks")[2]


def test_a_dry_run_tells_of_each_disk(agent: FakeAgent, run, capsys) -> None:
    plans = [{"before": [f"/i/{name}"], "after": [f"/o/{name}"], "warnings": []} for name in "ab"]
    agent.on("POST", "/v1/groups", (200, {"dry_run": True, "disks": plans}))
    assert run("job", "copy", *WORDS, "--dry-run") == 0
    assert agent.calls[0].body["dry_run"] is True
    assert "id" not in agent.calls[0].body
    out = capsys.readouterr().out
    assert "/o/a" in out and "/o/b" in out


def test_jobs_of_a_group_are_listed_and_say_so(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", "/v1/jobs", (200, {"items": group("running", "running")["jobs"], "next": None}))
    assert run("job", "list", "--group", GROUP) == 0
    assert agent.calls[0].query["group"] == [GROUP]
    agent.on("GET", f"/v1/jobs/{IDS[0]}", (200, group("running", "running")["jobs"][0]))
    assert run("job", "show", IDS[0]) == 0
    assert f"{GROUP} (2 jobs)" in capsys.readouterr().out
