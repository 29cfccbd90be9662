"""libvirt's service in the container, as Debian's package has it, and guests of it.

The package is only unpacked (tools/setup.sh): installed, its service would be this machine's own. QEMU emulates, for a
container has no /dev/kvm, and AppArmor, which a container cannot load profiles of, is off. All else is the default: the
owners of images are changed, and remembered.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hostagent.access.owner import REMEMBERED
from tests.libvirt import pattern
from tests.libvirt.guest import initramfs, kernel_folder
from tests.systemd.container import WAIT, Container

PACKAGE = Path(sys.prefix) / "libvirt"
IMAGES = "/var/lib/libvirt/images"
NOW = "/srv/now.raw"
USER = "libvirt-qemu"
USERS = f"""
g kvm -
g {USER} 64055
u {USER} 64055:kvm
m {USER} {USER}
"""
FOLDERS = f"""
d {IMAGES} 0711 root root
d /var/lib/libvirt/boot 0711 root root
d /var/lib/libvirt/qemu 0750 {USER} {USER}
d /var/log/libvirt/qemu 0750 root root
"""
DOMAIN = """
<domain type='qemu'><name>{name}</name><memory unit='MiB'>96</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>/var/lib/libvirt/boot/vmlinuz</kernel>
<initrd>/var/lib/libvirt/boot/initramfs</initrd><cmdline>console=ttyS0 quiet panic=-1 rest=20000</cmdline></os>
<features><acpi/></features><on_poweroff>destroy</on_poweroff><on_crash>destroy</on_crash>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>
<target dev='vda' bus='virtio'/></disk>
<controller type='usb' model='none'/><memballoon model='none'/>
<serial type='file'><source path='{console}'/></serial></devices></domain>
"""


def missing() -> str | None:
    """Why there can be no guests in the container; None when there can."""
    absent = [name for name in ("libvirtd", "virsh", "qemu-system-x86_64", "busybox") if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (tools/setup.sh develop)"
    if not (PACKAGE / "system/libvirtd.service").exists():
        return "libvirt's units were not unpacked (tools/setup.sh develop)"
    if not (kernel_folder() / "vmlinuz").exists():
        return "there is no kernel for guests (tools/setup.sh develop)"
    return None


def install(host: Container) -> None:
    """Before it boots. What this machine's own libvirt has is not there."""
    for place in ("etc/libvirt", "var/lib/libvirt", "var/log/libvirt", "var/cache/libvirt"):
        shutil.rmtree(host.root / place, ignore_errors=True)
    shutil.copytree(PACKAGE / "libvirt", host.root / "etc/libvirt")
    with (host.root / "etc/libvirt/qemu.conf").open("a") as settings:
        settings.write('\nsecurity_driver = "none"\n')
    for unit in (*(PACKAGE / "system").glob("libvirtd*"), *(PACKAGE / "system").glob("virtlo*")):
        (host.root / "etc/systemd/system" / unit.name).unlink(missing_ok=True)
        shutil.copy(unit, host.root / "usr/lib/systemd/system")
    (host.root / "usr/lib/sysusers.d/hypervisor.conf").write_text(USERS)
    (host.root / "usr/lib/tmpfiles.d/hypervisor.conf").write_text(FOLDERS)
    boot = host.root / "var/lib/libvirt/boot"
    boot.mkdir(parents=True)
    shutil.copy(kernel_folder() / "vmlinuz", boot)
    (boot / "initramfs").write_bytes(initramfs())
    host.enable("libvirtd.service")
    host.add_volume(IMAGES)


class Guest:
    """A domain of the container's. `disk` is the name of an image in IMAGES. Once it is awake it writes and flushes
    blocks without end (tests/libvirt/guest_init.sh)."""

    def __init__(self, host: Container, name: str, disk: str) -> None:
        self.name = name
        self._host = host
        self._console = f"/var/log/libvirt/qemu/{name}.console"
        self._xml = f"/srv/{name}.xml"
        text = DOMAIN.format(name=name, disk=f"{IMAGES}/{disk}", console=self._console)
        host.outside(self._xml).write_text(text)

    def define(self) -> None:
        self._host.run("virsh", "define", self._xml)

    def create(self) -> None:
        """Paused, and without a definition."""
        self._host.run("virsh", "create", "--paused", self._xml)

    def start(self, *, paused: bool = False) -> None:
        self._host.outside(self._console).unlink(missing_ok=True)
        self._host.run("virsh", "start", self.name, *(["--paused"] if paused else []))

    def end(self) -> None:
        self._host.run("virsh", "destroy", self.name)

    def remove(self) -> None:
        for verb in ("destroy", "undefine"):
            self._host.run("virsh", verb, self.name, check=False)

    @property
    def pid(self) -> str:
        return self._host.run("pgrep", "-f", f"guest={self.name},").strip()

    @property
    def flushed(self) -> int:
        """How many blocks it has flushed."""
        text = self._host.outside(self._console).read_text(errors="replace")
        assert "FAILED" not in text, text[-500:]
        return max(map(int, re.findall(r"^FLUSHED (\d+)\n", text.replace("\r", ""), re.MULTILINE)), default=0)

    def writes(self, more: int = 3) -> None:
        """It has flushed so many blocks from now on."""
        wanted = self.flushed + more
        self._host.until(lambda: self.flushed >= wanted, f"{self.name} writes")


class Image:
    """A file in IMAGES, as the container has it."""

    def __init__(self, host: Container, name: str) -> None:
        self.path = f"{IMAGES}/{name}"
        self._host = host
        self._file = host.outside(self.path)

    @property
    def owner(self) -> tuple[int, int]:
        found = self._file.stat()
        return found.st_uid, found.st_gid

    @property
    def remembered(self) -> dict[str, str]:
        """What libvirt has noted at the file: whose it was, and for how many domains it has changed that."""
        prefix = "trusted.libvirt.security."
        names = [name for name in os.listxattr(self._file) if name.startswith(prefix)]
        return {name.removeprefix(prefix): os.getxattr(self._file, name).strip(b"\0").decode() for name in names}

    def forget(self) -> None:
        """As `setfattr -x`."""
        os.removexattr(self._file, REMEMBERED)

    def opens(self, mode: str = "r") -> bool:
        """Whether the guests' user can, tried as that user."""
        program = "import sys; open(sys.argv[1], sys.argv[2]).close()"
        user = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "--inh-caps=-all")
        words = (*user, "/usr/bin/python3", "-c", program, self.path, f"{mode}b")
        done = subprocess.run(self._host.command(*words), capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 0 or "PermissionError" in done.stderr, done.stderr
        return done.returncode == 0

    def verify(self, before: str, flushed: int) -> None:
        """Every block is one that the guest wrote, the last of those that it had flushed, or what stood there before."""
        self._host.run("qemu-img", "convert", "-O", "raw", self.path, NOW)
        raw = self._host.outside(NOW)
        try:
            with raw.open("rb") as now, self._host.outside(before).open("rb") as was:
                found = pattern.verify(now, flushed, was)
        finally:
            raw.unlink()
        assert not found.wrong, found.wrong[:5]
        assert found.checked > 0, "the guest flushed nothing"
