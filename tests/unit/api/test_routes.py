from __future__ import annotations

import os
import threading
import time
import uuid

import pytest

from hostagent.api import models

PULL = {"operation": "pull", "target": "/img/top.qcow2"}


def start(agent, **more):
    return agent.call("POST", "/v1/jobs", {**PULL, **more})


def test_a_new_job_is_accepted_with_location_and_etag(agent):
    reply = start(agent)
    assert reply.status == 202
    assert reply.headers["location"] == f"/v1/jobs/{reply.body['id']}"
    assert reply.headers["etag"] == '"1"'
    models.Job.model_validate(reply.body)


def test_the_same_id_and_body_gives_the_first_result(agent):
    chosen = str(uuid.uuid4())
    first, again = start(agent, id=chosen), start(agent, id=chosen)
    assert (first.status, again.status) == (202, 200)
    assert again.body == first.body


def test_the_same_id_with_another_body_is_a_conflict(agent):
    chosen = str(uuid.uuid4())
    start(agent, id=chosen)
    reply = start(agent, id=chosen, bandwidth=7)
    assert (reply.status, reply.body["code"], reply.body["field"]) == (409, "conflict", "id")
    assert reply.body["job"] == chosen  # details are members of the problem


def test_the_service_gets_what_was_said_and_nothing_else(agent):
    start(agent, increment=1 << 26, labels={"ticket": "7"}, base=None)
    _, (spec, peer) = agent.service.calls[0]
    assert spec == {**PULL, "increment": 1 << 26, "labels": {"ticket": "7"}}
    assert peer.pid > 0


def test_a_dry_run_plans_and_starts_nothing(agent):
    reply = start(agent, dry_run=True)
    assert reply.status == 200
    assert reply.body["chain"]["after"] == [PULL["target"]]
    assert agent.service.jobs == {}


def test_an_operation_that_is_not_there_yet_is_not_supported(agent):
    reply = agent.call("POST", "/v1/jobs", {"operation": "copy", "target": "/a", "dest": "/b", "format": "raw"})
    assert (reply.status, reply.body["code"]) == (501, "not_supported")


def test_a_known_revision_is_not_sent_again(agent):
    id = start(agent).body["id"]
    reply = agent.call("GET", f"/v1/jobs/{id}", headers={"if-none-match": '"1"'})
    assert (reply.status, reply.body, reply.headers["etag"]) == (304, b"", '"1"')
    assert agent.call("GET", f"/v1/jobs/{id}", headers={"if-none-match": '"0"'}).status == 200


def test_a_long_poll_returns_when_the_job_changes(agent):
    id = start(agent).body["id"]
    threading.Timer(0.2, lambda: agent.run(agent.service.touch(id, state="ready"))).start()
    began = time.monotonic()
    reply = agent.call("GET", f"/v1/jobs/{id}?wait=9", headers={"if-none-match": '"1"'})
    assert (reply.status, reply.body["state"], reply.body["revision"]) == (200, "ready", 2)
    assert 0.1 < time.monotonic() - began < 5


def test_a_long_poll_of_something_that_has_changed_returns_at_once(agent):
    id = start(agent).body["id"]
    began = time.monotonic()
    assert agent.call("GET", f"/v1/jobs/{id}?wait=9", headers={"if-none-match": '"77"'}).status == 200
    assert time.monotonic() - began < 2


def test_a_long_poll_ends_at_the_configured_limit(serve):
    with serve(wait_limit=0.2) as agent:
        id = start(agent).body["id"]
        assert agent.call("GET", f"/v1/jobs/{id}?wait=50", headers={"if-none-match": '"1"'}).status == 304
        assert agent.call("GET", f"/v1/jobs/{id}?wait=50").status == 200


def test_a_stopping_agent_answers_its_long_polls(serve):
    answers = []
    with serve() as agent:
        id = start(agent).body["id"]
        poll = threading.Thread(target=lambda: answers.append(agent.call("GET", f"/v1/jobs/{id}?wait=50")))
        poll.start()
        time.sleep(0.3)
        began = time.monotonic()
    poll.join(5)
    assert answers[0].status == 200
    assert time.monotonic() - began < 5


def test_an_etag_that_is_none_of_ours_is_refused(agent):
    id = start(agent).body["id"]
    reply = agent.call("GET", f"/v1/jobs/{id}", headers={"if-none-match": '"abc"'})
    assert (reply.status, reply.body["field"], reply.body["value"]) == (400, "if-none-match", "'\"abc\"'")


