"""A guest of a private libvirtd: TCG, Debian's cloud kernel, and an initramfs that does nothing but write (pattern.py)."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tests.harness import stand_still
from tests.libvirt import pattern

if TYPE_CHECKING:
    from tests.libvirt.private import PrivateLibvirt

_MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
"""In the order in which they need each other (Debian's cloud kernel has no disk driver built in)."""

_DISK = """
<disk type='{type}' device='disk'><driver name='qemu' type='qcow2' cache='{cache}'{errors}/><source {source}>{seclabel}</source>
<target dev='{target}' bus='virtio'/></disk>
"""
_DOMAIN = """
<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>96</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel><initrd>{initramfs}</initrd>
<cmdline>console=ttyS0 quiet panic=-1{words}</cmdline></os>
<features><acpi/></features><on_poweroff>destroy</on_poweroff><on_crash>destroy</on_crash>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}
<controller type='usb' model='none'/><memballoon model='none'/>
<serial type='file'><source path='{console}'><seclabel model='dac' relabel='no'/></source></serial></devices></domain>
"""


def kernel_folder() -> Path:
    """Where tools/setup.sh puts the guests' kernel: vmlinuz, and the modules of a disk."""
    return Path(sys.prefix) / "guest"


@functools.cache
def initramfs() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in ("bin", "modules", "proc", "sys", "dev"):
            (folder / each).mkdir()
        busybox = shutil.which("busybox")
        assert busybox is not None
        shutil.copy(busybox, folder / "bin/busybox")
        for applet in ("sh", "mount", "insmod", "dd", "printf", "md5sum", "cat", "usleep"):
            (folder / "bin" / applet).symlink_to("busybox")
        for number, module in enumerate(_MODULES):
            shutil.copy(kernel_folder() / f"{module}.ko", folder / "modules" / f"{number}-{module}.ko")
        shutil.copy(Path(__file__).parent / "guest_init.sh", folder / "init")
        names = "\n".join(["."] + [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))])
        command = ["busybox", "cpio", "-o", "-H", "newc"]
        done = subprocess.run(command, cwd=folder, input=names.encode(), capture_output=True, check=True, timeout=60)
        return done.stdout


