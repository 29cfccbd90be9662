"""Groups of copies on real images: they complete together or not at all, and clients are never cut off.

After each, the sources and every target compare equal to what the sources were; of a group that did not complete no
target is left, and nothing else that was not there before.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, backing_of, check_clean, reachable, same_content
from tests.qemu.faults import ROOT, Pair, Reader, Tmpfs, daemon_of, eventually, storage_daemons
from tests.qemu.kills import SETTINGS

pytestmark = pytest.mark.qemu

SIZE = 16 * MIB
DISKS = 3
REVOKED = "done" if ROOT else "kept"


class Disks:
    """Images in folders of their own, and where they are copied to."""

    def __init__(self, models: list[Pair], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.images = [model.copy(folder / f"disk{n}") for n, model in enumerate(models)]
        self.dests = [images.folder / "copy.qcow2" for images in self.images]
        self.names = self._names()

    def _names(self) -> set[Path]:
        return {path for images in self.images for path in images.folder.iterdir()}

    def request(self, **spec: Any) -> Json:
        pairs = zip(self.images, self.dests, strict=True)
        disks = [{"target": str(images.top), "dest": str(dest)} for images, dest in pairs]
        return {"disks": disks, "id": str(uuid.uuid4()), **spec}

    def assert_sources_untouched(self) -> None:
        for images in self.images:
            assert backing_of(images.top) == images.base.name
            assert same_content(images.top, images.truth)

    def assert_copied(self, jobs: list[Json], pivot: bool = False) -> None:
        assert [(job["state"], job["error"]) for job in jobs] == [("completed", None)] * len(jobs)
        for job, images, dest in zip(jobs, self.images, self.dests, strict=True):
            assert job["revocation"] == (REVOKED if pivot else "none")
            assert job["dest"]["state"] == "complete"
            assert (job["chain"]["after"] == [str(dest)]) == pivot
            assert same_content(dest, images.truth)
            assert check_clean(dest)
            assert dest.stat().st_nlink == 1
        self.assert_sources_untouched()
        assert self._names() == self.names | set(self.dests)

    def assert_not_copied(self, jobs: list[Json]) -> None:
        assert all(job["state"] in ("failed", "aborted") for job in jobs)
        assert [job["dest"]["state"] for job in jobs] == ["deleted"] * len(jobs)
        assert self._names() == self.names
        self.assert_sources_untouched()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    return [Pair(tmp_path_factory.mktemp("model") / f"pair{n}", SIZE) for n in range(DISKS)]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with reachable(tmp_path), AgentProcess(tmp_path, SETTINGS) as process:
        yield process


@pytest.fixture
def disks(models: list[Pair], tmp_path: Path) -> Disks:
    with reachable(tmp_path):
        return Disks(models, tmp_path / "disks")


def ended(agent: AgentProcess, group: Json) -> list[Json]:
    jobs = [agent.until_ended(job["id"]) for job in group["jobs"]]
    assert eventually(lambda: storage_daemons(agent) == [])
    return jobs


def test_several_disks_are_copied_as_one(agent: AgentProcess, disks: Disks) -> None:
    request = disks.request(completion="finish")
    group = agent.post("/v1/groups", request)
    assert [job["group"]["id"] for job in group["jobs"]] == [request["id"]] * DISKS
    assert agent.post("/v1/groups", request)["id"] == request["id"]
    disks.assert_copied(ended(agent, group))
    assert [job["id"] for job in agent.get(f"/v1/groups/{request['id']}")["jobs"]] == group["jobs"][0]["group"]["jobs"]
    listed = agent.get(f"/v1/jobs?group={request['id']}")["items"]
    assert sorted(job["id"] for job in listed) == sorted(job["id"] for job in group["jobs"])


def test_readers_of_all_disks_go_over_to_the_copies(agent: AgentProcess, disks: Disks) -> None:
    exports = [agent.export(images.top) for images in disks.images]
    with contextlib.ExitStack() as stack:
        pairs = zip(exports, disks.images, strict=True)
        readers = [stack.enter_context(Reader(export["uri"], images.truth)) for export, images in pairs]
        group = agent.post("/v1/groups", disks.request(completion="pivot"))
        jobs = [agent.until_ended(job["id"]) for job in group["jobs"]]
        assert all(reader.stop() > 0 for reader in readers)
    for export in exports:
        agent.delete(f"/v1/exports/{export['id']}")
    assert eventually(lambda: storage_daemons(agent) == [])
    disks.assert_copied(jobs, pivot=True)
