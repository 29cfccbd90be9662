"""Real NBD servers behind tickets: qemu-nbd and qemu-storage-daemon, which a test can stop, kill and start again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from hostagent.drivers.qsd_process import ENVIRONMENT
from tests.data.wire import unix
from tests.harness import stand_still

START = 20.0


class NbdServer(ABC):
    """One export. Its socket lies in a short folder, and is gone with it."""

    def __init__(self, image: Path, image_format: str = "raw") -> None:
        self.image = image
        self.format = image_format
        self._home = tempfile.TemporaryDirectory(prefix="hn-")
        self.socket = str(Path(self._home.name) / "nbd.sock")
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """How it is started."""

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    @property
    @abstractmethod
    def url(self) -> str:
        """As a ticket names it."""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        Path(self.socket).unlink(missing_ok=True)
        errors = Path(self._home.name) / "errors"
        with errors.open("wb") as said:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stderr=said, start_new_session=True, env=self.environment()
            )
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), unix(self.socket) as probe:
                if probe.recv(8) == b"NBDMAGIC":
                    return
            time.sleep(0.01)
        ended = self.process.poll()
        raise AssertionError(f"no NBD server ({ended}): {self.command()}: {errors.read_text(errors='replace')}")

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(START)

    def stall(self) -> None:
        """From now on it answers nothing, and its connections stay open."""
        stand_still(self.pid)

    def resume(self) -> None:
        self.process_signal(signal.SIGCONT)

    def process_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(START)
        self.kill()
        self._home.cleanup()


class QemuNbd(NbdServer):
    def __init__(
        self,
        image: Path,
        image_format: str = "raw",
        *,
        read_only: bool = False,
        shared: int = 16,
        bitmap: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        super().__init__(image, image_format)
        self.options = [f"--shared={shared}", *(["--read-only"] if read_only else []), *options]
        if bitmap:
            self.options.append(f"--bitmap={bitmap}")
        if image_format != "raw":
            self.options.append("--allocation-depth")

    def command(self) -> list[str]:
        usual = ["qemu-nbd", "--persistent", f"--socket={self.socket}", "--discard=unmap", f"--format={self.format}"]
        return [*usual, *self.options, str(self.image)]

    @property
    def url(self) -> str:
        return f"nbd:unix:{self.socket}"


class Qsd(NbdServer):
    """qemu-storage-daemon, as the agent starts one: the export has a name."""

    NAME = "disk"

    def __init__(
        self, image: Path, image_format: str = "raw", *, read_only: bool = False, bitmaps: Sequence[str] = ()
    ) -> None:
        super().__init__(image, image_format)
        self.read_only = read_only
        self.bitmaps = list(bitmaps)

    def command(self) -> list[str]:
        below: dict[str, Any] = {"driver": "file", "filename": str(self.image), "discard": "unmap"}
        node = {"driver": self.format, "node-name": "n", "file": below, "read-only": self.read_only, "discard": "unmap"}
        address = {"type": "unix", "path": self.socket}
        export = {"type": "nbd", "id": "e", "node-name": "n", "name": self.NAME, "writable": not self.read_only}
        export |= {"bitmaps": self.bitmaps, "allocation-depth": self.format != "raw"}
        server = {"addr": address, "max-connections": 512}
        words = ["--blockdev", node, "--nbd-server", server, "--export", export]
        return ["qemu-storage-daemon", *(word if isinstance(word, str) else json.dumps(word) for word in words)]

    def environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, **os.environ}

    @property
    def url(self) -> str:
        return f"nbd:unix:{self.socket}:exportname={self.NAME}"
