"""The spine: pulls through a real agent, and what everybody sees of them.

After every job the bytes are compared with a copy that was made before, `qemu-img check` is asked, and the files' modes
and ACLs are what they were.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    MIB,
    AgentProcess,
    ApiError,
    Json,
    backing_of,
    check_clean,
    overlay,
    raw_image,
    same_content,
    user_can_read,
)
from tests.qemu.faults import HASTE, PATIENCE, Pair, Reader, eventually, permissions, storage_daemons

pytestmark = pytest.mark.qemu

ROOT = os.geteuid() == 0
SIZE = 16 * MIB
REVOKED = "done" if ROOT else "kept"
as_root = [
    pytest.mark.root,
    pytest.mark.skipif(not ROOT, reason="file modes change only for another hypervisor user, which needs root"),
]


class Layers:
    """A chain of `depth` layers, each with data of its own; `paths` from the top to the base. `truth` is what it reads
    as, `before` the files' modes and ACLs."""

    def __init__(self, folder: Path, depth: int, size: int = SIZE) -> None:
        base = raw_image(folder / "base.raw", size, size // 2)
        self.paths = [base]
        for n in range(1, depth):
            image = overlay(folder / f"layer{n}.qcow2", self.paths[0], "raw" if n == 1 else "qcow2")
            writes = [f"write -q -P {16 * n + k} {(k * 3 + n) * MIB} {256 * 1024}" for k in range(5)]
            subprocess.run(["qemu-io", *(w for line in writes for w in ("-c", line)), str(image)], check=True)
            self.paths.insert(0, image)
        self.truth = folder.parent / "truth.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(self.paths[0]), str(self.truth)], check=True)
        self.before = {path: permissions(path) for path in self.paths}

    @property
    def top(self) -> Path:
        return self.paths[0]


def states(paths: list[Path]) -> dict[Path, tuple[int, bytes | None]]:
    return {path: permissions(path) for path in paths}


def assert_whole(top: Path, truth: Path, backing: str | None = None) -> None:
    """Nobody has the image open any more, it stands on what it should, and its content is right."""
    assert eventually(partial(lockable, top)), f"{top} is still locked"
    assert backing_of(top) == backing
    assert check_clean(top)
    assert same_content(top, truth)


def assert_restored(before: dict[Path, tuple[int, bytes | None]]) -> None:
    """Modes and ACLs as they were. The overlay's own are put back a moment after the base's."""
    assert eventually(lambda: states(list(before)) == before), (states(list(before)), before)


def assert_nothing_of(agent: AgentProcess, *paths: Path) -> None:
    """No grant, no storage daemon and no lock is left for these files."""
    names = [str(path) for path in paths]
    assert eventually(lambda: not [d for d in agent.get("/v1/host")["storage_daemons"] if d["image"] in names])
    if ROOT:
        assert eventually(lambda: not [g for g in agent.get("/v1/grants")["items"] if g["path"] in names])
    for path in paths:
        assert eventually(partial(lockable, path)), f"{path} is still locked"


def lockable(path: Path) -> bool:
    """Whether QEMU may open the file for writing; nothing is written."""
    format = "raw" if path.suffix == ".raw" else "qcow2"
    done = subprocess.run(["qemu-io", "-f", format, "-c", "read 0 512", str(path)], capture_output=True, text=True)
    return done.returncode == 0


def drive(agent: AgentProcess, job: Json) -> Iterator[Json]:
    """`next` to the end: the job each time it waits, and last when it has ended."""
    while True:
        job = agent.until(job["id"], lambda j: j["state"] in ("waiting", "completed", "failed", "aborted"))
        if job["state"] != "waiting":
            yield agent.until_ended(job["id"])
            return
        yield job
        agent.post(f"/v1/jobs/{job['id']}/next", {"cursor": job["cursor"]["cur"]})


def finished(agent: AgentProcess, job: Json) -> Json:
    *_, last = drive(agent, job)
    return last


def pull(agent: AgentProcess, target: Path, **spec: Any) -> Json:
    """A pull of either kind, from its request to its end."""
    return finished(agent, agent.pull(target, **spec))


def refusal(agent: AgentProcess, method: str, path: str, body: Json | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        agent._ok(method, path, body)
    return caught.value


KINDS = [pytest.param({}, id="continuous"), pytest.param({"increment": 4 * MIB}, id="incremental")]
ONE_STEP = [pytest.param({}, id="continuous"), pytest.param({"increment": SIZE}, id="incremental")]


# Whole pulls


@pytest.mark.parametrize("spec", KINDS)
def test_a_pull_makes_the_overlay_stand_alone_and_takes_the_base_back(
    agent: AgentProcess, images: Pair, spec: Json
) -> None:
    before = states([images.top, images.base])
    job = pull(agent, images.top, **spec)
    assert job["state"] == "completed", job
    assert job["cursor"] == {"cur": SIZE, "end": SIZE}
    assert job["error"] is None
    assert job["revocation"] == REVOKED
    assert job["chain"]["before"] == [str(images.top), str(images.base)]
    assert job["chain"]["after"] == [str(images.top)]
    assert job["created"] <= job["started"] <= job["finished"]
    if ROOT:
        assert job["chain"]["revoked"] == [str(images.base)]
        assert job["chain"]["kept"] == []
    assert_whole(images.top, images.truth)
    assert_restored(before)
    assert_nothing_of(agent, images.top, images.base)
    images.base.unlink()
    assert same_content(images.top, images.truth)


@pytest.mark.parametrize("spec", KINDS)
def test_a_pull_takes_in_a_chain_of_several_layers(agent: AgentProcess, folder: Path, spec: Json) -> None:
    layers = Layers(folder, 4)
    job = pull(agent, layers.top, **spec)
    assert (job["state"], job["revocation"]) == ("completed", REVOKED)
    if ROOT:
        assert job["chain"]["revoked"] == [str(path) for path in layers.paths[1:]]
    assert_whole(layers.top, layers.truth)
    assert_restored(layers.before)
    assert_nothing_of(agent, *layers.paths)


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize(("depth", "stay"), [(3, 2), (4, 2), (4, 3)])
def test_a_pull_down_to_a_base_leaves_the_overlay_on_that_base(
    agent: AgentProcess, folder: Path, depth: int, stay: int, spec: Json
) -> None:
    layers = Layers(folder, depth)
    base, taken = layers.paths[stay], layers.paths[1:stay]
    own = {path: path.read_bytes() for path in layers.paths[1:]}
    job = pull(agent, layers.top, base=str(base), **spec)
    assert (job["state"], job["revocation"]) == ("completed", REVOKED), job
    assert job["chain"]["after"] == [str(layers.top), *(str(path) for path in layers.paths[stay:])]
    if ROOT:
        assert job["chain"]["revoked"] == [str(path) for path in taken]
    assert_whole(layers.top, layers.truth, base.name)
    assert {path: path.read_bytes() for path in layers.paths[1:]} == own, "only the top is written"
    assert data_depth(layers.top) == set(range(depth - stay + 1)), "what the base has stays there"
    assert_restored(layers.before)
    assert_nothing_of(agent, *layers.paths)


def data_depth(image: Path) -> set[int]:
    """In which layers of its chain the image's data lie."""
    command = ["qemu-img", "map", "-U", "--output=json", str(image)]
    extents = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {extent["depth"] for extent in extents if extent["data"]}


def test_a_partial_base_can_be_dropped_by_a_second_pull(agent: AgentProcess, folder: Path) -> None:
    layers = Layers(folder, 3)
    assert pull(agent, layers.top, base=str(layers.paths[2]), increment=4 * MIB)["state"] == "completed"
    job = pull(agent, layers.top)
    assert job["chain"]["before"] == [str(layers.top), str(layers.paths[2])]
    assert_whole(layers.top, layers.truth)


@pytest.mark.parametrize("spec", KINDS)
def test_a_pull_of_an_image_without_a_backing_file_completes_and_revokes_nothing(
    agent: AgentProcess, folder: Path, spec: Json
) -> None:
    alone, truth = folder / "alone.qcow2", folder.parent / "truth.raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(alone), "8M"], check=True)
    alone.chmod(0o600)
    subprocess.run(["qemu-io", "-c", "write -q -P 7 1M 1M", str(alone)], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(alone), str(truth)], check=True)
    job = pull(agent, alone, **spec)
    assert (job["state"], job["revocation"], job["error"]) == ("completed", "none", None), job
    assert job["chain"] == {"before": [str(alone)], "after": [str(alone)], "revoked": [], "kept": []}
    assert_whole(alone, truth)
    assert_nothing_of(agent, alone)


@pytest.mark.parametrize(("sizes", "name"), [((8, 12), "larger"), ((12, 8), "smaller")])
@pytest.mark.parametrize("spec", KINDS)
def test_an_overlay_of_another_size_than_its_base_reads_the_same_after_a_pull(
    agent: AgentProcess, folder: Path, sizes: tuple[int, int], name: str, spec: Json
) -> None:
    base = raw_image(folder / "base.raw", sizes[0] * MIB)
    top, truth = overlay(folder / "top.qcow2", base, size=sizes[1] * MIB), folder.parent / "truth.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(top), str(truth)], check=True)
    assert pull(agent, top, **spec)["state"] == "completed"
    assert_whole(top, truth)


def test_a_sparse_base_costs_an_incremental_pull_nothing(agent: AgentProcess, folder: Path) -> None:
    size = 8 << 30
    base = raw_image(folder / "base.raw", size, 0)
    top = overlay(folder / "top.qcow2", base)
    began = time.monotonic()
    job = pull(agent, top, increment=1 << 30)
    assert job["state"] == "completed"
    assert time.monotonic() - began < 5
    assert backing_of(top) is None
    assert check_clean(top)
    assert top.stat().st_blocks * 512 < 16 * MIB


# The cursor


def test_an_incremental_pull_moves_by_its_increment_and_rests_in_between(agent: AgentProcess, images: Pair) -> None:
    before = states([images.top, images.base])
    waits = []
    for job in drive(agent, agent.pull(images.top, increment=4 * MIB)):
        if job["state"] == "waiting":
            waits.append(job["cursor"])
            assert backing_of(images.top) == images.base.name
            assert check_clean(images.top)
            assert same_content(images.top, images.truth)
            assert_resting(agent, images)
    assert waits == [{"cur": n * 4 * MIB, "end": SIZE} for n in (1, 2, 3)]
    assert job["state"] == "completed"
    assert_whole(images.top, images.truth)
    assert_restored(before)


def assert_resting(agent: AgentProcess, images: Pair) -> None:
    assert eventually(lambda: lockable(images.top)), "the image is still open or locked"
    names = {daemon["image"] for daemon in agent.get("/v1/host")["storage_daemons"]}
    assert str(images.top) not in names


def test_each_step_copies_what_it_says_and_no_more(agent: AgentProcess, folder: Path) -> None:
    base = raw_image(folder / "base.raw", SIZE)
    top = overlay(folder / "top.qcow2", base)
    for job in drive(agent, agent.pull(top, increment=4 * MIB)):
        if job["state"] == "waiting":
            assert local_bytes(top) == job["cursor"]["cur"]
    assert local_bytes(top) == SIZE


def local_bytes(image: Path) -> int:
    command = ["qemu-img", "map", "-U", "--output=json", str(image)]
    extents = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return sum(extent["length"] for extent in extents if extent["depth"] == 0 and extent["data"])


def test_next_with_a_cursor_is_safe_to_repeat(agent: AgentProcess, images: Pair) -> None:
    job = agent.pull(images.top, increment=4 * MIB)
    path = f"/v1/jobs/{job['id']}"
    agent.until(job["id"], lambda j: j["state"] == "waiting")
    ahead = refusal(agent, "POST", f"{path}/next", {"cursor": 8 * MIB})
    assert (ahead.status, ahead.code, ahead.body["field"]) == (409, "conflict", "cursor")
    agent.post(f"{path}/next", {"cursor": 4 * MIB})
    job = agent.until(job["id"], lambda j: j["state"] == "waiting" and j["cursor"]["cur"] > 4 * MIB)
    for _ in range(3):
        again = agent.post(f"{path}/next", {"cursor": 4 * MIB})
        assert (again["cursor"]["cur"], again["state"]) == (8 * MIB, "waiting")
    assert agent.job(job["id"])["revision"] == job["revision"]
    agent.post(f"{path}/next")
    assert agent.until(job["id"], lambda j: j["cursor"]["cur"] == 12 * MIB and j["state"] == "waiting")
    job = finished(agent, job)
    assert agent.post(f"{path}/next", {"cursor": 12 * MIB})["state"] == "completed"
    assert refusal(agent, "POST", f"{path}/next").code == "conflict"
    assert_whole(images.top, images.truth)


def test_many_clients_may_call_next_at_once_for_one_step(agent: AgentProcess, images: Pair) -> None:
    job = agent.pull(images.top, increment=2 * MIB)
    agent.until(job["id"], lambda j: j["state"] == "waiting")
    path = f"/v1/jobs/{job['id']}/next"
    calls = [threading.Thread(target=agent.post, args=(path, {"cursor": 2 * MIB})) for _ in range(8)]
    for call in calls:
        call.start()
    for call in calls:
        call.join(PATIENCE)
    job = agent.until(job["id"], lambda j: j["state"] == "waiting" and j["cursor"]["cur"] > 2 * MIB)
    assert job["cursor"]["cur"] == 4 * MIB
    assert finished(agent, job)["state"] == "completed"
    assert_whole(images.top, images.truth)


def test_a_continuous_pull_needs_no_next(agent: AgentProcess, images: Pair) -> None:
    job = agent.pull(images.top, bandwidth=4 * MIB)
    assert refusal(agent, "POST", f"/v1/jobs/{job['id']}/next").code == "conflict"
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    assert agent.until_ended(job["id"])["state"] == "completed"


# While it runs


@pytest.mark.parametrize(
    "spec", [pytest.param({}, id="continuous"), pytest.param({"increment": SIZE}, id="incremental")]
)
def test_the_bandwidth_holds_and_can_be_changed_while_the_pull_runs(
    agent: AgentProcess, images: Pair, spec: Json
) -> None:
    job = agent.pull(images.top, bandwidth=4 * MIB, **spec)
    job = agent.until(job["id"], lambda j: j["state"] == "running" and j["cursor"]["cur"] > 0)
    time.sleep(0.6)
    assert agent.job(job["id"])["cursor"]["cur"] < 12 * MIB
    labels = f'domain="",operation="pull",target_device="{images.top}"'
    assert metric(agent, f"hostagent_block_job_bandwidth_limit_bytes_per_second{{{labels}}}") == 4 * MIB
    changed = agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    assert changed["bandwidth"] == 0
    began = time.monotonic()
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert time.monotonic() - began < 1.5
    assert_whole(images.top, images.truth)


def metric(agent: AgentProcess, series: str) -> float | None:
    text = agent.call("GET", "/metrics")[2]
    values = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{series} ")]
    return values[0] if values else None


@pytest.mark.parametrize(
    "spec", [pytest.param({}, id="continuous"), pytest.param({"increment": SIZE}, id="incremental")]
)
def test_a_paused_pull_stands_still_until_it_is_resumed(agent: AgentProcess, images: Pair, spec: Json) -> None:
    job = agent.pull(images.top, bandwidth=6 * MIB, **spec)
    path = f"/v1/jobs/{job['id']}"
    agent.until(job["id"], lambda j: j["state"] == "running" and j["cursor"]["cur"] > 0)
    assert agent.post(f"{path}/pause")["state"] == "paused"
    assert agent.post(f"{path}/pause")["state"] == "paused"
    time.sleep(0.15)  # what was in flight arrives
    cursor = agent.job(job["id"])["cursor"]
    time.sleep(0.3)
    assert agent.job(job["id"])["cursor"] == cursor
    assert agent.job(job["id"])["state"] == "paused"
    agent.patch(path, {"bandwidth": 0})
    assert agent.post(f"{path}/resume")["state"] in ("running", "completing", "completed")
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert refusal(agent, "POST", f"{path}/resume").code == "conflict"
    assert_whole(images.top, images.truth)


@pytest.mark.parametrize(
    "spec", [pytest.param({}, id="continuous"), pytest.param({"increment": SIZE}, id="incremental")]
)
def test_an_aborted_pull_keeps_what_it_has_and_the_base_and_the_next_one_goes_on_from_there(
    agent: AgentProcess, images: Pair, spec: Json
) -> None:
    before, own = states([images.top, images.base]), local_bytes(images.top)
    job = agent.pull(images.top, bandwidth=8 * MIB, **spec)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] >= 4 * MIB)
    agent.post(f"/v1/jobs/{job['id']}/abort")
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["revocation"]) == ("aborted", "cancelled", "none")
    assert job["chain"]["after"] == job["chain"]["before"]
    assert_whole(images.top, images.truth, images.base.name)
    assert local_bytes(images.top) > own + 2 * MIB
    grants = [g for g in agent.get("/v1/grants")["items"] if g["path"] == str(images.base)]
    assert [(g["holder"], g["mode"], g["state"]) for g in grants] == [
        ({"kind": "image", "id": str(images.top)}, "r", "granted")
    ]
    if ROOT:
        assert user_can_read(images.base, str(agent.user))
    assert eventually(lambda: lockable(images.top))
    assert agent.post(f"/v1/jobs/{job['id']}/abort")["state"] == "aborted"
    job = pull(agent, images.top)
    assert (job["state"], job["revocation"]) == ("completed", REVOKED)
    assert_whole(images.top, images.truth)
    assert_restored(before)
    assert_nothing_of(agent, images.top, images.base)


