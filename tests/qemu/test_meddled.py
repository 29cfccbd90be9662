"""What others do meanwhile to the folders, names and siblings of a running copy or commit.

QEMU works on open files and notices none of it. The job must not say that all is well when its result lies elsewhere,
has names that are not its own, or was paid for by another image; and nothing of somebody else's is touched.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, backing_of, overlay, same_content
from tests.qemu.faults import HASTE, Pair, Reader, eventually, open_below, storage_daemons

pytestmark = pytest.mark.qemu
SLOW = 4 * MIB
STRANGER = b"somebody else's"
COMPLETIONS = pytest.mark.parametrize("completion", ["finish", "pivot"])


@pytest.fixture
def there(folder: Path) -> Path:
    """Where copies go: not the image's own folder."""
    place = folder / "there"
    place.mkdir(mode=0o755)
    return place


@pytest.fixture
def three(folder: Path) -> Iterator[Pair]:
    """top ← middle ← base."""
    yield Pair(folder / "three", middle=True)


def begun(agent: AgentProcess, operation: str, target: Path, **spec: object) -> Json:
    """A job that has copied something, and is far from its end."""
    body = {"operation": operation, "target": str(target), "bandwidth": SLOW, **spec}
    job: Json = agent.post("/v1/jobs", body)
    return agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] > 0)


def hurried(agent: AgentProcess, job: Json) -> Json:
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    return agent.until_ended(job["id"])


def in_sync(agent: AgentProcess, job: Json) -> Json:
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    return agent.until(job["id"], lambda job: job["state"] == "ready")


def refused(agent: AgentProcess, path: str, body: Json) -> ApiError:
    with pytest.raises(ApiError) as error:
        agent.post(path, body)
    return error.value


def assert_failed_copy(agent: AgentProcess, images: Pair, job: Json, code: str) -> None:
    assert (job["state"], job["error"]["code"], job["dest"]["state"]) == ("failed", code, "deleted"), job
    assert job["dest"]["path"] in job["error"]["message"]
    assert job["error"]["remedy"]
    assert job["chain"]["revoked"] == []
    assert backing_of(images.top) == images.base.name
    assert same_content(images.top, images.truth, running=True)


def ours(folder: Path) -> list[Path]:
    return list(folder.rglob(".hostagent-*"))


# Copies


@COMPLETIONS
@pytest.mark.parametrize("again", [False, True], ids=["gone", "made-again"])
def test_a_copy_whose_folder_is_moved_fails_and_leaves_no_name_of_ours(
    agent: AgentProcess, images: Pair, folder: Path, there: Path, completion: str, again: bool
) -> None:
    export = agent.export(images.top)
    with Reader(export["uri"], images.truth) as reader:
        job = begun(agent, "copy", images.top, dest=str(there / "copy.qcow2"), completion=completion)
        there.rename(folder / "elsewhere")
        if again:
            there.mkdir(mode=0o755)
        assert_failed_copy(agent, images, hurried(agent, job), "image_changed")
        assert agent.get(f"/v1/exports/{export['id']}")["path"] == str(images.top)
        assert reader.stop() > 0
    agent.delete(f"/v1/exports/{export['id']}")
    assert ours(folder) == []
    assert list((folder / "elsewhere").iterdir()) == []
    assert not again or list(there.iterdir()) == []


@COMPLETIONS
def test_a_copy_that_got_another_hard_link_fails_and_only_that_is_left(
    agent: AgentProcess, images: Pair, folder: Path, there: Path, completion: str
) -> None:
    job = begun(agent, "copy", images.top, dest=str(there / "copy.qcow2"), completion=completion)
    (folder / "linked").hardlink_to(there / f".hostagent-{job['id']}")
    job = hurried(agent, job)
    assert_failed_copy(agent, images, job, "image_changed")
    assert "1 more hard link" in job["error"]["message"]
    assert list(there.iterdir()) == []
    assert (folder / "linked").stat().st_nlink == 1


