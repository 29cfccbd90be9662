"""What breaks around a pull: storage daemons, storage, space, events, files under the agent's feet.

In each case the outcome is right and told at once, the image reads as before, the base stays granted while the image
depends on it, and the pull can go on when the fault is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from hostagent import config_text
from hostagent.daemon import Agent
from hostagent.nbd.prepared import PreparedChain
from tests.harness import MIB, AgentProcess, ApiError, Json, check_clean, reachable, same_content, sound, user_can_read
from tests.qemu.faults import (
    ROOT,
    BadSectors,
    Pair,
    Reader,
    Tmpfs,
    daemon_of,
    eventually,
    permissions,
    send,
    stopped,
    storage_daemons,
)

pytestmark = pytest.mark.qemu
needs_root = pytest.mark.skipif(
    not ROOT, reason="needs root: it mounts a file system or looks at another user's access"
)

QUICK = {"JOBS_PROGRESS_INTERVAL": "0.1", "JOBS_SETTLE_RETRY": "0.1", "JOBS_SETTLE_RETRY_MAX": "0.5"}
IMPATIENT = {
    **QUICK,
    "JOBS_ABORT_TIMEOUT": "1",
    "QMP_CALL_TIMEOUT": "1",
    "QMP_CONNECT_TIMEOUT": "2",
    "EXPORTS_NBD_TIMEOUT": "1",
}
SLOW = 8 * MIB
"""Bytes a second: an image of 16 MiB takes two seconds, long enough to be caught in the middle."""
FAST = 512 * MIB
KINDS = pytest.mark.parametrize("spec", [{}, {"increment": 12 * MIB}], ids=["continuous", "incremental"])
DONE = "done" if ROOT else "kept"


@contextlib.contextmanager
def running(folder: Path, settings: Mapping[str, str]) -> Iterator[AgentProcess]:
    folder.mkdir(exist_ok=True)
    with AgentProcess(folder, settings) as process:
        yield process


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """One agent for the tests that leave it as it was."""
    with running(tmp_path_factory.mktemp("steady"), QUICK) as process:
        yield process


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[AgentProcess]:
    with running(tmp_path / "agent", IMPATIENT) as process:
        yield process


@pytest.fixture
def images(folder: Path) -> Pair:
    return Pair(folder / "pair")


def in_the_middle(agent: AgentProcess, images: Pair, spec: Json, bandwidth: int = SLOW) -> Json:
    """A pull that has begun to copy."""
    job = agent.pull(images.top, bandwidth=bandwidth, **spec)
    agent.until(job["id"], lambda job: job["state"] == "running")
    time.sleep(0.3)
    job = agent.job(job["id"])
    assert job["state"] == "running"
    return job


def pulled(agent: AgentProcess, images: Pair, spec: Json | None = None, **others: Any) -> Json:
    """A pull, driven to its end."""
    return driven(agent, agent.pull(images.top, bandwidth=FAST, **(spec or {}), **others))


def driven(agent: AgentProcess, job: Json) -> Json:
    while True:
        job = agent.until(job["id"], lambda job: job["state"] in ("waiting", "completed", "failed", "aborted"))
        if job["state"] != "waiting":
            return agent.until_ended(job["id"])
        agent.post(f"/v1/jobs/{job['id']}/next", {"cursor": job["cursor"]["cur"]})


def assert_failed(agent: AgentProcess, images: Pair, job: Json, code: str) -> None:
    """It says why and what to do, and the image keeps what it depends on."""
    assert job["state"] == "failed", job
    assert job["error"]["code"] == code, job["error"]
    assert job["error"]["remedy"]
    assert job["revocation"] == "none"
    assert job["chain"]["revoked"] == []
    holders = [g["holder"] for g in agent.get("/v1/grants")["items"] if g["path"] == str(images.base)]
    assert {"kind": "image", "id": str(images.top)} in holders
    if agent.user:
        assert user_can_read(images.base, agent.user)


def assert_completed(images: Pair, job: Json) -> None:
    assert job["state"] == "completed", job
    assert job["revocation"] == DONE, job
    assert images.pulled()
    assert sound(images.top)
    assert same_content(images.top, images.truth, running=True)


def seconds(time_of: str) -> float:
    return datetime.fromisoformat(time_of).timestamp()


def types(agent: AgentProcess, subject: str) -> list[str]:
    """The types of all events about a subject, without their prefix and version."""
    return [
        event["type"][len("org.hostagent.") : -len(".v1")] for event in agent.events() if event["subject"] == subject
    ]


# The storage daemon is killed


@KINDS
@pytest.mark.parametrize("with_export", [False, True], ids=["alone", "export"])
def test_a_killed_storage_daemon_fails_its_job_at_once_and_costs_no_data(
    steady: AgentProcess, images: Pair, spec: Json, with_export: bool
) -> None:
    with contextlib.ExitStack() as stack:
        if with_export:
            export = steady.export(images.top)
            reader = stack.enter_context(Reader(export["uri"], images.truth))
        job = in_the_middle(steady, images, spec)
        killed = time.time()
        send(signal.SIGKILL, daemon_of(steady, images.top))
        job = steady.until_ended(job["id"])
        assert_failed(steady, images, job, "storage_daemon_died")
        assert seconds(job["finished"]) - killed < 1
        if with_export:
            assert reader.cut_off()
            assert eventually(lambda: steady.get(f"/v1/exports/{export['id']}")["state"] == "lost")
            assert types(steady, export["id"]) == ["export.started", "export.lost"]
    assert sound(images.top)
    assert same_content(images.top, images.truth)
    assert_completed(images, pulled(steady, images, spec))


# The storage daemon does not answer


@KINDS
def test_a_stopped_storage_daemon_makes_its_job_unknown_and_disturbs_nobody_else(
    impatient: AgentProcess, images: Pair, folder: Path, spec: Json
) -> None:
    other = Pair(folder / "other")
    job = in_the_middle(impatient, images, spec)
    stuck = daemon_of(impatient, images.top)
    with stopped(stuck):
        impatient.until(job["id"], lambda job: job["state"] == "unknown", timeout=10)
        daemons = {daemon["pid"]: daemon["state"] for daemon in impatient.get("/v1/host")["storage_daemons"]}
        assert daemons == {stuck: "unresponsive"}
        began = time.monotonic()
        export = impatient.export(other.top)
        with Reader(export["uri"], other.truth) as reader:
            assert_completed(other, pulled(impatient, other))
            assert time.monotonic() - began < 3
            assert reader.stop() > 0
        latencies = [_latency(impatient, f"/v1/jobs/{job['id']}") for _ in range(30)]
        assert statistics.median(latencies) < 0.05
        assert max(latencies) < 0.5
        assert impatient.job(job["id"])["state"] == "unknown"
    job = driven(impatient, impatient.until(job["id"], lambda job: job["state"] != "unknown"))
    assert_completed(images, job)
    assert check_clean(images.top)
    happened = [event["type"] for event in impatient.events()]
    assert happened.count("org.hostagent.host.unresponsive.v1") == 1
    assert happened.count("org.hostagent.host.connected.v1") == 1
    assert happened.count("org.hostagent.job.completed.v1") == 2


def _latency(agent: AgentProcess, path: str) -> float:
    began = time.monotonic()
    agent.get(path)
    return time.monotonic() - began


@KINDS
def test_an_abort_of_an_unknown_job_is_carried_out_when_its_daemon_answers_again(
    impatient: AgentProcess, images: Pair, spec: Json
) -> None:
    export = impatient.export(images.top)
    with Reader(export["uri"], images.truth) as reader:
        job = in_the_middle(impatient, images, spec)
        with stopped(daemon_of(impatient, images.top)):
            impatient.until(job["id"], lambda job: job["state"] == "unknown", timeout=10)
            assert impatient.post(f"/v1/jobs/{job['id']}/abort")["state"] == "unknown"
        job = impatient.until_ended(job["id"])
        assert job["state"] == "aborted", job
        assert job["error"]["code"] == "cancelled"
        assert not images.pulled()
        assert_completed(images, pulled(impatient, images, spec))
        assert reader.stop() > 0


def test_a_forced_abort_of_an_unknown_job_ends_a_storage_daemon_that_serves_nobody_else(
    impatient: AgentProcess, images: Pair
) -> None:
    job = in_the_middle(impatient, images, {})
    stuck = daemon_of(impatient, images.top)
    with stopped(stuck):
        impatient.until(job["id"], lambda job: job["state"] == "unknown", timeout=10)
        time.sleep(1.1)  # jobs.abort_timeout; before that it is refused
        impatient.post(f"/v1/jobs/{job['id']}/abort", {"force": True})
        assert impatient.until_ended(job["id"])["state"] == "aborted"
        assert stuck not in storage_daemons(impatient)
    assert sound(images.top)
    assert_completed(images, pulled(impatient, images))


@KINDS
def test_an_agent_that_starts_while_a_storage_daemon_is_stopped_waits_for_it(
    impatient: AgentProcess, images: Pair, spec: Json
) -> None:
    export = impatient.export(images.top)
    with Reader(export["uri"], images.truth) as reader:
        job = in_the_middle(impatient, images, spec)
        with stopped(daemon_of(impatient, images.top)):
            impatient.kill()
            impatient.start()
            impatient.until(job["id"], lambda job: job["state"] == "unknown", timeout=10)
            assert impatient.get(f"/v1/exports/{export['id']}")["state"] == "unresponsive"
        job = driven(impatient, impatient.until(job["id"], lambda job: job["state"] != "unknown"))
        assert_completed(images, job)
        assert eventually(lambda: impatient.get(f"/v1/exports/{export['id']}")["state"] == "running")
        assert reader.stop() > 0


# Storage


@pytest.mark.root
@needs_root
@KINDS
def test_a_full_file_system_fails_the_pull_with_a_remedy_and_it_goes_on_with_more_space(
    steady: AgentProcess, folder: Path, spec: Json
) -> None:
    with Tmpfs(folder / "small", 22 * MIB) as small:
        images = Pair(small.folder, truth=folder / "truth")
        export = steady.export(images.top)
        with Reader(export["uri"], images.truth) as first:
            job = pulled(steady, images, spec)
            assert_failed(steady, images, job, "no_space")
            assert same_content(images.top, images.truth, running=True)
            small.resize(64 * MIB)
            with Reader(export["uri"], images.truth) as second:
                assert_completed(images, pulled(steady, images, spec))
                assert second.stop() > 0
            assert first.stop() > 0
        steady.delete(f"/v1/exports/{export['id']}")
        assert check_clean(images.top)


@KINDS
def test_an_unreadable_sector_of_the_base_fails_the_pull_and_it_goes_on_when_mended(
    tmp_path: Path, images: Pair, spec: Json
) -> None:
    sectors = BadSectors(tmp_path / "shim")
    with (
        reachable(sectors.binary.parent),
        running(tmp_path / "agent", {**QUICK, "QSD_BINARY": str(sectors.binary)}) as agent,
    ):
        sectors.break_(images.base, 9 * MIB, 9 * MIB + 4096)
        job = pulled(agent, images, spec)
        assert_failed(agent, images, job, "io_error")
        assert job["cursor"]["cur"] <= 9 * MIB
        sectors.mend()
        assert same_content(images.top, images.truth)
        assert_completed(images, pulled(agent, images, spec))
        assert check_clean(images.top)


# Events


def _lost(deliver: Callable[[], None]) -> None:
    pass


def _tripled(deliver: Callable[[], None]) -> None:
    for _ in range(3):
        deliver()


def _reordered(deliver: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(random.uniform(0, 0.3), deliver)


@KINDS
@pytest.mark.parametrize("line", [_lost, _tripled, _reordered], ids=["lost", "tripled", "reordered"])
def test_a_pull_has_one_outcome_whatever_becomes_of_the_events(
    tmp_path: Path, images: Pair, spec: Json, line: Callable[[Callable[[], None]], None]
) -> None:
    asyncio.run(_pull_over(line, AgentProcess(tmp_path), images, spec))


async def _pull_over(line: Callable[[Callable[[], None]], None], place: AgentProcess, images: Pair, spec: Json) -> None:
    """A pull by an agent in this process; `place` gives it folders and speaks with its socket."""
    overrides = {"agent.state_dir": str(place.state), "agent.runtime_dir": str(place.runtime)}
    overrides |= {"jobs.progress_interval": "0.1"}
    if place.user:
        overrides["access.hypervisor_user"] = place.user
    agent = Agent(config_text.load(env={}, overrides=overrides))
    deliver = agent.news.qmp_event

    def over_a_bad_line(chain: PreparedChain, name: str, data: Mapping[str, Any]) -> None:
        line(lambda: deliver(chain, name, data))

    agent.news.qmp_event = over_a_bad_line  # type: ignore[method-assign]
    try:
        await agent.start()
        job = await asyncio.to_thread(pulled, place, images, spec)
        await asyncio.to_thread(assert_completed, images, job)
        events = await asyncio.to_thread(place.events)
        about = [event["type"].split(".")[3] for event in events if event["subject"] == job["id"]]
        assert about == ["started", "completed"]
        revoked = [e for e in events if e["subject"] == str(images.base) and ".granted." not in e["type"]]
        assert len(revoked) == 1
    finally:
        await agent.stop()
        place.close()


# The store


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("min_free", ["64KiB", "0"], ids=["reserve", "sqlite"])
def test_a_full_store_refuses_new_work_and_records_what_ran_when_there_is_space_again(
    tmp_path: Path, images: Pair, folder: Path, min_free: str
) -> None:
    place = tmp_path / "agent"
    place.mkdir()
    other = Pair(folder / "other", MIB)
    with (
        Tmpfs(place / "state", 8 * MIB) as disk,
        running(place, {**QUICK, "STORE_MIN_FREE": min_free}) as agent,
    ):
        export = agent.export(images.top)
        with Reader(export["uri"], images.truth) as reader:
            job = in_the_middle(agent, images, {})
            filler = disk.fill()
            with pytest.raises(ApiError) as refused:
                agent.pull(other.top)
            assert refused.value.code == "store_full"
            assert refused.value.body["remedy"]
            assert eventually(images.pulled)
            time.sleep(0.5)
            assert agent.job(job["id"])["state"] not in ("completed", "failed", "aborted")
            assert agent.user and user_can_read(images.base, agent.user), "revoked before it was recorded"
            filler.unlink()
            assert_completed(images, agent.until_ended(job["id"]))
            assert types(agent, job["id"]) == ["job.started", "job.completed"]
            assert reader.stop() > 0
        agent.delete(f"/v1/exports/{export['id']}")
        assert_completed(other, pulled(agent, other))


@pytest.mark.root
@needs_root
def test_an_agent_that_is_killed_with_a_full_store_records_the_outcome_after_its_restart(
    tmp_path: Path, images: Pair
) -> None:
    place = tmp_path / "agent"
    place.mkdir()
    with Tmpfs(place / "state", 8 * MIB) as disk, running(place, QUICK | {"STORE_MIN_FREE": "0"}) as agent:
        job = in_the_middle(agent, images, {})
        filler = disk.fill()
        assert eventually(images.pulled)
        agent.kill()
        filler.unlink()
        agent.start()
        assert_completed(images, agent.until_ended(job["id"]))
        assert types(agent, job["id"]) == ["job.started", "job.completed"]


# Files under the agent's feet

TOUCHED = {
    "chmod-600": (["chmod", "600"], "done"),
    "chmod-644": (["chmod", "644"], "kept"),
    "setfacl-remove-all": (["setfacl", "-b"], "done"),
    "setfacl-another-user": (["setfacl", "-m", "u:54321:r"], "done"),
}


@pytest.mark.root
@needs_root
@KINDS
@pytest.mark.parametrize("touch", TOUCHED, ids=str)
def test_a_pull_survives_that_somebody_changes_the_permissions_of_its_base(
    steady: AgentProcess, images: Pair, spec: Json, touch: str
) -> None:
    command, revocation = TOUCHED[touch]
    if spec:
        job = steady.pull(images.top, **spec)
        steady.until(job["id"], lambda job: job["state"] == "waiting")
    else:
        job = in_the_middle(steady, images, spec)
    subprocess.run([*command, str(images.base)], check=True)
    job = driven(steady, job)
    assert job["state"] == "completed", job
    assert job["revocation"] == revocation, job
    assert same_content(images.top, images.truth)
    assert steady.user is not None
    assert user_can_read(images.base, steady.user) == (revocation == "kept")
    entries = subprocess.run(["getfacl", "-cn", images.base], capture_output=True, text=True, check=True).stdout
    users = [line.split(":")[1] for line in entries.splitlines() if line.startswith("user:")]
    assert users == ["", "54321"] if touch == "setfacl-another-user" else [""]
    if revocation == "kept":
        assert "lets everybody read" in job["chain"]["kept"][0]["reason"]


@pytest.mark.parametrize("which", ["base", "top"])
def test_a_file_that_is_replaced_while_the_job_waits_fails_it_and_the_new_file_is_not_touched(
    steady: AgentProcess, images: Pair, which: str
) -> None:
    path: Path = getattr(images, which)
    before = {file: permissions(file) for file in (images.base, images.top)}
    job = steady.pull(images.top, increment=4 * MIB)
    steady.until(job["id"], lambda job: job["state"] == "waiting")
    aside = path.with_suffix(".aside")
    path.rename(aside)
    shutil.copy(aside, path)
    path.chmod(0o600)
    stranger = permissions(path)
    steady.post(f"/v1/jobs/{job['id']}/next")
    job = steady.until_ended(job["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "image_changed"), job
    assert str(path) in job["error"]["message"]
    assert job["chain"]["revoked"] == []
    assert permissions(path) == stranger
    aside.rename(path)
    assert_completed(images, pulled(steady, images))
    # What stays in the chain is given back last, after the job has told of what left it.
    assert eventually(lambda: {file: permissions(file) for file in before} == before)


@pytest.mark.root
@needs_root
def test_a_base_that_is_moved_while_the_pull_runs_is_revoked_and_what_took_its_place_is_not_touched(
    steady: AgentProcess, images: Pair
) -> None:
    job = in_the_middle(steady, images, {})
    aside = images.base.with_suffix(".aside")
    images.base.rename(aside)
    images.base.write_bytes(b"somebody else's")
    images.base.chmod(0o640)
    subprocess.run(["setfacl", "-m", f"u:{steady.user}:r", str(images.base)], check=True)
    stranger = permissions(images.base)
    assert steady.user and user_can_read(aside, steady.user)
    job = steady.until_ended(job["id"])
    assert (job["state"], job["revocation"]) == ("completed", "done"), job
    assert not user_can_read(aside, steady.user)
    assert permissions(images.base) == stranger
    assert same_content(images.top, images.truth)


def test_the_store_of_the_steady_agent_is_quiet_in_the_end(steady: AgentProcess) -> None:
    assert storage_daemons(steady) == []
    assert steady.get("/v1/host")["storage_daemons"] == []
    log = [json.loads(line) for line in steady.log.read_text().splitlines() if line.startswith("{")]
    assert [line for line in log if line["level"] == "error"] == []