def test_an_abort_between_two_increments_is_immediate(agent: AgentProcess, images: Pair) -> None:
    job = agent.pull(images.top, increment=4 * MIB)
    agent.until(job["id"], lambda j: j["state"] == "waiting")
    began = time.monotonic()
    agent.post(f"/v1/jobs/{job['id']}/abort")
    job = agent.until_ended(job["id"])
    assert time.monotonic() - began < 1
    assert (job["state"], job["cursor"]["cur"]) == ("aborted", 4 * MIB)
    assert_whole(images.top, images.truth, images.base.name)
    assert_resting(agent, images)
    assert pull(agent, images.top, increment=8 * MIB)["state"] == "completed"
    assert_whole(images.top, images.truth)


def test_a_finished_pull_cannot_be_aborted_paused_or_sped_up(agent: AgentProcess, images: Pair) -> None:
    job = pull(agent, images.top)
    for action in ("abort", "pause", "resume", "complete"):
        assert refusal(agent, "POST", f"/v1/jobs/{job['id']}/{action}").code == "conflict"
    assert refusal(agent, "PATCH", f"/v1/jobs/{job['id']}", {"bandwidth": 1}).code == "conflict"
    assert agent.job(job["id"])["revision"] == job["revision"]


def test_the_cursor_never_goes_back_and_the_end_is_said_by_the_state_alone(agent: AgentProcess, images: Pair) -> None:
    job = agent.pull(images.top, bandwidth=24 * MIB)
    seen = []
    while (job := agent.job(job["id"]))["state"] not in ("completed", "failed", "aborted"):
        seen.append(job["cursor"]["cur"])
        assert 0 <= job["cursor"]["cur"] <= job["cursor"]["end"] == SIZE
        time.sleep(0.01)
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert job["state"] == "completed"


