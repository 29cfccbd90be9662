from __future__ import annotations

import json
import logging

import pytest

PULL = {"operation": "pull", "target": "/img/top.qcow2"}


def refused(agent, body, path="/v1/jobs"):
    reply = agent.call("POST", path, body)
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.body["status"] == reply.status
    assert reply.body["type"] == f"urn:hostagent:problem:{reply.body['code']}"
    assert agent.service.jobs == {}
    return reply


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bandwidth", -1),
        ("bandwidth", "50"),
        ("bandwidth", True),
        ("bandwidth", 2**63),
        ("bandwidth", 1.5),
        ("increment", 0),
        ("check", "maybe"),
        ("target", ""),
        ("target", "a\0b"),
        ("target", "x" * 4097),
        ("target", 7),
        ("id", "7"),
        ("dry_run", "yes"),
        ("format", "vmdk"),
        ("labels", {str(n): "" for n in range(33)}),
        ("operation", None),
    ],
)
def test_a_bad_value_is_named(agent, field, value):
    reply = refused(agent, {**PULL, field: value})
    assert (reply.status, reply.body["code"], reply.body["field"]) == (400, "invalid", field)
    if value is not None:
        assert reply.body["value"] == repr(value)[:199] + "…" if len(repr(value)) > 200 else repr(value)


@pytest.mark.parametrize("labels", [{"a=b": "1"}, {"": "1"}, {"k" * 65: "1"}, {"k": "v" * 257}, {"k": 1}, {"a\nb": ""}])
def test_labels_are_bounded(agent, labels):
    assert refused(agent, {**PULL, "labels": labels}).body["field"].startswith("labels.")


def test_a_missing_field_is_named(agent):
    reply = refused(agent, {"operation": "pull"})
    assert (reply.body["field"], reply.body["detail"]) == ("target", "target is missing")


def test_a_missing_body_is_said(agent):
    assert refused(agent, None).body["field"] == "body"


def test_an_unknown_field_names_the_nearest_known_one(agent):
    reply = refused(agent, {**PULL, "bandwith": 1, "increment": -1})
    assert reply.body["field"] == "bandwith"
    assert reply.body["remedy"].startswith("did you mean bandwidth? known fields are bandwidth, base, ")


def test_a_word_that_begins_with_a_field_means_it(agent):
    assert refused(agent, {**PULL, "destination": "/a"}).body["remedy"].startswith("did you mean dest? ")
    assert refused(agent, {**PULL, "donation": "/a"}).body["remedy"].startswith("known fields are ")


def test_a_lone_surrogate_is_refused(agent):
    assert refused(agent, b'{"operation": "pull", "target": "\\udcff"}').status == 400


def test_a_path_and_a_method_that_do_not_exist_are_problems_too(agent):
    reply = agent.call("GET", "/v2/jobs")
    assert (reply.status, reply.body["code"]) == (404, "not_found")
    reply = agent.call("PUT", "/v1/jobs", {})
    assert (reply.status, reply.body["status"], reply.headers["content-type"]) == (405, 405, "application/problem+json")
    assert "GET" in reply.headers["allow"]


def test_an_error_of_the_service_keeps_its_remedy(agent):
    reply = agent.call("GET", "/v1/jobs/nothing")
    assert (reply.status, reply.body["remedy"]) == (404, "hostagent job list")


def test_a_fault_is_logged_under_the_id_that_is_answered(agent, caplog):
    with caplog.at_level(logging.ERROR):
        reply = agent.call("GET", "/v1/jobs/00000000-0000-0000-0000-00000000dead")
    assert (reply.status, reply.body["code"]) == (500, "internal")
    assert "secret detail" not in json.dumps(reply.body)
    logged = [record for record in caplog.records if reply.body["fault"] in record.getMessage()]
    assert len(logged) == 1
    assert "secret detail" in str(logged[0].exc_info)
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
