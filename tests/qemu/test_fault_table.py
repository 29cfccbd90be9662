"""Each fault that storage and processes have, for each operation where it means something.

Always the same must hold: the job's outcome is right and says what to do, bytes are right, what somebody else does on
another image goes on, and when the fault is gone the same job completes. This module has what no other has; the table
says where each row is tested.

| fault | pull | copy | commit | export |
|---|---|---|---|---|
| no space | test_faults -k full_file_system | test_copy -k full_target | -k no_space | read-only: none |
| a read fails (EIO) | test_faults -k unreadable_sector | -k unreadable | -k unreadable | -k unreadable |
| storage dies for good | -k storage_that_died | -k storage_that_died, test_copy -k target_that_dies | -k storage_that_died | -k storage_that_died |
| storage hangs | -k hanging | -k hanging, test_copy -k target_that_hangs | -k hanging | -k hanging |
| storage is slow | bandwidth: test_spine | -k slow_target | bandwidth: test_commit | – |
| a storage daemon is killed | test_faults -k killed, test_kill | test_kill_copies | test_kill_copies | test_exports, test_adoption |
| a storage daemon hangs | test_faults -k stopped | -k daemon_that_hangs | -k daemon_that_hangs | test_faults -k stopped, test_writable_exports |
| the agent is killed | test_kill | test_kill_copies | test_kill_copies | test_adoption |
| a base is missing, no image, damaged, a loop | test_hostile -k not_to_be_trusted | the same | the same | the same |
| a chain of 201 layers | test_hostile -k two_hundred | the same reader | the same reader | test_hostile -k two_hundred |
| damaged tables | test_hostile -k damaged_tables | -k damaged_tables | -k damaged_tables | test_hostile -k damaged |
| a base is deleted or replaced meanwhile | test_drift, test_faults -k moved | test_meddled | test_meddled | test_proofs -k grasped |
| a base is cut meanwhile | test_drift | test_drift | -k was_cut | zeros: nobody can tell in time |
| somebody else writes a member | test_hostile -k another_program | test_leases | test_commit -k busy | test_exports -k another_program |
| a folder that the user may not pass | test_spine -k cannot_be_served | -k may_not_pass | -k may_not_pass | test_exports -k may_not_pass |
| events are lost, repeated, out of order | test_faults -k events | unit: test_engine_ready | unit: test_engine_ready | – |
| the store is full | test_faults -k full_store | the same keeper | the same keeper | test_faults -k full_store |

A read that fails or hangs is a library in front of the storage daemon's C library (`faults.BadSectors`): device mapper
with dm-error and dm-flakey is not in every kernel that runs the tests, and blkdebug cannot be put below a file that the
agent opens. Storage that dies is a file over FUSE whose server is killed (`remote_storage.FuseFile`).
A FUSE server that only hangs holds up new processes of everybody, the agent's among them: so that nobody else is affected
is shown for a read that hangs in one storage daemon, and is not so for FUSE (README, Limits).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, backing_of, overlay, raw_image, reachable, same_content
from tests.qemu.faults import (
    HASTE,
    PATIENCE,
    ROOT,
    BadSectors,
    Pair,
    Reader,
    Tmpfs,
    daemon_of,
    eventually,
    stopped,
)
from tests.qemu.remote_storage import FuseFile, nbd_server, needs_fuse, needs_nbdkit

pytestmark = pytest.mark.qemu
needs_root = pytest.mark.skipif(not ROOT, reason="needs root: it mounts a file system, or runs daemons as another user")

SIZE = 16 * MIB
SLOW = 4 * MIB
SETTINGS = {**HASTE, "JOBS_ABORT_TIMEOUT": "1", "IMAGES_INSPECT_TIMEOUT": "2", "EXPORTS_NBD_TIMEOUT": "2"}
WORKS = {
    "pull": {"operation": "pull"},
    "copy": {"operation": "copy", "dest": "{folder}/copy.qcow2", "completion": "pivot"},
    "commit": {"operation": "commit", "completion": "pivot"},
}
each_work = pytest.mark.parametrize("work", WORKS)


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent of the test's own: what hangs in it must not be others' matter."""
    home = tmp_path / "agent"
    home.mkdir()
    with reachable(home), AgentProcess(home, SETTINGS) as agent:
        yield agent


@pytest.fixture
def sectors(tmp_path: Path) -> Iterator[BadSectors]:
    found = BadSectors(tmp_path / "shim")
    with reachable(found.binary.parent):
        yield found