# Requests


def test_the_same_id_and_request_make_one_job(agent: AgentProcess, images: Pair) -> None:
    request = {"id": str(uuid.uuid4()), "operation": "pull", "target": str(images.top), "increment": 4 * MIB}
    status, headers, first = agent.call("POST", "/v1/jobs", request)
    assert (status, headers["location"]) == (202, f"/v1/jobs/{request['id']}")
    status, _, second = agent.call("POST", "/v1/jobs", request)
    assert (status, second["id"], second["created"]) == (200, first["id"], first["created"])
    other = refusal(agent, "POST", "/v1/jobs", {**request, "increment": 8 * MIB})
    assert (other.status, other.code, other.body["field"]) == (409, "conflict", "id")
    job = finished(agent, first)
    again = agent.post("/v1/jobs", request)
    assert [again[k] for k in ("state", "revision", "finished")] == [job[k] for k in ("state", "revision", "finished")]


def test_a_second_job_on_an_image_is_busy_and_names_the_first(agent: AgentProcess, images: Pair) -> None:
    job = agent.pull(images.top, increment=4 * MIB)
    agent.until(job["id"], lambda j: j["state"] == "waiting")
    for spec in ({}, {"dry_run": True}):
        error = refusal(agent, "POST", "/v1/jobs", {"operation": "pull", "target": str(images.top), **spec})
        assert (error.status, error.code) == (409, "busy")
        assert job["id"] in error.body["detail"]
        assert error.body["remedy"]
    linked = images.folder / "link.qcow2"
    linked.symlink_to(images.top)
    assert refusal(agent, "POST", "/v1/jobs", {"operation": "pull", "target": str(linked)}).status >= 400
    agent.post(f"/v1/jobs/{job['id']}/abort")
    assert agent.until_ended(job["id"])["state"] == "aborted"


