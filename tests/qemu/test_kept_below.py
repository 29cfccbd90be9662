"""What an image kept after a job that did not complete, and what takes it back, also below a chain that got shorter."""

from __future__ import annotations

import pytest

from tests.harness import AgentProcess, overlay, user_can_read
from tests.qemu.faults import ROOT, Pair, eventually, storage_daemons

pytestmark = [pytest.mark.qemu, pytest.mark.skipif(not ROOT, reason="needs another user, and so root")]


def test_a_base_that_left_the_chain_by_another_job_is_taken_back_at_once(agent: AgentProcess, images: Pair) -> None:
    """Found by a story: it stayed open until the next look at everything (access.converge_interval)."""
    assert agent.user is not None
    top = overlay(images.folder / "upper.qcow2", images.top, "qcow2")
    job = agent.post(
        "/v1/jobs",
        {"operation": "copy", "target": str(top), "source_format": "qcow2", "dest": str(images.folder / "copy.qcow2")},
    )
    agent.until(job["id"], lambda job: job["state"] == "ready")
    agent.post(f"/v1/jobs/{job['id']}/abort")
    assert agent.until_ended(job["id"])["state"] == "aborted"

    assert eventually(lambda: storage_daemons(agent) == [])  # what it had open is closed a moment later
    lower = agent.until_ended(agent.pull(images.top)["id"])  # the base leaves the chain; the image above keeps it still
    assert (lower["state"], lower["revocation"]) == ("completed", "kept")
    assert user_can_read(images.base, agent.user)
    assert agent.until_ended(agent.pull(top)["id"])["state"] == "completed"
    user = agent.user
    assert eventually(lambda: not user_can_read(images.base, user)), "nobody needs it any more"


def test_what_an_image_kept_goes_when_a_commit_deletes_it(agent: AgentProcess, images: Pair) -> None:
    """Found by a story: the files below stayed open until the next look at everything."""
    assert agent.user is not None
    upper = overlay(images.folder / "upper.qcow2", images.top, "qcow2")
    top = overlay(images.folder / "highest.qcow2", upper, "qcow2")
    job = agent.pull(upper, base=str(images.base), bandwidth=64 * 1024)
    agent.until(job["id"], lambda job: job["state"] == "running")
    agent.post(f"/v1/jobs/{job['id']}/abort")
    assert agent.until_ended(job["id"])["state"] == "aborted"
    assert user_can_read(images.top, agent.user)
    assert eventually(lambda: storage_daemons(agent) == [])

    request = {"operation": "commit", "target": str(top), "top": str(upper), "base": str(images.top), "delete": True}
    assert agent.until_ended(agent.post("/v1/jobs", request)["id"])["state"] == "completed"
    assert not upper.exists()
    user = agent.user
    for path in (images.top, images.base):
        assert eventually(lambda path=path: not user_can_read(path, user)), "nobody needs it any more"
