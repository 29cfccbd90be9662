"""Input of somebody who means harm, or of bad luck. Whatever is refused is refused clearly, and has changed nothing.

"Nothing" is taken to the byte: the files, their modes and ACLs, the ledger, storage daemons, sockets, leases.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import http.client
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    MIB,
    TEST_USER,
    AgentProcess,
    ApiError,
    Json,
    backing_of,
    check_clean,
    overlay,
    raw_image,
    reachable,
    same_content,
    user_can_read,
)
from tests.qemu.faults import eventually, permissions

pytestmark = pytest.mark.qemu

nbd: Any = pytest.importorskip("nbd", reason="needs python3-libnbd")

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root: other users take part")
WIDTH = 4
QUICK = {
    "JOBS_WIDTH": str(WIDTH),
    "JOBS_PROGRESS_INTERVAL": "0.1",
    "JOBS_SETTLE_RETRY": "0.1",
    "EXPORTS_NBD_TIMEOUT": "1",
}
GROUP = "users"
"""Any group that is no user's only one; as root the agent's socket is given to it."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """One agent for all that is refused: each test proves that it left nothing for the next."""
    with AgentProcess(tmp_path_factory.mktemp("shared"), {**QUICK, "QSD_MAX_CONNECTIONS": "4"}) as process:
        yield process


@pytest.fixture
def quick(shared: AgentProcess) -> Iterator[AgentProcess]:
    """The same agent for what is allowed: it is cleared of all that a test started."""
    yield shared
    for export in shared.get("/v1/exports?state=running")["items"]:
        shared.delete(f"/v1/exports/{export['id']}?force=true")
    for job in shared.get("/v1/jobs")["items"]:
        if job["finished"] is None:
            with contextlib.suppress(ApiError):  # it may end by itself meanwhile
                shared.post(f"/v1/jobs/{job['id']}/abort")
            shared.until_ended(job["id"])


# What must be as it was


def footprint(folder: Path) -> dict[str, object]:
    """All that is in a folder: kind, mode, owner, ACL and content of each file."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        acl, content = None, ""
        if stat.S_ISREG(info.st_mode):
            acl = permissions(path)
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (info.st_mode, info.st_uid, info.st_gid, acl, content)
    return found


def leases(folder: Path) -> list[str]:
    """Lines of /proc/locks about files of the folder."""
    inodes = {str(path.lstat().st_ino) for path in folder.rglob("*")}
    return [line for line in Path("/proc/locks").read_text().splitlines() if line.split()[-3].split(":")[-1] in inodes]


def traces(agent: AgentProcess, folder: Path) -> list[object]:
    """What an agent that works on nothing must not have."""
    host = agent.get("/v1/host")
    grants = [grant for grant in agent.get("/v1/grants")["items"] if grant["path"].startswith(str(folder))]
    sockets = [*(agent.runtime / "qsd").iterdir(), *(agent.runtime / "nbd").iterdir()]
    return [*host["storage_daemons"], *grants, *map(str, sockets), *leases(folder)]


def nothing_left(agent: AgentProcess, folder: Path) -> None:
    assert eventually(lambda: traces(agent, folder) == []), traces(agent, folder)
    assert agent.get("/healthz", timeout=2) == {"ok": True}


@contextlib.contextmanager
def harmless(agent: AgentProcess, folder: Path) -> Iterator[None]:
    """Nothing in the folder is touched, and the agent keeps nothing."""
    before = footprint(folder)
    yield
    nothing_left(agent, folder)
    assert eventually(lambda: footprint(folder) == before), footprint(folder)


def refusal(call: Callable[[], Any]) -> Json:
    with pytest.raises(ApiError) as caught:
        call()
    return caught.value.body


def failure(agent: AgentProcess, job: Json) -> Json:
    """Why a job that was accepted failed."""
    ended = agent.until_ended(job["id"], timeout=20)
    assert ended["state"] == "failed", ended
    error: Json = ended["error"]
    return error


def pulled(agent: AgentProcess, target: Path, **spec: Any) -> Json:
    """A pull to its end, through all increments."""
    job = agent.pull(target, **spec)
    while True:
        job = agent.until(job["id"], lambda j: j["state"] in ("waiting", "completed", "failed", "aborted"))
        if job["state"] != "waiting":
            return agent.until_ended(job["id"])
        agent.post(f"/v1/jobs/{job['id']}/next", {"cursor": job["cursor"]["cur"]})


def started(agent: AgentProcess, operation: str, target: Path, **spec: Any) -> Json:
    job: Json = agent.post("/v1/jobs", {"operation": operation, "target": str(target), **spec})
    return job


def flat_copy(image: Path) -> Path:
    """What an image reads as, kept elsewhere."""
    truth = image.with_suffix(".truth")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(truth)], check=True)
    return truth


# Images that are not what they should be