def test_an_image_that_stands_on_one_that_is_being_written_cannot_be_pulled_and_nothing_changes(
    agent: AgentProcess, folder: Path
) -> None:
    layers = Layers(folder, 3)
    middle, top = layers.paths[1], layers.top
    job = agent.pull(middle, bandwidth=4 * MIB)
    agent.until(job["id"], lambda j: j["state"] == "running")
    above = agent.until_ended(agent.pull(top)["id"])
    assert (above["state"], above["error"]["code"]) == ("failed", "busy"), above
    assert str(middle) in above["error"]["message"]
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert pull(agent, top)["state"] == "completed"
    assert_whole(top, layers.truth)
    assert_restored(layers.before)


def test_a_dry_run_says_what_would_happen_and_does_nothing(agent: AgentProcess, images: Pair) -> None:
    before, listed = states([images.top, images.base]), len(agent.get("/v1/jobs")["items"])
    content = images.top.read_bytes()
    status, _, plan = agent.call("POST", "/v1/jobs", {"operation": "pull", "target": str(images.top), "dry_run": True})
    assert status == 200
    assert plan["dry_run"] is True
    assert plan["before"] == [str(images.top), str(images.base)]
    assert plan["after"] == [str(images.top)]
    assert plan["revoke"] == [{"path": str(images.base)}]
    assert plan["keep"] == []
    assert plan["space"]["need"] > 0 < plan["space"]["free"]
    assert len(agent.get("/v1/jobs")["items"]) == listed
    assert_restored(before)
    assert images.top.read_bytes() == content
    assert_nothing_of(agent, images.top, images.base)


