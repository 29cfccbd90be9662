"""A libvirtd of a test's own, in namespaces of its own: it cannot see the host's guests, and nobody sees its.

    with PrivateLibvirt(folder) as libvirt:
        guest = libvirt.guest("web1", images)          # defined: a base, and an overlay as vda
        guest.start()                                  # boots; or start(paused=True), which runs nothing
        guest.until_flushed(20)                        # the guest has written, and flushed, so many blocks
        libvirt.kill(); libvirt.start()                # as a crash; the guest goes on

It needs root (mounts). All its processes live in one pid namespace, which ends with the one process that we hold by a
pidfd, and which the kernel ends should this process be killed. /etc, /var/lib, /var/log, /var/cache and /run are folders
of the test's own in there. /etc is the host's (by links) but for libvirt, and for passwd and group, which know Debian's
libvirt-qemu: the driver looks it up though QEMU runs as the tests' user. All other paths, those of images above all, are
the same inside and outside.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.harness import ensure_user
from tests.libvirt.guest import Guest, initramfs, kernel_folder

WAIT = 60.0
"""Seconds for whatever must happen: much more than it takes, also on a machine that is busy with other tests."""

_PROGRAMS = ("libvirtd", "qemu-system-x86_64", "qemu-img", "unshare", "nsenter", "setpriv", "busybox")

_INIT = """
set -e
mount --bind /etc "$1/host-etc"
for each in "$1/host-etc"/*; do [ -e "$1/etc/${each##*/}" ] || ln -s "$each" "$1/etc"; done
for each in etc var/lib var/log var/cache run; do mount --bind "$1/$each" "/$each"; done
[ ! -e /dev/kvm ] || mount --bind "$1/kvm" /dev/kvm
ip link set lo up 2>/dev/null || true
: > "$1/mounted"
while :; do sleep 0.2; done
"""
"""The namespace's first process; as a shell that loops it also reaps what libvirtd leaves behind (a zombie of its
probes makes libvirtd wait for minutes). Without a /dev/kvm: libvirtd tries it as root and looks at it as QEMU's user, and
where the two differ asks QEMU what it can, for a second, at every turn."""

_LIBVIRTD = """
unix_sock_dir = "{socket}"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{host}"
log_outputs = "1:file:{log}"
log_filters = "{monitor}3:util 3:object 3:event 3:rpc 3:qemu"
"""
_QEMU = """
user = "{user}"
group = "{user}"
dynamic_ownership = 1
remember_owner = 1
security_driver = "none"
cgroup_controllers = []
namespaces = []
seccomp_sandbox = 0
stdio_handler = "file"
"""

_GROUP = "libvirt-qemu:x:64055:"


@functools.cache
def missing() -> str | None:
    """Why a private libvirtd cannot run here; None when it can."""
    if os.geteuid() != 0:
        return "a private libvirtd needs root (mounts)"
    try:
        import libvirt  # noqa: F401
    except ImportError:
        return "python3-libvirt is not installed"
    absent = [program for program in _PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (tools/setup.sh develop)"
    if not (kernel_folder() / "vmlinuz").exists():
        return "there is no kernel for guests (tools/setup.sh develop)"
    tried = subprocess.run(["unshare", "-m", "-n", "-p", "-f", "true"], capture_output=True, text=True, timeout=WAIT)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


def until(done: Callable[[], Any], what: str, timeout: float = WAIT) -> Any:
    """What `done` returns when it is true."""
    deadline = time.monotonic() + timeout
    while not (found := done()):
        assert time.monotonic() < deadline, f"{what}: not after {timeout:.0f} s"
        time.sleep(0.02)
    return found


class PrivateLibvirt:
    """`folder` keeps its state and logs; with `monitor` also what QEMU is told (`asked`). Guests, and libvirtd itself,
    may be killed and started again at will."""

    def __init__(self, folder: Path, *, monitor: bool = False) -> None:
        # Socket names have 107 bytes, and pytest's folders are deep.
        self.runtime = Path(tempfile.mkdtemp(prefix="lv-"))
        self.runtime.chmod(0o755)
        self.root = folder / "root"
        self.log = folder / "libvirtd.log"
        self._monitor = monitor
        self.initramfs = folder / "initramfs"
        self.user = ensure_user()
        self._holder: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._folder = folder
        self._guests: list[Guest] = []

    @property
    def uri(self) -> str:
        return f"qemu:///system?socket={self.runtime}/libvirt-sock"

    def __enter__(self) -> PrivateLibvirt:
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # libvirtd

    def start(self) -> None:
        """Start libvirtd, also again after `kill`; it answers when this returns."""
        command = ["libvirtd", "-d", "-p", f"{self.runtime}/libvirtd.pid", "-f", "/etc/libvirt/libvirtd.conf"]
        done = subprocess.run(self.inside(command), capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 0, done.stderr
        until(self._answers, "libvirtd answers")

    def kill(self) -> None:
        """SIGKILL, as a crash; its guests go on."""
        self._end("libvirtd", signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM; its guests go on."""
        self._end("libvirtd", signal.SIGTERM)

    @contextlib.contextmanager
    def kept_running(self) -> Iterator[None]:
        """As systemd does, libvirtd is started again when it ends: 9.0, killed when a mirror begins, may have lost its
        target and then crash at the job's end."""
        over = threading.Event()

        def keep() -> None:
            while not over.is_set():
                with contextlib.suppress(ProcessLookupError, AssertionError):  # it is just gone
                    descriptor = os.pidfd_open(self.pid)
                    try:
                        while not over.is_set() and not select.select([descriptor], [], [], 0.2)[0]:
                            pass
                    finally:
                        os.close(descriptor)
                if not over.is_set() and not self.processes("libvirtd"):
                    self.start()

        keeper = threading.Thread(target=keep, daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join(2 * WAIT)

    @property
    def pid(self) -> int:
        """libvirtd's, as we see it."""
        found = self.processes("libvirtd")
        assert len(found) == 1, found
        return found[0]

    def close(self) -> None:
        """End everything in the namespace, and wait for it."""
        if self._holder is not None:
            for pid in self.processes(""):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self._holder.kill()  # its child, the namespace's init, gets SIGKILL from the kernel, and so do all others
            self._holder.wait(WAIT)
            until(lambda: not self.processes(""), "the namespace is empty")
            self._holder = None
        shutil.rmtree(self.runtime, ignore_errors=True)

    def asked(self, command: str) -> list[dict[str, Any]]:
        """The arguments of each such command that libvirtd has sent to a QEMU."""
        assert self._monitor, "it does not log them"
        sent = re.findall(r"QEMU_MONITOR_SEND_MSG: mon=\S+ msg=(\{.*\})$", self.log.read_text(), re.MULTILINE)
        messages = [json.loads(message) for message in sent]
        return [message.get("arguments", {}) for message in messages if message["execute"] == command]

    def inside(self, command: list[str]) -> list[str]:
        """The command, in the namespaces: their network is not ours."""
        return ["nsenter", "-t", str(self._init), "-m", "-n", "-p", "--", *command]

    # Guests

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        """A virConnect of the test's own, beside whatever is tested."""
        import libvirt

        from hostagent.drivers.libvirt import start_event_loop

        start_event_loop()  # before the process's first connection
        found = libvirt.open(self.uri)
        try:
            yield found
        finally:
            with contextlib.suppress(libvirt.libvirtError):
                found.close()

    def guest(self, name: str, disk: Path, **more: Any) -> Guest:
        """Define a guest whose vda is `disk` (qcow2). See Guest."""
        guest = Guest(self, name, disk, console=self._folder / f"{name}.console", **more)
        guest.define()
        self._guests.append(guest)
        return guest

    def remove_guests(self) -> None:
        """Destroy and undefine all that `guest` made: between two tests of a module."""
        for guest in self._guests:
            guest.remove()
        self._guests.clear()

    # Processes

    def processes(self, program: str) -> list[int]:
        """The pids, as we see them, of the namespace's processes whose name (of 15 letters) begins so."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns/pid") != self._namespace:
                    continue
                _, _, rest = (entry / "stat").read_text().partition("(")
                name, _, rest = rest.rpartition(")")
                # A killed one is a zombie while its other threads still hold its files.
                dead = rest.split()[0] in "ZX" and len(list((entry / "task").iterdir())) < 2
                if name.startswith(program) and not dead:
                    found.append(int(entry.name))
        return found

    def _prepare(self) -> None:
        self._folder.chmod(0o755)
        for each in ("etc/libvirt", "host-etc", "var/lib", "var/log", "var/cache", "run"):
            (self.root / each).mkdir(parents=True)
        for each in ("run/dbus", "var/lib/libvirt", "var/log/libvirt", "var/cache/libvirt"):
            (self.root / each).mkdir()
        for name, line in (("passwd", "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin"), ("group", _GROUP)):
            text = Path("/etc", name).read_text()
            (self.root / "etc" / name).write_text(text if "\nlibvirt-qemu:" in text else f"{text}{line}\n")
        (self.root / "kvm").touch(mode=0)
        monitor = "2:qemu.qemu_monitor " if self._monitor else ""
        config = _LIBVIRTD.format(socket=self.runtime, log=self.log, monitor=monitor, host=uuid.uuid4())
        (self.root / "etc/libvirt/libvirtd.conf").write_text(config)
        (self.root / "etc/libvirt/qemu.conf").write_text(_QEMU.format(user=self.user))
        self.initramfs.write_bytes(initramfs())
        # setpriv: should we be killed, the kernel ends unshare, and with it the namespace.
        command = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "-m", "-n", "-p", "-f", "--kill-child"]
        command += ["--mount-proc", "--propagation", "private", "bash", "-c", _INIT, "init", str(self.root)]
        with (self._folder / "namespace.log").open("wb") as log:
            self._holder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(lambda: (self.root / "mounted").exists() or self._holder.poll() is not None, "the namespace is there")
        assert self._holder.poll() is None, (self._folder / "namespace.log").read_text()
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self._init = int(children[0])
        self._namespace = os.readlink(f"/proc/{self._init}/ns/pid")

    def _answers(self) -> bool:
        import libvirt

        try:
            with self.connection():
                return True
        except libvirt.libvirtError:
            return False

    def _end(self, program: str, number: signal.Signals) -> None:
        descriptor = os.pidfd_open(self.pid)
        try:
            signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
        until(lambda: not self.processes(program), f"{program} is gone")
