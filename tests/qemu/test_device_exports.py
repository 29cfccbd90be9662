"""Exports of block devices: loop devices, which need root."""

from __future__ import annotations

import importlib
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hostagent.access.leases import Lease, LeaseMode
from jobs.errors import JobError
from tests.harness import MIB, AgentProcess, Json, raw_image
from tests.qemu.faults import HASTE, PATIENCE, ROOT, eventually, permissions
from tests.qemu.test_exports import refusal, show, stop

nbd: Any = importlib.import_module("nbd")

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.root,
    pytest.mark.skipif(not ROOT, reason="loop devices need root"),
]

SIZE = 16 * MIB


@contextmanager
def loop(image: Path) -> Iterator[Path]:
    made = subprocess.run(["losetup", "--show", "--find", str(image)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr}")
    device = Path(made.stdout.strip())
    before = device.stat()
    try:
        forget_grants(device)
        yield device
    finally:
        forget_grants(device)
        os.chown(device, before.st_uid, before.st_gid)
        subprocess.run(["losetup", "--detach", str(device)], check=True)


def forget_grants(device: Path) -> None:
    """The host's node outlives a test that failed, whose agent took nothing back."""
    subprocess.run(["setfacl", "--remove-all", str(device)], check=True)


@pytest.fixture
def device(folder: Path) -> Iterator[Path]:
    with loop(raw_image(folder / "disk.raw", SIZE)) as device:
        yield device


def node(device: Path) -> tuple[Any, ...]:
    """All that an export may not leave changed on the device's node."""
    found = device.stat()
    return found.st_mode, found.st_uid, found.st_gid, permissions(device)


def grants_of(agent: AgentProcess, device: Path) -> list[Json]:
    return [grant for grant in agent.get("/v1/grants")["items"] if grant["path"] == str(device)]


def test_a_block_device_is_served_and_its_node_is_as_before(agent: AgentProcess, device: Path, tmp_path: Path) -> None:
    before, content = node(device), device.read_bytes()
    export = agent.export(device, format="raw")
    assert (export["size"], export["path"]) == (SIZE, str(device))
    assert [grant["mode"] for grant in grants_of(agent, device)] == ["r"]
    copy = tmp_path / "copy.raw"
    subprocess.run(["nbdcopy", export["uri"], str(copy)], check=True, timeout=PATIENCE)
    assert copy.read_bytes() == content
    part = agent.export(device, format="raw", offset=MIB, size=MIB)
    client = nbd.NBD()
    client.connect_uri(part["uri"])
    assert client.pread(MIB, 0) == content[MIB : 2 * MIB]
    client.shutdown()
    stop(agent, part)
    stop(agent, export)
    assert eventually(lambda: node(device) == before)
    assert eventually(lambda: not grants_of(agent, device))


def test_a_block_device_is_written_and_the_agent_may_be_killed_meanwhile(tmp_path: Path, device: Path) -> None:
    before = node(device)
    with AgentProcess(tmp_path, HASTE) as agent:
        export = agent.export(device, format="raw", writable=True)
        client = nbd.NBD()
        client.connect_uri(export["uri"])
        client.pwrite(b"x" * MIB, 3 * MIB)
        agent.kill()
        agent.start()
        assert show(agent, export)["state"] == "running"
        assert refusal(agent, "POST", "/v1/exports", {"image": str(device), "format": "raw"}).code == "busy"
        with pytest.raises(OSError, match="busy"):
            os.close(os.open(device, os.O_RDWR | os.O_EXCL))  # claimed again by the agent that came back
        client.pwrite(b"y" * MIB, 4 * MIB)
        client.shutdown()
        stop(agent, export)
        assert eventually(lambda: node(device) == before)
    with device.open("rb") as stream:
        stream.seek(3 * MIB)
        assert stream.read(2 * MIB) == b"x" * MIB + b"y" * MIB


def test_a_qcow2_image_on_a_device_is_served_with_its_format(agent: AgentProcess, folder: Path) -> None:
    image = folder / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "8M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -q -P 9 1M 1M", str(image)], check=True)
    os.truncate(image, 4 * MIB)
    with loop(image) as device:
        export = agent.export(device)
        assert (export["format"], export["size"]) == ("qcow2", 8 * MIB)
        client = nbd.NBD()
        client.connect_uri(export["uri"])
        assert client.pread(MIB, MIB) == b"\x09" * MIB
        client.shutdown()
        stop(agent, export)


def test_a_device_that_the_kernel_uses_is_not_written(agent: AgentProcess, device: Path, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", str(device)], check=True)
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", str(device), str(place)], check=True)
    try:
        error = refusal(agent, "POST", "/v1/exports", {"image": str(device), "format": "raw", "writable": True})
        assert (error.code, "mounted" in error.body["detail"]) == ("busy", True), error.body
    finally:
        subprocess.run(["umount", str(place)], check=True)
    export = agent.export(device, format="raw", writable=True)
    mounted = subprocess.run(["mount", str(device), str(place)], capture_output=True, text=True)
    if not mounted.returncode:
        subprocess.run(["umount", str(place)], check=True)
    assert mounted.returncode, "mounted while a client may write it"
    stop(agent, export)
    subprocess.run(["mount", str(device), str(place)], check=True)
    subprocess.run(["umount", str(place)], check=True)


def test_a_node_elsewhere_is_refused(agent: AgentProcess, device: Path, folder: Path) -> None:
    for other in (folder / "node", Path(f"/dev/hostagent-test-{os.getpid()}")):
        os.mknod(other, 0o600 | stat.S_IFBLK, device.stat().st_rdev)
        try:
            error = refusal(agent, "POST", "/v1/exports", {"image": str(other), "format": "raw"})
        finally:
            other.unlink()
        assert error.code == "image_invalid"
        assert str(device) in error.body["remedy"]


def test_a_lease_claims_the_device_while_it_is_exclusive(device: Path) -> None:
    def claimed() -> bool:
        try:
            os.close(os.open(device, os.O_RDWR | os.O_EXCL))
        except OSError:
            return True
        return False

    with device.open("rb") as stream, Lease.shared(stream.fileno()) as lease:
        for mode in (LeaseMode.EXCLUSIVE, LeaseMode.SHARED, LeaseMode.EXCLUSIVE):
            lease.convert(mode)
            assert claimed() is (mode is LeaseMode.EXCLUSIVE)
            with pytest.raises(JobError) as refused:
                Lease.exclusive(stream.fileno())
            assert refused.value.code == "busy"
    assert not claimed()