def test_a_dry_run_names_who_would_keep_the_base(agent: AgentProcess, images: Pair) -> None:
    sibling = overlay(images.folder / "sibling.qcow2", images.base)
    export = agent.export(sibling)
    plan = agent.post("/v1/jobs", {"operation": "pull", "target": str(images.top), "dry_run": True})
    assert plan["revoke"] == []
    assert [kept["path"] for kept in plan["keep"]] == [str(images.base)]
    assert plan["keep"][0]["holders"] == [f"export:{export['id']}"]
    agent.delete(f"/v1/exports/{export['id']}")


@pytest.mark.parametrize(
    ("spec", "code", "field"),
    [
        ({"target": "/nowhere/top.qcow2"}, "not_found", None),
        ({"base": "/nowhere/base.raw"}, "invalid", "base"),
        ({"operation": "sweep"}, "invalid", "operation"),
        ({"operation": "copy"}, "invalid", "dest"),
        ({"operation": "commit", "increment": 1}, "invalid", "increment"),
        ({"increment": 0}, "invalid", "increment"),
        ({"bandwidth": -1}, "invalid", "bandwidth"),
        ({"target": "web1/vda"}, "not_supported", "target"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_its_reason_and_leaves_nothing(
    agent: AgentProcess, images: Pair, spec: Json, code: str, field: str | None
) -> None:
    listed = len(agent.get("/v1/jobs")["items"])
    error = refusal(agent, "POST", "/v1/jobs", {"operation": "pull", "target": str(images.top), **spec})
    assert error.code == code, error.body
    assert field is None or error.body["field"] == field
    assert len(agent.get("/v1/jobs")["items"]) == listed
    assert_nothing_of(agent, images.top, images.base)


def test_a_finished_job_can_be_forgotten_and_a_running_one_cannot(agent: AgentProcess, images: Pair) -> None:
    job = agent.pull(images.top, increment=4 * MIB)
    error = refusal(agent, "DELETE", f"/v1/jobs/{job['id']}")
    assert (error.status, error.code) == (409, "conflict")
    agent.post(f"/v1/jobs/{job['id']}/abort")
    agent.until_ended(job["id"])
    assert eventually(lambda: agent.call("DELETE", f"/v1/jobs/{job['id']}")[0] == 204)
    assert refusal(agent, "GET", f"/v1/jobs/{job['id']}").status == 404
    assert refusal(agent, "DELETE", f"/v1/jobs/{job['id']}").status == 404


def test_lists_are_filtered_by_label_state_and_target_and_paged_newest_first(agent: AgentProcess, folder: Path) -> None:
    mark = uuid.uuid4().hex
    base = raw_image(folder / "base.raw", MIB)
    jobs = []
    for n in range(5):
        top = overlay(folder / f"top{n}.qcow2", base)
        jobs.append(pull(agent, top, labels={"test": mark, "parity": str(n % 2)}))
    newest = [job["id"] for job in reversed(jobs)]

    def ids(query: str) -> list[str]:
        return [item["id"] for item in agent.get(f"/v1/jobs?{query}")["items"]]

    assert ids(f"label=test={mark}") == newest
    assert ids(f"label=test={mark}&label=parity=1") == [newest[1], newest[3]]
    assert ids(f"label=test={mark}&state=failed") == []
    assert ids(f"label=test={mark}&state=completed") == newest
    assert ids(f"target={folder}/top3.qcow2") == [newest[1]]
    assert ids(f"label=test={mark}&origin=external") == []
    assert refusal(agent, "GET", "/v1/jobs?state=done").code == "invalid"
    pages, after = [], ""
    for _ in range(4):
        page = agent.get(f"/v1/jobs?label=test={mark}&limit=2{after}")
        pages.append([item["id"] for item in page["items"]])
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert list(itertools.chain(*pages)) == newest
    assert [len(page) for page in pages][:2] == [2, 2]
    assert agent.job(newest[0])["labels"] == {"test": mark, "parity": "0"}


def test_a_long_poll_returns_with_the_change(agent: AgentProcess, images: Pair) -> None:
    job = agent.pull(images.top, increment=4 * MIB)
    agent.until(job["id"], lambda j: j["state"] == "waiting")
    path = f"/v1/jobs/{job['id']}"
    _, headers, job = agent.call("GET", path)
    began = time.monotonic()
    status, _, _ = agent.call("GET", f"{path}?wait=0.2", headers={"If-None-Match": headers["etag"]})
    assert (status, time.monotonic() - began >= 0.2) == (304, True)
    threading.Timer(0.2, agent.post, (f"{path}/abort",)).start()
    began = time.monotonic()
    status, _, changed = agent.call("GET", f"{path}?wait=20", headers={"If-None-Match": headers["etag"]})
    assert status == 200
    assert 0.1 < time.monotonic() - began < 5
    assert changed["revision"] > job["revision"]
    agent.until_ended(job["id"])


# Access


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="tries the files as another user")
@pytest.mark.parametrize("spec", KINDS)
def test_the_hypervisor_user_can_read_the_base_while_it_is_needed_and_not_after(
    agent: AgentProcess, images: Pair, spec: Json
) -> None:
    assert not user_can_read(images.base, str(agent.user))
    job = agent.pull(images.top, bandwidth=4 * MIB, **spec)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
    assert user_can_read(images.base, str(agent.user))
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    assert finished(agent, job)["revocation"] == "done"
    assert not user_can_read(images.base, str(agent.user))
    assert eventually(lambda: not user_can_read(images.top, str(agent.user)))


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="modes matter to another user only")
def test_a_base_that_everybody_may_read_is_kept_with_that_reason(agent: AgentProcess, images: Pair) -> None:
    images.base.chmod(0o644)
    before = states([images.top, images.base])
    job = pull(agent, images.top)
    assert (job["state"], job["revocation"]) == ("completed", "kept")
    assert job["chain"]["revoked"] == []
    (kept,) = job["chain"]["kept"]
    assert kept["path"] == str(images.base)
    assert "0644" in kept["reason"]
    assert_restored(before)
    events = [e for e in agent.events() if e["subject"] == str(images.base)]
    assert events[-1]["type"] == "org.hostagent.grant.kept.v1"


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="modes matter to another user only")
def test_the_acls_of_others_are_the_same_to_the_byte_after_a_pull(agent: AgentProcess, images: Pair) -> None:
    subprocess.run(["setfacl", "-m", "u:daemon:r,g:daemon:r,m::r", str(images.base)], check=True)
    subprocess.run(["setfacl", "-m", "u:daemon:rw", str(images.top)], check=True)
    before = states([images.top, images.base])
    assert all(acl for _, acl in before.values())
    job = pull(agent, images.top, increment=8 * MIB)
    assert (job["state"], job["revocation"]) == ("completed", "done"), job
    assert_nothing_of(agent, images.top, images.base)
    assert_restored(before)


