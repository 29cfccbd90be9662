"""Transfers with real data daemons, ours and ovirt-imageio's: every byte is compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hostagent import client
from hostagent.errors import AgentError
from tests.client.images import MIB, SIZE, allocated, new_qcow2, run, seen, sparse
from tests.data.daemons import Daemon
from tests.data.exports import QemuNbd, Qsd

SMALL = 512 * 1024
"""Bytes of a request, so that a small image has enough for all workers."""


@pytest.fixture
def target(tmp_path: Path, daemon: Daemon) -> Iterator[tuple[QemuNbd, str]]:
    """A qcow2 image full of what was there before, its server, and the URL of a ticket for it."""
    image = new_qcow2(tmp_path / "target.qcow2")
    run("qemu-io", "-c", f"write -P 0x55 0 {SIZE}", image)
    with QemuNbd(image, "qcow2") as server:
        yield server, daemon.url(daemon.ticket(server.url, SIZE, "read", "write"))


@pytest.fixture(scope="module")
def served(home: Path, daemon: Daemon) -> Iterator[str]:
    """The URL of a ticket for the chain."""
    with QemuNbd(home / "top.qcow2", "qcow2", read_only=True) as server:
        yield daemon.url(daemon.ticket(server.url, SIZE))


@pytest.mark.parametrize(("workers", "local"), [(1, True), (4, False)], ids=["unix-1", "tls-4"])
@pytest.mark.parametrize("name", ["disk.raw", "top.qcow2"])
def test_an_uploaded_image_is_the_same_for_a_guest(
    home: Path, target: tuple[QemuNbd, str], options: client.Options, name: str, local: bool, workers: int
) -> None:
    server, url = target
    options = replace(options, workers=workers, local=local, request_size=SMALL, verify=True)
    found = client.upload(client.Upload(str(home / name), url), options)
    assert found.server.startswith("unix socket" if local else "https:"), found
    assert found.workers == workers
    assert found.checksum is not None
    assert found.moved < SIZE * 2 // 3, "zeros are not sent"
    server.kill()  # what it had not on disk is gone
    run("qemu-img", "compare", "-f", "qcow2", "-F", name.rpartition(".")[2], server.image, home / name)
    assert seen(server.image) == seen(home / name)
    assert not list(home.glob("*.hostagent-resume"))


@pytest.mark.parametrize(("workers", "local"), [(1, True), (4, False)], ids=["unix-1", "tls-4"])
@pytest.mark.parametrize("name", ["out.raw", "out.qcow2"])
def test_a_downloaded_image_is_the_same_for_a_guest(
    home: Path, tmp_path: Path, served: str, options: client.Options, name: str, local: bool, workers: int
) -> None:
    out = tmp_path / name
    options = replace(options, workers=workers, local=local, request_size=SMALL, verify=True)
    found = client.download(client.Download(served, str(out)), options)
    assert found.server.startswith("unix socket" if local else "https:"), found
    assert found.workers == workers
    run("qemu-img", "compare", "-F", "qcow2", "-f", name.rpartition(".")[2], out, home / "top.qcow2")
    assert seen(out) == seen(home / "top.qcow2")
    assert allocated(out) < SIZE * 2 // 3, "holes stay holes"
    assert {path.name for path in tmp_path.iterdir()} == {name}
    if name.endswith(".qcow2"):
        run("qemu-img", "check", "-q", out)


def test_a_raw_file_is_written_and_read_as_it_is(
    home: Path, tmp_path: Path, daemon: Daemon, options: client.Options
) -> None:
    there, back = tmp_path / "there.raw", tmp_path / "back.raw"
    sparse(there, seed=9)
    url = daemon.url(daemon.ticket(f"file://{there}", SIZE, "read", "write"))
    found = client.upload(client.Upload(str(home / "disk.raw"), url), replace(options, request_size=SMALL))
    assert found.workers in (1, 4), "as many as the server lets write to a file"
    assert there.read_bytes() == (home / "disk.raw").read_bytes()
    client.download(client.Download(url, str(back)), replace(options, request_size=SMALL))
    assert back.read_bytes() == there.read_bytes()
    assert allocated(back) < SIZE * 2 // 3


def test_checksums_are_the_same_on_both_sides_and_for_every_format(
    home: Path, tmp_path: Path, served: str, options: client.Options
) -> None:
    raw = tmp_path / "top.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", home / "top.qcow2", raw)
    for algorithm in ("blake2b", "sha256"):
        told = replace(options, algorithm=algorithm, block_size=MIB)
        remote = client.checksum(served, told)
        assert remote == client.checksum(str(home / "top.qcow2"), told) == client.checksum(str(raw), told)


def test_extents_are_what_the_image_has(home: Path, served: str, options: client.Options) -> None:
    found = list(client.extents(served, options))
    assert sum(one.length for one in found) == SIZE
    raw = run("qemu-img", "map", "--output=json", "-f", "qcow2", home / "top.qcow2")
    zeros = [one["zero"] for one in json.loads(raw) for _ in range(one["length"] // 512)]
    assert [one.zero for one in found for _ in range(one.length // 512)] == zeros
    part = list(client.extents(served, options, start=5 * MIB, length=3 * MIB))
    assert (part[0].start, sum(one.length for one in part)) == (5 * MIB, 3 * MIB)
    info = client.info(served, options)
    assert (info["size"], info["writable"]) == (SIZE, False)


def test_only_what_is_dirty_comes_onto_the_backing_file(
    tmp_path: Path, daemon: Daemon, options: client.Options
) -> None:
    """Also what does not fill a cluster, and what became zeros."""
    image, before = new_qcow2(tmp_path / "disk.qcow2"), tmp_path / "before.raw"
    run("qemu-io", "-c", "write -P 1 0 8M", "-c", "write -P 2 12M 4M", image)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, before)
    run("qemu-img", "bitmap", "--add", "-g", "4k", image, "since")
    run("qemu-io", "-c", "write -P 3 1000k 12k", "-c", "write -z 4M 1M", "-c", "write -P 5 20M 64k", image)
    increment = tmp_path / "increment.qcow2"
    with QemuNbd(image, "qcow2", read_only=True, bitmap="since") as server:
        url = daemon.url(daemon.ticket(server.url, SIZE, dirty=True))
        work = client.Download(url, str(increment), backing=str(before), backing_format="raw", incremental=True)
        found = client.download(work, replace(options, verify=True))
    assert found.moved <= 3 * 64 * 1024
    assert seen(increment) == seen(image)
    assert allocated(increment) < 2 * MIB
    info = json.loads(run("qemu-img", "info", "--output=json", increment))
    assert info["backing-filename"] == str(before)
    assert info["backing-filename-format"] == "raw"


class Shallow(Qsd):
    """One layer alone."""

    def command(self) -> list[str]:
        return [word.replace('{"driver": "qcow2"', '{"driver": "qcow2", "backing": null') for word in super().command()]


def test_holes_are_left_to_the_backing_file(
    home: Path, tmp_path: Path, daemon: Daemon, options: client.Options
) -> None:
    """A server that serves one layer of a chain: what that has not is the backing file's."""
    shallow = tmp_path / "top.qcow2"
    with Shallow(home / "top.qcow2", "qcow2", read_only=True) as server:
        url = daemon.url(daemon.ticket(server.url, SIZE))
        options = replace(options, storage=replace(options.storage, pools=(str(home),)))
        client.download(client.Download(url, str(shallow), backing=str(home / "mid.qcow2")), options)
    assert seen(shallow) == seen(home / "top.qcow2")
    assert allocated(shallow) < MIB