@pytest.fixture
def broken(tmp_path: Path, sectors: BadSectors) -> Iterator[AgentProcess]:
    """An agent whose storage daemons meet bad sectors."""
    home = tmp_path / "agent"
    home.mkdir()
    with (
        reachable(home),
        AgentProcess(home, {**HASTE, "JOBS_ABORT_TIMEOUT": "1", "QSD_BINARY": str(sectors.binary)}) as agent,
    ):
        yield agent


def begun(agent: AgentProcess, images: Pair, work: str, **spec: object) -> Json:
    """A job that has copied something, and is far from its end."""
    job = started(agent, images, work, **{"bandwidth": SLOW, **spec})
    return agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] > 0)


def started(agent: AgentProcess, images: Pair, work: str, **spec: object) -> Json:
    words = {key: word.format(folder=images.folder) for key, word in WORKS[work].items()}
    job: Json = agent.post("/v1/jobs", {"target": str(images.top), **words, **spec})
    return job


def hurried(agent: AgentProcess, job: Json) -> Json:
    with contextlib.suppress(ApiError):  # it may have ended by itself
        agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    return agent.until_ended(job["id"])


def result_of(images: Pair, work: str) -> tuple[Path, str | None]:
    """The file that shows the image's content when the job completed, and its format where that must be said."""
    return {"pull": (images.top, None), "copy": (images.folder / "copy.qcow2", None), "commit": (images.base, "raw")}[
        work
    ]


def assert_completed(images: Pair, work: str, job: Json) -> None:
    assert (job["state"], job["error"]) == ("completed", None), job
    path, format = result_of(images, work)
    assert same_content(path, images.truth, first=format)


def assert_failed(images: Pair, job: Json, code: str) -> None:
    assert (job["state"], job["error"]["code"]) == ("failed", code), job
    assert job["error"]["remedy"]
    assert job["chain"]["revoked"] == []
    assert backing_of(images.top) == images.base.name
    assert not (images.folder / "copy.qcow2").exists()
    assert list(images.folder.glob(".hostagent-*")) == []


@contextlib.contextmanager
def undisturbed(agent: AgentProcess, other: Pair) -> Iterator[None]:
    """Meanwhile another image is exported and read, pulled, and the agent asked; each without a wait."""
    export = agent.export(other.top)
    with Reader(export["uri"], other.truth) as reader:
        yield
        latencies = [_latency(agent) for _ in range(20)]
        assert statistics.median(latencies) < 1
        job = agent.until_ended(agent.pull(other.top)["id"], timeout=PATIENCE)
        assert (job["state"], job["error"]) == ("completed", None)
        assert reader.stop() > 0
    agent.delete(f"/v1/exports/{export['id']}")
    assert same_content(other.top, other.truth)


def _latency(agent: AgentProcess) -> float:
    began = time.monotonic()
    agent.get("/v1/jobs")
    return time.monotonic() - began


# Storage that hangs, or dies


@each_work
@pytest.mark.parametrize("abort", [False, True], ids=["goes-on", "abort"])
def test_hanging_storage_holds_up_its_job_and_nobody_else(
    broken: AgentProcess, sectors: BadSectors, images: Pair, folder: Path, work: str, abort: bool
) -> None:
    other = Pair(folder / "other", 4 * MIB)
    slow = images.top if work == "commit" else images.base
    end = slow.stat().st_size
    job = begun(broken, images, work, bandwidth=MIB)
    sectors.break_(slow, 0, end, hang=True)
    with undisturbed(broken, other):
        if abort:
            assert broken.post(f"/v1/jobs/{job['id']}/abort")["state"] in ("aborting", "unknown", "aborted")
    assert broken.job(job["id"])["state"] not in ("completed", "failed")
    sectors.mend()
    if abort:
        job = broken.until_ended(job["id"])
        assert (job["state"], job["error"]["code"]) == ("aborted", "cancelled"), job
        assert backing_of(images.top) == images.base.name
        assert same_content(images.top, images.truth, running=True)
        job = started(broken, images, work)
    assert_completed(images, work, hurried(broken, job))


def test_hanging_storage_holds_up_who_reads_it_and_no_other_export(
    broken: AgentProcess, sectors: BadSectors, images: Pair, folder: Path
) -> None:
    other = Pair(folder / "other", 4 * MIB)
    export = broken.export(images.top)
    handle = nbd.NBD()
    handle.connect_uri(export["uri"])
    sectors.break_(images.base, 0, SIZE, hang=True)
    got: list[bytes] = []
    offset = 9 * MIB + 4096
    client = threading.Thread(target=lambda: got.append(bytes(handle.pread(4096, offset))), daemon=True)
    client.start()
    with undisturbed(broken, other):
        pass
    assert got == []
    sectors.mend()
    client.join(PATIENCE)
    assert got == [images.truth.read_bytes()[offset : offset + 4096]]
    handle.shutdown()
    assert eventually(lambda: not broken.get(f"/v1/exports/{export['id']}")["clients"])
    broken.delete(f"/v1/exports/{export['id']}")


