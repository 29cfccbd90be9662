"""Files that are cut, written, deleted or replaced under a running job: QEMU notices nothing, and the agent must."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
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
)
from tests.qemu.faults import HASTE, eventually

pytestmark = pytest.mark.qemu

SIZE = 8 * MIB
SLOW = 256 * 1024


@pytest.fixture
def base(folder: Path) -> Path:
    return raw_image(folder / "base.raw", SIZE)


@pytest.fixture
def top(folder: Path, base: Path) -> Path:
    return overlay(folder / "top.qcow2", base)


def begun(agent: AgentProcess, target: Path, operation: str = "pull", **spec: Any) -> Json:
    """A job that has copied something, and is far from its end."""
    body = {"operation": operation, "target": str(target), "bandwidth": SLOW, **spec}
    job: Json = agent.post("/v1/jobs", body)
    return agent.until(job["id"], lambda one: one["state"] == "running" and 0 < one["cursor"]["cur"] < SIZE // 2)


def hurried(agent: AgentProcess, job: Json) -> Json:
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    return agent.until_ended(job["id"])


def failed_for_the_cut(job: Json, path: Path) -> None:
    assert (job["state"], job["error"]["code"]) == ("failed", "image_changed"), job
    assert f"{path} was cut" in job["error"]["message"]
    assert job["error"]["remedy"]
    assert job["chain"]["revoked"] == []


def test_a_pull_of_a_base_that_was_cut_is_not_completed_and_keeps_its_base(
    agent: AgentProcess, top: Path, base: Path, folder: Path
) -> None:
    truth = shutil.copy(base, folder / "truth.raw")
    job = begun(agent, top)
    os.truncate(base, SIZE // 2)
    failed_for_the_cut(hurried(agent, job), base)
    assert backing_of(top) == "base.raw"
    assert check_clean(top)
    assert not same_content(truth, top, first="raw")  # QEMU copied zeros: that is what must not be called completed
    errors = agent.get("/v1/host")["last_errors"]
    assert any(f"{base} was cut" in one["message"] for one in errors)


def test_a_pull_of_a_qcow2_base_that_was_cut_is_not_completed(agent: AgentProcess, folder: Path, base: Path) -> None:
    middle = folder / "middle.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(base), str(middle)], check=True)
    top = overlay(folder / "top.qcow2", middle, "qcow2")
    job = begun(agent, top)
    os.truncate(middle, middle.stat().st_size - 2 * MIB)
    failed_for_the_cut(hurried(agent, job), middle)
    assert backing_of(top) == "middle.qcow2"


@pytest.mark.parametrize("completion", ["finish", "pivot"])
def test_a_copy_of_a_base_that_was_cut_fails_and_leaves_no_target(
    agent: AgentProcess, top: Path, base: Path, folder: Path, completion: str
) -> None:
    dest = folder / "copy.qcow2"
    job: Json = agent.post("/v1/jobs", {"operation": "copy", "target": str(top), "dest": str(dest), "bandwidth": MIB})
    agent.until(job["id"], lambda one: one["state"] in ("running", "ready"))
    os.truncate(base, SIZE // 2)
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    agent.until(job["id"], lambda one: one["state"] == "ready")
    with pytest.raises(ApiError) as caught:
        agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": completion})
    assert caught.value.code == "image_changed"
    assert agent.job(job["id"])["state"] == "ready"
    agent.post(f"/v1/jobs/{job['id']}/abort")
    assert agent.until_ended(job["id"])["state"] == "aborted"
    assert not dest.exists()


def test_a_copy_that_was_to_end_by_itself_fails(agent: AgentProcess, top: Path, base: Path, folder: Path) -> None:
    dest = folder / "copy.qcow2"
    spec = {"dest": str(dest), "completion": "pivot", "bandwidth": MIB}
    job: Json = agent.post("/v1/jobs", {"operation": "copy", "target": str(top), **spec})
    agent.until(job["id"], lambda one: one["state"] == "running")
    os.truncate(base, SIZE // 2)
    failed_for_the_cut(hurried(agent, job), base)
    assert not dest.exists()


def test_a_cut_between_two_increments_fails_the_job_before_it_goes_on(
    agent: AgentProcess, top: Path, base: Path
) -> None:
    job = agent.pull(top, increment=MIB)
    agent.until(job["id"], lambda one: one["state"] == "waiting")
    os.truncate(base, SIZE // 2)
    agent.post(f"/v1/jobs/{job['id']}/next")
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "image_changed")
    assert job["cursor"]["cur"] == MIB


def test_a_cut_while_the_agent_is_away_is_noticed(agent: AgentProcess, top: Path, base: Path) -> None:
    job = begun(agent, top)
    agent.kill()
    os.truncate(base, SIZE // 2)
    agent.start()
    agent.until(job["id"], lambda one: one["state"] != "starting")
    failed_for_the_cut(hurried(agent, job), base)


def regrown(base: Path) -> None:
    os.truncate(base, SIZE // 2)
    os.truncate(base, SIZE)


def overwritten(base: Path) -> None:
    with base.open("r+b") as file:
        file.seek(SIZE - MIB)
        file.write(b"x" * 4096)


def appended(base: Path) -> None:
    with base.open("ab") as file:
        file.write(b"x" * 4096)


WRITES = [regrown, overwritten, appended, Path.touch]
"""What another program does to a base. The last changes no byte, which nobody can know from outside."""


def failed_for_the_write(job: Json, path: Path) -> None:
    assert (job["state"], job["error"]["code"]) == ("failed", "image_changed"), job
    assert f"{path} was written by somebody else" in job["error"]["message"]
    assert "touch" in job["error"]["remedy"]
    assert job["chain"]["revoked"] == []


@pytest.mark.parametrize("write", WRITES)
def test_a_pull_of_a_base_that_somebody_writes_is_not_completed_and_keeps_its_base(
    agent: AgentProcess, top: Path, base: Path, write: Callable[[Path], None]
) -> None:
    job = begun(agent, top)
    write(base)
    failed_for_the_write(hurried(agent, job), base)
    assert backing_of(top) == "base.raw"
    assert check_clean(top)
    again = agent.until_ended(agent.pull(top)["id"])  # whoever saw that it was a mere touch starts again
    assert (again["state"], backing_of(top)) == ("completed", None), again


def test_a_copy_of_a_top_that_somebody_writes_fails_and_leaves_no_target(
    agent: AgentProcess, top: Path, folder: Path
) -> None:
    dest = folder / "copy.qcow2"
    spec = {"dest": str(dest), "completion": "finish", "bandwidth": MIB}
    job: Json = agent.post("/v1/jobs", {"operation": "copy", "target": str(top), **spec})
    agent.until(job["id"], lambda one: one["state"] == "running")
    top.touch()
    failed_for_the_write(hurried(agent, job), top)
    assert not dest.exists()


def test_a_commit_fails_when_what_it_reads_is_written_and_not_when_what_it_writes_is(
    agent: AgentProcess, base: Path, folder: Path
) -> None:
    middle = folder / "middle.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(base), str(middle)], check=True)
    subprocess.run(["qemu-img", "rebase", "-u", "-F", "raw", "-b", base.name, str(middle)], check=True)
    top = overlay(folder / "top.qcow2", middle, "qcow2")
    job = begun(agent, top, "commit", top=str(middle), base=str(base))
    middle.touch()
    failed_for_the_write(hurried(agent, job), middle)
    assert backing_of(top) == "middle.qcow2"
    job = begun(agent, top, "commit", top=str(middle), base=str(base))
    job = hurried(agent, job)
    assert (job["state"], job["warnings"]) == ("completed", []), job


def test_a_write_while_the_agent_is_away_is_noticed(agent: AgentProcess, top: Path, base: Path) -> None:
    job = begun(agent, top)
    agent.kill()
    overwritten(base)
    agent.start()
    agent.until(job["id"], lambda one: one["state"] != "starting")
    failed_for_the_write(hurried(agent, job), base)


def test_a_write_between_two_increments_fails_the_job_before_it_goes_on(
    agent: AgentProcess, top: Path, base: Path
) -> None:
    job = agent.pull(top, increment=MIB)
    agent.until(job["id"], lambda one: one["state"] == "waiting")
    overwritten(base)
    agent.post(f"/v1/jobs/{job['id']}/next")
    job = agent.until_ended(job["id"])
    failed_for_the_write(job, base)
    assert job["cursor"]["cur"] == MIB


def test_what_is_written_by_right_before_a_job_starts_is_no_change(
    tmp_path: Path, top: Path, base: Path, folder: Path
) -> None:
    """A queued job has no leases yet: others may write its image until it begins."""
    first = overlay(folder / "first.qcow2", raw_image(folder / "other.raw", SIZE))
    with reachable(tmp_path), AgentProcess(tmp_path, {**HASTE, "JOBS_WIDTH": "1"}) as agent:
        slow = begun(agent, first)
        dest = folder / "copy.qcow2"
        spec = {"dest": str(dest), "completion": "finish"}
        queued: Json = agent.post("/v1/jobs", {"operation": "copy", "target": str(top), **spec})
        assert queued["state"] == "queued"
        words = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", str(top)]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        assert hurried(agent, slow)["state"] == "completed"
        job = agent.until_ended(queued["id"])
        assert (job["state"], job["warnings"]) == ("completed", []), job
        assert same_content(top, dest)


@pytest.mark.parametrize("operation", ["pull", "copy", "commit"])
def test_what_our_own_clients_jobs_and_restarts_write_is_no_change(
    agent: AgentProcess, folder: Path, base: Path, operation: str
) -> None:
    """Written by a client, then by a commit into the middle, while the read-only chain of an export is known; then the
    job itself, over a restart."""
    middle = overlay(folder / "middle.qcow2", base)
    top = overlay(folder / "top.qcow2", middle, "qcow2")
    truth = folder / "truth.raw"
    half = SIZE // 2
    truth.write_bytes(b"\7" * half + base.read_bytes()[half:])
    export = agent.export(top, writable=True)
    words = ["qemu-io", "-f", "raw", "-c", f"write -P 7 0 {half}", "-c", "flush", export["uri"]]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    agent.delete(f"/v1/exports/{export['id']}")
    agent.export(top)
    spec = {"operation": "commit", "target": str(top), "base": str(middle), "completion": "finish"}
    earlier = agent.until_ended(agent.post("/v1/jobs", spec)["id"])
    assert (earlier["state"], earlier["warnings"]) == ("completed", []), earlier
    dest = folder / "copy.qcow2"
    more = {"pull": {}, "copy": {"dest": str(dest), "completion": "finish"}, "commit": {"completion": "pivot"}}
    body = {"operation": operation, "target": str(top), "bandwidth": SLOW, **more[operation]}
    job: Json = agent.post("/v1/jobs", body)
    agent.until(job["id"], lambda one: one["state"] == "running" and one["cursor"]["cur"] > 0)
    agent.kill()
    agent.start()
    agent.until(job["id"], lambda one: one["state"] not in ("starting", "unknown"))
    with contextlib.suppress(ApiError):  # on a slow machine it may have ended by itself
        agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    job = agent.until_ended(job["id"])
    assert (job["state"], job["warnings"]) == ("completed", []), job
    result = {"pull": top, "copy": dest, "commit": base}[operation]
    assert same_content(truth, result, running=True, first="raw")


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_what_does_not_harm_the_result_is_a_warning(
    agent: AgentProcess, top: Path, base: Path, folder: Path, change: str
) -> None:
    truth = Path(shutil.copy(base, folder / "truth.raw"))
    job = begun(agent, top)
    base.rename(folder / "aside.raw")
    if change == "replaced":
        base.write_bytes(b"stranger")
    job = hurried(agent, job)
    assert job["state"] == "completed", job
    assert any(f"{base} was {change}" in warning for warning in job["warnings"]), job
    assert same_content(truth, top, first="raw")


def test_a_job_whose_files_stay_what_they_are_has_no_warning(agent: AgentProcess, top: Path, base: Path) -> None:
    """Rights and names of a file are not its bytes: they move its ctime alone."""
    job = begun(agent, top)
    base.chmod(0o640)
    base.chmod(0o600)
    job = hurried(agent, job)
    assert (job["state"], job["warnings"]) == ("completed", []), job


# Exports: there is no end at which it would be found out


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[AgentProcess]:
    with reachable(tmp_path), AgentProcess(tmp_path, {"IMAGES_WATCH_INTERVAL": "0.1"}) as agent:
        yield agent


def changed(agent: AgentProcess) -> list[tuple[str, str, bool]]:
    found = agent.get("/v1/host")["changed_files"]
    return [(one["path"], " ".join(one["what"].split()[:2]), one["lost"]) for one in found]


def test_a_base_that_is_cut_under_an_export_is_in_status_and_doctor(
    watching: AgentProcess, top: Path, base: Path
) -> None:
    export = watching.export(top)
    os.truncate(base, SIZE - 1)
    assert eventually(lambda: changed(watching) == [(str(base), "was cut", True)])
    (error,) = watching.get("/v1/host")["last_errors"]
    assert f"{base} was cut" in error["message"]
    command = [sys.executable, "-m", "hostagent.cli.main", "--socket", str(watching.socket), "doctor", "--json"]
    checks = json.loads(subprocess.run(command, capture_output=True, timeout=60).stdout)["checks"]
    assert [one["result"] for one in checks if one["name"] == "files"] == ["fail"]
    watching.delete(f"/v1/exports/{export['id']}?force=true")
    assert eventually(lambda: changed(watching) == [])


def test_a_base_that_is_replaced_under_an_export_is_told_and_goes_on_to_be_served(
    watching: AgentProcess, top: Path, base: Path, folder: Path
) -> None:
    export = watching.export(top)
    base.rename(folder / "aside.raw")
    base.write_bytes(b"stranger")
    assert eventually(lambda: changed(watching) == [(str(base), "was replaced", False)])
    out = folder / "out.raw"
    subprocess.run(["nbdcopy", export["uri"], str(out)], check=True, timeout=60)
    assert out.read_bytes() == (folder / "aside.raw").read_bytes()


@pytest.mark.parametrize("operation", ["pull", "copy", "commit"])
def test_what_our_own_jobs_change_is_no_alarm(watching: AgentProcess, top: Path, folder: Path, operation: str) -> None:
    """A file that is cut afterwards says that everything was looked at since."""
    other = raw_image(folder / "other.raw", MIB)
    watching.export(overlay(folder / "witness.qcow2", other))
    watching.export(top)
    more = {"pull": {}, "copy": {"dest": str(folder / "copy.qcow2")}, "commit": {}}[operation]
    completion = {} if operation == "pull" else {"completion": "pivot"}
    job = watching.post("/v1/jobs", {"operation": operation, "target": str(top), **more, **completion})
    job = watching.until_ended(job["id"])
    assert (job["state"], job["warnings"]) == ("completed", []), job
    os.truncate(other, 1)
    assert eventually(lambda: changed(watching)) == [(str(other), "was cut", True)]
    assert watching.log.read_text().count("a file changed") == 1