@pytest.mark.parametrize(("action", "status"), [("next", 202), ("abort", 202), ("pause", 200), ("resume", 200)])
def test_an_action_answers_the_job(agent, action, status):
    id = start(agent).body["id"]
    reply = agent.call("POST", f"/v1/jobs/{id}/{action}")
    assert (reply.status, reply.body["id"], reply.headers["etag"]) == (status, id, '"2"')


def test_actions_hand_on_what_their_body_says(agent):
    id = start(agent).body["id"]
    agent.call("POST", f"/v1/jobs/{id}/next", {"cursor": 5})
    agent.call("POST", f"/v1/jobs/{id}/next", {})
    agent.call("POST", f"/v1/jobs/{id}/abort", {"force": True})
    assert agent.service.calls[1:] == [("next_job", 5), ("next_job", None), ("abort_job", True)]


def test_an_action_that_takes_no_fields_refuses_them(agent):
    id = start(agent).body["id"]
    reply = agent.call("POST", f"/v1/jobs/{id}/pause", {"force": True})
    assert (reply.status, reply.body["field"]) == (400, "force")


def test_completing_what_is_not_ready_is_a_conflict(agent):
    reply = agent.call("POST", f"/v1/jobs/{start(agent).body['id']}/complete")
    assert (reply.status, reply.body["state"]) == (409, "running")


def test_the_bandwidth_can_be_changed(agent):
    id = start(agent).body["id"]
    assert agent.call("PATCH", f"/v1/jobs/{id}", {"bandwidth": 1000}).body["bandwidth"] == 1000


def test_a_deleted_job_is_gone(agent):
    id = start(agent).body["id"]
    reply = agent.call("DELETE", f"/v1/jobs/{id}")
    assert (reply.status, reply.body) == (204, b"")
    assert agent.call("GET", f"/v1/jobs/{id}").status == 404


DISKS = [{"target": "/a", "dest": "/c"}, {"target": "/b", "dest": "/d", "format": "raw"}]


def test_a_group_is_started_once_and_shown(agent):
    body = {"id": str(uuid.uuid4()), "disks": DISKS, "completion": "pivot"}
    first, again = (agent.call("POST", "/v1/groups", body) for _ in range(2))
    assert (first.status, again.status) == (202, 200)
    assert first.headers["location"] == f"/v1/groups/{body['id']}"
    models.Group.model_validate(first.body)
    assert agent.service.calls[0][1][0] == body
    assert agent.call("GET", first.headers["location"]).body["id"] == body["id"]
    assert agent.call("GET", "/v1/groups/none").status == 404


def test_a_dry_run_of_a_group_starts_nothing(agent):
    reply = agent.call("POST", "/v1/groups", {"disks": DISKS, "dry_run": True})
    assert (reply.status, reply.body["disks"]) == (200, DISKS)
    assert agent.service.groups == {}


@pytest.mark.parametrize(
    "disks", [[], DISKS[:1], [*DISKS, {"target": "/e"}], [*DISKS, {**DISKS[0], "base": "/b"}], DISKS * 51]
)
def test_what_is_no_group_is_refused(agent, disks):
    reply = agent.call("POST", "/v1/groups", {"disks": disks})
    assert (reply.status, reply.body["code"]) == (400, "invalid")
    assert agent.service.calls == []


def test_lists_hand_on_their_filters(agent):
    query = "state=running&target=/a&label=a=1&label=b=x%3Dy&origin=agent&limit=7&after=x&group=g"
    reply = agent.call("GET", f"/v1/jobs?{query}")
    assert reply.body == {"items": [], "next": None}
    asked = {"state": "running", "target": "/a", "labels": {"a": "1", "b": "x=y"}, "origin": "agent", "group": "g"}
    assert agent.service.calls == [("list_jobs", {**asked, "limit": 7, "after": "x"})]


def test_a_page_never_passes_the_configured_limit(serve):
    with serve(list_limit=50) as agent:
        agent.call("GET", "/v1/jobs")
        assert agent.service.calls[0][1]["limit"] == 50


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "label=a", "label=%3Da", "state=sleepy", "colour=red"])
def test_a_filter_that_cannot_be_is_refused_by_name(agent, query):
    reply = agent.call("GET", f"/v1/jobs?{query}")
    assert (reply.status, reply.body["code"], reply.body["field"]) == (400, "invalid", query.partition("=")[0])


