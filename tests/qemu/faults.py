"""Faults for tests to cause, each a real one: a process killed or stopped, a disk that is full, a read that fails.

Nothing here knows what the agent should do about them. The module is also the program that `Reader` runs: an NBD client
that reads at random places for ever, and ends with status 1 at the first wrong byte and 3 when it is cut off.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ != "__main__":
    from tests.harness import MIB, AgentProcess, overlay, raw_image, stand_still

ROOT = os.geteuid() == 0
READ = 64 * 1024
HASTE = {
    "JOBS_PROGRESS_INTERVAL": "0.05",
    "JOBS_SETTLE_RETRY": "0.1",
    "EXPORTS_IDLE_CHECK": "0.1",
    "LIBVIRT_SAMPLE": "0.1",
}
"""Settings of an agent that tests do not want to wait for."""
PATIENCE = 30.0
"""Seconds after which a test gives up what must have happened long ago, also on a busy machine."""


# Clients


class Reader:
    """A process that reads an export all the time and compares it with `truth`, a raw image."""

    def __init__(self, uri: str, truth: Path) -> None:
        command = [sys.executable, __file__, uri, str(truth)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "reading\n", self.process.communicate()[1]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        """How many reads were right; fails when one was wrong or the client was ever cut off."""
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, f"the client ended with {self.process.returncode}: {err}"
        return int(out)

    def cut_off(self) -> bool:
        """Wait for the end that a lost server means; False when it ended for another reason."""
        _, err = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode != 1, err
        return self.process.returncode == 3


def _read_for_ever(uri: str, truth: str) -> int:
    nbd: Any = importlib.import_module("nbd")  # the reading process alone needs it
    going = True

    def end(*_: object) -> None:
        nonlocal going
        going = False

    signal.signal(signal.SIGTERM, end)
    expected = Path(truth).read_bytes()
    reads = 0
    try:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        print("reading", flush=True)
        while going:
            offset = random.randrange(0, len(expected) - READ + 1, 512)
            if handle.pread(READ, offset) != expected[offset : offset + READ]:
                print(f"wrong bytes at {offset}", file=sys.stderr)
                return 1
            reads += 1
            time.sleep(0.001)  # a test machine has few processors, and the agent needs one
        handle.shutdown()
    except nbd.Error as error:
        print(error, file=sys.stderr)
        return 3
    print(reads)
    return 0


# Images


class Pair:
    """An overlay with data of its own on a raw base, and `truth`, what the overlay reads as.

    `middle` puts a layer between the two, which a pull with the base as its `base` takes in.
    """

    def __init__(
        self, folder: Path, size: int = 16 * (1 << 20), *, truth: Path | None = None, middle: bool = False
    ) -> None:
        folder.mkdir(mode=0o755, exist_ok=True)
        self.folder = folder
        self.base = raw_image(folder / "base.raw", size, size - size // 8)
        self.middle = overlay(folder / "middle.qcow2", self.base) if middle else None
        if self.middle:
            _write(self.middle, [f"write -q -P {n + 65} {n * size // 6 + 8192} {192 * 1024}" for n in range(6)])
        below, below_format = (self.middle, "qcow2") if self.middle else (self.base, "raw")
        self.top = overlay(folder / "top.qcow2", below, below_format)
        _write(self.top, [f"write -q -P {n + 1} {n * size // 8 + 4096 * n} {96 * 1024}" for n in range(8)])
        self.truth = truth or folder.parent / f"{folder.name}.truth"
        command = ["qemu-img", "convert", "-O", "raw", str(self.top), str(self.truth)]
        subprocess.run(command, check=True, capture_output=True)

    @property
    def files(self) -> dict[Path, str]:
        """Every file of the chain, and its format."""
        found = {self.base: "raw", self.top: "qcow2"}
        return found | {self.middle: "qcow2"} if self.middle else found

    @property
    def request(self) -> dict[str, Any]:
        """The pull that takes in all that lies between the overlay and the base, or everything."""
        wanted = {"operation": "pull", "target": str(self.top)}
        return wanted | {"base": str(self.base)} if self.middle else wanted

    def pulled(self) -> bool:
        """Whether the overlay's header shows the end of that pull."""
        return backing_name(self.top) == (self.base.name if self.middle else None)

    def copy(self, folder: Path) -> Pair:
        """The same images again, in another folder: quicker than new ones."""
        folder.mkdir(mode=0o755)
        for source in self.files:
            command = ["cp", "--sparse=auto", "--preserve=mode", str(source), str(folder)]
            subprocess.run(command, check=True)
        twin = object.__new__(Pair)
        twin.folder, twin.truth = folder, self.truth
        twin.base, twin.top = folder / self.base.name, folder / self.top.name
        twin.middle = folder / self.middle.name if self.middle else None
        return twin


def _write(image: Path, commands: list[str]) -> None:
    subprocess.run(["qemu-io", *(word for line in commands for word in ("-c", line)), str(image)], check=True)


def backing_name(image: Path) -> str | None:
    """What the qcow2 header says, read past every lock (docs/interop/qcow2.txt: offset at 8, length at 16)."""
    with image.open("rb") as stream:
        offset, length = struct.unpack(">QI", stream.read(20)[8:])
        stream.seek(offset)
        return stream.read(length).decode() if offset else None


