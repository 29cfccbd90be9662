"""Storage for guests' disks that can be made to fail: a small file system, and an image that cannot be read or written.

libvirtd, in its own mount namespace, sees only what was mounted before it: this is made first.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.harness import reachable
from tests.libvirt.private import until
from tests.qemu.faults import Tmpfs


@dataclass(frozen=True)
class Storage:
    """`small` is a file system that can be filled, `image` a file of a fixed size; requests to it fail (`fail`)."""

    small: Tmpfs
    image: Path

    def put(self, image: Path) -> Path:
        """Its bytes are the failing image's from now on; where that is."""
        subprocess.run(["dd", f"if={image}", f"of={self.image}", "bs=1M", "conv=notrunc", "status=none"], check=True)
        return self.image

    def fail(self, requests: str) -> None:
        """All of that kind, `pread` or `pwrite`, fail with EIO until `mend`."""
        self._trigger(requests).touch()

    def mend(self) -> None:
        for requests in ("pread", "pwrite"):
            self._trigger(requests).unlink(missing_ok=True)

    def _trigger(self, requests: str) -> Path:
        return self.image.parent.with_name(requests)


@contextlib.contextmanager
def failing_storage(home: Path, *, small: int, size: int) -> Iterator[Storage]:
    """`small` and `size` in bytes: of the file system, and of the image."""
    source, socket, mount = home / "source", home / "s", home / "failing"
    with source.open("wb") as stream:
        stream.truncate(size)
    mount.mkdir()
    image = mount / "image"
    image.touch()
    server = ["nbdkit", "-f", "-U", str(socket), "--filter=error", "file", str(source), "error=EIO"]
    for requests in ("pread", "pwrite"):
        server += [f"error-{requests}-rate=100%", f"error-{requests}-file={home / requests}"]
    remote = f"driver=nbd,node-name=image,server.type=unix,server.path={socket}"
    export = f"type=fuse,id=image,node-name=image,mountpoint={image},allow-other=on,writable=on"
    with reachable(home), Tmpfs(home / "small", small) as filled, _ended(server):
        until(socket.exists, "nbdkit listens")
        with _ended(["qemu-storage-daemon", "--blockdev", remote, "--export", export]):
            until(lambda: image.stat().st_size == size, "the image is mounted")
            image.chmod(0o666)
            storage = Storage(filled, image)
            try:
                yield storage
            finally:
                storage.mend()


@contextlib.contextmanager
def _ended(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)