def test_a_pivot_onto_a_name_that_was_taken_fails_before_anybody_goes_over(
    agent: AgentProcess, images: Pair, there: Path
) -> None:
    export = agent.export(images.top)
    with Reader(export["uri"], images.truth) as reader:
        job = begun(agent, "copy", images.top, dest=str(there / "copy.qcow2"), completion="pivot")
        (there / "copy.qcow2").write_bytes(STRANGER)
        assert_failed_copy(agent, images, hurried(agent, job), "conflict")
        assert agent.get(f"/v1/exports/{export['id']}")["path"] == str(images.top)
        assert reader.stop() > 0
    agent.delete(f"/v1/exports/{export['id']}")
    assert [path.read_bytes() for path in there.iterdir()] == [STRANGER]
    assert eventually(lambda: storage_daemons(agent) == [])


@COMPLETIONS
def test_a_ready_copy_says_that_its_name_is_taken_and_ends_when_it_is_free_again(
    agent: AgentProcess, images: Pair, there: Path, completion: str
) -> None:
    dest = there / "copy.qcow2"
    job = begun(agent, "copy", images.top, dest=str(dest))
    dest.write_bytes(STRANGER)
    job = in_sync(agent, job)
    warnings = eventually(lambda: agent.job(job["id"])["warnings"])
    assert any(f"{dest}" in warning and "exists" in warning for warning in warnings), warnings
    complete = f"/v1/jobs/{job['id']}/complete"
    error = refused(agent, complete, {"completion": completion})
    assert (error.code, error.body["field"]) == ("conflict", "dest")
    assert error.body["remedy"]
    assert agent.job(job["id"])["state"] == "ready"
    dest.unlink()
    agent.post(complete, {"completion": completion})
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert same_content(dest, images.truth)


@COMPLETIONS
def test_an_existing_target_that_was_replaced_is_not_said_to_be_complete(
    agent: AgentProcess, images: Pair, there: Path, completion: str
) -> None:
    dest = there / "old.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(dest), "16M"], check=True)
    job = begun(agent, "copy", images.top, dest=str(dest), reuse_external=True, completion=completion)
    dest.rename(there / "aside.qcow2")
    dest.write_bytes(STRANGER)
    job = hurried(agent, job)
    assert (job["state"], job["error"]["code"], job["dest"]["state"]) == ("failed", "image_changed", "unusable"), job
    assert str(there / "aside.qcow2") in job["error"]["message"]
    assert dest.read_bytes() == STRANGER


@pytest.mark.parametrize("reuse", [False, True], ids=["new", "existing"])
def test_an_agent_that_starts_again_has_the_target_for_itself_as_before(
    tmp_path: Path, images: Pair, there: Path, reuse: bool
) -> None:
    dest = there / "copy.qcow2"
    if reuse:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(dest), "16M"], check=True)
    with AgentProcess(tmp_path, HASTE) as agent:
        job = begun(agent, "copy", images.top, dest=str(dest), reuse_external=reuse)
        in_sync(agent, job)
        agent.kill()
        agent.start()
        assert agent.process is not None
        assert open_below(agent.process.pid, there) != []
        if reuse:
            assert refused(agent, "/v1/exports", {"image": str(dest)}).code == "busy"
        agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "finish"})
        assert agent.until_ended(job["id"])["state"] == "completed"
        assert agent.until(job["id"], lambda _: open_below(agent.process.pid, there) == [])  # type: ignore[union-attr]
    assert same_content(dest, images.truth)


# Images that lose their names

LOSSES = {
    "pull-top": ("pull", "top", {}),
    "commit-base": ("commit", "base", {"completion": "pivot"}),
    "commit-kept-base": ("commit", "base", {"completion": "finish"}),
    "commit-below-top": ("commit", "top", {"top": "{middle}"}),
    "commit-below-base": ("commit", "base", {"top": "{middle}"}),
}


