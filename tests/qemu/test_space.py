"""What a copy or a commit needs is said before it begins, and is what it takes; what cannot fit is not begun."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, Json, overlay, raw_image, same_content, user_can_read
from tests.qemu.faults import HASTE, ROOT, Pair, Tmpfs, eventually, storage_daemons
from tests.qemu.test_exports import refusal

pytestmark = pytest.mark.qemu
needs_root = pytest.mark.skipif(not ROOT, reason="needs root: it mounts a file system")
SLACK = MIB // 2
"""Metadata of the file system, and clusters that a storage daemon allocates ahead."""


def request(operation: str, target: Path, **spec: Any) -> Json:
    ends = {"completion": "finish" if operation == "copy" else "pivot"}
    return {"operation": operation, "target": str(target), **ends, **spec}


def plan(agent: AgentProcess, operation: str, target: Path, **spec: Any) -> Json:
    found: Json = agent.post("/v1/jobs", request(operation, target, dry_run=True, **spec))
    return found


def done(agent: AgentProcess, operation: str, target: Path, **spec: Any) -> Json:
    return agent.until_ended(agent.post("/v1/jobs", request(operation, target, **spec))["id"])


def write(image: Path, offset: int, length: int) -> None:
    subprocess.run(["qemu-io", "-c", f"write -q -P 5 {offset} {length}", str(image)], check=True)


def allocated(path: Path) -> int:
    os.sync()  # delayed allocation: until then it is not known
    return path.stat().st_blocks * 512


@pytest.fixture
def small(folder: Path) -> Iterator[Tmpfs]:
    with Tmpfs(folder / "small", 8 * MIB) as mounted:
        yield mounted


@pytest.fixture
def sparse(folder: Path) -> Path:
    """8 MiB of data on a disk of 64 MiB: 6 in the base, 3 above, of which one hides one of the base."""
    home = folder / "sparse"
    home.mkdir(mode=0o755)
    base = raw_image(home / "base.raw", 64 * MIB, data=6 * MIB)
    top = overlay(home / "top.qcow2", base)
    write(top, 5 * MIB, MIB)
    write(top, 40 * MIB, 2 * MIB)
    return top


# The measure


@pytest.mark.parametrize(
    ("spec", "data"),
    [
        pytest.param({"format": "raw"}, 8 * MIB, id="raw"),
        pytest.param({}, 8 * MIB, id="qcow2"),
        pytest.param({"shallow": True}, 3 * MIB, id="shallow"),
    ],
)
def test_a_copy_takes_what_was_said(agent: AgentProcess, sparse: Path, spec: Json, data: int) -> None:
    dest = sparse.with_name("copy")
    need = plan(agent, "copy", sparse, dest=str(dest), **spec)["space"]["need"]
    if spec.get("format") == "raw":
        assert need == data
    assert done(agent, "copy", sparse, dest=str(dest), **spec)["state"] == "completed"
    assert data <= allocated(dest) <= need + SLACK
    assert need <= data + SLACK


def test_compressed_data_counts_as_what_it_becomes(agent: AgentProcess, images: Pair) -> None:
    packed = images.folder / "packed.qcow2"
    plain = raw_image(images.folder / "plain.raw", 4 * MIB, data=0)
    plain.write_bytes(b"compressible" * (4 * MIB // 12) + b"    ")
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(plain), str(packed)], check=True)
    assert allocated(packed) < MIB
    space = plan(agent, "copy", packed, dest=str(images.folder / "copy.raw"), format="raw")["space"]
    assert space["need"] == 4 * MIB


def test_the_files_are_closed_again_to_whom_the_measure_had_to_read_them(agent: AgentProcess, images: Pair) -> None:
    before = {path: path.stat().st_mode for path in images.folder.iterdir()}
    assert plan(agent, "copy", images.top, dest=str(images.folder / "copy.qcow2"))["space"]["need"] > 0
    assert plan(agent, "commit", images.top)["space"]["need"] > 0
    assert {path: path.stat().st_mode for path in images.folder.iterdir()} == before
    assert [grant for grant in agent.get("/v1/grants")["items"] if grant["path"] in map(str, before)] == []
    if ROOT:
        assert agent.user
        assert not any(user_can_read(path, agent.user) for path in before)
    assert eventually(lambda: storage_daemons(agent) == [])


@pytest.mark.parametrize("wait", [True, False], ids=["slow", "failing"])
def test_what_cannot_be_measured_is_a_warning(tmp_path: Path, images: Pair, folder: Path, wait: bool) -> None:
    program = folder / "qemu-img"
    program.write_text(f'#!/bin/sh\n[ "$1" = measure ] && exec {"sleep 60" if wait else "false"}\nexec qemu-img "$@"\n')
    program.chmod(0o755)
    settings = {**HASTE, "IMAGES_QEMU_IMG": str(program), "IMAGES_MEASURE_TIMEOUT": "0.5"}
    with AgentProcess(tmp_path, settings) as agent:
        found = plan(agent, "copy", images.top, dest=str(images.folder / "copy.qcow2"))
        assert found["space"]["need"] is None
        assert "not known" in found["warnings"][0]
        job = done(agent, "copy", images.top, dest=str(images.folder / "copy.qcow2"))
        assert (job["state"], job["warnings"]) == ("completed", []), "there is room for all of the disk"


HOLDS = """#!/bin/sh
[ "$1" = measure ] || exec qemu-img "$@"
for image; do [ "$image" = -U ] && share=-U; done
(sleep 1; echo open >> {begun}) &
qemu-io -r $share -c "sleep 8000" "$image"
exit 1
"""
"""It has the image open for 8 s, with QEMU's locks or without, as it was asked to measure."""


