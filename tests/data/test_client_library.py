"""ovirt-imageio's own client library, unchanged, against our daemon: what it copies is proven by the bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ovirt_imageio import client

from tests.data.daemons import Daemon, Ours
from tests.data.exports import NbdServer, QemuNbd, Qsd
from tests.data.pki import Pki

MIB = 1 << 20
SIZE = 40 * MIB
WORKERS = [pytest.param(1, marks=pytest.mark.slow), 4]


@pytest.fixture(
    scope="module",
    params=[
        "tls",
        "unix",
        pytest.param("plain", marks=pytest.mark.slow),
        pytest.param("tls-then-unix", marks=pytest.mark.slow),
    ],
)
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Daemon]:
    """The client goes over to the unix socket that OPTIONS names, where it can."""
    tls = pki if "tls" in request.param else None
    with Ours(tmp_path_factory.mktemp("daemon"), tls=tls) as process:
        if "unix" not in request.param:
            Path(process.local_path).unlink()
        yield process


def over(daemon: Daemon) -> Any:
    """What the client is given besides the URL."""
    return {"cafile": daemon.cafile, "secure": daemon.pki is not None}


def qemu_io(image: Path, image_format: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", image_format, *words, str(image)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def chain(home: Path) -> Path:
    """Data, zeros and holes in two layers of qcow2 above a raw base that is shorter than they are."""
    base, middle, top = home / "base.raw", home / "middle.qcow2", home / "top.qcow2"
    base.write_bytes(os.urandom(10 * MIB + 512))
    for layer, below, kind in ((middle, base, "raw"), (top, middle, "qcow2")):
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(below), "-F", kind, str(layer), str(SIZE)]
        subprocess.run(command, check=True)
    pattern = home / "pattern"
    pattern.write_bytes(os.urandom(3 * MIB))
    qemu_io(
        middle,
        "qcow2",
        f"write -s {pattern} {6 * MIB} {3 * MIB}",
        f"write -z {2 * MIB} {MIB}",
        f"write -P 7 {20 * MIB} 1M",
    )
    qemu_io(
        top,
        "qcow2",
        f"write -s {pattern} {12 * MIB} {3 * MIB}",
        f"write -z {7 * MIB} 64k",
        f"write -P 9 {SIZE - 65536} 64k",
    )
    return top


@pytest.fixture(scope="module")
def flat(home: Path, chain: Path) -> Path:
    """The chain's content."""
    path = home / "flat.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(chain), str(path)], check=True)
    return path


def same(one: Path, other: Path, *formats: str) -> bool:
    words = [word for flag, kind in zip(("-f", "-F"), formats, strict=False) for word in (flag, kind)]
    done = subprocess.run(["qemu-img", "compare", *words, str(one), str(other)], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


def target(folder: Path, kind: str) -> Path:
    """An image full of what must be gone after an upload."""
    path = folder / f"target.{kind}"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, str(path), str(SIZE)], check=True)
    qemu_io(path, kind, f"write -P 238 0 {SIZE}")
    return path


def served(path: Path, kind: str, **options: Any) -> NbdServer:
    return Qsd(path, kind, **options) if kind == "qcow2" else QemuNbd(path, kind, **options)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("source", ["flat", "chain"])
def test_an_upload_makes_the_image_what_the_file_is(
    daemon: Daemon, tmp_path: Path, chain: Path, flat: Path, source: str, kind: str, workers: int
) -> None:
    file, image = (flat if source == "flat" else chain), target(tmp_path, kind)
    with served(image, kind) as server:
        ticket = daemon.ticket(server.url, SIZE, "read", "write")
        client.upload(str(file), daemon.url(ticket), max_workers=workers, buffer_size=256 * 1024, **over(daemon))
    assert same(flat, image, "raw", kind)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_download_makes_a_file_of_what_the_image_is(
    daemon: Daemon, tmp_path: Path, chain: Path, flat: Path, kind: str, workers: int
) -> None:
    copy = tmp_path / f"copy.{kind}"
    for server in (QemuNbd(chain, "qcow2", read_only=True), QemuNbd(flat, "raw", read_only=True)):
        with server:
            ticket = daemon.ticket(server.url, SIZE)
            client.download(
                daemon.url(ticket), str(copy), fmt=kind, max_workers=workers, buffer_size=256 * 1024, **over(daemon)
            )
        assert same(flat, copy, "raw", kind)
        copy.unlink()


