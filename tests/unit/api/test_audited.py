"""Each use-case that changes something has its line, and each that changes nothing has none."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from running_agent import Agent, serving

from hostagent.api import scopes
from hostagent.api.audited import DEEDS
from hostagent.api.usecases import Service

READING = {
    *("plan_job", "list_jobs", "get_job", "wait_job", "plan_group", "get_group", "list_exports", "get_export"),
    *("wait_export", "inspect_image", "list_bitmaps", "list_grants", "get_grant", "host", "drain_state", "ready"),
    *("events_since", "last_seq"),
}
ID = "00000000-0000-0000-0000-000000000001"
PULL = {"operation": "pull", "target": "/img/top.qcow2", "id": ID}


def test_every_use_case_is_one_or_the_other() -> None:
    known = {name for name, _ in inspect.getmembers(Service, inspect.isfunction) if not name.startswith("_")}
    assert known == READING | DEEDS.keys()
    assert not READING & DEEDS.keys()


def test_there_are_as_many_as_routes_that_change_something() -> None:
    assert len(DEEDS) == sum(rule.changes for rule in scopes.ROUTES.values())


def test_each_has_its_line(tmp_path: Path) -> None:
    bodies = {
        "/v1/jobs": PULL,
        "/v1/groups": {"disks": [{"target": "/a", "dest": "/b"}, {"target": "/c", "dest": "/d"}]},
        "/v1/exports": {"image": "/a", "id": ID},
        "/v1/images/bitmaps": {"name": "b0"},
        "/v1/images/bitmaps/merge": {"name": "b0", "source_name": "b1"},
    }
    with serving(tmp_path / "s") as agent:
        done = []
        order = sorted(scopes.ROUTES.items(), key=lambda item: (item[0][0] == "DELETE", item[0][1].count("/")))
        for (method, path), rule in order:
            if not rule.changes:
                continue
            query = (
                "?path=/a&name=b0"
                if method == "DELETE" and "bitmaps" in path
                else "?path=/a"
                if "bitmaps" in path
                else ""
            )
            body = bodies.get(path) if method == "POST" else {"bandwidth": 5} if method == "PATCH" else None
            reply = agent.call(method, path.replace("{id}", ID) + query, body)
            assert reply.status not in (400, 401, 403, 404, 405), (method, path, reply.body)
            done.append((method, path, agent.audit[-1]))
            assert len(agent.audit) == len(done), f"{method} {path} has its line"
        assert {line["what"] for *_, line in done} == {what for what, _ in DEEDS.values()}
        assert all(line["who"].startswith("uid ") and line["from"].startswith("pid ") for *_, line in done)
        by_what = {line["what"]: line for *_, line in done}
    assert (
        by_what["job start"] | {"target": PULL["target"], "id": ID, "result": "ok", "new": True} == by_what["job start"]
    )
    assert by_what["job complete"]["result"] == "conflict" and by_what["job complete"]["id"] == ID
    assert by_what["grant revoke"]["result"] == "busy"
    assert by_what["bitmap add"]["target"] == "/a" and by_what["bitmap add"]["name"] == "b0"


@pytest.mark.parametrize(
    "path", ["/v1/jobs", "/v1/host", "/v1/exports", f"/v1/jobs/{ID}", "/v1/images/inspect?path=/a"]
)
def test_who_only_looks_leaves_no_line(agent: Agent, path: str) -> None:
    agent.audit.clear()
    agent.call("GET", path)
    agent.call("POST", "/v1/jobs", {**PULL, "dry_run": True})
    assert agent.audit == []


def test_a_call_that_failed_by_a_fault_of_ours_has_its_line(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as agent:
        assert agent.call("DELETE", f"/v1/jobs/{ID}").status == 500
        assert [line["result"] for line in agent.audit] == ["internal"]