@pytest.mark.root
@needs_fuse
@each_work
def test_storage_that_died_fails_its_job_at_once_and_nobody_elses(
    patient: AgentProcess, images: Pair, folder: Path, work: str
) -> None:
    other, store = Pair(folder / "other", 4 * MIB), folder / "store.raw"
    with FuseFile(images.base, store) as base:
        job = begun(patient, images, work)
        base.die()
        with undisturbed(patient, other):
            pass
        assert_failed_for_storage(images, patient.until_ended(job["id"]))
    if work == "commit":
        return  # what it wrote can never be flushed: its storage daemon, and so the image, stays until that is ended
    images.base.unlink()
    shutil.move(store, images.base)  # the server is back, with what it had
    images.base.chmod(0o600)
    assert same_content(images.top, images.truth)
    assert_completed(images, work, hurried(patient, started(patient, images, work)))


def assert_failed_for_storage(images: Pair, job: Json) -> None:
    assert job["state"] == "failed" and job["error"]["code"] == "io_error", job
    assert job["error"]["remedy"]
    assert job["chain"]["revoked"] == []
    assert list(images.folder.glob(".hostagent-*")) == []


# Slow targets


@needs_nbdkit
@pytest.mark.parametrize("abort", [False, True], ids=["goes-on", "abort"])
def test_a_slow_target_slows_its_copy_down_and_nobody_else(
    patient: AgentProcess, images: Pair, folder: Path, abort: bool
) -> None:
    other = Pair(folder / "other", 4 * MIB)
    with nbd_server(folder, SIZE, "--filter=delay", "delay-write=400ms", "delay-zero=400ms") as (uri, disk, _):
        job: Json = patient.post(
            "/v1/jobs", {"operation": "copy", "target": str(images.top), "dest": uri, "completion": "finish"}
        )
        patient.until(job["id"], lambda job: job["state"] == "running")
        with undisturbed(patient, other):
            if abort:
                patient.post(f"/v1/jobs/{job['id']}/abort")
        job = patient.until_ended(job["id"], timeout=PATIENCE)
    if abort:
        assert (job["state"], job["dest"]["state"]) == ("aborted", "unusable"), job
    else:
        assert (job["state"], job["dest"]["state"]) == ("completed", "complete"), job
        assert same_content(disk, images.truth, first="raw")
    assert backing_of(images.top) == images.base.name
    assert same_content(images.top, images.truth)


# Reads that fail


@pytest.mark.parametrize("work", ["copy", "commit"])
def test_an_unreadable_sector_fails_the_job_and_it_can_be_made_again_when_mended(
    broken: AgentProcess, sectors: BadSectors, images: Pair, work: str
) -> None:
    bad, begin = (images.base, 9 * MIB) if work == "copy" else (images.top, images.top.stat().st_size // 2)
    sectors.break_(bad, begin, begin + 65536)
    assert_failed(images, broken.until_ended(started(broken, images, work)["id"]), "io_error")
    sectors.mend()
    assert same_content(images.top, images.truth)
    assert_completed(images, work, broken.until_ended(started(broken, images, work)["id"]))


def test_an_unreadable_sector_is_the_clients_error_and_the_export_serves_on(
    broken: AgentProcess, sectors: BadSectors, images: Pair
) -> None:
    """QEMU cuts off the client whose read fails in the midst of an answer; who connects again is served."""
    truth, bad = images.truth.read_bytes(), 9 * MIB
    sectors.break_(images.base, bad, bad + 4096)
    export = broken.export(images.top)
    with pytest.raises(nbd.Error) as error:
        read(export["uri"], bad)
    assert error.value.errno in ("EIO", "ENOTCONN")
    assert read(export["uri"], bad + MIB) == truth[bad + MIB : bad + MIB + 4096]
    assert broken.get(f"/v1/exports/{export['id']}")["state"] == "running"
    sectors.mend()
    assert read(export["uri"], bad) == truth[bad : bad + 4096]
    assert eventually(lambda: not broken.get(f"/v1/exports/{export['id']}")["clients"])
    broken.delete(f"/v1/exports/{export['id']}")


def read(uri: str, offset: int) -> bytes:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    data = bytes(handle.pread(4096, offset))
    handle.shutdown()
    return data


# Space


@pytest.mark.root
@needs_root
def test_no_space_for_the_base_fails_the_commit_and_it_goes_on_with_more(agent: AgentProcess, folder: Path) -> None:
    with Tmpfs(folder / "small", 40 * MIB) as small:
        base = raw_image(small.folder / "base.raw", SIZE, 0)
        top, truth = overlay(small.folder / "top.qcow2", base), folder / "truth.raw"
        words = [f"write -q -P {n + 1} {n}M 1M" for n in range(12)]
        subprocess.run(["qemu-io", *(part for word in words for part in ("-c", word)), str(top)], check=True)
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(top), str(truth)], check=True)
        filler = small.fill()
        wanted = {"operation": "commit", "target": str(top), "completion": "pivot"}
        job = agent.until_ended(agent.post("/v1/jobs", {**wanted, "check": "never"})["id"])
        assert (job["state"], job["error"]["code"], job["chain"]["revoked"]) == ("failed", "no_space", []), job
        assert "the base" in job["error"]["remedy"]
        assert same_content(top, truth, running=True)
        filler.unlink()
        job = agent.until_ended(agent.post("/v1/jobs", wanted)["id"])
        assert (job["state"], job["error"]) == ("completed", None), job
        assert same_content(base, truth, first="raw")