class Guest:
    """One domain. `disks` are further disks by target; `cache` is QEMU's mode for all of them. Without `relabel` libvirt
    leaves the owners of their files alone. With a `pool` they are its volumes, and the XML names no files. `stops`: a
    request of the guest's that fails, for whatever reason, stops it until it is resumed, as one for want of space does
    in any case.

    `uuid` and `words`, more of the kernel's command line, are what a guest has to have in common with one that was saved
    to be woken as that (see booted.py). As libvirt has it, `pid` is QEMU's; it can be stopped (SIGSTOP) so that its
    monitor answers nobody.
    """

    def __init__(
        self,
        libvirt: PrivateLibvirt,
        name: str,
        disk: Path,
        *,
        console: Path,
        disks: dict[str, Path] | None = None,
        cache: str = "writeback",
        relabel: bool = True,
        stops: bool = False,
        uuid: str | None = None,
        words: str = "",
        pool: str | None = None,
    ) -> None:
        self.name = name
        self.uuid = uuid or str(uuid4())
        self.disk = disk
        self.console = console
        console.touch()
        console.chmod(0o666)  # libvirt leaves it alone, for what it notes of a console's owner outlives the guest
        self._libvirt = libvirt
        self._disks = {"vda": disk, **(disks or {})}
        self._cache = cache
        self._pool = pool
        self._seclabel = "" if relabel else "<seclabel model='dac' relabel='no'/>"
        self._errors = " error_policy='stop' rerror_policy='stop'" if stops else ""
        self._words = f" {words}" if words else ""

    # Life

    @property
    def xml(self) -> str:
        kind = "volume" if self._pool else "file"
        more = {"cache": self._cache, "seclabel": self._seclabel, "errors": self._errors, "type": kind}
        disks = [_DISK.format(source=self._source(path), target=target, **more) for target, path in self._disks.items()]
        return _DOMAIN.format(
            name=self.name,
            uuid=self.uuid,
            kernel=kernel_folder() / "vmlinuz",
            initramfs=self._libvirt.initramfs,
            disks="".join(disks),
            console=self.console,
            words=self._words,
        )

    def _source(self, path: Path) -> str:
        return f"pool='{self._pool}' volume='{path.name}'" if self._pool else f"file='{path}'"

    def define(self) -> None:
        with self._libvirt.connection() as connection:
            connection.defineXML(self.xml)

    def stand_on(self, disk: Path) -> None:
        """Write down that its disk is another file, for its next start."""
        import libvirt

        with self.domain() as domain:
            xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        xml = re.sub(r"(<disk .*?<source file=')[^']*", rf"\g<1>{disk}", xml, count=1, flags=re.DOTALL)
        if disk.suffix == ".raw":
            xml = re.sub(r"(<disk .*?<driver [^>]*type=')qcow2'", r"\g<1>raw'", xml, count=1, flags=re.DOTALL)
        with self._libvirt.connection() as connection:
            connection.defineXML(xml)

    def start(self, *, paused: bool = False) -> None:
        """Boot; `paused`: QEMU runs and has the disks open, but the guest does nothing, which takes no processor."""
        import libvirt

        with self.domain() as domain:
            domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)

    def save(self, state: Path) -> None:
        """Stop it, and keep its memory."""
        with self.domain() as domain:
            domain.save(str(state))

    def wake(self, state: Path) -> None:
        """Go on from what `save` has kept, on the disks that it has now."""
        import libvirt

        with self._libvirt.connection() as connection:
            flags = libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_INACTIVE
            described = connection.lookupByUUIDString(self.uuid).XMLDesc(flags)
            connection.restoreFlags(str(state), described, libvirt.VIR_DOMAIN_SAVE_RUNNING)

    def destroy(self) -> None:
        with self.domain() as domain:
            domain.destroy()

    def kill(self) -> None:
        """SIGKILL to QEMU, as a crash."""
        from tests.libvirt.private import until

        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: pid not in self._libvirt.processes("qemu-system"), "QEMU is gone")

    def kill_what_is_lost(self) -> bool:
        """libvirt 9.0, killed in a pivot, may write a description that it cannot read itself (a mirror with the job ''),
        and forgets the domain when it comes back. Its QEMU runs on."""
        lost = self._processes()
        for pid in lost:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                try:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    # Its command line is gone some time before its locks.
                    assert select.select([descriptor], [], [], 10)[0], f"QEMU ({pid}) does not end"
                finally:
                    os.close(descriptor)
        return bool(lost)

    def remove(self) -> None:
        """Destroy and undefine it, as often as it takes: libvirtd may be busy with its QEMU, which was stopped."""
        from tests.libvirt.private import until

        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        until(self._is_removed, f"{self.name} is removed")

    def _is_removed(self) -> bool:
        import libvirt

        try:
            with self.domain() as domain:
                if domain.isActive():
                    domain.destroy()
                if domain.isPersistent():
                    kept = ("MANAGED_SAVE", "CHECKPOINTS_METADATA")
                    flags = [getattr(libvirt, f"VIR_DOMAIN_UNDEFINE_{one}") for one in kept]
                    domain.undefineFlags(sum(flags))
        except libvirt.libvirtError as error:
            return bool(error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)
        return False

    @property
    def waits_for_qemu(self) -> bool:
        """Whether a call of libvirt's waits for the monitor's answer."""
        import libvirt

        with self.domain() as domain:
            return bool(domain.controlInfo()[0] == libvirt.VIR_DOMAIN_CONTROL_OCCUPIED)

    @property
    def exists(self) -> bool:
        """Not any more when it has ended and was undefined."""
        with self._libvirt.connection() as connection:
            return any(domain.UUIDString() == self.uuid for domain in connection.listAllDomains())

    @property
    def runs(self) -> bool:
        with self._libvirt.connection() as connection:
            running = connection.listAllDomains(1)
            return any(domain.UUIDString() == self.uuid for domain in running)

    @contextlib.contextmanager
    def domain(self) -> Iterator[Any]:
        """Its virDomain, over a connection of its own."""
        with self._libvirt.connection() as connection:
            yield connection.lookupByUUIDString(self.uuid)

    # QEMU's process

    @property
    def pid(self) -> int:
        """As we see it."""
        found = self._processes()
        assert len(found) == 1, found
        return found[0]

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """QEMU does nothing, and its monitor does not answer."""
        descriptor = os.pidfd_open(self.pid)
        try:
            stand_still(self.pid)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
            os.close(descriptor)

    def _processes(self) -> list[int]:
        mine = f"guest={self.name},".encode()
        found = []
        for pid in self._libvirt.processes("qemu-system"):
            with contextlib.suppress(OSError):
                if mine in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    # What it wrote

    @property
    def flushed(self) -> int:
        """How many blocks the guest has flushed since it was booted. A write that failed for the guest is an error."""
        try:
            text = self.console.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return 0
        booted = text.rpartition("READY blocks=")[2]
        assert "FAILED" not in booted, booted[-500:]
        found = re.findall(r"^FLUSHED (\d+)\r?\n", booted, re.MULTILINE)
        return int(found[-1]) if found else 0

    def until_flushed(self, count: int) -> int:
        from tests.libvirt.private import until

        until(lambda: self.flushed >= count, f"{self.name} has flushed {count} blocks")
        return self.flushed

    def verify(
        self,
        image: Path | None = None,
        *,
        flushed: int | None = None,
        running: bool = False,
        before: Path | None = None,
    ) -> int:
        """That the image (its disk) has all that the guest flushed, and else what it had `before`, if that is known;
        says how many blocks were looked at."""
        number = self.flushed if flushed is None else flushed
        found = pattern.verify_image(image or self.disk, number, running=running, before=before)
        assert not found.wrong, found.wrong[:5]
        assert found.checked > 0, "the guest flushed nothing"
        return found.checked
