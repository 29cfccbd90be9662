"""Exports that have a storage daemon for themselves: parts of raw images, and limits on clients."""

from __future__ import annotations

import importlib
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, Json, raw_image
from tests.qemu.faults import HASTE, PATIENCE, Pair, eventually
from tests.qemu.test_exports import Client, alive, assert_no_grants, content, refusal, show, stop

nbd: Any = importlib.import_module("nbd")

pytestmark = pytest.mark.qemu

SIZE = 16 * MIB


def bytes_of(uri: str) -> bytes:
    client = nbd.NBD()
    client.connect_uri(uri)
    data = bytes(client.pread(client.get_size(), 0))
    client.shutdown()
    return data


# Parts


@pytest.mark.parametrize(
    ("offset", "size"),
    [(512, 1024), (0, MIB), (3 * MIB, None), (None, 512), (SIZE - 512, 512), (0, SIZE)],
    ids=lambda value: str(value),
)
def test_a_part_of_a_raw_image_is_all_that_clients_see(
    agent: AgentProcess, images: Pair, offset: int | None, size: int | None
) -> None:
    spec = {name: value for name, value in (("offset", offset), ("size", size)) if value is not None}
    export = agent.export(images.base, format="raw", **spec)
    begin, end = offset or 0, SIZE if size is None else (offset or 0) + size
    assert (export["offset"], export["size"]) == (begin, end - begin)
    assert bytes_of(export["uri"]) == images.base.read_bytes()[begin:end]
    stop(agent, export)
    assert_no_grants(agent, images)


def test_a_writable_part_is_written_and_nothing_around_it(agent: AgentProcess, folder: Path) -> None:
    image = raw_image(folder / "disk.raw", SIZE)
    before = image.read_bytes()
    export = agent.export(image, format="raw", writable=True, offset=MIB, size=2 * MIB)
    client = nbd.NBD()
    client.connect_uri(export["uri"])
    client.pwrite(b"x" * 2 * MIB, 0)
    client.set_strict_mode(0)
    with pytest.raises(nbd.Error):
        client.pwrite(b"y" * 512, 2 * MIB)
    client.shutdown()
    stop(agent, export)
    assert image.read_bytes() == before[:MIB] + b"x" * 2 * MIB + before[3 * MIB :]


@pytest.mark.parametrize(
    ("image", "spec", "field"),
    [
        ("base", {"offset": SIZE}, "offset"),
        ("base", {"offset": 512, "size": SIZE}, "offset"),
        ("base", {"size": SIZE + 512}, "size"),
        ("base", {"size": 0}, "size"),
        ("base", {"offset": 100}, "offset"),
        ("base", {"offset": 512, "size": 1000}, "size"),
        ("base", {"offset": (1 << 63) - 512, "size": (1 << 63) - 512}, "offset"),
        ("base", {"offset": -512}, "offset"),
        ("top", {"offset": 512}, "offset"),
        ("top", {"size": 512}, "size"),
        ("base", {"max_clients": 0}, "max_clients"),
    ],
)
def test_a_part_that_is_none_is_refused(agent: AgentProcess, images: Pair, image: str, spec: Json, field: str) -> None:
    path, format_ = (images.base, "raw") if image == "base" else (images.top, "qcow2")
    error = refusal(agent, "POST", "/v1/exports", {"image": str(path), "format": format_, **spec})
    assert (error.code, error.body["field"]) == ("invalid", field), error.body
    assert_no_grants(agent, images)


def test_the_same_id_asks_for_the_same_part(agent: AgentProcess, images: Pair) -> None:
    request = {"id": str(uuid.uuid4()), "image": str(images.base), "format": "raw", "offset": MIB}
    export = agent.post("/v1/exports", request)
    assert agent.call("POST", "/v1/exports", request)[0] == 200
    assert agent.call("POST", "/v1/exports", {**request, "size": SIZE - MIB})[0] == 200
    for other in ({"offset": 2 * MIB}, {"size": MIB}, {"max_clients": 2}):
        assert refusal(agent, "POST", "/v1/exports", {**request, **other}).code == "conflict"
    stop(agent, export)