def test_a_base_of_two_overlays_stays_open_for_the_second_until_that_one_is_pulled(
    agent: AgentProcess, images: Pair
) -> None:
    sibling = overlay(images.folder / "sibling.qcow2", images.base)
    before = states([images.top, images.base, sibling])
    first, second = agent.export(images.top), agent.export(sibling)
    job = pull(agent, images.top)
    assert (job["state"], job["revocation"]) == ("completed", "kept")
    assert [kept["path"] for kept in job["chain"]["kept"]] == [str(images.base)]
    assert f"export:{second['id']}" in job["chain"]["kept"][0]["holders"]
    assert f"export:{first['id']}" not in job["chain"]["kept"][0]["holders"]
    if ROOT:
        assert user_can_read(images.base, str(agent.user))
    with Reader(second["uri"], images.base) as reader:
        job = pull(agent, sibling)
        assert reader.stop() > 0
    assert (job["state"], job["revocation"]) == ("completed", REVOKED), job
    if ROOT:
        assert not user_can_read(images.base, str(agent.user))
    for export in (first, second):
        assert eventually(partial(unused, agent, export))
        assert agent.delete(f"/v1/exports/{export['id']}")["state"] == "stopped"
    assert_whole(images.top, images.truth)
    assert same_content(sibling, images.base)
    assert_restored(before)
    assert_nothing_of(agent, images.top, images.base, sibling)