def permissions(path: Path) -> tuple[int, bytes | None]:
    """Mode and access ACL, to the byte."""
    acl = None
    with contextlib.suppress(OSError):
        acl = os.getxattr(path, "system.posix_acl_access")
    return path.stat().st_mode, acl


def writable_for_qemu(path: Path, format: str) -> bool:
    """Whether QEMU gets its write lock on the image: nobody has it open or leased any more."""
    done = subprocess.run(["qemu-io", "-f", format, "-c", "write 0 512", str(path)], capture_output=True, text=True)
    return done.returncode == 0


# Processes


def storage_daemons(agent: AgentProcess) -> list[int]:
    """Pids of the agent's storage daemons by their log file, which they have open even when its name is gone."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                log = str((entry / "fd/1").readlink())
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if log.startswith(f"{agent.runtime}/qsd/") and state not in "ZX":
                    found.append(int(entry.name))
    return found


def daemon_of(agent: AgentProcess, image: Path) -> int:
    """The pid of the storage daemon that has the image on top."""
    daemons = agent.get("/v1/host")["storage_daemons"]
    return next(int(daemon["pid"]) for daemon in daemons if daemon["image"] == str(image))


def send(number: signal.Signals, *pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def open_below(pid: int, folder: Path) -> list[str]:
    """What a process has open below a folder, whatever the access."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            name = str(entry.readlink())
            if name.startswith(f"{folder}/"):
                found.append(name)
    return found


ACCEPTS = 1 << 16
"""__SO_ACCEPTCON of net.h"""


def eventually(true: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    """The first true value, or the last one when the time is up."""
    deadline = time.monotonic() + timeout
    while not (value := true()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def listens(socket: Path) -> bool:
    """It is there a moment before that; and who tries it is a client already."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(line[-1] == str(socket) and int(line[3], 16) & ACCEPTS for line in lines[1:])


# Storage


class Tmpfs:
    """A file system of its own, of a size that can be changed. Needs root."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        folder.mkdir(mode=0o755, exist_ok=True)
        options = f"size={size},mode=0755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)

    def __enter__(self) -> Tmpfs:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)

    def fill(self) -> Path:
        """A file that takes all that is free."""
        filler = self.folder / "filler"
        with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            for piece in (MIB, 4096):
                with contextlib.suppress(OSError):
                    while stream.write(bytes(piece)) == piece:
                        pass
        return filler


class BadSectors:
    """A storage daemon in which reading a part of one file fails with EIO, or hangs, for as long as we say so.

    A shim that is loaded before the C library fails the system call itself, so everything above it is real. `binary`
    is what the agent starts; the shim looks at `order` before each read.
    """

    SHIM = textwrap.dedent(
        """
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <errno.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <sys/stat.h>
        #include <sys/uio.h>
        #include <unistd.h>

        static int bad(int fd, long long offset, long long length) {
            for (;; usleep(10000)) {
                unsigned long long inode; long long begin, end; int hang; struct stat info;
                FILE *order = fopen(getenv("BAD_SECTORS"), "r");
                int told = order && fscanf(order, "%llu %lld %lld %d", &inode, &begin, &end, &hang) == 4;
                if (order) fclose(order);
                if (!told || fstat(fd, &info) || info.st_ino != inode || offset >= end || offset + length <= begin)
                    return 0;
                if (!hang) return 1;
            }
        }
        static long long total(const struct iovec *iov, int count) {
            long long sum = 0;
            while (count-- > 0) sum += iov[count].iov_len;
            return sum;
        }
        #define READ(name) ssize_t name(int fd, void *buf, size_t length, long offset) { \\
            static ssize_t (*next)(int, void *, size_t, long); \\
            if (!next) next = dlsym(RTLD_NEXT, #name); \\
            if (bad(fd, offset, length)) { errno = EIO; return -1; } \\
            return next(fd, buf, length, offset); }
        #define READV(name) ssize_t name(int fd, const struct iovec *iov, int count, long offset) { \\
            static ssize_t (*next)(int, const struct iovec *, int, long); \\
            if (!next) next = dlsym(RTLD_NEXT, #name); \\
            if (bad(fd, offset, total(iov, count))) { errno = EIO; return -1; } \\
            return next(fd, iov, count, offset); }
        READ(pread) READ(pread64) READV(preadv) READV(preadv64)
        """
    )

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o755)
        source, library = folder / "shim.c", folder / "shim.so"
        source.write_text(self.SHIM)
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"], check=True)
        library.chmod(0o755)
        self.order = folder / "order"
        self.binary = folder / "qemu-storage-daemon"
        self.binary.write_text(
            f'#!/bin/sh\nLD_PRELOAD={library} BAD_SECTORS={self.order} exec qemu-storage-daemon "$@"\n'
        )
        self.binary.chmod(0o755)

    def break_(self, path: Path, begin: int, end: int, *, hang: bool = False) -> None:
        new = self.order.with_suffix(".new")
        new.write_text(f"{path.stat().st_ino} {begin} {end} {int(hang)}\n")
        new.chmod(0o644)
        new.replace(self.order)

    def mend(self) -> None:
        self.order.unlink()


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that exist and do nothing, as one that waits for dead storage."""
    try:
        for pid in pids:
            stand_still(pid)
        yield
    finally:
        send(signal.SIGCONT, *pids)


if __name__ == "__main__":
    sys.exit(_read_for_ever(sys.argv[1], sys.argv[2]))