def test_an_unknown_query_parameter_names_the_nearest_known_one(agent):
    reply = agent.call("GET", "/v1/jobs?lable=a%3D1")
    assert "did you mean label?" in reply.body["remedy"]


def test_an_export_starts_and_stops(agent):
    reply = agent.call("POST", "/v1/exports", {"image": "/a", "bitmaps": ["b0"], "ttl": 5, "idle_timeout": 1.5})
    assert reply.status == 202
    models.Export.model_validate(reply.body)
    where = reply.headers["location"]
    assert agent.call("GET", where).headers["etag"] == '"1"'
    assert agent.call("DELETE", f"{where}?force=true").body["state"] == "stopped"
    assert agent.service.calls[-1] == ("stop_export", True)


def test_a_path_that_is_no_utf8_comes_back_escaped(agent):
    reply = agent.call("GET", "/v1/images/inspect?path=/a")
    assert reply.body["chain"][1]["path"] == "/not\udcffutf8"


def test_bitmaps_are_listed_and_changed(agent):
    where = "/v1/images/bitmaps"
    found = models.BitmapList.model_validate(agent.call("GET", f"{where}?path=/a%20b").body)
    assert (found.path, found.items[0].name) == ("/a b", "b0")
    new = {"name": "größe", "granularity": 65536, "disabled": True}
    assert agent.call("POST", f"{where}?path=/a", new).status == 200
    assert agent.service.calls[-1] == ("add_bitmap", ("/a", new))
    assert agent.call("DELETE", f"{where}?path=/a&name=b%261").status == 200
    assert agent.service.calls[-1] == ("remove_bitmap", ("/a", "b&1"))
    merge = {"name": "b0", "source_name": "b1", "source": "/b"}
    assert agent.call("POST", f"{where}/merge?path=/a", merge).status == 200
    assert agent.service.calls[-1] == ("merge_bitmap", ("/a", merge))


@pytest.mark.parametrize(
    "body", [{}, {"name": ""}, {"name": "a\n"}, {"name": "n" * 1024}, {"name": "a", "granularity": 1 << 32}]
)
def test_a_bitmap_that_cannot_be_is_refused_before_the_image_is_opened(agent, body):
    calls = len(agent.service.calls)
    assert agent.call("POST", "/v1/images/bitmaps?path=/a", body).status == 400
    assert agent.call("POST", "/v1/images/bitmaps", {"name": "b"}).body["field"] == "path"
    assert len(agent.service.calls) == calls


def test_grants_are_listed_shown_and_kept_while_needed(agent):
    models.Grant.model_validate(agent.call("GET", "/v1/grants").body["items"][0])
    assert agent.call("GET", "/v1/grants/g1").body["id"] == "g1"
    models.Grant.model_validate(agent.call("POST", "/v1/grants/g1/undo").body)
    reply = agent.call("DELETE", "/v1/grants/g1")
    assert (reply.status, reply.body["holders"]) == (409, ["job:j"])


def test_draining_is_begun_asked_for_and_lifted(agent):
    assert agent.call("POST", "/v1/host/drain").body["draining"]
    assert agent.call("POST", "/v1/host/drain", {"pause": True}).status == 200
    assert agent.call("POST", "/v1/host/drain", {"pauze": True}).body["field"] == "pauze"
    assert agent.call("GET", "/v1/host/drain").status == 200
    assert agent.call("DELETE", "/v1/host/drain").status == 200
    asked = [(name, what) for name, what in agent.service.calls if "drain" in name]
    assert [(name, what[0]) for name, what in asked[:2]] == [("drain", False), ("drain", True)]
    peers = [asked[0][1][1], asked[2][1]]
    assert {peer.uid for peer in peers} == {os.geteuid()}


def test_probes_and_metrics(agent):
    assert agent.call("GET", "/healthz").body == {"ok": True}
    assert agent.call("GET", "/readyz").status == 200
    agent.service.is_ready = False
    reply = agent.call("GET", "/readyz")
    assert (reply.status, reply.body["checks"]["store"]["ok"]) == (503, False)
    assert agent.call("GET", "/metrics").body == b"m 1\n"
    assert agent.call("GET", "/v1/host").body["host"] == "h1"
