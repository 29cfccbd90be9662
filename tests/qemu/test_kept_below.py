"""What an image kept after a job that did not complete, and what takes it back, also below a chain that got shorter."""

from __future__ import annotations

import pytest

from tests.harness import AgentProcess, overlay, user_can_read
from tests.qemu.faults import ROOT, Pair, eventually

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

    lower = agent.until_ended(agent.pull(images.top)["id"])  # the base leaves the chain; the image above keeps it still
    assert (lower["state"], lower["revocation"]) == ("completed", "kept")
    assert user_can_read(images.base, agent.user)
    assert agent.until_ended(agent.pull(top)["id"])["state"] == "completed"
    user = agent.user
    assert eventually(lambda: not user_can_read(images.base, user)), "nobody needs it any more"