def naming(path: Path, backing: str, backing_format: str = "raw") -> Path:
    """An overlay whose header names `backing`, which qemu-img does not look at."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", backing_format, str(path), "1M"]
    subprocess.run(command, check=True, capture_output=True)
    path.chmod(0o600)
    return path


def patched(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as image:
        image.seek(offset)
        image.write(data)
    return path


def healthy(folder: Path) -> Path:
    return overlay(folder / "top.qcow2", raw_image(folder / "base.raw", MIB))


def names_shadow(folder: Path) -> Path:
    return naming(folder / "top.qcow2", "/etc/shadow")


def names_shadow_by_dots(folder: Path) -> Path:
    return naming(folder / "top.qcow2", "../" * 20 + "etc/shadow")


def names_a_device(folder: Path) -> Path:
    return naming(folder / "top.qcow2", "/dev/null")


def names_a_process_descriptor(folder: Path) -> Path:
    return naming(folder / "top.qcow2", "/proc/self/fd/0")


def names_a_link(folder: Path) -> Path:
    (folder / "base.raw").symlink_to("/etc/shadow")
    return naming(folder / "top.qcow2", "base.raw")


def is_a_link(folder: Path) -> Path:
    link = folder / "link.qcow2"
    link.symlink_to(healthy(folder))
    return link


def has_two_names(folder: Path) -> Path:
    top = healthy(folder)
    (folder / "other-name").hardlink_to(top)
    return top


def has_a_base_with_two_names(folder: Path) -> Path:
    top = healthy(folder)
    (folder / "other-name").hardlink_to(folder / "base.raw")
    return top


def is_a_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "top.qcow2")
    return folder / "top.qcow2"


def names_a_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "base.raw")
    return naming(folder / "top.qcow2", "base.raw")


def is_a_folder(folder: Path) -> Path:
    (folder / "top.qcow2").mkdir()
    return folder / "top.qcow2"


def names_nothing_there(folder: Path) -> Path:
    return naming(folder / "top.qcow2", "gone.raw")


def names_itself(folder: Path) -> Path:
    return naming(folder / "top.qcow2", "top.qcow2", "qcow2")


def stands_in_a_circle(folder: Path) -> Path:
    naming(folder / "other.qcow2", "top.qcow2", "qcow2")
    return naming(folder / "top.qcow2", "other.qcow2", "qcow2")


def names_a_network_image(folder: Path) -> Path:
    return naming(folder / "top.qcow2", "nbd://localhost:1/x")


def names_json(folder: Path) -> Path:
    return naming(folder / "top.qcow2", 'json:{"driver":"file","filename":"/etc/shadow"}')


def names_a_new_line(folder: Path) -> Path:
    return naming(folder / "top.qcow2", "base\n.raw")


def names_an_escape(folder: Path) -> Path:
    return naming(folder / "top.qcow2", "base\x1b[2J.raw")


def says_no_format(folder: Path) -> Path:
    top = healthy(folder)
    return patched(top, top.read_bytes().index(b"\xe2\x79\x2a\xca"), b"\0\0\0\1")


def has_a_damaged_header(folder: Path) -> Path:
    return patched(healthy(folder), 20, b"\0\0\0\xff")  # cluster_bits


def claims_an_absurd_size(folder: Path) -> Path:
    return patched(healthy(folder), 24, b"\x7f" + b"\xff" * 7)  # size


def has_a_name_past_its_end(folder: Path) -> Path:
    return patched(healthy(folder), 8, struct.pack(">QI", 1 << 40, 1000))  # backing file name


def is_cut_off(folder: Path) -> Path:
    top = healthy(folder)
    os.truncate(top, 60)
    return top


def is_marked_corrupt(folder: Path) -> Path:
    return patched(healthy(folder), 79, b"\x02")  # the last byte of incompatible_features


def has_data_elsewhere(folder: Path) -> Path:
    top = folder / "top.qcow2"
    options = f"data_file={folder / 'data.raw'}"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(top), "1M"], check=True)
    return top


def is_missing(folder: Path) -> Path:
    return folder / "no such image.qcow2"


ATTACKS: Mapping[Callable[[Path], Path], str] = {
    names_shadow: "outside_pools",
    names_shadow_by_dots: "outside_pools",
    names_a_device: "outside_pools",
    names_a_process_descriptor: "outside_pools",
    names_a_link: "image_invalid",
    is_a_link: "image_invalid",
    has_two_names: "outside_pools",
    has_a_base_with_two_names: "outside_pools",
    is_a_fifo: "image_invalid",
    names_a_fifo: "image_invalid",
    is_a_folder: "image_invalid",
    names_nothing_there: "not_found",
    names_itself: "chain_loop",
    stands_in_a_circle: "chain_loop",
    names_a_network_image: "not_supported",
    names_json: "not_supported",
    names_a_new_line: "image_invalid",
    names_an_escape: "image_invalid",
    says_no_format: "image_invalid",
    has_a_damaged_header: "image_invalid",
    claims_an_absurd_size: "image_invalid",
    has_a_name_past_its_end: "image_invalid",
    is_cut_off: "image_invalid",
    is_marked_corrupt: "image_corrupt",
    has_data_elsewhere: "not_supported",
    is_missing: "not_found",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_image_that_is_not_to_be_trusted_is_refused(
    shared: AgentProcess, folder: Path, attack: Callable[[Path], Path]
) -> None:
    image = attack(folder)
    with harmless(shared, folder):
        refusals = {
            "target": refusal(lambda: shared.pull(image)),
            "target, dry run": refusal(lambda: shared.pull(image, dry_run=True)),
            "target, copy": refusal(lambda: started(shared, "copy", image, dest=str(folder / "copy.qcow2"))),
            "target, commit": refusal(lambda: started(shared, "commit", image)),
            "image": refusal(lambda: shared.export(image)),
            "path": refusal(lambda: shared.get(f"/v1/images/inspect?path={str(image).replace(' ', '%20')}")),
        }
        for field, problem in refusals.items():
            assert problem["code"] == ATTACKS[attack], problem
            assert problem["remedy"], problem
            assert problem["field"] == field.partition(",")[0], problem
            assert not any(char in problem["detail"] for char in "\n\x1b"), problem
        assert not [job for job in shared.get("/v1/jobs")["items"] if job["path"] == str(image)]
        assert not [export for export in shared.get("/v1/exports")["items"] if export["path"] == str(image)]


@pytest.mark.parametrize(
    ("offset", "data"), [(56, b"\x80\0\0\0"), (60, b"\xff\xff\xff\xff")], ids=["refcounts", "snapshots"]
)
def test_what_only_qemu_refuses_is_the_images_fault(
    quick: AgentProcess, folder: Path, offset: int, data: bytes
) -> None:
    image = patched(healthy(folder), offset, data)
    with harmless(quick, folder):
        problem = refusal(lambda: quick.export(image))
        assert (problem["code"], problem["field"], problem["status"]) == ("image_invalid", "image", 422)
        assert str(image) in problem["detail"] and "image check" in problem["remedy"]
        assert failure(quick, quick.pull(image))["code"] == "image_invalid"


def test_a_device_node_is_never_opened(shared: AgentProcess, folder: Path) -> None:
    with harmless(shared, folder):
        assert refusal(lambda: shared.pull(Path("/dev/null")))["code"] == "image_invalid"
        assert refusal(lambda: shared.export(Path("/dev/zero"), format="raw"))["code"] == "image_invalid"


def test_a_raw_image_is_not_a_target_of_a_pull(shared: AgentProcess, folder: Path) -> None:
    image = raw_image(folder / "disk.raw", MIB)
    with harmless(shared, folder):
        problem = refusal(lambda: shared.pull(image))
        assert problem["code"] in ("invalid", "image_invalid")
        assert problem["remedy"]


def test_a_guest_that_writes_a_qcow2_header_into_its_raw_disk_gains_nothing(quick: AgentProcess, folder: Path) -> None:
    base = raw_image(folder / "base.raw", 4 * MIB)
    base.write_bytes(names_shadow(folder).read_bytes().ljust(4 * MIB, b"\0"))
    (folder / "top.qcow2").unlink()
    top = overlay(folder / "top.qcow2", base)
    truth = flat_copy(top)
    assert [layer["format"] for layer in quick.get(f"/v1/images/inspect?path={top}")["chain"]] == ["qcow2", "raw"]
    handle = connected(quick.export(top))
    assert handle.pread(4, 0) == b"QFI\xfb"
    assert handle.get_size() == 4 * MIB
    handle.shutdown()
    assert pulled(quick, top)["state"] == "completed"
    command = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(top), str(truth)]  # which must not probe, either
    subprocess.run(command, check=True, capture_output=True)


# Images that change under the agent


def swap(path: Path, other: Path) -> None:
    """Put a symbolic link where the file was, in one step."""
    link = path.with_name("link")
    link.symlink_to(other)
    link.rename(path)


@pytest.mark.parametrize("name", ["top.qcow2", "base.raw"])
def test_a_link_that_is_swapped_in_before_the_start_is_noticed(quick: AgentProcess, folder: Path, name: str) -> None:
    base = raw_image(folder / "base.raw", MIB)
    before_it = [quick.pull(overlay(folder / f"{n}.qcow2", base), bandwidth=1) for n in range(WIDTH)]
    images = folder / "images"
    images.mkdir(mode=0o755)
    job = quick.pull(healthy(images))
    assert quick.job(job["id"])["state"] == "queued"
    secret = raw_image(folder / "secret", MIB)
    swap(images / name, secret)
    before = footprint(images), permissions(secret)
    for blocker in before_it:
        quick.post(f"/v1/jobs/{blocker['id']}/abort")
    assert failure(quick, job)["code"] in ("image_changed", "image_invalid", "outside_pools")
    assert (footprint(images), permissions(secret)) == before
    assert not [grant for grant in quick.get("/v1/grants")["items"] if grant["path"].startswith(f"{images}/")]


@pytest.mark.parametrize("name", ["top.qcow2", "base.raw"])
def test_a_link_that_is_swapped_in_between_two_increments_is_noticed(
    quick: AgentProcess, folder: Path, name: str
) -> None:
    secret = raw_image(folder / "secret", MIB)
    images = folder / "images"
    images.mkdir(mode=0o755)
    healthy(images)
    job = quick.pull(images / "top.qcow2", increment=256 * 1024)
    quick.until(job["id"], lambda j: j["state"] == "waiting")
    swap(images / name, secret)
    before = permissions(secret)
    quick.post(f"/v1/jobs/{job['id']}/next")
    error = failure(quick, job)
    assert error["code"] in ("image_changed", "image_invalid", "outside_pools")
    assert error["remedy"]
    assert permissions(secret) == before
    assert eventually(lambda: quick.get("/v1/host")["storage_daemons"] == [], timeout=5)


@needs_root
@pytest.mark.root
def test_a_base_that_is_renamed_in_the_middle_is_closed_all_the_same(quick: AgentProcess, folder: Path) -> None:
    base = raw_image(folder / "base.raw", 8 * MIB)
    before = permissions(base)
    job = quick.pull(overlay(folder / "top.qcow2", base), bandwidth=16 * MIB)
    quick.until(job["id"], lambda j: j["state"] == "running")
    moved = base.rename(folder / "moved.raw")
    ended = quick.until_ended(job["id"])
    assert ended["state"] == "completed"
    if ended["revocation"] == "done":  # then it must be true
        assert not user_can_read(moved, TEST_USER)
        assert permissions(moved) == before
    else:
        assert ended["chain"]["kept"][0]["reason"]


# Depth and sizes


def deep_chain(folder: Path, layers: int) -> Path:
    """A chain of so many files: each a copy of the second one that names another file."""
    overlay(folder / "001.qcow2", raw_image(folder / "000.raw", MIB))
    data = overlay(folder / "002.qcow2", folder / "001.qcow2", "qcow2").read_bytes()
    for number in range(3, layers):
        path = folder / f"{number:03}.qcow2"
        path.write_bytes(data.replace(b"001.qcow2", f"{number - 1:03}.qcow2".encode()))
        path.chmod(0o600)
    return folder / f"{layers - 1:03}.qcow2"


def test_two_hundred_layers_are_served_and_pulled_and_one_more_is_refused(quick: AgentProcess, folder: Path) -> None:
    too_deep = deep_chain(folder, 201)
    problem = refusal(lambda: quick.pull(too_deep))
    assert problem["code"] == "chain_too_deep"
    assert problem["remedy"]
    nothing_left(quick, folder)
    top = folder / "199.qcow2"
    handle = connected(quick.export(top))
    assert handle.pread(MIB, 0) == (folder / "000.raw").read_bytes()
    assert pulled(quick, top)["state"] == "completed"
    assert handle.pread(MIB, 0) == (folder / "000.raw").read_bytes()
    handle.shutdown()
    assert backing_of(top) is None


@pytest.mark.parametrize("size", [3 * MIB + 512, 6 * MIB], ids=["smaller", "larger"])
@pytest.mark.parametrize("increment", [None, 1_234_567], ids=["continuous", "incremental"])
def test_an_overlay_of_another_size_than_its_base_reads_as_before(
    quick: AgentProcess, folder: Path, size: int, increment: int | None
) -> None:
    base = folder / "base.raw"
    base.write_bytes(os.urandom(4 * MIB + 77))  # and the base no multiple of a sector
    base.chmod(0o600)
    top = overlay(folder / "top.qcow2", base, size=size)
    subprocess.run(["qemu-io", "-c", f"write -P 7 {size - 4096} 512", str(top)], check=True, capture_output=True)
    truth = flat_copy(top)
    assert pulled(quick, top, **({"increment": increment} if increment else {}))["state"] == "completed"
    assert same_content(top, truth)
    assert truth.stat().st_size == size
    assert check_clean(top)


def test_an_increment_of_one_byte_is_one_step_and_a_limit_of_one_byte_a_second_can_be_aborted(
    quick: AgentProcess, folder: Path
) -> None:
    top = overlay(folder / "top.qcow2", raw_image(folder / "base.raw", 4 * MIB))
    job = quick.pull(top, increment=1, bandwidth=1)
    job = quick.until(job["id"], lambda j: j["state"] == "waiting")
    assert job["cursor"] == {"cur": 1, "end": 4 * MIB}
    quick.post(f"/v1/jobs/{job['id']}/abort")
    quick.until_ended(job["id"])
    for spec in ({"increment": 4 * MIB}, {}):
        again = eventually_pulls(quick, top, bandwidth=1, **spec)
        quick.until(again["id"], lambda j: j["state"] == "running")
        began = time.monotonic()
        quick.post(f"/v1/jobs/{again['id']}/abort")
        assert quick.until_ended(again["id"])["state"] == "aborted"
        assert time.monotonic() - began < 2


def eventually_pulls(agent: AgentProcess, target: Path, **spec: Any) -> Json:
    """A pull as soon as the one before has been cleared away."""

    def attempt() -> Json | None:
        try:
            return agent.pull(target, **spec)
        except ApiError as error:
            if error.code != "busy":
                raise
            return None

    found: Json = eventually(attempt, timeout=5)
    return found


def test_a_pull_can_be_started_as_soon_as_the_one_before_is_said_to_have_ended(
    quick: AgentProcess, folder: Path
) -> None:
    top = overlay(folder / "top.qcow2", raw_image(folder / "base.raw", 4 * MIB))
    for _ in range(5):
        job = quick.pull(top, bandwidth=MIB)
        quick.post(f"/v1/jobs/{job['id']}/abort")
        assert quick.until_ended(job["id"])["state"] == "aborted"
    assert pulled(quick, top)["state"] == "completed"


# Damage


def with_bad_tables(folder: Path) -> Path:
    """An overlay one of whose L2 entries points into the middle of a cluster (qcow2 specification: corrupt)."""
    top = overlay(folder / "top.qcow2", raw_image(folder / "base.raw", 4 * MIB))
    subprocess.run(["qemu-io", "-c", "write 0 1M", str(top)], check=True, capture_output=True)
    data = top.read_bytes()
    (table,) = struct.unpack_from(">Q", data, 40)
    (entries,) = struct.unpack_from(">Q", data, table)
    return patched(top, (entries & 0x00FFFFFFFFFFFE00) + 8 * 3, struct.pack(">Q", 0x8000000000055200))


@pytest.mark.parametrize("check", ["auto", "always"])
def test_damaged_tables_are_found_by_the_check_before_anything_is_written(
    shared: AgentProcess, folder: Path, check: str
) -> None:
    top = with_bad_tables(folder)
    with harmless(shared, folder):
        error = failure(shared, shared.pull(top, check=check))
        assert error["code"] == "image_corrupt"
        assert error["remedy"]


def test_damaged_tables_that_nobody_checks_cost_the_job_and_nothing_else(tmp_path: Path, folder: Path) -> None:
    settings = {**QUICK, "QMP_CALL_TIMEOUT": "0.5", "QMP_CONNECT_TIMEOUT": "0.5", "JOBS_ABORT_TIMEOUT": "1"}
    with AgentProcess(tmp_path, settings) as agent:
        job = agent.pull(with_bad_tables(folder), check="never")
        eventually(lambda: agent.job(job["id"])["state"] not in ("queued", "starting", "running"), timeout=5)
        other = folder / "other"
        other.mkdir(mode=0o755)
        assert pulled(agent, healthy(other))["state"] == "completed"
        if not agent.job(job["id"])["finished"]:
            agent.post(f"/v1/jobs/{job['id']}/abort")
            time.sleep(1)
            agent.post(f"/v1/jobs/{job['id']}/abort", {"force": True})
        ended = agent.until_ended(job["id"], timeout=20)
        assert ended["state"] in ("failed", "aborted")
        assert agent.daemons() == []


# Others who use the image


def test_an_image_that_another_program_writes_is_busy_and_names_it(shared: AgentProcess, folder: Path) -> None:
    top = healthy(folder)
    before = footprint(folder)
    program = subprocess.Popen(["qemu-io", "-f", "qcow2", str(top)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        assert eventually(lambda: leases(folder), timeout=5)
        for problem in (
            failure(shared, shared.pull(top)),
            refusal(lambda: shared.export(top)),
        ):
            assert problem["code"] == "busy"
            assert problem["remedy"]
            assert f"pid {program.pid}" in str(problem)
    finally:
        assert program.stdin is not None
        program.stdin.close()
        program.wait(10)
    nothing_left(shared, folder)
    assert eventually(lambda: footprint(folder) == before), footprint(folder)


def test_an_export_that_was_refused_can_be_tried_again_with_its_id(shared: AgentProcess, folder: Path) -> None:
    top = healthy(folder)
    own = "0ddba11c-0000-4000-8000-000000000001"
    program = subprocess.Popen(["qemu-io", "-f", "qcow2", str(top)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        assert eventually(lambda: leases(folder), timeout=5)
        assert refusal(lambda: shared.export(top, id=own))["code"] == "busy"
        assert refusal(lambda: shared.get(f"/v1/exports/{own}"))["code"] == "not_found"
    finally:
        assert program.stdin is not None
        program.stdin.close()
        program.wait(10)
    assert shared.export(top, id=own)["state"] == "running"
    shared.delete(f"/v1/exports/{own}")
    nothing_left(shared, folder)


def test_one_file_is_not_two_formats_at_a_time(shared: AgentProcess, folder: Path) -> None:
    top = healthy(folder)
    before = footprint(folder)
    export = shared.export(top, format="raw")
    assert refusal(lambda: shared.export(top, format="qcow2"))["code"] == "busy"
    for spec in ({}, {"increment": MIB}):
        assert failure(shared, eventually_pulls(shared, top, **spec))["code"] == "busy"
    shared.delete(f"/v1/exports/{export['id']}")
    nothing_left(shared, folder)
    assert eventually(lambda: footprint(folder) == before), footprint(folder)


def test_a_second_agent_takes_nothing_from_the_first(quick: AgentProcess, folder: Path, tmp_path: Path) -> None:
    export = quick.export(healthy(folder))
    user = ["--hypervisor-user", TEST_USER] if ROOT else []
    command = [sys.executable, "-m", "hostagent.cli.main", "serve", "--runtime-dir", str(quick.runtime), *user]
    for state in (quick.state, tmp_path / "another"):
        done = subprocess.run([*command, "--state-dir", str(state)], capture_output=True, text=True, timeout=30)
        assert done.returncode == 6, done.stderr
        assert "Traceback" not in done.stderr
        assert quick.get(f"/v1/exports/{export['id']}")["state"] == "running"
        connected(export).shutdown()


def test_a_file_that_is_no_socket_is_never_removed_for_one(tmp_path: Path) -> None:
    precious = tmp_path / "disk.raw"
    precious.write_bytes(b"precious")
    folders = ["--state-dir", str(tmp_path / "state"), "--runtime-dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "hostagent.cli.main", "serve", *folders, "--socket", str(precious)]
    user = ["--hypervisor-user", TEST_USER] if ROOT else []
    done = subprocess.run([*command, *user], capture_output=True, text=True, timeout=30)
    assert done.returncode not in (0, -signal.SIGTERM)
    assert precious.read_bytes() == b"precious"
    assert str(precious) in done.stderr


# Requests


POISON: list[tuple[str, Json, str, str | None, str | None]] = [
    ("/v1/jobs", {"operation": "copy", "target": "/x"}, "invalid", "dest", "absolute path"),
    ("/v1/jobs", {"operation": "commit", "target": "/x", "shallow": True}, "invalid", "shallow", "leave it out"),
    ("/v1/jobs", {"operation": "steal", "target": "/x"}, "invalid", "operation", "pull"),
    ("/v1/jobs", {"operation": "pull", "target": "web1/vda"}, "not_supported", "target", "libvirt.uri"),
    ("/v1/jobs", {"operation": "pull", "target": "./x"}, "invalid", "target", "absolute path"),
    ("/v1/jobs", {"operation": "pull", "target": ""}, "invalid", "target", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x\0y"}, "invalid", "target", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x\ny"}, "invalid", "target", "absolute path"),
    ("/v1/jobs", {"operation": "pull", "target": "/x\x1b[31my"}, "invalid", "target", "absolute path"),
    ("/v1/jobs", {"operation": "pull", "target": "/x\udcff"}, "invalid", "target", None),
    ("/v1/jobs", {"operation": "pull", "target": "/" + "x" * 5000}, "invalid", "target", None),
    ("/v1/jobs", {"operation": "pull", "target": "/" + "x" * 300}, "image_invalid", "target", "shorter"),
    ("/v1/jobs", {"operation": "pull", "target": ["/x"]}, "invalid", "target", None),
    ("/v1/jobs", {"operation": "pull"}, "invalid", "target", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "bandwith": 1}, "invalid", "bandwith", "did you mean bandwidth"),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "bandwidth": "50"}, "invalid", "bandwidth", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "bandwidth": -1}, "invalid", "bandwidth", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "bandwidth": 1.5}, "invalid", "bandwidth", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "increment": 0}, "invalid", "increment", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "increment": 1 << 63}, "invalid", "increment", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "increment": 10**400}, "invalid", "increment", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "increment": True}, "invalid", "increment", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "id": "not-a-uuid"}, "invalid", "id", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "check": "perhaps"}, "invalid", "check", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "labels": {"k": "v" * 300}}, "invalid", "labels.k", None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "labels": {f"{n}": "" for n in range(33)}}, "invalid", "labels",
     None),
    ("/v1/jobs", {"operation": "pull", "target": "/x", "labels": {"a": 1}}, "invalid", "labels.a", None),
    ("/v1/exports", {"image": "web1/vda"}, "not_supported", "image", "absolute path"),
    ("/v1/exports", {"image": "/x", "format": "vmdk"}, "invalid", "format", None),
    ("/v1/exports", {"image": "/x", "ttl": 0}, "invalid", "ttl", None),
    ("/v1/exports", {"image": "/x", "ttl": 1e300}, "invalid", "ttl", None),
    ("/v1/exports", {"image": "/x", "idle_timout": 5}, "invalid", "idle_timout", "did you mean idle_timeout"),
]  # fmt: skip


@pytest.mark.parametrize("case", POISON, ids=lambda case: f"{case[0][4:]}-{case[3]}-{json.dumps(case[1])[-24:]}")
def test_a_request_that_is_wrong_is_told_which_field_and_why(
    shared: AgentProcess, case: tuple[str, Json, str, str | None, str | None]
) -> None:
    path, body, code, field, remedy = case
    problem = refusal(lambda: shared.post(path, body))
    assert (problem["code"], problem["field"]) == (code, field), problem
    assert remedy is None or remedy in problem["remedy"], problem
    assert len(json.dumps(problem)) < 10_000
    assert all(job["target"] != body.get("target") for job in shared.get("/v1/jobs")["items"])


def send(agent: AgentProcess, body: bytes, path: str = "/v1/jobs", kind: str = "application/json") -> tuple[int, Json]:
    connection = http.client.HTTPConnection("localhost", timeout=5)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(5)
    connection.sock.connect(str(agent.socket))
    with contextlib.closing(connection):
        with contextlib.suppress(BrokenPipeError):  # an answer may come before the body is read
            connection.request("POST", path, body=body, headers={"content-type": kind})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b'{"operation":"pull","target":"/x","target":"/y"}', 400, "target"),
        (b'{"operation":"pull","labels":{"a":"1","a":"2"}}', 400, "a"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "api.max_json_depth"),
        (b'{"a":' + b'{"a":' * 17 + b"1" + b"}" * 18, 400, "api.max_json_depth"),
        (b"[" * 60000, 400, "api.max_json_depth"),
        (b'{"operation":"pull","target":"' + b"x" * 70000 + b'"}', 413, "api.max_body"),
        (b'{"operation":"pull","increment":NaN}', 400, "body"),
        (b'{"operation":"pull","bandwidth":' + b"9" * 5000 + b"}", 400, "body"),
        (b'"just a string"', 400, "body"),
        (b"\xff\xfe{}", 400, "body"),
        (b"{", 400, "body"),
        (b'{"operation": "' + b"\\" * 60000, 400, "body"),
    ],
)
def test_json_that_is_too_much_or_means_two_things_is_refused(
    shared: AgentProcess, body: bytes, status: int, field: str
) -> None:
    began = time.monotonic()
    found, problem = send(shared, body)
    assert (found, problem["field"]) == (status, field), problem
    assert time.monotonic() - began < 1
    assert shared.get("/healthz", timeout=1) == {"ok": True}


def test_a_body_that_is_not_json_by_its_type_is_refused(shared: AgentProcess) -> None:
    status, problem = send(shared, b'{"operation":"pull","target":"/x"}', kind="text/plain")
    assert (status, problem["field"]) == (400, "content-type")
    assert problem["remedy"]


@pytest.mark.parametrize(
    ("query", "code", "field"),
    [
        ("/v1/jobs?limti=3", "invalid", "limti"),
        ("/v1/jobs?limit=0", "invalid", "limit"),
        ("/v1/jobs?limit=99999999", "invalid", "limit"),
        ("/v1/jobs?state=bogus", "invalid", "state"),
        ("/v1/exports?state=bogus", "invalid", "state"),
        ("/v1/jobs?label=novalue", "invalid", "label"),
        ("/v1/jobs/x?wait=nan", "invalid", "wait"),
        ("/v1/jobs/%00%0a%1b%ff", "not_found", "id"),
        ("/v1/exports/..%2f..%2fetc", "not_found", None),
        ("/v1/grants/%0a", "not_found", "id"),
        ("/v1/events?since=-1", "invalid", "since"),
        ("/v1/events?since=99999999999999999999", "invalid", "since"),
        ("/v1/images/inspect?path=relative", "invalid", "path"),
        ("/v1/images/inspect?path=/%00", "invalid", "path"),
        ("/v1/images/inspect", "invalid", "path"),
        ("/v1/images/inspect?path=/proc/self/mem", "image_invalid", "path"),
        ("/v1/images/inspect?path=/proc/self/maps&format=raw", "image_invalid", "path"),
        ("/v1/images/inspect?path=/dev/tty", "image_invalid", "path"),
        ("/v1/nothing", "not_found", None),
    ],
)
def test_a_query_that_is_wrong_is_told_which_parameter(
    shared: AgentProcess, query: str, code: str, field: str | None
) -> None:
    problem = refusal(lambda: shared.get(query))
    assert (problem["code"], problem.get("field")) == (code, field), problem


def test_clients_that_send_slowly_or_not_at_all_are_cut_off_and_hold_up_nobody(tmp_path: Path) -> None:
    with AgentProcess(tmp_path, {**QUICK, "API_BODY_TIMEOUT": "0.5", "API_MAX_CONNECTIONS": "40"}) as agent:
        heads = [b"", b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\n"]
        heads += [b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"]
        clients = []
        for n in range(30):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(5)
            client.connect(str(agent.socket))
            client.sendall(heads[n % 3])
            clients.append(client)
        began = time.monotonic()
        assert agent.get("/v1/host", timeout=2)["host"]
        assert time.monotonic() - began < 0.5
        for n, client in enumerate(clients):
            said = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := client.recv(4096):
                    said += piece
            assert n % 3 < 2 or b"api.body_timeout" in said
            client.close()
        assert time.monotonic() - began < 4
        assert agent.get("/healthz") == {"ok": True}


def test_forty_requests_at_once_are_all_taken(quick: AgentProcess, folder: Path) -> None:
    base = raw_image(folder / "base.raw", MIB)
    first = overlay(folder / "00.qcow2", base).read_bytes()
    images = [folder / f"{number:02}.qcow2" for number in range(40)]
    for image in images:
        image.write_bytes(first)
        image.chmod(0o600)
    with ThreadPoolExecutor(len(images)) as crowd:
        jobs = list(crowd.map(quick.pull, images))
    assert {quick.until_ended(job["id"])["state"] for job in jobs} == {"completed"}
    nothing_left(quick, folder)


# Clients of an export


def connected(export: Json, name: str | None = None) -> Any:
    handle = nbd.NBD()
    handle.set_export_name(export["id"] if name is None else name)
    handle.add_meta_context("base:allocation")
    handle.connect_unix(export["socket"])
    handle.set_strict_mode(0)
    return handle


def denied(request: Callable[..., Any], *arguments: object) -> None:
    with pytest.raises(nbd.Error):
        request(*arguments)


def test_a_reader_cannot_write_by_any_request(quick: AgentProcess, folder: Path) -> None:
    top = healthy(folder)
    before = top.read_bytes(), (folder / "base.raw").read_bytes()
    export = quick.export(top)
    handle = connected(export)
    denied(handle.pwrite, b"x" * 512, 0)
    denied(handle.zero, 512, 0)
    denied(handle.trim, 65536, 0)
    denied(handle.cache, 65536, 0)
    denied(handle.pread, 512, MIB)
    denied(handle.pread, 1024, MIB - 512)
    assert handle.pread(MIB, 0) == before[1]
    for name in ("hostagent-control", "hostagent-reader", "", "../x", "l0", "export-" + export["id"]):
        denied(connected, export, name)
    handle.shutdown()
    quick.delete(f"/v1/exports/{export['id']}")
    nothing_left(quick, folder)
    assert (top.read_bytes(), (folder / "base.raw").read_bytes()) == before


def test_a_client_that_asked_for_caching_cannot_spoil_a_later_pull_unnoticed(quick: AgentProcess, folder: Path) -> None:
    """QEMU keeps what it could not write in its caches, so its daemon cannot write the image any more."""
    top = healthy(folder)
    truth = flat_copy(top)
    export = quick.export(top)
    handle = connected(export)
    denied(handle.cache, 65536, 0)
    job = pulled(quick, top)
    if job["state"] != "completed":
        assert job["error"]["code"] == "busy", job["error"]
        assert "export" in job["error"]["remedy"], job["error"]
    assert handle.pread(MIB, 0) == (folder / "base.raw").read_bytes()
    handle.shutdown()
    quick.delete(f"/v1/exports/{export['id']}")
    if job["state"] != "completed":
        assert pulled(quick, top)["state"] == "completed"
    assert same_content(top, truth)
    assert check_clean(top)


def test_a_client_that_writes_and_caches_while_a_pull_runs_changes_nothing_of_its_outcome(
    quick: AgentProcess, folder: Path
) -> None:
    base = raw_image(folder / "base.raw", 8 * MIB)
    middle = overlay(folder / "middle.qcow2", base)
    subprocess.run(["qemu-io", "-c", "write -P 5 1M 6M", str(middle)], check=True, capture_output=True)
    top = overlay(folder / "top.qcow2", middle, "qcow2")
    truth = flat_copy(top)
    export = quick.export(top)
    handle = connected(export)
    job = quick.pull(top, increment=8 * MIB, base=str(base), bandwidth=4 * MIB)
    quick.until(job["id"], lambda j: j["state"] == "running")
    internal = 0
    while quick.job(job["id"])["state"] == "running":
        denied(handle.pwrite, b"x" * 512, 0)
        for name in ("hostagent-control", "hostagent-reader"):
            with contextlib.suppress(nbd.Error):
                spy = connected(export, name)
                internal += 1
                denied(spy.pwrite, b"x" * 512, 4096)
                denied(spy.zero, 4096, 0)
                spy.cache(65536, 7 * MIB)  # copies up what reads the same
                spy.pread(512, 0)
    assert internal  # they were there, and were of no use
    assert quick.until_ended(job["id"])["state"] == "completed"
    assert handle.pread(8 * MIB, 0) == truth.read_bytes()
    handle.shutdown()
    quick.delete(f"/v1/exports/{export['id']}")
    assert same_content(top, truth)
    assert check_clean(top)
    assert backing_of(top) == "base.raw"


def test_clients_that_take_every_connection_cost_a_pull_at_most_its_time(quick: AgentProcess, folder: Path) -> None:
    top = overlay(folder / "top.qcow2", raw_image(folder / "base.raw", 4 * MIB))
    truth = flat_copy(top)
    export = quick.export(top)
    handles = [connected(export) for _ in range(4)]
    queued = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for client in queued:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect(export["socket"])
    problem = refusal(lambda: quick.export(top))
    assert (problem["code"], bool(problem["remedy"])) == ("limit", True)
    error = failure(quick, quick.pull(top, increment=MIB))
    assert (error["code"], bool(error["remedy"])) == ("limit", True)
    stop = refusal(lambda: quick.delete(f"/v1/exports/{export['id']}"))
    assert stop["code"] == "busy"
    assert str(os.getpid()) in stop["detail"]
    job = eventually_pulls(quick, top)  # a continuous one needs no connection, also not at its end
    assert quick.until_ended(job["id"])["state"] == "completed"
    assert all(handle.pread(4 * MIB, 0) == truth.read_bytes() for handle in handles)
    for client in [*handles, *queued]:
        client.close() if isinstance(client, socket.socket) else client.shutdown()
    assert eventually(lambda: not quick.get(f"/v1/exports/{export['id']}")["clients"], timeout=5)
    quick.delete(f"/v1/exports/{export['id']}")
    assert same_content(top, truth)


def test_a_crowd_of_clients_that_come_and_go_leaves_no_descriptor_behind(tmp_path: Path, folder: Path) -> None:
    with AgentProcess(tmp_path, QUICK) as agent:
        export = agent.export(healthy(folder))
        assert agent.process is not None
        fds = [Path(f"/proc/{pid}/fd") for pid in (agent.process.pid, export["pid"])]
        connected(export).shutdown()
        agent.get(f"/v1/exports/{export['id']}")
        time.sleep(0.1)
        before = [len(list(folder.iterdir())) for folder in fds]
        for _ in range(5):
            crowd = [connected(export) for _ in range(40)]
            assert len(agent.get(f"/v1/exports/{export['id']}")["clients"]) == 40
            del crowd  # without a goodbye
        assert eventually(lambda: [len(list(folder.iterdir())) for folder in fds] <= before, timeout=5)
        assert agent.get(f"/v1/exports/{export['id']}")["clients"] == []


# Other users of the host

ASK = """
import http.client, json, socket, sys
path, method, address, body = sys.argv[1:]
link = http.client.HTTPConnection("localhost", timeout=5)
link.sock = socket.socket(socket.AF_UNIX)
try:
    link.sock.connect(path)
