"""Commits, from the request to the bytes: active and below the top, with and without siblings, kept and deleted.

After each job the chain reads as before, whatever became of its layers, and every image that somebody else has still
holds what it held.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, backing_of, check_clean, overlay, same_content, sound
from tests.qemu.faults import HASTE, ROOT, Pair, Reader, daemon_of, eventually, storage_daemons

pytestmark = pytest.mark.qemu
SLOW = MIB
REVOKED = "done" if ROOT else "kept"


class Chain:
    """top ← upper ← lower ← base, each with data of its own; `truth` is what the top reads as."""

    def __init__(self, folder: Path) -> None:
        pair = Pair(folder)
        self.folder, self.base, self.lower = folder, pair.base, pair.top
        self.upper = written(overlay(folder / "upper.qcow2", self.lower, "qcow2"), 1)
        self.top = written(overlay(folder / "disk.qcow2", self.upper, "qcow2"), 2)
        self.truth = folder.parent / "disk.truth"
        convert(self.top, self.truth)

    @property
    def paths(self) -> list[str]:
        return [str(path) for path in (self.top, self.upper, self.lower, self.base)]


def written(image: Path, pattern: int) -> Path:
    words = [f"write -q -P {pattern + 100} {n * 2 * MIB + pattern * 65536} 131072" for n in range(7)]
    subprocess.run(["qemu-io", *(part for word in words for part in ("-c", word)), str(image)], check=True)
    return image


def convert(image: Path, raw: Path) -> None:
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)


@pytest.fixture
def chain(folder: Path) -> Chain:
    return Chain(folder / "chain")


def request(agent: AgentProcess, target: Path, **spec: Any) -> Json:
    job: Json = agent.post("/v1/jobs", {"operation": "commit", "target": str(target), **spec})
    return job


def commit(agent: AgentProcess, target: Path, **spec: Any) -> Json:
    return agent.until_ended(request(agent, target, **spec)["id"])


def refused(agent: AgentProcess, target: Path, **spec: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        request(agent, target, **spec)
    return error.value


def raw(path: Path) -> str | None:
    return "raw" if path.suffix == ".raw" else None


# Active


def test_a_commit_with_a_pivot_leaves_all_data_in_the_base(agent: AgentProcess, chain: Chain) -> None:
    job = commit(agent, chain.top, completion="pivot")
    assert (job["state"], job["error"], job["revocation"]) == ("completed", None, REVOKED)
    assert job["chain"]["after"] == [str(chain.base)]
    assert job["chain"]["revoked"] == (chain.paths[:3] if ROOT else [])
    assert same_content(chain.base, chain.truth, first="raw")
    assert chain.top.exists()
    assert eventually(lambda: storage_daemons(agent) == [])


def test_a_commit_into_a_layer_leaves_what_is_below_as_it_was(agent: AgentProcess, chain: Chain) -> None:
    below = chain.base.read_bytes()
    job = commit(agent, chain.top, base=str(chain.lower), completion="pivot")
    assert job["chain"]["after"] == chain.paths[2:]
    assert same_content(chain.lower, chain.truth)
    assert check_clean(chain.lower)
    assert chain.base.read_bytes() == below


def test_a_commit_can_keep_its_overlay(agent: AgentProcess, chain: Chain) -> None:
    job = commit(agent, chain.top, completion="finish")
    assert (job["state"], job["revocation"]) == ("completed", "none")
    assert job["chain"]["after"] == job["chain"]["before"] == chain.paths
    assert same_content(chain.base, chain.truth, first="raw")
    assert same_content(chain.top, chain.truth)
    assert all(check_clean(path) for path in (chain.top, chain.upper, chain.lower))


def test_an_active_commit_is_ready_until_its_end_is_asked_for(agent: AgentProcess, chain: Chain) -> None:
    job = request(agent, chain.top)
    agent.until(job["id"], lambda job: job["state"] == "ready")
    agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "pivot"})
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert same_content(chain.base, chain.truth, first="raw")


def test_the_exports_of_the_chain_go_over_to_the_base(agent: AgentProcess, chain: Chain) -> None:
    export = agent.export(chain.top)
    with Reader(export["uri"], chain.truth) as reader:
        job = commit(agent, chain.top, completion="pivot")
        assert job["state"] == "completed"
        time.sleep(0.3)
        assert reader.stop() > 0
    assert agent.get(f"/v1/exports/{export['id']}")["path"] == str(chain.base)
    agent.delete(f"/v1/exports/{export['id']}")
    assert same_content(chain.base, chain.truth, first="raw")


def test_what_was_committed_is_deleted_on_request(agent: AgentProcess, chain: Chain) -> None:
    job = commit(agent, chain.top, completion="pivot", delete=True)
    assert (job["state"], job["chain"]["kept"]) == ("completed", [])
    assert sorted(path.name for path in chain.folder.iterdir()) == ["base.raw"]
    assert same_content(chain.base, chain.truth, first="raw")


# Below the top


def test_a_commit_below_the_top_shortens_the_chain(agent: AgentProcess, chain: Chain) -> None:
    job = commit(agent, chain.top, top=str(chain.upper), base=str(chain.base))
    assert (job["state"], job["revocation"]) == ("completed", REVOKED)
    assert job["chain"]["after"] == [str(chain.top), str(chain.base)]
    assert backing_of(chain.top) == chain.base.name
    assert same_content(chain.top, chain.truth)
    assert check_clean(chain.top)
    assert chain.upper.exists()


def test_a_commit_below_the_top_under_a_reading_client(agent: AgentProcess, chain: Chain) -> None:
    export = agent.export(chain.top)
    with Reader(export["uri"], chain.truth) as reader:
        job = commit(agent, chain.top, top=str(chain.lower), delete=True)
        assert job["state"] == "completed"
        time.sleep(0.2)
        assert reader.stop() > 0
    agent.delete(f"/v1/exports/{export['id']}")
    assert backing_of(chain.upper) == chain.base.name
    assert not chain.lower.exists()
    assert same_content(chain.top, chain.truth)


@pytest.mark.parametrize("spec", [{"completion": "pivot"}, {"top": "{upper}"}], ids=["active", "below"])
@pytest.mark.parametrize("killed", [False, True], ids=["", "agent-killed"])
def test_who_comes_while_a_commit_runs_reads_the_top(tmp_path: Path, chain: Chain, spec: Json, *, killed: bool) -> None:
    spec = {key: value.format(upper=chain.upper) for key, value in spec.items()}
    with AgentProcess(tmp_path, HASTE) as agent:
        job = request(agent, chain.top, bandwidth=SLOW, **spec)
        agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] > 0)
        export = agent.export(chain.top)
        with Reader(export["uri"], chain.truth) as reader:
            if killed:
                agent.kill()
                agent.start()
            with contextlib.suppress(ApiError):  # it may have ended while the agent was away
                agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
            assert agent.until_ended(job["id"])["state"] == "completed"
            time.sleep(0.2)
            assert reader.stop() > 0
        agent.delete(f"/v1/exports/{export['id']}")
    left = chain.top if "top" in spec else chain.base
    assert same_content(left, chain.truth, first=raw(left))


# Siblings


@pytest.mark.parametrize("on", ["base", "lower"])
def test_a_layer_that_somebody_else_stands_on_is_not_committed_into(agent: AgentProcess, chain: Chain, on: str) -> None:
    below = chain.base if on == "base" else chain.lower
    sibling = overlay(chain.folder / "sibling.qcow2", below, "raw" if on == "base" else "qcow2")
    before, bytes_ = chain.folder.parent / "sibling.truth", chain.base.read_bytes()
    convert(sibling, before)
    error = refused(agent, chain.top, completion="pivot")
    assert error.code == "busy"
    assert str(sibling) in error.body["detail"]
    assert same_content(sibling, before)
    assert chain.base.read_bytes() == bytes_


def test_others_may_stand_on_the_top_that_is_committed_but_not_when_it_is_deleted(
    agent: AgentProcess, chain: Chain
) -> None:
    child = overlay(chain.folder / "child.qcow2", chain.top, "qcow2")
    before = chain.folder.parent / "child.truth"
    convert(child, before)
    assert refused(agent, chain.top, completion="pivot", delete=True).code == "busy"
    assert commit(agent, chain.top, completion="pivot")["state"] == "completed"
    assert same_content(child, before)


def test_a_sibling_in_a_pool_counts(tmp_path: Path, chain: Chain, folder: Path) -> None:
    pool = folder / "pool" / "deep"
    pool.mkdir(mode=0o755, parents=True)
    sibling = overlay(pool / "sibling.qcow2", chain.base)
    with AgentProcess(tmp_path, {"IMAGES_POOLS": str(pool.parent)}) as agent:
        error = refused(agent, chain.top, completion="pivot")
        assert (error.code, str(sibling) in error.body["detail"]) == ("busy", True)


def test_a_header_that_cannot_be_read_may_hide_a_sibling(agent: AgentProcess, chain: Chain) -> None:
    bad = chain.folder / "bad.qcow2"
    bad.write_bytes(b"QFI\xfb" + b"\xff" * 100)
    error = refused(agent, chain.top, completion="pivot")
    assert str(bad) in str(error.body)
    bad.unlink()
    assert commit(agent, chain.top, completion="pivot")["state"] == "completed"


def test_a_base_that_another_chain_serves_is_busy(agent: AgentProcess, chain: Chain) -> None:
    export = agent.export(chain.base, format="raw")
    job = commit(agent, chain.top, completion="pivot")
    assert (job["state"], job["error"]["code"]) == ("failed", "busy")
    agent.delete(f"/v1/exports/{export['id']}")
    assert same_content(chain.top, chain.truth)


# Requests


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"base": "/nowhere/base.raw"}, "base"),
        ({"top": "/nowhere/top.raw"}, "top"),
        ({"top": "{base}", "base": "{upper}"}, "base"),
        ({"top": "{upper}", "base": "{upper}"}, "base"),
    ],
)
def test_a_commit_that_makes_no_sense_is_refused(agent: AgentProcess, chain: Chain, spec: Json, field: str) -> None:
    spec = {key: value.format(base=chain.base, upper=chain.upper) for key, value in spec.items()}
    error = refused(agent, chain.top, **spec)
    assert (error.code, error.body["field"]) == ("invalid", field)
    assert same_content(chain.top, chain.truth)


def test_a_base_that_is_larger_than_its_overlay_is_refused(agent: AgentProcess, chain: Chain) -> None:
    os.truncate(chain.base, 20 * MIB)
    assert refused(agent, chain.top).code == "invalid"


def test_an_image_without_a_backing_file_has_nothing_to_commit(agent: AgentProcess, folder: Path) -> None:
    alone = folder / "alone.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(alone), "1M"], check=True)
    assert refused(agent, alone).code == "invalid"


# Faults


@pytest.mark.parametrize("spec", [{"completion": "pivot"}, {"top": "{upper}"}], ids=["active", "below"])
@pytest.mark.parametrize("way", ["abort", "kill"])
def test_a_commit_that_does_not_complete_loses_nothing_and_can_be_made_again(
    agent: AgentProcess, chain: Chain, spec: Json, way: str
) -> None:
    spec = {key: value.format(upper=chain.upper) for key, value in spec.items()}
    job = request(agent, chain.top, bandwidth=SLOW, **spec)
    agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] > 0)
    if way == "abort":
        agent.post(f"/v1/jobs/{job['id']}/abort")
    else:
        os.kill(daemon_of(agent, chain.top), signal.SIGKILL)
    job = agent.until_ended(job["id"])
    assert job["state"] == ("aborted" if way == "abort" else "failed")
    assert job["chain"]["after"] == chain.paths
    assert all(sound(path) for path in (chain.top, chain.upper, chain.lower))
    assert same_content(chain.top, chain.truth)
    assert commit(agent, chain.top, **spec)["state"] == "completed"
    left = chain.top if "top" in spec else chain.base
    assert same_content(left, chain.truth, first=raw(left))