def test_a_file_goes_both_ways(daemon: Daemon, tmp_path: Path, flat: Path) -> None:
    """A raw file that the daemon opens by itself."""
    image, copy = target(tmp_path, "raw"), tmp_path / "copy.raw"
    ticket = daemon.ticket(f"file://{image}", SIZE, "read", "write")
    client.upload(str(flat), daemon.url(ticket), **over(daemon))
    assert digest(image) == digest(flat)
    client.download(daemon.url(ticket), str(copy), fmt="raw", **over(daemon))
    assert digest(copy) == digest(flat)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_incremental_download_has_what_changed_and_no_more(daemon: Daemon, tmp_path: Path) -> None:
    image, full, increment = (tmp_path / f"{name}.qcow2" for name in ("image", "full", "increment"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(SIZE)], check=True)
    qemu_io(image, "qcow2", "write -P 1 0 8M", "write -P 2 16M 8M")
    with Qsd(image, "qcow2", read_only=True) as server:
        client.download(daemon.url(daemon.ticket(server.url, SIZE)), str(full), **over(daemon))
    subprocess.run(["qemu-img", "bitmap", "--add", str(image), "since"], check=True)
    qemu_io(image, "qcow2", "write -P 3 1M 64k", "write -z 17M 1M", "write -P 4 39M 1M", "discard 3M 1M")
    with Qsd(image, "qcow2", read_only=True, bitmaps=["since"]) as server:
        ticket = daemon.ticket(server.url, SIZE, dirty=True)
        client.download(
            daemon.url(ticket),
            str(increment),
            incremental=True,
            backing_file=str(full),
            backing_format="qcow2",
            **over(daemon),
        )
    assert same(image, increment, "qcow2", "qcow2")
    assert not same(image, full, "qcow2", "qcow2")
    assert increment.stat().st_size < 4 * MIB, "what did not change is not in it"


def test_a_client_of_its_own_reads_writes_zeroes_and_flushes(daemon: Daemon, tmp_path: Path) -> None:
    image = target(tmp_path, "raw")
    data = os.urandom(MIB)
    with QemuNbd(image) as server:
        ticket = daemon.ticket(server.url, SIZE, "read", "write", sparse=True)
        one = client.ImageioClient(daemon.url(ticket), **over(daemon))
        try:
            where = one._backend.server_address
            assert (where == daemon.local_path) == Path(daemon.local_path).exists(), where
            assert one.size() == SIZE
            assert one.max_readers > 1 and one.max_writers > 1
            one.write(5 * MIB, data)
            one.zero(6 * MIB, MIB)
            one.flush()
            found = bytearray(MIB)
            one.read(5 * MIB, found)
            assert found == data
        finally:
            one.close()
        again = client.ImageioClient(daemon.url(ticket), **over(daemon))  # the first one remembers what it knew
        extents = [(extent.start, extent.length, extent.zero) for extent in again.extents()]
        again.close()
        assert sum(length for _, length, _ in extents) == SIZE
        assert (6 * MIB, MIB, True) in extents
    content = image.read_bytes()
    assert content[5 * MIB : 7 * MIB] == data + bytes(MIB)
    assert set(content[7 * MIB :]) == set(content[: 5 * MIB]) == {238}


def test_the_checksum_is_that_of_the_file(daemon: Daemon, chain: Path) -> None:
    with QemuNbd(chain, "qcow2", read_only=True) as server, daemon.tcp() as wire:
        ticket = daemon.ticket(server.url, SIZE)
        said = wire.ask("GET", f"/images/{ticket}/checksum").json
    assert said == client.checksum(str(chain))


def test_a_refusal_reaches_the_client_in_words(daemon: Daemon, flat: Path, tmp_path: Path) -> None:
    with QemuNbd(flat, "raw", read_only=True) as server:
        ticket = daemon.ticket(server.url, SIZE)
        with pytest.raises(Exception, match="forbids write"):
            client.upload(str(flat), daemon.url(ticket), **over(daemon))
        with pytest.raises(Exception, match="No such ticket"):
            client.download(daemon.url("nobody"), str(tmp_path / "no"), **over(daemon))
