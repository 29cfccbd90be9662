"""Groups of copies on real images: they complete together or not at all, and clients are never cut off.

After each, the sources and every target compare equal to what the sources were; of a group that did not complete no
target is left, and nothing else that was not there before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.harness import MIB, AgentProcess, ApiError, Json, backing_of, check_clean, reachable, same_content
from tests.qemu.faults import PATIENCE, ROOT, Pair, Reader, Tmpfs, eventually, send, storage_daemons
from tests.qemu.kills import SETTINGS
from tests.qemu.remote_storage import nbd_server, needs_nbdkit

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

    def parts(self) -> list[Path]:
        """The targets that have no name yet."""
        return [path for images in self.images for path in images.folder.glob(".hostagent-*")]

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


def test_a_group_waits_until_all_are_ready_and_the_end_of_one_is_asked_for(agent: AgentProcess, disks: Disks) -> None:
    group = agent.post("/v1/groups", disks.request())
    for job in group["jobs"]:
        agent.until(job["id"], lambda job: job["state"] == "ready")
    assert not any(dest.exists() for dest in disks.dests)
    agent.post(f"/v1/jobs/{group['jobs'][1]['id']}/complete", {"completion": "pivot"})
    disks.assert_copied(ended(agent, group), pivot=True)


@needs_nbdkit
@pytest.mark.parametrize("point", [None, "all are sealed"])
def test_an_export_and_files_of_both_formats_are_in_one_group(
    agent: AgentProcess, disks: Disks, tmp_path: Path, point: str | None
) -> None:
    with nbd_server(tmp_path, SIZE) as (uri, remote, _):
        request = disks.request(completion="finish")
        request["disks"][0] |= {"dest": uri, "format": "raw"}
        request["disks"][1] |= {"format": "raw"}
        group = agent.post("/v1/groups", request)
        if point is not None:
            wait_for(agent, disks, point)
            agent.kill()
            agent.start()
        jobs = ended(agent, group)
    assert [(job["state"], job["error"]) for job in jobs] == [("completed", None)] * DISKS
    for images, dest, format in zip(disks.images, (remote, *disks.dests[1:]), ("raw", "raw", "qcow2"), strict=True):
        assert same_content(dest, images.truth, first=format)
    disks.assert_sources_untouched()


def test_existing_targets_are_written_over_together_and_unusable_when_one_fails(
    agent: AgentProcess, disks: Disks
) -> None:
    for dest in disks.dests:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(dest), str(SIZE)], check=True)
    group = agent.post("/v1/groups", disks.request(reuse_external=True))
    for job in group["jobs"]:
        agent.until(job["id"], lambda job: job["state"] == "ready")
    send(signal.SIGKILL, *daemons_of(agent, disks.images[0].top))
    jobs = ended(agent, group)
    assert [job["error"]["code"] for job in jobs] == ["storage_daemon_died", "group_failed", "group_failed"]
    assert [job["dest"]["state"] for job in jobs] == ["unusable"] * DISKS
    disks.assert_copied(ended(agent, agent.post("/v1/groups", disks.request(reuse_external=True, completion="finish"))))


def test_the_command_line_copies_several_disks(agent: AgentProcess, disks: Disks) -> None:
    pairs = [str(path) for pair in zip((one.top for one in disks.images), disks.dests, strict=True) for path in pair]
    command = [sys.executable, "-m", "hostagent.cli.main", "--socket", str(agent.socket), "--json"]
    command += ["job", "copy", *pairs, "--finish", "--wait"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert eventually(lambda: storage_daemons(agent) == [])
    disks.assert_copied(json.loads(done.stdout)["jobs"])


# Not completing


def test_the_abort_of_one_aborts_all_and_leaves_nothing(agent: AgentProcess, disks: Disks) -> None:
    group = agent.post("/v1/groups", disks.request(bandwidth=MIB))
    agent.until(group["jobs"][2]["id"], lambda job: job["state"] == "running")
    agent.post(f"/v1/jobs/{group['jobs'][0]['id']}/abort")
    jobs = ended(agent, group)
    assert {job["state"] for job in jobs} == {"aborted"}
    disks.assert_not_copied(jobs)


def test_a_name_that_was_taken_meanwhile_fails_all_and_is_not_touched(agent: AgentProcess, disks: Disks) -> None:
    group = agent.post("/v1/groups", disks.request())
    for job in group["jobs"]:
        agent.until(job["id"], lambda job: job["state"] == "ready")
    disks.dests[2].write_bytes(b"mine")
    agent.post(f"/v1/jobs/{group['jobs'][0]['id']}/complete", {"completion": "finish"})
    jobs = ended(agent, group)
    assert [job["error"]["code"] for job in jobs] == ["group_failed", "group_failed", "conflict"]
    assert disks.dests[2].read_bytes() == b"mine"
    disks.dests[2].unlink()
    disks.assert_not_copied(jobs)


@pytest.mark.skipif(not ROOT, reason="mounts a file system")
def test_a_target_without_room_fails_all(agent: AgentProcess, disks: Disks, tmp_path: Path) -> None:
    with Tmpfs(tmp_path / "small", 4 * MIB) as small:
        filler = small.folder / "filler"
        filler.write_bytes(bytes(2 * MIB))
        disks.dests[1] = small.folder / "copy.qcow2"
        with pytest.raises(ApiError, match="no_space"):
            agent.post("/v1/groups", disks.request(completion="finish"))
        group = agent.post("/v1/groups", disks.request(completion="finish", check="never"))
        jobs = ended(agent, group)
        assert [job["error"]["code"] for job in jobs] == ["group_failed", "no_space", "group_failed"]
        assert str(disks.images[1].top) in jobs[0]["error"]["message"]
        assert list(small.folder.iterdir()) == [filler]
        disks.assert_not_copied(jobs)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"target": "/none"}, "not_found"),
        ({"target": 0}, "invalid"),
        ({"dest": 0}, "invalid"),
    ],
)
def test_what_is_wrong_with_one_is_refused_and_nothing_is_made(
    agent: AgentProcess, disks: Disks, wrong: Json, code: str
) -> None:
    request = disks.request()
    request["disks"][2] |= {key: request["disks"][0][key] if value == 0 else value for key, value in wrong.items()}
    for body in (request, {**request, "dry_run": True}):
        with pytest.raises(ApiError) as refused:
            agent.post("/v1/groups", body)
        assert refused.value.code == code
    assert agent.get("/v1/jobs")["items"] == []
    assert disks._names() == disks.names


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("nbd://store/a", "nbd://STORE:10809/a"),
        ("nbd://[::1]/", "nbd://[0:0::1]:10809"),
        ("nbd+unix:///?socket=/run/x.sock", "nbd+unix://?socket=/run//x.sock"),
    ],
)
@pytest.mark.skipif(not ROOT, reason="only root may copy to NBD")
def test_one_server_in_two_spellings_is_refused(agent: AgentProcess, disks: Disks, one: str, other: str) -> None:
    request = disks.request(completion="finish")
    for disk, uri in zip(request["disks"], (one, other), strict=False):
        disk |= {"dest": uri, "format": "raw"}
    with pytest.raises(ApiError) as refused:
        agent.post("/v1/groups", {**request, "dry_run": True})
    assert (refused.value.code, "is the target of two copies" in refused.value.body["detail"]) == ("invalid", True)


def test_a_dry_run_tells_of_all_disks_and_changes_nothing(agent: AgentProcess, disks: Disks) -> None:
    plan = agent.post("/v1/groups", disks.request(completion="pivot", dry_run=True))
    assert [disk["after"] for disk in plan["disks"]] == [[str(dest)] for dest in disks.dests]
    assert agent.get("/v1/jobs")["items"] == []
    assert disks._names() == disks.names


# Kills


def logged(agent: AgentProcess, what: str, number: int = 1) -> bool:
    return agent.log.read_text().count(f'"job {what}"') >= number


Point = Callable[[AgentProcess, Disks], bool]
POINTS: dict[str, Point] = {
    "stored": lambda agent, disks: True,
    "the first target is made": lambda agent, disks: any(disks.parts()),
    "one is ready": lambda agent, disks: logged(agent, "ready"),
    "one is sealed": lambda agent, disks: logged(agent, "completing"),
    "all are sealed": lambda agent, disks: logged(agent, "completing", DISKS),
    "one has its name": lambda agent, disks: any(dest.exists() for dest in disks.dests),
    "all have their names": lambda agent, disks: all(dest.exists() for dest in disks.dests),
    "decided": lambda agent, disks: any(dest.exists() and dest.stat().st_nlink == 1 for dest in disks.dests),
    "one is completed": lambda agent, disks: logged(agent, "completed"),
}
WHOLE = ("all are sealed", "one has its name", "all have their names", "decided", "one is completed")
"""From here on the death of a storage daemon stops nobody."""


def wait_for(agent: AgentProcess, disks: Disks, point: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not POINTS[point](agent, disks):
        assert time.monotonic() < deadline, point
        time.sleep(0.0005)


def at_points(*quick: str) -> pytest.MarkDecorator:
    """Each of these with one of the ends, by turns; all points with both ends take minutes."""
    cases = [(point, end) for point in POINTS for end in ("finish", "pivot")]
    chosen = {(point, ("finish", "pivot")[n % 2]) for n, point in enumerate(quick)}
    return pytest.mark.parametrize(
        ("point", "end"), [pytest.param(*one, marks=() if one in chosen else pytest.mark.slow) for one in cases]
    )


@at_points(*POINTS)
def test_an_agent_that_is_killed_completes_the_group_when_it_is_back(
    agent: AgentProcess, disks: Disks, point: str, end: str
) -> None:
    group = agent.post("/v1/groups", disks.request(completion=end))
    wait_for(agent, disks, point)
    agent.kill()
    agent.start()
    disks.assert_copied(ended(agent, group), pivot=end == "pivot")


@at_points("one is ready", "one is sealed", "all are sealed", "all have their names")
def test_a_storage_daemon_that_is_killed_fails_all_or_stops_nobody(
    agent: AgentProcess, disks: Disks, point: str, end: str
) -> None:
    group = agent.post("/v1/groups", disks.request(completion=end))
    agent.until(group["jobs"][1]["id"], lambda job: job["state"] not in ("queued", "starting"))
    victims = daemons_of(agent, disks.images[1].top)
    wait_for(agent, disks, point)
    send(signal.SIGKILL, *victims)
    jobs = ended(agent, group)
    assert len({job["state"] for job in jobs}) == 1
    if jobs[0]["state"] == "completed":
        disks.assert_copied(jobs, pivot=end == "pivot")
    else:
        assert point not in WHOLE
        assert [job["error"]["code"] for job in jobs] == ["group_failed", "storage_daemon_died", "group_failed"]
        disks.assert_not_copied(jobs)


def test_a_member_whose_pivot_fails_after_the_decision_says_so_and_nobody_loses_a_byte(
    agent: AgentProcess, disks: Disks
) -> None:
    exports = [agent.export(images.top) for images in disks.images]
    with contextlib.ExitStack() as stack:
        pairs = zip(exports, disks.images, strict=True)
        readers = [stack.enter_context(Reader(export["uri"], images.truth)) for export, images in pairs]
        group = agent.post("/v1/groups", disks.request())
        for job in group["jobs"]:
            agent.until(job["id"], lambda job: job["state"] == "ready")
        odd = group["jobs"][1]["id"]
        monitor = monitor_of(agent, daemons_of(agent, disks.images[1].top)[0])
        agent.kill()
        decide(agent, disks)
        asyncio.run(cancelled(monitor, f"copy-{odd}"))
        agent.start()
        jobs = [agent.until_ended(job["id"]) for job in group["jobs"]]
        readers.append(stack.enter_context(Reader(exports[1]["uri"], disks.images[1].truth)))
        assert all(reader.stop() > 0 for reader in readers)
    assert [job["state"] for job in jobs] == ["completed", "failed", "completed"]
    assert jobs[1]["error"]["code"] == "pivot_refused"
    assert jobs[1]["chain"]["after"] == jobs[1]["chain"]["before"]
    assert jobs[1]["chain"]["revoked"] == []
    for images, dest, job in zip(disks.images, disks.dests, jobs, strict=True):
        assert job["dest"]["state"] == "complete"
        assert same_content(dest, images.truth)
        assert check_clean(dest)
        assert dest.stat().st_nlink == 1
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", str(disks.dests[1])], check=True, timeout=PATIENCE)
    for export in exports:
        agent.delete(f"/v1/exports/{export['id']}")
    assert eventually(lambda: storage_daemons(agent) == [])
    disks.assert_sources_untouched()


def decide(agent: AgentProcess, disks: Disks) -> None:
    """What the agent leaves that is killed just after the decision: the names, and the store."""
    for dest in disks.dests:
        (part,) = dest.parent.glob(".hostagent-*")
        dest.hardlink_to(part)
    with contextlib.closing(sqlite3.connect(agent.state / "hostagent.db")) as db:
        for key, body in db.execute("SELECT id, body FROM jobs").fetchall():
            job = json.loads(body) | {"state": "completing", "sealed": "pivot", "completion": "pivot"}
            db.execute("UPDATE jobs SET state = 'completing', body = ? WHERE id = ?", (json.dumps(job), key))
        db.commit()


def monitor_of(agent: AgentProcess, pid: int) -> Path:
    """The monitor's socket of this storage daemon."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes()
    return next(path for path in agent.runtime.rglob("qmp.sock") if path.parent.name.encode() in words)


async def cancelled(monitor: Path, job: str) -> None:
    """QEMU ends the ready job badly, as when its graph does not let it go over."""
    client = QMPClient("test")
    async with asyncio.timeout(PATIENCE):
        await client.connect(str(monitor))
        try:
            await client.execute("job-cancel", {"id": job})
            while True:
                (found,) = [one for one in await client.execute("query-jobs") if one["id"] == job]
                if found["status"] == "concluded":
                    assert "error" in found
                    return
                await asyncio.sleep(0.01)
        finally:
            await client.disconnect()


def daemons_of(agent: AgentProcess, image: Path) -> list[int]:
    """Its storage daemon, unless that has ended by now."""
    found = agent.get("/v1/host")["storage_daemons"]
    return [int(daemon["pid"]) for daemon in found if daemon["image"] == str(image) and daemon["pid"]]
