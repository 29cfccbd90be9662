"""The local side: images that are not trusted, in use, on block devices; and files that are allocated beforehand."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from hostagent import client
from hostagent.errors import AgentError
from tests.client.images import MIB, allocated, chain, new_qcow2, run, sparse
from tests.client.model import Model
from tests.client.test_model_server import QUICK
from tests.qemu.test_device_exports import loop

SIZE = 8 * MIB
ROOT = os.geteuid() == 0


@pytest.fixture
def options(storage: client.Storage) -> client.Options:
    return replace(QUICK, storage=storage)


def sent(path: Path, options: client.Options, **more: object) -> bytes:
    """What a server has after an upload."""
    with Model(SIZE, durable=bytearray(b"x" * SIZE)) as model:
        client.upload(client.Upload(str(path), model.url, **more), options)  # type: ignore[arg-type]
        return bytes(model.durable)


def overlay(path: Path, backing: str, image_format: str = "raw") -> Path:
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", image_format, path, SIZE)
    return path


def test_a_header_that_a_guest_could_have_written_names_no_file(tmp_path: Path, options: client.Options) -> None:
    """A raw disk whose guest wrote a qcow2 header into it, with a backing file that he would like to have."""
    (tmp_path / "secret").write_bytes(b"s" * MIB)
    disk = overlay(tmp_path / "disk.img", "secret")
    with pytest.raises(AgentError) as refused:
        sent(disk, options)
    assert "--format" in (refused.value.remedy or "")
    raw = sent(disk, options, format="raw")
    assert raw.startswith(disk.read_bytes())
    assert sent(disk, options, format="qcow2").startswith(b"s" * MIB)


def test_a_folder_for_passing_files_may_have_a_long_name(
    tmp_path: Path, options: client.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("long" * 40)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    disk = overlay(tmp_path / "disk.qcow2", "base")
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    assert sent(disk, options) == b"b" * SIZE
    assert list(long.iterdir()) == []


def test_a_backing_file_elsewhere_is_not_read_unless_it_was_said(tmp_path: Path, options: client.Options) -> None:
    pool, folder = tmp_path / "pool", tmp_path / "images"
    for place in (pool, folder):
        place.mkdir()
    (pool / "base.raw").write_bytes(b"b" * MIB)
    disk = overlay(folder / "disk.qcow2", str(pool / "base.raw"))
    with pytest.raises(AgentError) as refused:
        sent(disk, options)
    assert refused.value.code == "outside_pools"
    assert str(pool) in refused.value.message and "--pool" in (refused.value.remedy or "")
    storage = replace(options.storage, pools=(str(pool),))
    assert sent(disk, replace(options, storage=storage)).startswith(b"b" * MIB)


def test_a_backing_file_that_is_a_link_is_not_followed(tmp_path: Path, options: client.Options) -> None:
    (tmp_path / "base.raw").symlink_to("/etc/passwd")
    with pytest.raises(AgentError, match="symbolic link"):
        sent(overlay(tmp_path / "disk.qcow2", "base.raw"), options)


def test_what_is_no_image_is_refused(tmp_path: Path, options: client.Options) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, words in (("fifo", "FIFO"), (".", "directory"), ("nothing", "does not exist")):
        with pytest.raises(AgentError, match=words):
            sent(tmp_path / name, options)
    with pytest.raises(AgentError, match="not a qcow2 image"):
        sent(sparse(tmp_path / "disk.raw", SIZE), options, format="qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", tmp_path / "ext.qcow2", SIZE)
    with pytest.raises(AgentError, match="data file"):
        sent(tmp_path / "ext.qcow2", options)
    loop_to_itself = overlay(tmp_path / "loop.qcow2", "loop.qcow2", "qcow2")
    with pytest.raises(AgentError) as refused:
        sent(loop_to_itself, options)
    assert refused.value.code == "chain_loop"


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_image_that_a_guest_writes_is_not_sent(tmp_path: Path, options: client.Options, image_format: str) -> None:
    disk = new_qcow2(tmp_path / "disk.qcow2", SIZE) if image_format == "qcow2" else sparse(tmp_path / "disk.raw", SIZE)
    command = ["qemu-io", "-f", image_format, str(disk)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write("write 0 64k\n")
        assert "wrote" in writer.stdout.readline()
        with pytest.raises(AgentError) as refused:
            sent(disk, options)
        assert refused.value.code == "busy"
        writer.stdin.close()
    sent(disk, options)


def test_nobody_writes_an_image_while_it_is_sent(tmp_path: Path, options: client.Options) -> None:
    disk = sparse(tmp_path / "disk.raw", SIZE)
    found: list[subprocess.CompletedProcess[str]] = []

    def show(progress: client.Progress) -> None:
        if progress.done and not found:
            command = ["qemu-io", "-f", "raw", "-c", "write 0 64k", str(disk)]
            found.append(subprocess.run(command, capture_output=True, text=True))

    with Model(SIZE) as model:
        client.upload(client.Upload(str(disk), model.url), replace(options, bandwidth=8 * MIB), show=show)
        assert bytes(model.durable) == disk.read_bytes()
    assert "lock" in found[0].stderr


@pytest.mark.skipif(not ROOT, reason="the storage daemon runs as another user only for root")
def test_root_gives_the_storage_daemon_no_more_than_its_user_has(tmp_path: Path, options: client.Options) -> None:
    disk = new_qcow2(tmp_path / "disk.qcow2", SIZE)
    disk.chmod(0o600)
    with pytest.raises(AgentError) as refused:
        sent(disk, options)
    assert refused.value.code == "denied"
    assert "setfacl" in (refused.value.remedy or "")


@pytest.mark.skipif(not ROOT, reason="the storage daemon runs as another user only for root")
def test_a_new_image_is_its_makers(tmp_path: Path, options: client.Options) -> None:
    """Although another user's storage daemon writes it, and where that user could not get to."""
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o700)
    with Model(SIZE) as model:
        client.download(client.Download(model.url, str(folder / "disk.qcow2")), options)
    found = (folder / "disk.qcow2").stat()
    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())