def test_a_ticket_that_may_only_read_is_not_written(home: Path, served: str, options: client.Options) -> None:
    with pytest.raises(AgentError) as refused:
        client.upload(client.Upload(str(home / "disk.raw"), served), options)
    assert refused.value.code == "denied"


def test_a_certificate_must_be_of_the_authority_and_for_the_host(
    home: Path, daemon: Daemon, served: str, options: client.Options
) -> None:
    assert daemon.pki is not None
    with pytest.raises(AgentError, match="not trusted") as refused:
        client.info(served, replace(options, tls=client.Tls()))
    assert "--cafile" in (refused.value.remedy or "")
    with pytest.raises(AgentError, match="for another host"):
        client.info(served.replace("127.0.0.1", "127.1"), options)
    with pytest.raises(AgentError, match=r"does not speak TLS|no TLS"):
        client.info(served.replace(str(daemon.port), str(plain_port())), options)
    assert client.info(served, replace(options, tls=client.Tls(insecure=True)))["size"] == SIZE


def plain_port() -> int:
    import http.server
    import threading

    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    return int(server.server_address[1])


def test_a_unix_socket_is_a_url_too(home: Path, daemon: Daemon, served: str, options: client.Options) -> None:
    ticket = served.rpartition("/")[2]
    info = client.info(f"http+unix:///images/{ticket}?socket={daemon.local_path}", options)
    assert info["size"] == SIZE
    with pytest.raises(AgentError) as refused:
        client.info("http+unix:///images/x?socket=/nowhere/s", options)
    assert refused.value.code == "unreachable"
