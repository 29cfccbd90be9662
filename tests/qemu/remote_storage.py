"""Storage that other programs serve, so that a test can make it slow, or let it die: a file over FUSE, an NBD server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.faults import PATIENCE, ROOT, eventually, listens

needs_fuse = pytest.mark.skipif(
    not ROOT or not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs root and FUSE, to serve a file"
)
needs_nbdkit = pytest.mark.skipif(not shutil.which("nbdkit"), reason="needs nbdkit")


class FuseFile:
    """The file at `path`, served over FUSE from `store`, to which its content goes. Everybody may use it."""

    def __init__(self, path: Path, store: Path) -> None:
        self.path, self.store = path, store
        shutil.move(path, store)
        path.touch()
        export = f"type=fuse,id=file,node-name=file,mountpoint={path},allow-other=on,writable=on"
        command = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=file,filename={store}"]
        self._server = subprocess.Popen([*command, "--export", export])
        assert eventually(lambda: os.path.ismount(path))
        path.chmod(0o666)

    def __enter__(self) -> FuseFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.terminate()
        self._server.wait(PATIENCE)
        subprocess.run(["umount", "--lazy", str(self.path)], capture_output=True)

    def die(self) -> None:
        """For good: whoever has the file open gets ENOTCONN, those that wait in it too."""
        self._server.kill()
        self._server.wait(PATIENCE)


@contextlib.contextmanager
def nbd_server(folder: Path, size: int, *filters: str) -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """nbdkit with a writable file; its URI, the file, the process."""
    disk, where = folder / "remote.raw", Path(tempfile.mkdtemp(prefix="nbd-"))
    with disk.open("wb") as file:
        file.truncate(size)
    where.chmod(0o755)
    command = ["nbdkit", "-f", "-U", str(where / "s"), *[word for word in filters if word.startswith("--filter")]]
    command += ["file", str(disk), *[word for word in filters if not word.startswith("--filter")]]
    process = subprocess.Popen(command)
    try:
        assert eventually(lambda: listens(where / "s"))
        (where / "s").chmod(0o666)
        yield f"nbd+unix:///?socket={where / 's'}", disk, process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(PATIENCE)
        shutil.rmtree(where)