def unused(agent: AgentProcess, export: Json) -> bool:
    """Whether the storage daemon has seen that the last client left."""
    return not agent.get(f"/v1/exports/{export['id']}")["clients"]


def test_two_overlays_of_one_base_can_be_pulled_at_the_same_time(agent: AgentProcess, images: Pair) -> None:
    sibling = overlay(images.folder / "sibling.qcow2", images.base)
    before = states([images.top, images.base, sibling])
    slow, quick = agent.pull(images.top, bandwidth=MIB), agent.pull(sibling, increment=4 * MIB)
    quick = finished(agent, quick)
    assert (quick["state"], quick["revocation"]) == ("completed", "kept")
    assert quick["chain"]["kept"][0]["holders"] == [f"job:{slow['id']}"]
    agent.patch(f"/v1/jobs/{slow['id']}", {"bandwidth": 0})
    slow = agent.until_ended(slow["id"])
    assert (slow["state"], slow["revocation"]) == ("completed", REVOKED)
    assert_whole(images.top, images.truth)
    assert same_content(sibling, images.base)
    assert_restored(before)


# What is told


def test_the_events_of_a_pull_tell_the_whole_story_in_order(agent: AgentProcess, images: Pair) -> None:
    job = pull(agent, images.top, labels={"vm": "web1"})
    told = [e for e in agent.events() if e["subject"] in (job["id"], str(images.base))]
    kinds = [e["type"].removeprefix("org.hostagent.").removesuffix(".v1") for e in told]
    last = "grant.revoked" if ROOT else "grant.kept"
    assert kinds == ["grant.granted", "job.started", "job.completed", last]
    assert [int(e["id"]) for e in told] == sorted(int(e["id"]) for e in told)
    completed = told[2]
    assert completed["specversion"] == "1.0"
    assert completed["source"].startswith("/hosts/")
    assert completed["data"]["status"] == "COMPLETED"
    assert completed["data"]["labels"] == {"vm": "web1"}
    assert (completed["data"]["cur"], completed["data"]["end"]) == (SIZE, SIZE)
    assert (completed["data"]["path"], completed["data"]["domain"]) == (str(images.top), "")


def test_an_aborted_pull_is_told_as_failed_because_it_was_cancelled(agent: AgentProcess, images: Pair) -> None:
    job = agent.pull(images.top, increment=4 * MIB)
    agent.until(job["id"], lambda j: j["state"] == "waiting")
    agent.post(f"/v1/jobs/{job['id']}/abort")
    agent.until_ended(job["id"])
    (event,) = [e for e in agent.events() if e["subject"] == job["id"] and "started" not in e["type"]]
    assert event["type"] == "org.hostagent.job.cancelled.v1"
    assert (event["data"]["status"], event["data"]["reason"]) == ("FAILED", "cancelled")


class Listener(threading.Thread):
    """Reads /v1/events until it is closed."""

    def __init__(self, agent: AgentProcess, since: int | None) -> None:
        super().__init__(daemon=True)
        self.events: list[Json] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(agent.socket))
        connection = http.client.HTTPConnection("localhost")
        connection.sock = self._socket
        headers = {} if since is None else {"Last-Event-ID": str(since)}
        connection.request("GET", "/v1/events", headers=headers)
        self._reply = connection.getresponse()
        assert self._reply.status == 200
        self.start()

    def run(self) -> None:
        try:
            for line in self._reply:
                if line.startswith(b"data:"):
                    self.events.append(json.loads(line[5:]))
        except (OSError, ValueError):
            pass

    def numbered(self) -> list[int]:
        return [int(e["id"]) for e in self.events if e.get("id", "").isdigit()]

    def kinds(self) -> list[str]:
        return [e["type"].split(".")[3] for e in self.events if ".job." in e.get("type", "")]

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self.join(PATIENCE)