except OSError as error:
    print(json.dumps([0, error.errno]))
    raise SystemExit
link.request(method, address, body or None, {"content-type": "application/json"} if body else {})
reply = link.getresponse()
print(json.dumps([reply.status, json.loads(reply.read() or "null")]))
"""


def ask_as(uid: int, groups: list[int], agent: AgentProcess, method: str, path: str, body: Json | None = None) -> Any:
    words = [str(agent.socket), method, path, json.dumps(body) if body else ""]
    done = subprocess.run(
        ["/usr/bin/python3", "-c", ASK, *words],
        user=uid, group=uid, extra_groups=groups, capture_output=True, text=True, timeout=20, check=True, cwd="/",
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def open_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[AgentProcess, Path]]:
    """An agent that the members of a group may use, and its pool."""
    folder = tmp_path_factory.mktemp("group")
    pool = folder / "pool"
    pool.mkdir(mode=0o755)
    settings = {**QUICK, "API_SOCKET_GROUP": GROUP, "IMAGES_POOLS": str(pool)}
    with reachable(pool), AgentProcess(folder, settings) as agent:
        yield agent, pool


def as_member(agent: AgentProcess, method: str, path: str, body: Json | None = None) -> Any:
    return ask_as(65534, [grp.getgrnam(GROUP).gr_gid], agent, method, path, body)


@needs_root
@pytest.mark.root
def test_a_local_user_gets_nothing_also_when_the_sockets_mode_is_opened_up(
    open_house: tuple[AgentProcess, Path],
) -> None:
    agent, _ = open_house
    assert ask_as(65534, [], agent, "GET", "/v1/jobs")[0] == 0
    agent.socket.chmod(0o666)
    for method, path in (("GET", "/v1/jobs"), ("GET", "/metrics"), ("GET", "/v1/events"), ("DELETE", "/v1/jobs/x")):
        status, problem = ask_as(65534, [], agent, method, path)
        assert (status, problem["code"]) == (403, "denied")
        assert problem["remedy"]
    agent.socket.chmod(0o660)
    for private in (agent.runtime / "qsd", agent.runtime / "nbd", agent.state):
        assert private.stat().st_mode & 0o007 == 0


@needs_root
@pytest.mark.root
def test_a_member_of_the_group_names_only_images_in_a_pool(open_house: tuple[AgentProcess, Path], folder: Path) -> None:
    agent, pool = open_house
    healthy(folder)
    healthy(pool)
    (pool / "way-out").symlink_to(folder)
    up_and_down = pool / os.path.relpath(folder, pool) / "top.qcow2"
    with harmless(agent, folder):
        for path in (folder / "top.qcow2", pool / "way-out" / "top.qcow2", up_and_down):
            for status, problem in (
                as_member(agent, "POST", "/v1/jobs", {"operation": "pull", "target": str(path)}),
                as_member(agent, "POST", "/v1/jobs", {"operation": "pull", "target": str(path), "dry_run": True}),
                as_member(agent, "POST", "/v1/exports", {"image": str(path)}),
                as_member(agent, "GET", f"/v1/images/inspect?path={path}"),
            ):
                assert (status, problem["code"]) == (422, "outside_pools"), problem
        source = str(pool / "top.qcow2")
        for dest in (folder / "made.qcow2", pool / "way-out" / "made.qcow2", pool / ".." / "made.qcow2"):
            spec = {"operation": "copy", "target": source, "dest": str(dest), "completion": "finish"}
            status, problem = as_member(agent, "POST", "/v1/jobs", spec)
            assert (status, problem["code"], problem["field"]) == (422, "outside_pools", "dest"), problem
        spec = {"operation": "copy", "target": source, "dest": "nbd://localhost/x"}
        status, problem = as_member(agent, "POST", "/v1/jobs", spec)
        assert (status, problem["field"]) == (403, "dest"), problem
    # of what lies elsewhere he does not even learn whether it exists
    for name in ("/etc/shadow", "/etc/nothing-like-this", pool / "way-out" / "nothing-like-this"):
        status, problem = as_member(agent, "GET", f"/v1/images/inspect?path={name}")
        assert (status, problem["code"]) == (422, "outside_pools"), problem
    status, job = as_member(agent, "POST", "/v1/jobs", {"operation": "pull", "target": str(pool / "top.qcow2")})
    assert status == 202
    assert agent.until_ended(job["id"])["state"] == "completed"


@needs_root
@pytest.mark.root
def test_a_member_of_the_group_does_not_get_the_rights_of_root_by_naming_its_jobs_id(
    open_house: tuple[AgentProcess, Path], folder: Path
) -> None:
    agent, _ = open_house
    spec = {"operation": "pull", "target": str(healthy(folder)), "id": "0ddba11c-0000-4000-8000-000000000002"}
    agent.until_ended(agent.post("/v1/jobs", spec)["id"])
    status, problem = as_member(agent, "POST", "/v1/jobs", spec)
    assert (status, problem["code"]) in ((409, "conflict"), (422, "outside_pools"))


@needs_root
@pytest.mark.root
def test_a_runtime_folder_that_somebody_else_prepared_is_not_used(tmp_path: Path) -> None:
    trap = tmp_path / "run"
    trap.mkdir(mode=0o777)
    os.chown(trap, 65534, 65534)
    trap.chmod(0o777)
    folders = ["--state-dir", str(tmp_path / "state"), "--runtime-dir", str(trap), "--hypervisor-user", TEST_USER]
    command = [sys.executable, "-m", "hostagent.cli.main", "serve", *folders]
    agent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = agent.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        agent.terminate()
        agent.communicate(timeout=20)
        pytest.fail("the agent serves in a folder that another user owns")
    assert agent.returncode not in (0, None)
    assert str(trap) in said