def test_a_look_at_what_a_copy_would_take_stops_nobody(tmp_path: Path, images: Pair, folder: Path) -> None:
    program, begun = folder / "qemu-img", folder / "begun"
    program.write_text(HOLDS.format(begun=begun))
    program.chmod(0o755)
    begun.touch(0o666)
    begun.chmod(0o666)
    with AgentProcess(tmp_path, {**HASTE, "IMAGES_QEMU_IMG": str(program)}) as agent, ThreadPoolExecutor() as aside:
        looking = aside.submit(plan, agent, "copy", images.top, dest=str(images.folder / "copy.qcow2"))
        assert eventually(lambda: begun.read_text() != "")
        job = agent.until_ended(agent.pull(images.top)["id"])
        assert not looking.done(), "it was measured all the time"
        assert (job["state"], job["error"]) == ("completed", None)
        assert looking.result(60)["space"]["need"] is None
    assert same_content(images.top, images.truth)


@pytest.mark.root
@needs_root
def test_a_job_that_may_not_fit_begins_with_a_warning_where_it_cannot_be_measured(
    tmp_path: Path, images: Pair, folder: Path, small: Tmpfs
) -> None:
    program = folder / "qemu-img"
    program.write_text('#!/bin/sh\n[ "$1" = measure ] && exec false\nexec qemu-img "$@"\n')
    program.chmod(0o755)
    with AgentProcess(tmp_path, {**HASTE, "IMAGES_QEMU_IMG": str(program)}) as agent:
        job = done(agent, "copy", images.top, dest=str(small.folder / "copy.qcow2"))
        assert "not known" in job["warnings"][0]


# The verdict


@pytest.mark.root
@needs_root
def test_a_copy_that_cannot_fit_is_not_stored(agent: AgentProcess, sparse: Path, small: Tmpfs) -> None:
    small.resize(7 * MIB)
    dest = str(small.folder / "copy.raw")
    jobs = agent.get("/v1/jobs")["items"]
    error = refusal(agent, "POST", "/v1/jobs", request("copy", sparse, dest=dest, format="raw"))
    assert (error.code, error.body["field"], error.status) == ("no_space", "dest", 507)
    free = plan(agent, "copy", sparse, dest=dest, format="raw", check="never")["space"]["free"]
    assert all(str(number) in error.body["detail"] for number in (8 * MIB, free, dest))
    assert "--check never" in error.body["remedy"]
    assert agent.get("/v1/jobs")["items"] == jobs
    assert list(small.folder.iterdir()) == []
    small.resize(8 * MIB + 64 * 1024)
    assert done(agent, "copy", sparse, dest=dest, format="raw")["state"] == "completed"