# Clients


@contextmanager
def queued(uri: str) -> Iterator[subprocess.Popen[str]]:
    """A client that says when it got in."""
    process = subprocess.Popen([sys.executable, "-c", Client.CODE, uri], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def got_in(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "in\n"


def test_an_export_serves_no_more_clients_than_it_may_and_others_of_the_image_are_not_counted(
    agent: AgentProcess, images: Pair
) -> None:
    export, other = agent.export(images.top, max_clients=2), agent.export(images.top)
    assert export["max_clients"] == 2
    assert export["socket"] != other["socket"]
    with Client(export["uri"]) as first, Client(export["uri"]), Client(other["uri"]):
        with queued(export["uri"]) as third:
            with Client(other["uri"]):  # later, and in already
                assert {c["pid"] for c in show(agent, export)["clients"]}.isdisjoint({third.pid})
            first.process.kill()
            assert got_in(third), "its turn came"
            assert eventually(lambda: third.pid in {c["pid"] for c in show(agent, export)["clients"]})
        assert content(other["uri"]) == images.truth.read_bytes()
    stop(agent, export)
    assert alive(other["pid"])
    stop(agent, other)


def test_a_job_that_writes_the_image_is_refused_and_names_the_export(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top, max_clients=1)
    error = refusal(agent, "POST", "/v1/jobs", {"operation": "pull", "target": str(images.top)})
    assert (error.code, error.body["holders"]) == ("busy", [f"export:{export['id']}"])
    assert f"export stop {export['id']}" in error.body["remedy"]
    assert agent.get("/v1/jobs")["items"] == []
    stop(agent, export)
    assert agent.until_ended(agent.pull(images.top)["id"])["state"] == "completed"


def test_a_commit_is_refused_for_an_export_of_its_base(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.base, format="raw", max_clients=1)
    wanted = {"operation": "commit", "target": str(images.top), "completion": "pivot"}
    error = refusal(agent, "POST", "/v1/jobs", wanted)
    assert (error.code, error.body["holders"]) == ("busy", [f"export:{export['id']}"])
    stop(agent, export)


def test_a_copy_with_a_pivot_says_that_it_stays_where_it_is(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top, max_clients=1)
    wanted = {"operation": "copy", "target": str(images.top), "dest": str(images.folder / "copy.qcow2")}
    job = agent.until_ended(agent.post("/v1/jobs", {**wanted, "completion": "pivot"})["id"])
    assert job["state"] == "completed", job
    assert any(f"export:{export['id']}" in warning for warning in job["warnings"]), job
    assert show(agent, export)["path"] == str(images.top)
    assert content(export["uri"]) == images.truth.read_bytes()
    stop(agent, export)


def test_it_outlives_the_agent(tmp_path: Path, images: Pair) -> None:
    with AgentProcess(tmp_path, HASTE) as agent:
        part = agent.export(images.base, format="raw", offset=MIB, size=MIB)
        limited = agent.export(images.top, max_clients=1)
        plain = agent.export(images.top)
        agent.kill()
        agent.start()
        assert {show(agent, export)["state"] for export in (part, limited, plain)} == {"running"}
        assert bytes_of(part["uri"]) == images.base.read_bytes()[MIB : 2 * MIB]
        assert content(plain["uri"]) == content(limited["uri"]) == images.truth.read_bytes()
        with Client(limited["uri"]), queued(limited["uri"]) as second:
            assert len(show(agent, limited)["clients"]) == 1
            assert second.poll() is None
        for export in (part, limited, plain):
            stop(agent, export)
            assert eventually(lambda: not alive(export["pid"]), PATIENCE)  # noqa: B023