@pytest.mark.parametrize("restart", [False, True], ids=["", "restart"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_job_whose_result_lost_its_name_is_not_completed_and_can_be_made_again(
    tmp_path: Path, three: Pair, loss: str, restart: bool
) -> None:
    operation, which, words = LOSSES[loss]
    spec = {key: word.format(middle=three.middle) for key, word in words.items()}
    path: Path = getattr(three, which)
    aside = three.folder / "aside"
    with AgentProcess(tmp_path, HASTE) as agent:
        job: Json = agent.post("/v1/jobs", {"operation": operation, "target": str(three.top), "bandwidth": 1, **spec})
        agent.until(job["id"], lambda job: job["state"] == "running")
        path.rename(aside)
        path.write_bytes(STRANGER)
        if restart:
            agent.kill()
            agent.start()
        job = hurried(agent, job)
        assert (job["state"], job["error"]["code"], job["chain"]["revoked"]) == ("failed", "image_changed", []), job
        assert f"{path} was replaced" in job["error"]["message"]
        assert str(path) in job["error"]["remedy"]
        assert job["chain"]["after"] == [str(three.top), str(three.middle), str(three.base)]
        assert path.read_bytes() == STRANGER
        aside.replace(path)
        assert same_content(three.top, three.truth, running=True)  # its storage daemon may still be about to end
        job = agent.post("/v1/jobs", {"operation": operation, "target": str(three.top), **spec})
        assert agent.until_ended(job["id"])["state"] == "completed"
    result, format = (three.base, "raw") if which == "base" and "top" not in spec else (three.top, None)
    assert same_content(result, three.truth, first=format)


# Commits


def test_a_sibling_that_came_while_a_job_waited_for_its_turn_stops_the_commit_before_it_writes(
    tmp_path: Path, three: Pair, images: Pair
) -> None:
    before = three.base.read_bytes()
    with AgentProcess(tmp_path, {**HASTE, "JOBS_WIDTH": "1"}) as agent:
        first = begun(agent, "pull", images.top, bandwidth=MIB)
        job: Json = agent.post("/v1/jobs", {"operation": "commit", "target": str(three.top), "completion": "pivot"})
        sibling = overlay(three.folder / "sibling.qcow2", three.base)
        agent.post(f"/v1/jobs/{first['id']}/abort")
        job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "busy")
    assert str(sibling) in job["error"]["message"]
    assert three.base.read_bytes() == before


@pytest.mark.parametrize("below", [False, True], ids=["active", "below"])
def test_a_sibling_that_comes_while_a_commit_runs_is_named(agent: AgentProcess, three: Pair, below: bool) -> None:
    assert three.middle is not None
    spec: Json = {"top": str(three.middle)} if below else {"completion": "pivot"}
    job: Json = agent.post("/v1/jobs", {"operation": "commit", "target": str(three.top), "bandwidth": 1, **spec})
    agent.until(job["id"], lambda job: job["state"] == "running")
    sibling = overlay(three.folder / "sibling.qcow2", three.base)
    job = hurried(agent, job)
    assert job["state"] == "completed", job
    told = [warning for warning in job["warnings"] if str(sibling) in warning and str(three.base) in warning]
    assert len(told) == 1, job["warnings"]
    assert same_content(three.top if below else three.base, three.truth, first=None if below else "raw")


def test_what_a_sibling_came_to_stand_on_is_not_deleted(agent: AgentProcess, three: Pair, folder: Path) -> None:
    assert three.middle is not None
    spec = {"top": str(three.middle), "delete": True, "bandwidth": 1}
    job: Json = agent.post("/v1/jobs", {"operation": "commit", "target": str(three.top), **spec})
    agent.until(job["id"], lambda job: job["state"] == "running")
    sibling = overlay(three.folder / "sibling.qcow2", three.middle, "qcow2")
    job = hurried(agent, job)
    assert job["state"] == "completed", job
    assert three.middle.exists()
    assert f"{three.middle} was not deleted: {sibling} stands on it" in job["warnings"]
    assert same_content(three.top, three.truth)
    sibling.unlink()
    subprocess.run(["qemu-img", "check", str(three.middle)], check=True, capture_output=True)