def leave(small: Tmpfs, free: int) -> None:
    """Make the file system so small that `free` bytes are left."""
    found = os.statvfs(small.folder)
    small.resize((found.f_blocks - found.f_bfree) * found.f_frsize + free)


@pytest.mark.root
@needs_root
def test_a_commit_that_cannot_fit_is_not_stored(agent: AgentProcess, small: Tmpfs) -> None:
    small.resize(64 * MIB)
    base = raw_image(small.folder / "base.raw", 64 * MIB, data=4 * MIB)
    top = overlay(small.folder / "top.qcow2", base)
    write(top, 2 * MIB, 10 * MIB)  # 2 of which the base has
    before, jobs = base.read_bytes(), agent.get("/v1/jobs")["items"]
    leave(small, 7 * MIB)
    error = refusal(agent, "POST", "/v1/jobs", request("commit", top))
    assert (error.code, error.body["field"]) == ("no_space", "target")
    assert all(str(word) in error.body["detail"] for word in (8 * MIB, 7 * MIB, base))
    assert agent.get("/v1/jobs")["items"] == jobs
    assert base.read_bytes() == before
    found = plan(agent, "commit", top, check="never")
    assert found["space"] == {"need": 10 * MIB, "free": 7 * MIB}
    assert "needs" in found["warnings"][0]
    leave(small, 8 * MIB + SLACK)
    assert "may need" in plan(agent, "commit", top)["warnings"][0]
    assert done(agent, "commit", top)["state"] == "completed"
    assert same_content(base, top, first="raw")


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_a_commit_into_what_the_base_has_already_needs_no_space(
    agent: AgentProcess, small: Tmpfs, folder: Path, format_: str
) -> None:
    """The bound is 4 MiB, and next to nothing is free: that may do, so it is told, and refused on request only."""
    small.resize(64 * MIB)
    raw = raw_image(folder / "base.raw", 4 * MIB)
    base = small.folder / "base"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format_, str(raw), str(base)], check=True)
    base.chmod(0o600)
    top = overlay(small.folder / "top.qcow2", base, format_)
    write(top, 0, 4 * MIB)
    leave(small, SLACK)
    assert refusal(agent, "POST", "/v1/jobs", request("commit", top, check="always")).code == "no_space"
    job = done(agent, "commit", top)
    assert job["state"] == "completed"
    assert any("may need" in warning for warning in job["warnings"])
    assert same_content(base, top, first=format_)


@pytest.mark.root
@needs_root
def test_what_an_existing_target_has_is_not_needed_again(agent: AgentProcess, small: Tmpfs, images: Pair) -> None:
    source = raw_image(images.folder / "source.raw", 5 * MIB)
    dest = raw_image(small.folder / "dest.raw", 5 * MIB)
    leave(small, SLACK)
    spec = {"dest": str(dest), "source_format": "raw", "format": "raw", "reuse_external": True}
    job = done(agent, "copy", source, **spec)
    assert job["state"] == "completed"
    assert any("may need" in warning for warning in job["warnings"])
    assert source.read_bytes() == dest.read_bytes()


@pytest.mark.root
@needs_root
def test_small_pieces_in_a_sparse_base_are_not_taken_for_more_than_they_are(agent: AgentProcess, small: Tmpfs) -> None:
    """4 KiB in every 64 KiB of 32 MiB are 2 MiB in the base. In clusters of 64 KiB all of it would seem needed."""
    small.resize(64 * MIB)
    base = small.folder / "base.raw"
    with base.open("wb") as image:
        for at in range(0, 32 * MIB, 65536):
            image.seek(at)
            image.write(os.urandom(4096))
        image.truncate(32 * MIB)
    base.chmod(0o600)
    top = overlay(small.folder / "top.qcow2", base)
    write(top, 2 * MIB, 5 * MIB)
    leave(small, 5 * MIB - 64 * 1024)  # the base has 1/16 of these 5
    assert "may need" in plan(agent, "commit", top)["warnings"][0]
    assert done(agent, "commit", top)["state"] == "completed"
    assert same_content(base, top, first="raw")
