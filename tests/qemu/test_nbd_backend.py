"""The NBD backend keeps the promises of a backend, on real servers: raw and qcow2 with a chain, QSD and qemu-nbd."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.data.backends.base import ImageBackend
from hostagent.data.backends.nbd import NbdSettings, nbd_factory
from hostagent.data.backends.registry import Opening
from hostagent.data.checksum import Method, checksum
from hostagent.data.streams import Stopped
from tests.contract.backend_guards import StallSuite, ended_by
from tests.contract.backend_laws import ExtentsSuite
from tests.contract.backend_suite import MIB, RangeSuite, Rig, pattern
from tests.harness import overlay, raw_image
from tests.qemu.nbd_servers import Serving, qemu_nbd, storage_daemon
from tests.unit.data.test_checksum import defined

pytestmark = pytest.mark.qemu
SIZE = 6 * MIB + 5 * 512


def opened(serving: Serving, *, writable: bool = True, settings: NbdSettings | None = None) -> ImageBackend:
    return nbd_factory(settings or NbdSettings())(Opening(serving.url, SIZE, writable=writable))


def content_of(image: Path, image_format: str) -> bytes:
    """The virtual disk's bytes, as qemu-img reads them past a storage daemon's locks."""
    out = image.with_suffix(".now")
    subprocess.run(["qemu-img", "convert", "-U", "-f", image_format, "-O", "raw", str(image), str(out)], check=True)
    return out.read_bytes()


def rig_of(serving: Serving, image: Path, image_format: str) -> Rig:
    content = content_of(image, image_format)
    return Rig(
        lambda writable=True: opened(serving, writable=writable),
        content,
        lambda: content_of(image, image_format),
        serving.stalled,
    )


def qemu_io(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(image)], check=True, capture_output=True)


def raw_with_holes(path: Path) -> Path:
    with path.open("wb") as image:
        image.truncate(SIZE)
        for offset in (0, 2 * MIB, SIZE - 4096):
            image.seek(offset)
            image.write(pattern(4096 * 8 if offset < SIZE - 4096 else 4096, offset % 101))
    return path


def chain(folder: Path) -> Path:
    """Three layers with data, zeros that hide data, discards, and what is in none of them."""
    base = raw_with_holes(folder / "base.raw")
    middle = overlay(folder / "middle.qcow2", base)
    qemu_io(middle, "write -P 3 64k 128k", "write -z 2M 64k", "write -P 5 3M 70k")
    top = overlay(folder / "top.qcow2", middle, "qcow2")
    qemu_io(top, "write -P 7 100k 1k", "write -z 3M 64k", "write -P 9 4095k 2M", "discard 5M 64k")
    return top


class TestRawFromStorageDaemon(RangeSuite, ExtentsSuite, StallSuite):
    @contextlib.contextmanager
    def make(self, folder: Path) -> Iterator[Rig]:
        image = raw_with_holes(folder / "disk.raw")
        with storage_daemon(image, "raw") as serving:
            yield rig_of(serving, image, "raw")


class TestChainFromStorageDaemon(RangeSuite, ExtentsSuite, StallSuite):
    @contextlib.contextmanager
    def make(self, folder: Path) -> Iterator[Rig]:
        image = chain(folder)
        with storage_daemon(image, "qcow2") as serving:
            yield rig_of(serving, image, "qcow2")


class TestDirtyFromQemuNbd(RangeSuite, ExtentsSuite, StallSuite):
    @contextlib.contextmanager
    def make(self, folder: Path) -> Iterator[Rig]:
        image = chain(folder)
        subprocess.run(["qemu-img", "bitmap", "--add", str(image), "b0"], check=True)
        qemu_io(image, "write -P 11 1M 65k", "write -z 2M 64k", "write -P 12 6M 1k")
        with qemu_nbd(image, "qcow2", "--shared=4", "--allocation-depth", "--bitmap=b0") as serving:
            rig = rig_of(serving, image, "qcow2")
            rig.dirty = [(MIB, MIB + 65 * 1024), (2 * MIB, 2 * MIB + 65536), (6 * MIB, 6 * MIB + 1024)]
            yield rig


def test_a_checksum_over_several_connections_is_that_of_the_bytes(folder: Path) -> None:
    image = chain(folder)
    content = content_of(image, "qcow2")
    with storage_daemon(image, "qcow2", writable=False) as serving:
        for workers in (1, 3):
            found = checksum(lambda: opened(serving), SIZE, Method(block_size=MIB), workers=workers)
            assert found == defined(content, MIB)


def test_a_checksum_needs_no_more_connections_than_there_are(folder: Path) -> None:
    """qemu-nbd says that it takes several, and not how many."""
    image = chain(folder)
    content = content_of(image, "qcow2")
    few = NbdSettings(connect_timeout=1)
    for shared in (2, 3):
        with qemu_nbd(image, "qcow2", "--read-only", f"--shared={shared}") as serving:
            found = checksum(lambda serving=serving: opened(serving, settings=few), SIZE, Method(block_size=MIB))
            assert found == defined(content, MIB)


def test_a_checksum_is_ended_by_a_fence_while_its_server_hangs(folder: Path) -> None:
    image = raw_image(folder / "disk.raw", 64 * MIB)
    backends: list[ImageBackend] = []

    def another() -> ImageBackend:
        backends.append(opened(serving))
        return backends[-1]

    def fence() -> None:
        for backend in list(backends):
            backend.fence()

    def done(number: int) -> None:
        if not stalled:
            stalled.append(stack.enter_context(serving.stalled()))

    stalled: list[None] = []
    with storage_daemon(image, "raw") as serving, contextlib.ExitStack() as stack:
        work = lambda: checksum(another, 64 * MIB, Method(block_size=MIB), workers=2, done=done)  # noqa: E731
        assert isinstance(ended_by(fence, work), Stopped)
        assert len(backends) == 3
