from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.cloudevents import from_json, to_json
from events.model import (
    ExportEvent,
    ExportEventKind,
    GrantEvent,
    GrantEventKind,
    HostEvent,
    HostEventKind,
    JobEvent,
    JobEventKind,
    Record,
    Status,
)

text = st.text(max_size=20)
maybe = st.none() | text
labels = st.dictionaries(text, text, max_size=3)
count = st.integers(0, 2**63 - 1)

events = st.one_of(
    st.builds(
        JobEvent,
        kind=st.sampled_from(JobEventKind),
        job=text, operation=text, path=text, state=text, cur=count, end=count, domain=text, disk=text,
        status=st.none() | st.sampled_from(Status),
        reason=maybe,
        error=st.none() | st.fixed_dictionaries({"code": text, "message": text, "remedy": maybe}),
        origin=text, labels=labels,
    ),
    st.builds(
        GrantEvent,
        kind=st.sampled_from(GrantEventKind),
        path=text, mode=text, trigger=text, reason=maybe, holders=st.lists(text, max_size=3).map(tuple),
    ),
    st.builds(
        ExportEvent,
        kind=st.sampled_from(ExportEventKind), export=text, path=text, uri=text, reason=maybe, labels=labels,
    ),
    st.builds(HostEvent, kind=st.sampled_from(HostEventKind), subject=text, reason=maybe),
)  # fmt: skip
records = st.builds(Record, seq=count, time=st.datetimes(timezones=st.just(UTC)), event=events)

DONE = Record(
    7,
    datetime(2024, 5, 1, 14, 0, tzinfo=timezone(timedelta(hours=2))),
    JobEvent(JobEventKind.COMPLETED, "j1", "pull", "/a", "completed", 5, 5, status=Status.COMPLETED),
)


@given(records, text)
def test_a_record_comes_back_as_it_was(record, host):
    assert from_json(json.loads(json.dumps(to_json(record, host)))) == record


def test_the_envelope_is_cloudevents_1_0():
    envelope = to_json(DONE, "h1")
    data = envelope.pop("data")
    assert envelope == {
        "specversion": "1.0",
        "id": "7",
        "source": "/hosts/h1",
        "type": "org.hostagent.job.completed.v1",
        "subject": "j1",
        "time": "2024-05-01T12:00:00.000000Z",
        "datacontenttype": "application/json",
    }
    assert (data["status"], data["path"], data["domain"], data["disk"]) == ("COMPLETED", "/a", "", "")
    assert "kind" not in data


def test_transient_records_have_ids_of_their_own_that_are_no_numbers():
    progress = replace(DONE, seq=0)
    first, second = to_json(progress, "h"), to_json(progress, "h")
    assert first["id"] != second["id"]
    assert from_json(first).seq == 0


def test_fields_of_a_newer_agent_are_ignored():
    envelope = to_json(DONE, "h")
    envelope["traceparent"] = "00"
    envelope["data"]["colour"] = "red"
    assert from_json(envelope) == DONE


@pytest.mark.parametrize(
    "change",
    [
        {"type": "org.hostagent.job.exploded.v1"},
        {"type": "org.hostagent.job.completed.v2"},
        {"type": "org.example.job.completed.v1"},
        {"time": "yesterday"},
        {"id": 7},
        {"data": {}},
        {"data": None},
    ],
)
def test_what_is_no_event_of_ours_is_refused(change):
    with pytest.raises(ValueError):
        from_json({**to_json(DONE, "h"), **change})


@pytest.mark.parametrize("missing", ["id", "type", "time", "data"])
def test_an_envelope_without_its_parts_is_refused(missing):
    envelope = to_json(DONE, "h")
    del envelope[missing]
    with pytest.raises(ValueError):
        from_json(envelope)
