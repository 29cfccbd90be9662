"""Whatever a job or a row holds comes back from JSON as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent import records
from hostagent.records import AccessFile, DaemonRecord, Ending, ExportRecord, Node, encode
from jobs.model import (
    Chain,
    Completion,
    Cursor,
    Drive,
    Failure,
    FileId,
    Group,
    Job,
    JobSpec,
    Kept,
    Layer,
    Operation,
    Revocation,
    State,
    Target,
    TargetState,
)

U64 = st.integers(0, (1 << 64) - 1)
texts = st.text(max_size=12)
times = st.datetimes(min_value=datetime(1990, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
files = st.builds(FileId, U64, U64)
layers = st.builds(Layer, texts, st.sampled_from(["raw", "qcow2"]), files, U64, U64, st.none() | texts)
chains = st.builds(Chain, st.lists(layers, min_size=1, max_size=3).map(tuple))
labels = st.dictionaries(texts, texts, max_size=3)
specs = st.builds(
    JobSpec,
    st.sampled_from(Operation),
    texts,
    base=st.none() | texts,
    top=st.none() | texts,
    dest=st.none() | texts,
    format=st.none() | texts,
    source_format=st.none() | texts,
    shallow=st.booleans(),
    reuse_external=st.booleans(),
    completion=st.none() | st.sampled_from(Completion),
    delete=st.booleans(),
    increment=st.none() | U64,
    bandwidth=U64,
    check=texts,
    labels=labels,
    anywhere=st.booleans(),
)
jobs_ = st.builds(
    Job,
    id=texts,
    spec=specs,
    state=st.sampled_from(State),
    created=times,
    since=times,
    before=chains,
    after=chains,
    revision=U64,
    cursor=st.builds(Cursor, U64, U64),
    upto=st.none() | U64,
    intent=st.none() | st.just("abort"),
    drive=st.none() | st.builds(Drive, texts, texts, texts),
    target=st.none()
    | st.builds(
        Target, texts, texts, st.booleans(), st.sampled_from(TargetState), st.none() | texts, st.none() | files
    ),
    completion=st.none() | st.sampled_from(Completion),
    group=st.none() | st.builds(Group, texts, st.lists(texts, max_size=3).map(tuple)),
    sealed=st.none() | st.sampled_from(Completion),
    started=st.none() | times,
    finished=st.none() | times,
    error=st.none() | st.builds(Failure, texts, texts, st.none() | texts),
    revocation=st.sampled_from(Revocation),
    revoked=st.lists(texts, max_size=2).map(tuple),
    kept=st.lists(st.builds(Kept, texts, texts, st.lists(texts, max_size=2).map(tuple)), max_size=2).map(tuple),
    warnings=st.lists(texts, max_size=2).map(tuple),
)
acls = st.none() | st.fixed_dictionaries({"mode": U64, "uid": U64, "gid": U64, "xattr": st.none() | texts})
entries = st.builds(
    AccessFile,
    file=files,
    path=texts,
    access=texts,
    mode=texts,
    verdict=texts,
    since=times,
    uid=U64,
    before=acls,
    given=acls,
    reason=st.none() | texts,
    holders=st.lists(texts, max_size=2).map(tuple),
)
exports = st.builds(
    ExportRecord,
    id=texts,
    image=texts,
    path=texts,
    file=files,
    format=texts,
    state=st.sampled_from(["starting", "running", "stopping", "stopped", "lost"]),
    ending=st.none() | st.builds(Ending, texts, st.booleans(), texts),
    created=times,
    size=U64,
    pid=st.none() | U64,
    ttl=st.none() | st.floats(0, 1e9),
    expires=st.none() | times,
    stopped=st.none() | times,
    labels=labels,
)
nodes = st.lists(st.builds(Node, layers, U64, U64), max_size=3).map(tuple)
daemons = st.builds(
    DaemonRecord,
    id=texts,
    file=files,
    shallow=st.booleans(),
    pid=U64,
    start_time=U64,
    boot_id=texts,
    nodes=nodes,
    beside=nodes,
    created=times,
)


def through_json(value: object) -> dict[str, object]:
    data: dict[str, object] = json.loads(json.dumps(encode(value)))
    return data


@given(jobs_)
def test_a_job_comes_back_as_it_was(job: Job) -> None:
    back = records.job(through_json(job))
    assert back == job
    assert type(back.cursor) is Cursor
    assert type(back.before.top.file) is FileId
    assert (back.state, back.spec.operation) == (State(job.state), Operation(job.spec.operation))


@given(entries, exports, daemons)
def test_rows_come_back_as_they_were(entry: AccessFile, export: ExportRecord, daemon: DaemonRecord) -> None:
    assert records.access_file(through_json(entry)) == entry
    assert records.export(through_json(export)) == export
    assert records.daemon(through_json(daemon)) == daemon


@given(jobs_)
def test_a_job_from_before_guests_had_any_is_an_images(job: Job) -> None:
    stored = encode(job)
    del stored["drive"]
    assert records.job(stored) == replace(job, drive=None)


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(TypeError, match="bytes"):
        encode({"xattr": b"x"})
    with pytest.raises(TypeError, match="set"):
        encode({1, 2})