def test_a_stream_resumes_after_the_last_event_that_was_seen_without_gap_or_repetition(
    agent: AgentProcess, images: Pair
) -> None:
    live = Listener(agent, None)
    since = agent.get("/v1/host")["store"]["events"]
    job = agent.pull(images.top, bandwidth=24 * MIB)
    assert eventually(lambda: "started" in live.kinds())
    live.close()
    seen = live.numbered()
    agent.until_ended(job["id"])
    resumed = Listener(agent, seen[-1])
    last = agent.get("/v1/host")["store"]["events"]
    assert eventually(lambda: resumed.numbered() and resumed.numbered()[-1] >= last)
    told = seen + resumed.numbered()  # what is given back after the job's end may have come, too
    assert told == list(range(since + 1, told[-1] + 1))
    assert "completed" in resumed.kinds()
    resumed.close()


def test_progress_is_told_live_and_never_replayed(agent: AgentProcess, images: Pair) -> None:
    live = Listener(agent, None)
    job = agent.pull(images.top, bandwidth=24 * MIB)
    agent.until_ended(job["id"])
    assert eventually(lambda: "completed" in live.kinds())
    assert live.kinds().count("progress") >= 3
    cursors = [e["data"]["cur"] for e in live.events if e.get("type") == "org.hostagent.job.progress.v1"]
    assert cursors == sorted(cursors)
    live.close()
    assert not [e for e in agent.events() if "progress" in e["type"]]


def test_the_metrics_tell_of_a_pull_while_it_runs_and_after(agent: AgentProcess, images: Pair) -> None:
    finished_total = 'hostagent_block_jobs_finished_total{operation="pull",outcome="completed"}'
    durations = 'hostagent_block_job_duration_seconds_count{operation="pull",outcome="completed"}'
    result = "revoked" if ROOT else "kept"
    revocations = f'hostagent_access_revocations_total{{result="{result}",trigger="pull"}}'
    before = {name: metric(agent, name) or 0 for name in (finished_total, durations, revocations)}
    labels = f'domain="",operation="pull",target_device="{images.top}"'
    job = agent.pull(images.top, bandwidth=8 * MIB)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
    assert (metric(agent, f"hostagent_block_job_cursor_bytes{{{labels}}}") or 0) > 0
    assert metric(agent, f"hostagent_block_job_end_bytes{{{labels}}}") == SIZE
    assert eventually(lambda: metric(agent, 'hostagent_block_jobs{operation="pull",state="running"}') == 1)
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    agent.until_ended(job["id"])
    assert eventually(lambda: metric(agent, f"hostagent_block_job_cursor_bytes{{{labels}}}") is None)
    assert eventually(lambda: metric(agent, 'hostagent_block_jobs{operation="pull",state="running"}') == 0)
    assert metric(agent, finished_total) == before[finished_total] + 1
    assert metric(agent, durations) == before[durations] + 1
    both = before[revocations] + 2  # the base, and the overlay itself
    assert eventually(lambda: metric(agent, revocations) == both)
    assert eventually(
        lambda: metric(agent, "hostagent_access_revocations_pending") == 0
    )  # read with the next gathering
    assert job["id"] not in agent.call("GET", "/metrics")[2]


# Limits


def test_jobs_above_the_width_wait_their_turn_and_above_the_queue_are_refused(tmp_path: Path, folder: Path) -> None:
    base = raw_image(folder / "base.raw", SIZE)
    tops = [overlay(folder / f"top{n}.qcow2", base) for n in range(4)]
    with AgentProcess(tmp_path, {**HASTE, "JOBS_WIDTH": "1", "JOBS_QUEUE": "3"}) as agent:
        first = agent.pull(tops[0], bandwidth=2 * MIB)
        agent.until(first["id"], lambda j: j["state"] == "running")
        second, third = agent.pull(tops[1]), agent.pull(tops[2], increment=4 * MIB)
        error = refusal(agent, "POST", "/v1/jobs", {"operation": "pull", "target": str(tops[3])})
        assert (error.status, error.code) == (429, "limit")
        assert "jobs.queue" in error.body["remedy"]
        time.sleep(0.2)
        assert [agent.job(j["id"])["state"] for j in (first, second, third)] == ["running", "queued", "queued"]
        assert len(storage_daemons(agent)) == 1
        agent.post(f"/v1/jobs/{second['id']}/abort")
        assert agent.until_ended(second["id"])["state"] == "aborted"
        agent.post(f"/v1/jobs/{first['id']}/abort")
        agent.until(third["id"], lambda j: j["state"] == "waiting")
        fourth = agent.pull(tops[3])
        assert agent.until_ended(fourth["id"])["state"] == "completed", "a job that waits for `next` holds no place"
        assert finished(agent, third)["state"] == "completed"
        assert same_content(tops[2], base)
        assert same_content(tops[3], base)
