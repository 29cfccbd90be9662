"""Real NBD servers for tests: storage daemons and qemu-nbd, which can be stopped and killed."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness import stand_still
from tests.qemu.faults import PATIENCE, eventually, listens

NAME = "disk"


@dataclass(frozen=True, slots=True)
class Serving:
    url: str
    process: subprocess.Popen[bytes]

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """It answers nothing meanwhile; its kernel still takes connections and some data."""
        stand_still(self.process.pid)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


@contextlib.contextmanager
def storage_daemon(
    image: Path, image_format: str, *, writable: bool = True, bitmaps: Sequence[str] = (), depth: bool = True
) -> Iterator[Serving]:
    """A qemu-storage-daemon that serves an image with its backing chain."""
    node = f"driver={image_format},node-name=top,file.driver=file,file.filename={image}"
    export = f"type=nbd,id=x,node-name=top,name={NAME},writable={'on' if writable else 'off'}"
    export += ",allocation-depth=on" if depth else ""
    export += "".join(f",bitmaps.{number}={name}" for number, name in enumerate(bitmaps))
    read_only = "" if writable else ",read-only=on"
    with _folder() as folder:
        server = f"addr.type=unix,addr.path={folder / 's'}"
        command = ["qemu-storage-daemon", "--blockdev", node + read_only, "--nbd-server", server, "--export", export]
        with _running(command, folder / "s") as process:
            yield Serving(f"nbd:unix:{folder / 's'}:exportname={NAME}", process)


@contextlib.contextmanager
def qemu_nbd(image: Path, image_format: str, *options: str) -> Iterator[Serving]:
    with _folder() as folder:
        command = ["qemu-nbd", "-f", image_format, "-x", NAME, "-k", str(folder / "s"), "-t", *options, str(image)]
        with _running(command, folder / "s") as process:
            yield Serving(f"nbd+unix:///{NAME}?socket={folder / 's'}", process)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="nbd-"))  # socket names have 107 bytes, and pytest's folders are deep
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _running(command: Sequence[str], socket: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command)
    try:
        assert eventually(lambda: listens(socket) or process.poll() is not None)
        assert process.poll() is None
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(PATIENCE)
