"""Jobs that write to block devices and read from them: loop devices, which need root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent.access.leases import Lease, LeaseMode
from jobs.errors import JobError
from tests.harness import MIB, AgentProcess, Json, overlay, raw_image, same_content
from tests.qemu.faults import HASTE, PATIENCE, ROOT, eventually, storage_daemons
from tests.qemu.test_device_exports import grants_of, loop, node
from tests.qemu.test_exports import refusal, stop

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.root,
    pytest.mark.skipif(not ROOT, reason="loop devices need root"),
]

SIZE = 8 * MIB


def dirty(path: Path, size: int) -> Path:
    """A file that was used before: no copy may leave any of this where the image has zeros."""
    path.write_bytes(b"\xee" * size)
    path.chmod(0o600)
    return path


def empty(path: Path, size: int) -> Path:
    path.touch(0o600)
    os.truncate(path, size)
    return path


@pytest.fixture
def image(folder: Path) -> Path:
    """An overlay with data of its own and of its base, and zeros in between."""
    base = raw_image(folder / "base.raw", SIZE, 2 * MIB)
    top = overlay(folder / "top.qcow2", base)
    subprocess.run(["qemu-io", "-c", "write -q -P 7 4M 1M", str(top)], check=True)
    return top


@pytest.fixture
def device(folder: Path) -> Iterator[Path]:
    with loop(empty(folder / "device", SIZE)) as device:
        yield device


@pytest.fixture
def used(folder: Path) -> Iterator[Path]:
    """A device with content, larger than the image."""
    with loop(dirty(folder / "used", SIZE + 2 * MIB)) as device:
        yield device


def run(agent: AgentProcess, operation: str, target: Path, **spec: Any) -> Json:
    job = agent.post("/v1/jobs", {"operation": operation, "target": str(target), **spec})
    return agent.until_ended(job["id"])


def copy(agent: AgentProcess, target: Path, dest: Path, **spec: Any) -> Json:
    return run(agent, "copy", target, dest=str(dest), **{"completion": "finish", **spec})


def refused(agent: AgentProcess, target: Path, dest: Path, **spec: Any) -> Any:
    body = {"operation": "copy", "target": str(target), "dest": str(dest), "completion": "finish", **spec}
    return refusal(agent, "POST", "/v1/jobs", body)


def content(image: Path, folder: Path) -> bytes:
    plain = folder / "plain.raw"
    command = ["qemu-img", "convert", "-O", "raw", str(image), str(plain)]
    # A storage daemon that is ending, its job long told, may have it locked for a moment.
    assert eventually(lambda: subprocess.run(command, timeout=PATIENCE).returncode == 0)
    try:
        return plain.read_bytes()
    finally:
        plain.unlink()


# A device as target


def test_an_image_is_copied_to_an_empty_device(agent: AgentProcess, image: Path, device: Path, folder: Path) -> None:
    before = node(device)
    job = copy(agent, image, device)
    assert (job["state"], job["dest"]) == (
        "completed",
        {"path": str(device), "format": "raw", "state": "complete"},
    ), job
    assert device.read_bytes() == content(image, folder)
    assert eventually(lambda: node(device) == before)
    assert eventually(lambda: not grants_of(agent, device)), grants_of(agent, device)


def test_a_device_with_content_needs_a_sign_of_will(agent: AgentProcess, image: Path, used: Path, folder: Path) -> None:
    before = used.read_bytes()
    error = refused(agent, image, used)
    assert (error.code, "--reuse-external" in error.body["remedy"]) == ("conflict", True), error.body
    assert used.read_bytes() == before
    job = copy(agent, image, used, reuse_external=True)
    assert job["state"] == "completed", job
    after = used.read_bytes()
    assert after[:SIZE] == content(image, folder), "zeros of the image must be zeros of the copy"
    assert after[SIZE:] == before[SIZE:], "what lies beyond the image is not the copy's"


def test_a_device_that_is_too_small_mounted_or_part_of_the_chain_is_refused(
    agent: AgentProcess, image: Path, folder: Path, used: Path, tmp_path: Path
) -> None:
    with loop(empty(folder / "small", SIZE - MIB)) as small:
        assert refused(agent, image, small).code == "invalid"
    subprocess.run(["mkfs.ext4", "-q", "-F", str(used)], check=True)
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", str(used), str(place)], check=True)
    try:
        (place / "precious").write_bytes(b"p" * 5000)
        error = refused(agent, image, used, reuse_external=True)
        assert (error.code, "mounted" in error.body["detail"]) == ("busy", True), error.body
        subprocess.run(["sync", "-f", str(place)], check=True)
        assert (place / "precious").read_bytes() == b"p" * 5000
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert subprocess.run(["fsck.ext4", "-n", "-f", str(used)], capture_output=True).returncode == 0
    os.truncate(image, SIZE)
    with loop(image) as above:  # the source under another name
        job = copy(agent, image, above, reuse_external=True)
        assert (job["state"], job["error"]["code"]) == ("failed", "busy"), job


def test_a_pivot_takes_the_exports_over_to_a_larger_device(
    tmp_path: Path, image: Path, used: Path, folder: Path
) -> None:
    truth = content(image, folder)
    with AgentProcess(tmp_path, HASTE) as agent:
        export = agent.export(image)
        job = copy(agent, image, used, reuse_external=True, completion="pivot")
        assert job["state"] == "completed", (job["error"], job)
        now = agent.get(f"/v1/exports/{export['id']}")
        assert (now["path"], now["size"], now["state"]) == (str(used), SIZE, "running")
        seen = tmp_path / "seen.raw"
        subprocess.run(["nbdcopy", export["uri"], str(seen)], check=True, timeout=PATIENCE)
        assert seen.read_bytes() == truth, "of the image's own size"
        assert refusal(agent, "POST", "/v1/exports", {"image": str(used), "format": "raw"}).code == "busy"
        agent.kill()
        agent.start()
        seen.unlink()
        subprocess.run(["nbdcopy", export["uri"], str(seen)], check=True, timeout=PATIENCE)
        assert seen.read_bytes() == truth
        stop(agent, export)
        whole = agent.export(used, format="raw")
        assert whole["size"] == SIZE + 2 * MIB
        stop(agent, whole)


def test_qcow2_on_a_device_new_shallow_and_prepared(
    agent: AgentProcess, image: Path, folder: Path, tmp_path: Path
) -> None:
    with loop(empty(folder / "new", 2 * SIZE)) as new:
        job = copy(agent, image, new, format="qcow2")
        assert (job["state"], job["dest"]["format"]) == ("completed", "qcow2"), job
        assert eventually(lambda: storage_daemons(agent) == [])
        assert same_content(new, image)
        again = refused(agent, image, new, format="qcow2")
        assert again.code == "conflict"
        job = copy(agent, image, new, format="qcow2", reuse_external=True)
        assert job["state"] == "completed", (job["error"], job)
        assert eventually(lambda: storage_daemons(agent) == [])
        assert same_content(new, image)
    with loop(empty(folder / "thin", 2 * SIZE)) as thin:
        job = copy(agent, image, thin, shallow=True)
        assert (job["state"], job["dest"]["format"]) == ("completed", "qcow2"), job
        assert eventually(lambda: storage_daemons(agent) == [])
        assert same_content(thin, image)
        assert str(folder / "base.raw").encode() in thin.read_bytes()[:4096]


def test_a_qcow2_that_a_device_has_no_room_for_fails_and_is_marked(
    agent: AgentProcess, image: Path, folder: Path
) -> None:
    before = content(image, folder)
    with loop(empty(folder / "narrow", 2 * MIB)) as narrow:
        job = copy(agent, image, narrow, format="qcow2")
        assert (job["state"], job["dest"]["state"]) == ("failed", "unusable"), job
        assert job["error"]["code"] == "no_space", job["error"]
    assert content(image, folder) == before


def test_a_copy_to_a_device_that_is_aborted_or_killed_is_unusable(
    tmp_path: Path, image: Path, device: Path, folder: Path
) -> None:
    before, permissions = content(image, folder), node(device)
    body = {"operation": "copy", "target": str(image), "dest": str(device), "completion": "finish", "bandwidth": MIB}
    with AgentProcess(tmp_path, HASTE) as agent:
        job = agent.post("/v1/jobs", body)
        agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] > 0)
        agent.post(f"/v1/jobs/{job['id']}/abort")
        job = agent.until_ended(job["id"])
        assert (job["state"], job["dest"]["state"]) == ("aborted", "unusable"), job
        body["reuse_external"] = True
        job = agent.post("/v1/jobs", body)
        agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] > 0)
        agent.kill()
        agent.start()
        with pytest.raises(OSError, match="busy"):
            os.close(os.open(device, os.O_RDWR | os.O_EXCL))  # claimed again
        job = agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 1024 * MIB})
        job = agent.until_ended(job["id"])
        assert (job["state"], job["dest"]["state"]) == ("completed", "complete"), job
        assert device.read_bytes() == before
        assert eventually(lambda: node(device) == permissions)


# Devices in the chain


def qcow2_on(folder: Path, name: str, base: Path, base_format: str, *, room: int) -> Path:
    """The file that is to be a device: an overlay, in a file of `room` bytes."""
    image = overlay(folder / name, base, base_format, size=SIZE)
    subprocess.run(["qemu-io", "-c", "write -q -P 7 4M 1M", str(image)], check=True)
    os.truncate(image, room)
    return image


def test_an_overlay_on_a_device_is_pulled_and_copied(tmp_path: Path, folder: Path) -> None:
    base = raw_image(folder / "base.raw", SIZE, 2 * MIB)
    below = folder / "device"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(below)], check=True)
    subprocess.run(["qemu-io", "-c", "write -q -P 7 4M 1M", str(below)], check=True)
    below.chmod(0o600)
    truth = content(below, folder)
    os.truncate(below, 2 * SIZE)
    with loop(below) as device, AgentProcess(tmp_path, {**HASTE, "IMAGES_POOLS": str(folder)}) as agent:
        job = copy(agent, device, folder / "copy.raw", source_format="qcow2", format="raw")
        assert job["state"] == "completed", (job["error"], job)
        assert (folder / "copy.raw").read_bytes() == truth
        job = run(agent, "pull", device)
        assert job["state"] == "completed", (job["error"], job)
        assert content(device, folder) == truth
        info = subprocess.run(["qemu-img", "info", str(device)], capture_output=True, text=True, check=True)
        assert "backing file" not in info.stdout


def test_an_overlay_that_outgrows_its_device_fails_and_loses_nothing(tmp_path: Path, folder: Path) -> None:
    base = raw_image(folder / "base.raw", SIZE)
    below = overlay(folder / "device", base)
    truth = content(below, folder)
    os.truncate(below, 2 * MIB)
    with loop(below) as device, AgentProcess(tmp_path, {**HASTE, "IMAGES_POOLS": str(folder)}) as agent:
        rebase = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(base), str(device)]
        subprocess.run(rebase, check=True)
        job = run(agent, "pull", device)
        assert (job["state"], job["error"]["code"]) == ("failed", "no_space"), job["error"]
        assert any("may need" in warning for warning in job["warnings"])
        assert content(device, folder) == truth


def test_a_backing_device_must_be_in_a_pool_and_is_committed_into(tmp_path: Path, folder: Path) -> None:
    with loop(raw_image(folder / "base", SIZE)) as device:
        link = Path(f"/dev/disk/hostagent-test-{os.getpid()}")
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(device)
        try:
            mid = overlay(folder / "mid.qcow2", link)
            top = overlay(folder / "top.qcow2", mid, "qcow2")
            subprocess.run(["qemu-io", "-c", "write -q -P 7 4M 1M", str(mid)], check=True)
            subprocess.run(["qemu-io", "-c", "write -q -P 8 6M 1M", str(top)], check=True)
            truth = content(top, folder)
            with AgentProcess(tmp_path, HASTE) as agent:
                assert (
                    refusal(agent, "POST", "/v1/jobs", {"operation": "pull", "target": str(top)}).code
                    == "outside_pools"
                )
                agent.stop()
                agent.settings["IMAGES_POOLS"] = str(link)
                agent.start()
                job = run(agent, "commit", top, top=str(mid), delete=True)
                assert job["state"] == "completed", (job["error"], job)
                info = subprocess.run(["qemu-img", "info", str(top)], capture_output=True, text=True, check=True).stdout
                assert f"backing file: {link}" in info, "the name that lasts, and not the kernel's own"
                assert content(top, folder) == truth
                job = run(agent, "commit", top, completion="pivot")
                assert job["state"] == "completed", (job["error"], job)
            assert device.read_bytes() == truth
        finally:
            link.unlink()


def test_what_another_device_stands_on_is_not_written(tmp_path: Path, image: Path, folder: Path) -> None:
    above = folder / "above"
    with loop(raw_image(folder / "base", SIZE)) as device:
        before = device.read_bytes()
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(device), "-F", "raw", str(above)], check=True
        )
        with loop(above) as other, AgentProcess(tmp_path, HASTE) as agent:
            error = refused(agent, image, device, reuse_external=True)
            assert (error.code, error.body["holders"]) == ("busy", [str(other)]), error.body
        assert device.read_bytes() == before


def test_a_device_that_shrinks_under_a_copy_fails_it(tmp_path: Path, folder: Path) -> None:
    source = raw_image(folder / "source", SIZE)
    with loop(source) as device, AgentProcess(tmp_path, HASTE) as agent:
        body = {"operation": "copy", "target": str(device), "source_format": "raw", "dest": str(folder / "copy.raw")}
        job = agent.post("/v1/jobs", {**body, "completion": "finish", "bandwidth": 2 * MIB})
        agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] > 0)
        os.truncate(source, SIZE - 2 * MIB)
        subprocess.run(["losetup", "--set-capacity", str(device)], check=True)
        agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 1024 * MIB})
        job = agent.until_ended(job["id"])
        assert job["state"] == "failed", job
        assert not (folder / "copy.raw").exists()


def test_an_image_on_a_device_gets_no_power_over_its_neighbours(tmp_path: Path, folder: Path, device: Path) -> None:
    hostile, before = folder / "hostile", node(device)
    for name in (str(device), device.name):
        hostile.unlink(missing_ok=True)
        create = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", str(hostile), str(SIZE)]
        subprocess.run(create, check=True)
        os.truncate(hostile, 2 * MIB)
        with loop(hostile) as top, AgentProcess(tmp_path, HASTE) as agent:
            for path, body in (
                ("/v1/exports", {"image": str(top)}),
                ("/v1/jobs", {"operation": "pull", "target": str(top)}),
            ):
                assert refusal(agent, "POST", path, body).code == "outside_pools"
            assert node(device) == before


# One image under two names


def test_a_file_and_the_loop_device_on_it_are_one(agent: AgentProcess, folder: Path, device: Path) -> None:
    file = folder / "device"
    written = agent.export(device, format="raw", writable=True)
    for writable in (True, False):
        error = refusal(agent, "POST", "/v1/exports", {"image": str(file), "format": "raw", "writable": writable})
        assert error.code == "busy", error.body
    stop(agent, written)
    read = agent.export(file, format="raw")
    assert (
        refusal(agent, "POST", "/v1/exports", {"image": str(device), "format": "raw", "writable": True}).code == "busy"
    )
    stop(agent, agent.export(device, format="raw"))
    stop(agent, read)
    error = refusal(agent, "POST", "/v1/exports", {"image": str(file), "format": "raw", "writable": True})
    assert (error.code, str(device) in error.body["detail"]) == ("busy", True), error.body
    stop(agent, agent.export(device, format="raw", writable=True))


def test_leases_know_what_a_device_stands_on(device: Path, folder: Path) -> None:
    def busy(path: Path, mode: LeaseMode) -> bool:
        with path.open("rb") as stream:
            try:
                take = Lease.exclusive if mode is LeaseMode.EXCLUSIVE else Lease.shared
                take(stream.fileno()).release()
            except JobError as error:
                assert error.code == "busy"
                return True
        return False

    file = folder / "device"
    with device.open("rb") as stream, Lease.shared(stream.fileno()) as lease:
        for mode in (LeaseMode.EXCLUSIVE, LeaseMode.SHARED, LeaseMode.EXCLUSIVE, LeaseMode.SHARED):
            lease.convert(mode)
            assert busy(file, LeaseMode.SHARED) is (mode is LeaseMode.EXCLUSIVE)
            assert busy(file, LeaseMode.EXCLUSIVE)
        with file.open("rb") as below, Lease.shared(below.fileno()):
            with pytest.raises(JobError):
                lease.convert(LeaseMode.EXCLUSIVE)
            assert not busy(device, LeaseMode.SHARED)
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))  # nothing is left of the refused claim
        lease.convert(LeaseMode.EXCLUSIVE)
    assert not busy(device, LeaseMode.EXCLUSIVE)
    assert not busy(file, LeaseMode.SHARED)
