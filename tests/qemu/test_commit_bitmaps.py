"""What a commit does to the bitmaps of its base, and their removal on request."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, Json, check_clean, overlay, same_content
from tests.qemu.faults import HASTE, Pair, daemon_of, eventually, send, storage_daemons
from tests.qemu.test_bitmap_exports import BLOCK, bitmap, content_of, dirty, left_in_use, write
from tests.qemu.test_exports import refusal, stop

pytestmark = pytest.mark.qemu
MANY = 16


class Stack:
    """top ← base (qcow2, with bitmaps) ← raw; `truth` is what the top reads as."""

    def __init__(self, images: Pair) -> None:
        self.base = images.top
        bitmap(self.base, "daily")
        bitmap(self.base, "still", "--add", "--disable")
        write(self.base, 3)
        self.top = overlay(images.folder / "above.qcow2", self.base, "qcow2")
        write(self.top, 7, 11)
        self.truth = content_of(self.top)


@pytest.fixture
def stack(images: Pair) -> Stack:
    return Stack(images)


def request(agent: AgentProcess, stack: Stack, **spec: Any) -> Json:
    body = {"operation": "commit", "target": str(stack.top), "base": str(stack.base), "completion": "pivot", **spec}
    job: Json = agent.post("/v1/jobs", body)
    return job


def bitmaps(image: Path) -> dict[str, set[str]]:
    """Name → flags, as qemu-img tells them."""
    command = ["qemu-img", "info", "--output=json", str(image)]
    info = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    found = info["format-specific"]["data"].get("bitmaps", [])
    return {one["name"]: set(one["flags"]) for one in found}


def holds_the_truth(stack: Stack, image: Path) -> bool:
    return content_of(image) == stack.truth and check_clean(image)


def is_right(image: Path) -> bool:
    """Without corruption; a daemon that was killed may have leaked clusters."""
    done = subprocess.run(["qemu-img", "check", str(image)], capture_output=True, text=True)
    assert done.returncode in (0, 3), (done.returncode, done.stdout, done.stderr)
    return True


def test_an_enabled_bitmap_of_the_base_tells_of_what_is_committed(agent: AgentProcess, stack: Stack) -> None:
    plan = request(agent, stack, dry_run=True)
    assert {one["name"]: (one["recording"], one["state"], one["pruned"]) for one in plan["bitmaps"]} == {
        "daily": (True, "consistent", False),
        "still": (False, "consistent", False),
    }
    job = agent.until_ended(request(agent, stack)["id"])
    assert job["state"] == "completed"
    assert any("'still'" in warning for warning in job["warnings"])
    assert eventually(lambda: storage_daemons(agent) == [])
    assert bitmaps(stack.base) == {"daily": {"auto"}, "still": set()}
    export = agent.export(stack.base, bitmaps=["daily", "still"])
    assert dirty(export["uri"], "daily") == {3, 7, 11}
    assert dirty(export["uri"], "still") == set()
    stop(agent, export)
    assert holds_the_truth(stack, stack.base)


@pytest.mark.parametrize("below", [False, True], ids=["active", "below the top"])
def test_all_bitmaps_of_the_base_go_before_the_commit_on_request(
    agent: AgentProcess, stack: Stack, below: bool
) -> None:
    bitmap(stack.top, "daily")
    left_in_use(stack.base, "broken")
    stack.truth = content_of(stack.top)
    spec: Json = {"prune_bitmaps": True}
    left = stack.base
    if below:
        left = overlay(stack.top.with_name("leaf.qcow2"), stack.top, "qcow2")
        write(left, 13)
        stack.truth = content_of(left)
        spec |= {"target": str(left), "top": str(stack.top), "completion": None}
    before = stack.base.read_bytes()
    plan = request(agent, stack, dry_run=True, **spec)
    assert [one["name"] for one in plan["bitmaps"] if one["pruned"]] == ["daily", "still", "broken"]
    assert plan["warnings"] == []
    assert stack.base.read_bytes() == before
    job = agent.until_ended(request(agent, stack, **spec)["id"])
    assert (job["state"], job["warnings"]) == ("completed", [])
    assert eventually(lambda: storage_daemons(agent) == [])
    assert bitmaps(stack.base) == {}
    assert set(bitmaps(stack.top)) == {"daily"}
    assert holds_the_truth(stack, left)


def test_their_cost_is_what_they_take_in_the_file(agent: AgentProcess, stack: Stack) -> None:
    """One cluster for the table, and one for the bits, of which all are within the first; none where none is set."""
    plan = request(agent, stack, dry_run=True)
    assert {one["name"]: one["bytes"] for one in plan["bitmaps"]} == {"daily": 2 * BLOCK, "still": BLOCK}


@pytest.mark.parametrize("prune", [False, True], ids=["kept", "pruned"])
def test_a_commit_that_is_cut_off_leaves_images_that_are_right(tmp_path: Path, stack: Stack, prune: bool) -> None:
    """Bitmaps that were not removed are inconsistent then, and said to be; the data is where it was."""
    with AgentProcess(tmp_path, HASTE) as agent:
        spec: Json = {"bandwidth": BLOCK, "prune_bitmaps": prune}
        subprocess.run(["qemu-io", "-c", f"write -q -P 9 {MIB} {2 * MIB}", str(stack.top)], check=True)
        stack.truth = content_of(stack.top)
        job = request(agent, stack, **spec)
        agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] > 0)
        send(signal.SIGKILL, daemon_of(agent, stack.top))
        job = agent.until_ended(job["id"])
        assert (job["state"], job["error"]["code"]) == ("failed", "storage_daemon_died")
        listed = agent.get(f"/v1/images/bitmaps?path={stack.base}")["items"]
        assert {one["name"]: one["state"] for one in listed} == (
            {} if prune else {"daily": "inconsistent", "still": "inconsistent"}
        )
        assert holds_the_truth(stack, stack.top)
        job = agent.until_ended(request(agent, stack, prune_bitmaps=True)["id"])
        assert job["state"] == "completed"
        assert bitmaps(stack.base) == {}
        assert content_of(stack.base) == stack.truth
        assert is_right(stack.base)


@pytest.mark.parametrize("left", [1, MANY // 2])
def test_an_agent_that_is_killed_while_it_removes_them_goes_on(tmp_path: Path, stack: Stack, left: int) -> None:
    """Killed with its storage daemon as soon as so many are gone: what is there then is right, and the next one ends it."""
    for n in range(MANY):
        bitmap(stack.base, f"b{n}")
    with AgentProcess(tmp_path, HASTE) as agent:
        job = request(agent, stack, prune_bitmaps=True)
        assert eventually(lambda: names_in(stack.base) <= MANY + 2 - left)
        agent.kill()
        send(signal.SIGKILL, *storage_daemons(agent))
        assert eventually(lambda: unlocked(stack.base))  # a thread of the killed process may outlive its /proc entries
        assert is_right(stack.base)
        assert content_of(stack.top) == stack.truth
        agent.start()
        job = agent.until_ended(job["id"])
        assert job["state"] in ("completed", "failed")
        if job["state"] == "failed":
            assert job["error"]["code"] in ("storage_daemon_died", "unproven"), job["error"]
            again = agent.until_ended(request(agent, stack, prune_bitmaps=True)["id"])
            assert again["state"] == "completed", again
        assert eventually(lambda: storage_daemons(agent) == [])
        assert bitmaps(stack.base) == {}
        assert content_of(stack.base) == stack.truth


def unlocked(image: Path) -> bool:
    """Whether nobody has the image open for writing, by QEMU's own locks."""
    return subprocess.run(["qemu-img", "info", str(image)], capture_output=True).returncode == 0


def names_in(image: Path) -> int:
    """How many bitmaps the header counts, read past all locks."""
    command = ["qemu-img", "info", "-U", "--output=json", str(image)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        return MANY + 2
    return len(json.loads(done.stdout)["format-specific"]["data"].get("bitmaps", []))


def test_it_is_for_commits_alone_and_needs_nothing_of_a_raw_base(
    agent: AgentProcess, stack: Stack, images: Pair
) -> None:
    pull = {"operation": "pull", "target": str(stack.top), "prune_bitmaps": True}
    error = refusal(agent, "POST", "/v1/jobs", pull)
    assert (error.code, error.body["field"]) == ("invalid", "prune_bitmaps")
    spec = {"operation": "commit", "target": str(stack.top), "completion": "pivot", "prune_bitmaps": True}
    job = agent.until_ended(agent.post("/v1/jobs", spec)["id"])
    assert job["state"] == "completed"
    assert same_content(images.base, stack.top, first="raw")
