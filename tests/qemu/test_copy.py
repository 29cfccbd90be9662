"""Copies, from the request to the bytes: new files and old, whole and shallow, finished and pivoted.

After each job the source compares equal to what it was, the target to the source; nothing of a copy that did not
complete is left, and no client is ever cut off.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
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
    reachable,
    same_content,
    stand_still,
)
from tests.qemu.faults import (
    HASTE,
    ROOT,
    Pair,
    Reader,
    Tmpfs,
    daemon_of,
    eventually,
    permissions,
    storage_daemons,
)
from tests.qemu.remote_storage import nbd_server, needs_nbdkit

pytestmark = pytest.mark.qemu
SLOW = 4 * MIB
REVOKED = "done" if ROOT else "kept"


def copy(agent: AgentProcess, source: Path, dest: Path | str, **spec: Any) -> Json:
    """A copy that has ended, and whose access is settled."""
    job: Json = agent.post("/v1/jobs", {"operation": "copy", "target": str(source), "dest": str(dest), **spec})
    return agent.until_ended(job["id"])


def started(agent: AgentProcess, source: Path, dest: Path | str, state: str = "running", **spec: Any) -> Json:
    job: Json = agent.post("/v1/jobs", {"operation": "copy", "target": str(source), "dest": str(dest), **spec})
    return agent.until(job["id"], lambda job: job["state"] == state)


def assert_source_untouched(images: Pair, *, running: bool = False) -> None:
    assert backing_of(images.top) == images.base.name
    assert same_content(images.top, images.truth, running=running)


def assert_nothing_left(agent: AgentProcess, folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if path.name.startswith(".hostagent")] == []
    assert eventually(lambda: storage_daemons(agent) == [])
    assert eventually(lambda: held(agent, folder) == [])


def held(agent: AgentProcess, folder: Path) -> list[Json]:
    """Grants that jobs and exports have on the files of a folder; an image keeps its own after a job that failed."""
    grants = agent.get("/v1/grants")["items"]
    return [grant for grant in grants if grant["path"].startswith(str(folder)) and grant["holder"]["kind"] != "image"]


# New files


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_whole_copy_stands_alone_and_reads_like_the_image(agent: AgentProcess, images: Pair, format: str) -> None:
    images.top.chmod(0o640)
    dest = images.folder / f"copy.{format}"
    job = copy(agent, images.top, dest, format=format, completion="finish")
    assert (job["state"], job["revocation"], job["error"]) == ("completed", "none", None)
    assert job["dest"] == {"path": str(dest), "format": format, "state": "complete"}
    assert job["chain"]["after"] == job["chain"]["before"]
    assert job["cursor"]["cur"] == job["cursor"]["end"] > 0
    assert same_content(dest, images.truth, first=format)
    assert backing_of(dest) is None
    assert_source_untouched(images)
    assert_nothing_left(agent, images.folder)
    assert eventually(lambda: permissions(dest) == (0o100640, None))
    assert dest.stat().st_uid == images.top.stat().st_uid


def test_a_shallow_copy_shares_the_backing_file(agent: AgentProcess, images: Pair) -> None:
    dest = images.folder / "shallow.qcow2"
    job = copy(agent, images.top, dest, shallow=True, completion="finish")
    assert job["state"] == "completed"
    assert backing_of(dest) == images.base.name
    assert dest.stat().st_blocks * 512 < 4 * MIB
    assert same_content(dest, images.truth)
    assert check_clean(dest)
    assert_source_untouched(images)


def test_a_shallow_copy_in_another_folder_names_its_backing_file_whole(
    agent: AgentProcess, images: Pair, folder: Path
) -> None:
    with reachable(folder):
        other = folder / "elsewhere"
        other.mkdir(mode=0o755)
        job = copy(agent, images.top, other / "shallow.qcow2", shallow=True, completion="finish")
    assert job["state"] == "completed"
    assert backing_of(other / "shallow.qcow2") == str(images.base)
    assert same_content(other / "shallow.qcow2", images.truth)


def test_a_raw_image_is_copied_when_it_is_said_to_be_raw(agent: AgentProcess, images: Pair) -> None:
    dest = images.folder / "copy.qcow2"
    with pytest.raises(ApiError) as refused:
        copy(agent, images.base, dest, completion="finish")
    assert refused.value.code == "invalid"
    job = copy(agent, images.base, dest, source_format="raw", format="qcow2", completion="finish")
    assert job["state"] == "completed"
    assert same_content(dest, images.base)


def test_the_name_appears_only_when_the_copy_is_whole(agent: AgentProcess, images: Pair) -> None:
    dest = images.folder / "copy.qcow2"
    job = started(agent, images.top, dest, bandwidth=SLOW, completion="finish")
    assert not dest.exists()
    part = images.folder / f".hostagent-{job['id']}"
    assert part.exists()
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert not part.exists()
    assert same_content(dest, images.truth)


def test_a_copy_of_an_exported_image_is_as_closed_as_the_image(agent: AgentProcess, images: Pair) -> None:
    """The mask of the ACL that an export needs stands where the group's permissions are; they are not the group's."""
    images.top.chmod(0o600)
    export = agent.export(images.top)
    dest = images.folder / "copy.qcow2"
    assert copy(agent, images.top, dest, completion="finish")["state"] == "completed"
    assert eventually(lambda: permissions(dest) == (0o100600, None))
    agent.delete(f"/v1/exports/{export['id']}")


# Ready


def test_a_copy_without_an_end_stays_ready_until_it_is_told(agent: AgentProcess, images: Pair) -> None:
    dest = images.folder / "copy.qcow2"
    job = started(agent, images.top, dest, "ready")
    assert job["completion"] is None
    with pytest.raises(ApiError) as refused:
        agent.post(f"/v1/jobs/{job['id']}/complete")
    assert (refused.value.code, refused.value.body["field"]) == ("invalid", "completion")
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
    ended = agent.until_ended(job["id"])
    assert (ended["state"], ended["completion"]) == ("completed", "finish")
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
    assert same_content(dest, images.truth)
    kinds = [event["type"].split(".")[3] for event in agent.events() if event["subject"] == job["id"]]
    assert kinds == ["started", "ready", "completed"]


def test_a_job_that_is_not_ready_cannot_be_completed(agent: AgentProcess, images: Pair) -> None:
    job = started(agent, images.top, images.folder / "copy.qcow2", bandwidth=SLOW)
    with pytest.raises(ApiError) as refused:
        agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "pivot"})
    assert refused.value.code == "conflict"
    agent.post(f"/v1/jobs/{job['id']}/abort")
    assert agent.until_ended(job["id"])["state"] == "aborted"


@pytest.mark.parametrize("state", ["running", "ready", "paused"])
def test_an_aborted_copy_leaves_nothing(agent: AgentProcess, images: Pair, state: str) -> None:
    dest = images.folder / "copy.qcow2"
    before = permissions(images.top), permissions(images.base)
    job = started(
        agent, images.top, dest, "running" if state == "paused" else state, bandwidth=0 if state == "ready" else SLOW
    )
    if state == "paused":
        agent.post(f"/v1/jobs/{job['id']}/pause")
    agent.post(f"/v1/jobs/{job['id']}/abort")
    ended = agent.until_ended(job["id"])
    assert (ended["state"], ended["error"]["code"], ended["dest"]["state"]) == ("aborted", "cancelled", "deleted")
    assert not dest.exists()
    assert sorted(path.name for path in images.folder.iterdir()) == ["base.raw", "top.qcow2"]
    assert_source_untouched(images)
    assert permissions(images.base) == before[1] or ROOT  # it stays granted, as after every job that did not complete


# Pivot


def test_exports_go_over_to_the_copy_and_their_clients_never_notice(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top)
    dest = images.folder / "copy.qcow2"
    with Reader(export["uri"], images.truth) as one, Reader(export["uri"], images.truth) as other:
        job = started(agent, images.top, dest, bandwidth=SLOW, completion="pivot")
        late = agent.export(images.top)
        with Reader(late["uri"], images.truth) as third:
            agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
            job = agent.until_ended(job["id"])
            assert (job["state"], job["revocation"]) == ("completed", REVOKED)
            assert job["chain"]["before"] == [str(images.top), str(images.base)]
            assert job["chain"]["after"] == [str(dest)]
            assert set(job["chain"]["revoked"]) == ({str(images.top), str(images.base)} if ROOT else set())
            time.sleep(0.3)
            assert all(reader.stop() > 0 for reader in (one, other, third))
    assert {agent.get(f"/v1/exports/{each['id']}")["path"] for each in (export, late)} == {str(dest)}
    again = agent.export(dest)  # joins the chain that stands on the copy now
    assert again["pid"] == export["pid"]
    with Reader(again["uri"], images.truth) as reader:
        time.sleep(0.1)
        assert reader.stop() > 0
    for each in (export, late, again):
        agent.delete(f"/v1/exports/{each['id']}")
    assert same_content(dest, images.truth)
    assert_source_untouched(images)
    assert_nothing_left(agent, images.folder)


def test_a_pivot_of_a_shallow_copy_keeps_the_backing_file(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top)
    dest = images.folder / "shallow.qcow2"
    with Reader(export["uri"], images.truth) as reader:
        job = copy(agent, images.top, dest, shallow=True, completion="pivot")
        assert job["chain"]["after"] == [str(dest), str(images.base)]
        assert job["chain"]["revoked"] == ([str(images.top)] if ROOT else [])
        pull = agent.until_ended(agent.pull(dest)["id"])
        assert (pull["state"], pull["revocation"]) == ("completed", REVOKED)
        assert reader.stop() > 0
    agent.delete(f"/v1/exports/{export['id']}")
    assert backing_of(dest) is None
    assert same_content(dest, images.truth)
    assert_source_untouched(images)


def test_a_copy_can_be_copied_on_under_the_same_export(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top)
    place = images.top
    with Reader(export["uri"], images.truth) as reader:
        for n in range(3):
            dest = images.folder / f"copy{n}.qcow2"
            assert copy(agent, place, dest, completion="pivot")["state"] == "completed"
            place = dest
        assert reader.stop() > 0
    agent.delete(f"/v1/exports/{export['id']}")
    assert same_content(place, images.truth)
    assert_nothing_left(agent, images.folder)


# Existing targets


def test_an_existing_file_is_written_over_when_that_is_said(agent: AgentProcess, images: Pair) -> None:
    dest = images.folder / "there.raw"
    raw_image(dest, 16 * MIB)
    before = dest.stat().st_ino
    with pytest.raises(ApiError) as refused:
        copy(agent, images.top, dest, format="raw", completion="finish")
    assert (refused.value.code, refused.value.body["field"]) == ("conflict", "dest")
    job = copy(agent, images.top, dest, format="raw", reuse_external=True, completion="finish")
    assert (job["state"], job["dest"]["state"]) == ("completed", "complete")
    assert dest.stat().st_ino == before
    assert same_content(dest, images.truth, first="raw")


def test_a_shallow_copy_is_into_an_empty_image_only(agent: AgentProcess, images: Pair) -> None:
    dest = overlay(images.folder / "there.qcow2", images.base)
    subprocess.run(["qemu-io", "-c", "write -q -P 77 0 16M", str(dest)], check=True)
    with pytest.raises(ApiError) as refused:
        copy(agent, images.top, dest, reuse_external=True, shallow=True, completion="finish")
    assert (refused.value.code, refused.value.body["field"]) == ("invalid", "dest")
    assert "data of its own" in refused.value.body["detail"]
    dest.unlink()
    overlay(dest, images.base)
    assert copy(agent, images.top, dest, reuse_external=True, shallow=True, completion="finish")["state"] == "completed"
    assert eventually(lambda: storage_daemons(agent) == [])
    assert same_content(dest, images.truth)
    assert backing_of(dest) == images.base.name


def test_what_comes_into_a_shallow_copys_target_before_its_lease_is_no_part_of_it(
    tmp_path: Path, images: Pair, folder: Path
) -> None:
    other = Pair(folder / "other")
    dest = overlay(images.folder / "there.qcow2", images.base)
    with AgentProcess(tmp_path, {**HASTE, "JOBS_WIDTH": "1"}) as agent:
        first = started(agent, other.top, other.folder / "copy.qcow2", bandwidth=SLOW)
        spec = {"dest": str(dest), "reuse_external": True, "shallow": True, "completion": "finish"}
        job: Json = agent.post("/v1/jobs", {"operation": "copy", "target": str(images.top), **spec})
        subprocess.run(["qemu-io", "-c", "write -q -P 77 0 1M", str(dest)], check=True)
        agent.post(f"/v1/jobs/{first['id']}/abort")
        job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["dest"]["state"]) == ("failed", "invalid", "untouched")
    assert "data of its own" in job["error"]["message"]


def test_a_target_that_is_exported_is_refused_before_anything_is_stored(agent: AgentProcess, images: Pair) -> None:
    dest = images.folder / "there.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(dest), str(16 * MIB)], check=True)
    export = agent.export(dest)
    wanted = {"operation": "copy", "target": str(images.top), "dest": str(dest), "reuse_external": True}
    for more in ({"dry_run": True}, {}):
        with pytest.raises(ApiError) as refused:
            agent.post("/v1/jobs", {**wanted, "completion": "finish", **more})
        assert (refused.value.code, export["id"] in refused.value.body["detail"]) == ("busy", True)
    assert not [job for job in agent.get("/v1/jobs")["items"] if job["target"] == str(images.top)]
    agent.delete(f"/v1/exports/{export['id']}")


def test_an_existing_target_of_an_aborted_copy_is_unusable_and_stays(agent: AgentProcess, images: Pair) -> None:
    dest = images.folder / "there.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(dest), "16M"], check=True)
    job = started(agent, images.top, dest, reuse_external=True, bandwidth=SLOW)
    agent.post(f"/v1/jobs/{job['id']}/abort")
    ended = agent.until_ended(job["id"])
    assert (ended["state"], ended["dest"]["state"]) == ("aborted", "unusable")
    assert dest.exists()
    assert_source_untouched(images)
    again = copy(agent, images.top, dest, reuse_external=True, completion="finish")
    assert again["state"] == "completed"
    assert same_content(dest, images.truth)


@pytest.mark.parametrize(
    ("case", "code"),
    [("base", "invalid"), ("size", "invalid"), ("backing", "invalid"), ("exported", "busy"), ("absent", "not_found")],
)
def test_a_target_that_cannot_be_one_is_refused(agent: AgentProcess, images: Pair, case: str, code: str) -> None:
    dest, format = images.folder / "there.qcow2", "qcow2"
    if case == "base":
        dest, format = images.base, "raw"
    elif case == "size":
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(dest), "8M"], check=True)
    elif case == "backing":
        overlay(dest, images.base)
    elif case == "exported":
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(dest), "16M"], check=True)
        export = agent.export(dest)
    before = images.base.read_bytes()
    with pytest.raises(ApiError) as refused:
        job = copy(agent, images.top, dest, format=format, reuse_external=True, completion="finish")
        assert job["state"] == "failed"
        raise ApiError(409, job["error"])
    assert refused.value.code == code
    assert images.base.read_bytes() == before
    assert_source_untouched(images)
    if case == "exported":
        agent.delete(f"/v1/exports/{export['id']}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("n" * 256, "File name too long"),
        ("\u00e9" * 128, "File name too long"),
        ("a\nb", "control characters"),
        ("\x1b[31m", "control characters"),
        (".hostagent-job", "agent's own"),
    ],
)
def test_a_name_that_no_copy_can_have_is_refused(agent: AgentProcess, images: Pair, name: str, words: str) -> None:
    with pytest.raises(ApiError) as refused:
        copy(agent, images.top, images.folder / name, completion="finish")
    assert (refused.value.code, refused.value.body["field"]) == ("invalid", "dest")
    assert words in refused.value.body["detail"]
    assert_nothing_left(agent, images.folder)
    assert copy(agent, images.top, images.folder / ("n" * 255), completion="finish")["state"] == "completed"


def test_a_target_has_one_copy_at_a_time(agent: AgentProcess, images: Pair) -> None:
    other, dest = overlay(images.folder / "other.qcow2", images.base), images.folder / "copy.qcow2"
    job = started(agent, images.top, dest, bandwidth=SLOW, completion="finish")
    with pytest.raises(ApiError) as refused:
        copy(agent, other, dest, completion="finish")
    assert (refused.value.code, refused.value.body["holders"]) == ("busy", [f"job:{job['id']}"])
    agent.post(f"/v1/jobs/{job['id']}/abort")
    agent.until_ended(job["id"])
    assert copy(agent, other, dest, completion="finish")["state"] == "completed"


def test_bitmaps_that_a_pivot_leaves_behind_are_said(agent: AgentProcess, images: Pair) -> None:
    subprocess.run(["qemu-img", "bitmap", "--add", str(images.top), "daily"], check=True)
    dest = images.folder / "copy.qcow2"
    assert "(daily)" in copy(agent, images.top, dest, completion="pivot")["warnings"][0]
    again = images.folder / "again.qcow2"
    assert copy(agent, images.top, again, completion="finish")["warnings"] == [], "the image keeps them"


@pytest.mark.parametrize(
    ("spec", "code", "field"),
    [
        ({}, "invalid", "dest"),
        ({"dest": "relative"}, "invalid", "dest"),
        ({"dest": "/nowhere/at/all.qcow2"}, "not_found", "dest"),
        ({"dest": "/etc/passwd"}, "conflict", "dest"),
        ({"dest": "{folder}/x.raw", "format": "raw", "shallow": True}, "invalid", "format"),
        ({"dest": "{folder}/x", "increment": 1}, "invalid", "increment"),
        ({"dest": "{folder}/x", "delete": True}, "invalid", "delete"),
        ({"dest": "{folder}/x", "completion": "perhaps"}, "invalid", "completion"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    agent: AgentProcess, images: Pair, spec: Json, code: str, field: str
) -> None:
    spec = {k: v.format(folder=images.folder) if isinstance(v, str) else v for k, v in spec.items()}
    with pytest.raises(ApiError) as refused:
        agent.post("/v1/jobs", {"operation": "copy", "target": str(images.top), **spec})
    assert (refused.value.code, refused.value.body["field"]) == (code, field)
    assert sorted(path.name for path in images.folder.iterdir()) == ["base.raw", "top.qcow2"]


# Faults


def test_a_full_target_fails_the_copy_and_leaves_nothing(agent: AgentProcess, images: Pair, folder: Path) -> None:
    if not ROOT:
        pytest.skip("needs root: it mounts a file system")
    with Tmpfs(folder / "small", 6 * MIB) as small:
        export = agent.export(images.top)
        with Reader(export["uri"], images.truth) as reader:
            job = copy(agent, images.top, small.folder / "copy.qcow2", completion="pivot", check="never")
            assert (job["state"], job["error"]["code"]) == ("failed", "no_space")
            assert "target" in job["error"]["remedy"]
            assert list(small.folder.iterdir()) == []
            assert reader.stop() > 0
        assert agent.get(f"/v1/exports/{export['id']}")["path"] == str(images.top)
        agent.delete(f"/v1/exports/{export['id']}")
    assert_source_untouched(images)


def test_a_name_that_is_taken_meanwhile_is_not_overwritten(agent: AgentProcess, images: Pair) -> None:
    dest = images.folder / "copy.qcow2"
    job = started(agent, images.top, dest, bandwidth=SLOW, completion="finish")
    dest.write_bytes(b"somebody else's")
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["dest"]["state"]) == ("failed", "conflict", "deleted")
    assert dest.read_bytes() == b"somebody else's"
    assert_source_untouched(images)
    assert_nothing_left(agent, images.folder)


def test_a_killed_storage_daemon_fails_the_copy_and_leaves_nothing(agent: AgentProcess, images: Pair) -> None:
    dest = images.folder / "copy.qcow2"
    job = started(agent, images.top, dest, bandwidth=SLOW, completion="pivot")
    os.kill(daemon_of(agent, images.top), signal.SIGKILL)
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["dest"]["state"]) == ("failed", "storage_daemon_died", "deleted")
    assert sorted(path.name for path in images.folder.iterdir()) == ["base.raw", "top.qcow2"]
    assert_source_untouched(images)


@pytest.mark.parametrize("state", ["running", "ready"])
@pytest.mark.parametrize("completion", ["finish", "pivot"])
def test_a_copy_goes_on_when_the_agent_was_killed(tmp_path: Path, images: Pair, state: str, completion: str) -> None:
    dest = images.folder / "copy.qcow2"
    with AgentProcess(tmp_path, HASTE) as agent:
        export = agent.export(images.top)
        with Reader(export["uri"], images.truth) as reader:
            spec = {"bandwidth": SLOW, "completion": completion} if state == "running" else {}
            job = started(agent, images.top, dest, state, **spec)
            agent.kill()
            agent.start()
            if state == "ready":
                agent.until(job["id"], lambda job: job["state"] == "ready")
                agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": completion})
            ended = agent.until_ended(job["id"])
            assert ended["state"] == "completed"
            assert reader.stop() > 0
        pivoted = completion == "pivot"
        assert agent.get(f"/v1/exports/{export['id']}")["path"] == str(dest if pivoted else images.top)
        agent.kill()
        agent.start()  # and the daemon is known again by what it stands on now
        assert agent.get(f"/v1/exports/{export['id']}")["state"] == "running"
        with Reader(export["uri"], images.truth) as reader:
            time.sleep(0.1)
            assert reader.stop() > 0
        agent.delete(f"/v1/exports/{export['id']}")
        assert same_content(dest, images.truth)
        assert_source_untouched(images)
        assert_nothing_left(agent, images.folder)


# NBD


@needs_nbdkit
def test_a_copy_goes_to_an_nbd_export(agent: AgentProcess, images: Pair, folder: Path) -> None:
    with nbd_server(folder, 16 * MIB) as (uri, disk, _):
        job = copy(agent, images.top, uri, completion="finish")
        assert (job["state"], job["dest"]) == ("completed", {"path": uri, "format": "raw", "state": "complete"})
    assert same_content(disk, images.truth, first="raw")
    assert_nothing_left(agent, images.folder)


@needs_nbdkit
def test_nothing_goes_over_to_an_nbd_export_later_either(agent: AgentProcess, images: Pair, folder: Path) -> None:
    with nbd_server(folder, 16 * MIB) as (uri, disk, _):
        job = agent.post("/v1/jobs", {"operation": "copy", "target": str(images.top), "dest": uri})
        agent.until(job["id"], lambda job: job["state"] == "ready")
        with pytest.raises(ApiError) as refused:
            agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "pivot"})
        assert (refused.value.code, refused.value.body["field"]) == ("invalid", "completion")
        agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
        assert agent.until_ended(job["id"])["state"] == "completed"
    assert same_content(disk, images.truth, first="raw")
    assert_source_untouched(images)


@needs_nbdkit
@pytest.mark.parametrize(
    ("spec", "code"), [({"completion": "pivot"}, "invalid"), ({"shallow": True}, "invalid"), ({}, "invalid")]
)
def test_what_an_nbd_export_cannot_be_is_refused(
    agent: AgentProcess, images: Pair, folder: Path, spec: Json, code: str
) -> None:
    with nbd_server(folder, 8 * MIB) as (uri, _, _):
        try:
            error = copy(agent, images.top, uri, **spec)["error"]["code"]
        except ApiError as refused:
            error = refused.code
        assert error == code
    assert_source_untouched(images)


@needs_nbdkit
@pytest.mark.skipif(not ROOT, reason="as a plain user the hypervisor user is the server's own")
def test_an_nbd_socket_that_the_hypervisor_user_may_not_use_is_named(
    agent: AgentProcess, images: Pair, folder: Path
) -> None:
    with nbd_server(folder, 16 * MIB) as (uri, _, _):
        socket = Path(uri.partition("socket=")[2])
        socket.chmod(0o600)
        error = copy(agent, images.top, uri, completion="finish")["error"]
    assert (error["code"], str(socket) in error["message"]) == ("access_refused", True), error
    assert f"u:{agent.user}:rw {socket}" in error["remedy"]
    assert_source_untouched(images)


@needs_nbdkit
def test_a_target_that_dies_fails_the_copy_and_nothing_else(agent: AgentProcess, images: Pair, folder: Path) -> None:
    export = agent.export(images.top)
    with nbd_server(folder, 16 * MIB) as (uri, _, server), Reader(export["uri"], images.truth) as reader:
        job = started(agent, images.top, uri, bandwidth=SLOW)
        server.kill()
        job = agent.until_ended(job["id"])
        assert (job["state"], job["dest"]["state"]) == ("failed", "unusable")
        assert reader.stop() > 0
    agent.delete(f"/v1/exports/{export['id']}")
    assert_source_untouched(images)


def forced(agent: AgentProcess, job: Json) -> bool:
    try:
        agent.post(f"/v1/jobs/{job['id']}/abort", {"force": True})
    except ApiError as error:
        assert error.code == "busy", error
        return False
    return True


@needs_nbdkit
def test_a_target_that_hangs_holds_up_nobody_else_and_force_ends_it(tmp_path: Path, images: Pair, folder: Path) -> None:
    other = raw_image(folder / "other.raw", 4 * MIB)
    with (
        AgentProcess(tmp_path, {**HASTE, "JOBS_ABORT_TIMEOUT": "1"}) as agent,
        nbd_server(folder, 16 * MIB) as (uri, _, server),
    ):
        job = started(agent, images.top, uri, bandwidth=SLOW)
        stand_still(server.pid)
        time.sleep(0.3)
        began = time.monotonic()
        export = agent.export(other, format="raw")
        assert copy(agent, other, folder / "x.raw", source_format="raw", completion="finish")["state"] == "completed"
        agent.delete(f"/v1/exports/{export['id']}")
        assert time.monotonic() - began < 10
        agent.post(f"/v1/jobs/{job['id']}/abort")
        assert eventually(lambda: forced(agent, job))  # not before jobs.abort_timeout is over
        job = agent.until_ended(job["id"])
        assert (job["state"], job["dest"]["state"]) == ("aborted", "unusable")
        assert_source_untouched(images)


def test_a_target_that_others_stand_on_is_not_written_over(agent: AgentProcess, images: Pair) -> None:
    dest = images.folder / "there.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(dest), "16M"], check=True)
    child = overlay(images.folder / "child.qcow2", dest, "qcow2")
    with pytest.raises(ApiError) as refused:
        copy(agent, images.top, dest, reuse_external=True, completion="finish")
    assert (refused.value.code, refused.value.body["field"]) == ("busy", "dest")
    assert str(child) in refused.value.body["detail"]