@pytest.mark.skipif(not ROOT, reason="loop devices need root")
def test_a_block_device_gets_every_byte_also_the_zeros(tmp_path: Path, options: client.Options) -> None:
    disk, image = tmp_path / "device", sparse(tmp_path / "disk.raw", SIZE)
    disk.write_bytes(b"x" * (SIZE + MIB))
    zeros = [
        {"start": 0, "length": MIB, "zero": False},
        {"start": MIB, "length": 3 * MIB, "zero": True},
        {"start": 4 * MIB, "length": 4 * MIB, "zero": False},
    ]
    content = bytearray(image.read_bytes())
    content[MIB : 4 * MIB] = bytes(3 * MIB)
    with loop(disk) as device, Model(SIZE, durable=content, extents=zeros) as model:
        found = client.download(client.Download(model.url, str(device)), options)
        assert found.moved == 5 * MIB
        run("sync", device)
        assert Path(device).read_bytes() == bytes(content) + b"x" * MIB, "what lies beyond the image is not touched"
        assert not list(tmp_path.glob("*.hostagent-resume"))
    small = tmp_path / "small"
    small.write_bytes(bytes(MIB))
    with loop(small) as device, Model(SIZE) as model:
        with pytest.raises(AgentError) as refused:
            client.download(client.Download(model.url, str(device)), options)
        assert refused.value.code == "no_space"


@pytest.mark.skipif(not ROOT, reason="loop devices need root")
def test_a_block_device_is_sent(tmp_path: Path, options: client.Options) -> None:
    image = sparse(tmp_path / "disk.raw", SIZE)
    with loop(image) as device:
        assert sent(Path(device), options) == image.read_bytes()


def test_a_preallocated_file_has_all_of_its_space(tmp_path: Path, options: client.Options) -> None:
    out = tmp_path / "out.raw"
    with Model(SIZE, extents=[{"start": 0, "length": SIZE, "zero": True}]) as model:
        client.download(client.Download(model.url, str(out), preallocate=True), options)
    assert out.read_bytes() == bytes(SIZE)
    assert allocated(out) >= SIZE


def test_a_file_system_without_room_is_said(tmp_path: Path, options: client.Options) -> None:
    """Here as a limit of the process's own; what was fetched until then stays."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20));"
        "from hostagent.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    with Model(SIZE, durable=bytearray(b"x" * SIZE)) as model:
        command = [sys.executable, "-c", script, "download", model.url, str(tmp_path / "out.raw")]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "out.raw" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.raw").exists()


def test_an_image_of_odd_size_is_whole(tmp_path: Path, options: client.Options) -> None:
    """A qcow2 image has whole sectors; the checksum is of the image all the same."""
    size = 3 * MIB + 100
    content = os.urandom(size)
    with Model(size, durable=bytearray(content)) as model:
        client.download(client.Download(model.url, str(tmp_path / "out.qcow2")), options)
        client.download(client.Download(model.url, str(tmp_path / "out.raw")), options)
    run("qemu-img", "convert", "-O", "raw", tmp_path / "out.qcow2", tmp_path / "back.raw")
    assert (tmp_path / "back.raw").read_bytes() == content + bytes(-size % 512)
    assert (tmp_path / "out.raw").read_bytes() == content


def test_an_empty_image_is_an_empty_file(tmp_path: Path, options: client.Options) -> None:
    with Model(0) as model:
        client.download(client.Download(model.url, str(tmp_path / "out.raw")), options)
        assert (tmp_path / "out.raw").read_bytes() == b""
        client.upload(client.Upload(str(tmp_path / "out.raw"), model.url), options)


def test_a_chain_is_what_a_guest_sees_of_it(tmp_path: Path, options: client.Options) -> None:
    top = chain(tmp_path, SIZE + 16 * MIB)
    size = SIZE + 16 * MIB
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, tmp_path / "flat.raw")
    with Model(size, durable=bytearray(b"x" * size)) as model:
        client.upload(client.Upload(str(top), model.url), options)
        assert bytes(model.durable) == (tmp_path / "flat.raw").read_bytes()