# Storage daemons


@pytest.mark.parametrize("work", ["copy", "commit"])
def test_a_job_with_a_storage_daemon_that_hangs_is_unknown_and_completes_when_it_answers(
    tmp_path: Path, images: Pair, folder: Path, work: str
) -> None:
    other = Pair(folder / "other", 4 * MIB)
    with AgentProcess(tmp_path, {**SETTINGS, "QMP_CALL_TIMEOUT": "1", "QMP_CONNECT_TIMEOUT": "2"}) as agent:
        job = begun(agent, images, work)
        with stopped(daemon_of(agent, images.top)):
            agent.until(job["id"], lambda job: job["state"] == "unknown")
            with undisturbed(agent, other):
                pass
            assert agent.job(job["id"])["state"] == "unknown"
        assert_completed(images, work, hurried(agent, agent.until(job["id"], lambda job: job["state"] != "unknown")))


# Images


@pytest.mark.parametrize("work", ["copy", "commit"])
def test_damaged_tables_are_found_before_anything_is_written(agent: AgentProcess, images: Pair, work: str) -> None:
    with images.top.open("r+b") as file:  # an L2 table's offset that is no multiple of a cluster
        file.seek(40)
        first = int.from_bytes(file.read(8), "big")
        file.seek(first)
        file.write((0x8000000000000000 | 0x1234567).to_bytes(8, "big"))
    before = images.base.read_bytes(), images.top.read_bytes()
    job = agent.until_ended(started(agent, images, work, check="always")["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "image_corrupt"), job
    assert job["error"]["remedy"]
    assert (images.base.read_bytes(), images.top.read_bytes()) == before
    assert sorted(path.name for path in images.folder.iterdir()) == ["base.raw", "top.qcow2"]


def test_a_commit_whose_overlay_was_cut_is_not_completed(agent: AgentProcess, folder: Path) -> None:
    images = Pair(folder / "three", middle=True)
    assert images.middle is not None
    job = agent.post("/v1/jobs", {"operation": "commit", "target": str(images.top), "bandwidth": 1})
    agent.until(job["id"], lambda job: job["state"] in ("running", "ready"))
    os.truncate(images.middle, images.middle.stat().st_size - 65536)
    with contextlib.suppress(ApiError):
        agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    agent.until(job["id"], lambda job: job["state"] == "ready")
    with pytest.raises(ApiError) as refused:
        agent.post(f"/v1/jobs/{job['id']}/complete", {"completion": "pivot"})
    assert refused.value.code == "image_changed"
    agent.post(f"/v1/jobs/{job['id']}/abort")
    assert agent.until_ended(job["id"])["state"] == "aborted"


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("work", ["copy", "commit"])
def test_a_folder_that_the_user_may_not_pass_is_no_harm_by_descriptor_or_refused_with_its_remedy(
    agent: AgentProcess, images: Pair, work: str
) -> None:
    images.folder.chmod(0o700)
    try:
        job = agent.until_ended(started(agent, images, work)["id"])
    finally:
        images.folder.chmod(0o755)
    if job["state"] == "failed":
        assert job["error"]["code"] == "access_refused", job
        assert "chmod o+x" in job["error"]["remedy"]
        assert list(images.folder.glob(".hostagent-*")) == []
        job = agent.until_ended(started(agent, images, work)["id"])
    assert_completed(images, work, job)
