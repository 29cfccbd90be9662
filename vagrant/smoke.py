#!/usr/bin/python3
"""The whole of hostagent once, as its users have it: with `hostagent`, qemu-img, nbdinfo and virsh, and nothing else.

    smoke.py            images without guests, and the disk of a running guest
    smoke.py offline    the first alone
    smoke.py live       the second alone

It exports, pulls by increments, copies, commits and revokes. After each step every byte is compared with what it must
be, and whether the hypervisor user can open a file is tried as that user. It works with the agent that HOSTAGENT_SOCKET
names (empty: none), else with the system's, else with one that it starts for itself; with the libvirt that
LIBVIRT_DEFAULT_URI names, else the system's. It needs root, 256 MiB in /var/tmp (TMPDIR) and a minute, and leaves
nothing behind. Exit status 0 says that all held.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Json = dict[str, Any]

MIB = 1 << 20
SIZE = 24 * MIB
DATA = 16 * MIB  # of random bytes at the base's begin
STEP = 8 * MIB
WAIT = 120.0  # seconds for what takes one or two
ENDED = ("completed", "failed", "aborted")
SOCKET = Path("/run/hostagent/hostagent.sock")
DOMAIN = f"hostagent-smoke-{os.getpid()}"
GUEST = """
<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>
<target dev='vda' bus='virtio'/></disk>
<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>
"""
DEVICE = "/machine/peripheral/virtio-disk0/virtio-backend"


class Failed(Exception):
    """Something did not hold; the text says what."""


# Saying and doing


def held(truth: bool, claim: str) -> None:
    if not truth:
        raise Failed(claim)
    print(f"  ok: {claim}", flush=True)


def run(*words: str | Path, status: int = 0) -> str:
    """Show a command, run it, and give what it printed."""
    command = [str(word) for word in words]
    print(f"$ {shlex.join(command)}", flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise Failed(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{command[0]} has not ended after {WAIT:g} s") from None
    if done.returncode != status:
        raise Failed(f"it ended with {done.returncode} and not with {status}: {done.stderr or done.stdout}")
    return done.stdout


def hostagent(*words: str | Path) -> Json:
    """What the command says with --json."""
    found: Json = json.loads(run("hostagent", *words, "--json"))
    return found


def until(what: str, found: Callable[[], Any]) -> Any:
    """What `found` returns when it is true."""
    end = time.monotonic() + WAIT
    while not (value := found()):
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {WAIT:g} s")
        time.sleep(0.2)
    return value


def job(id: str) -> Json:
    done = subprocess.run(
        ["hostagent", "job", "show", id, "--json"], capture_output=True, text=True, timeout=WAIT, check=True
    )
    found: Json = json.loads(done.stdout)
    return found


def settled(id: str) -> Json:
    """The job when it has ended, and its access with it."""
    found = until("the job's end", lambda: _ended(job(id)))
    why = f": {found['error']}" if found.get("error") else ""
    held(found["state"] == "completed", f"the {found['operation']} is completed{why}")
    return dict(found)


def _ended(found: Json) -> Json | None:
    return found if found["state"] in ENDED and found["revocation"] != "pending" else None


# What must be true


class Images:
    """A folder, and the user whose access is tried."""

    def __init__(self, folder: Path, user: str) -> None:
        self.folder = folder
        entry = pwd.getpwnam(user)
        self.user = user
        self._as: Json = {
            "user": entry.pw_uid,
            "group": entry.pw_gid,
            "extra_groups": os.getgrouplist(user, entry.pw_gid),
        }

    def base(self, name: str) -> tuple[Path, bytearray]:
        """A raw image that only its owner may read, and its bytes."""
        content = bytearray(os.urandom(DATA)) + bytearray(SIZE - DATA)
        path = self.folder / name
        path.touch(mode=0o600)
        with path.open("wb") as image:
            image.write(content[:DATA])
            image.truncate(SIZE)
        return path, content

    def overlay(self, name: str, base: Path, base_format: str) -> Path:
        path = self.folder / name
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", base_format, path)
        path.chmod(0o600)
        return path

    def opens(self, path: Path) -> bool:
        """Whether the hypervisor user can, tried as that user."""
        program = "import os, sys; os.open(sys.argv[1], os.O_RDONLY)"
        done = subprocess.run(
            ["/usr/bin/python3", "-c", program, path], capture_output=True, timeout=WAIT, check=False, **self._as
        )
        return done.returncode == 0

    def same(self, image: Path | str, format: str, content: bytes | bytearray, claim: str) -> None:
        """Compared by qemu-img and, of a file, by the checksum of all its bytes."""
        truth = self.folder / "truth.raw"
        with truth.open("wb") as file:
            file.write(content)
        run("qemu-img", "compare", "-f", format, "-F", "raw", image, truth)
        if isinstance(image, Path):
            raw = self.folder / "checked.raw"
            run("qemu-img", "convert", "-f", format, "-O", "raw", image, raw)
            held(hashlib.sha256(raw.read_bytes()).digest() == hashlib.sha256(content).digest(), claim)
            raw.unlink()
        else:
            held(True, claim)
        truth.unlink()


def backing(image: Path) -> str | None:
    name: str | None = json.loads(run("qemu-img", "info", "--output=json", image)).get("backing-filename")
    return name


def write(images: Images, image: Path, content: bytearray, offset: int) -> None:
    """4 MiB of something new into an image and into what it must be, as a client of a writable export."""
    piece = images.folder / "piece.raw"
    piece.write_bytes(os.urandom(4 * MIB))
    export = hostagent("export", "start", image, "--writable")
    parts = urlsplit(export["uri"])
    nbd = f"file.driver=nbd,file.server.type=unix,file.server.path={parse_qs(parts.query)['socket'][0]}"
    target = f"driver=raw,offset={offset},size={4 * MIB},{nbd},file.export={unquote(parts.path[1:])}"
    run("qemu-img", "convert", "-n", "-f", "raw", piece, "--target-image-opts", target)
    run("hostagent", "export", "stop", export["id"])
    content[offset : offset + 4 * MIB] = piece.read_bytes()
    piece.unlink()
    images.same(image, "qcow2", content, "what a client wrote is in the image")


# Images without guests


def offline(images: Images) -> None:
    base, content = images.base("base.raw")
    disk = images.overlay("disk.qcow2", base, "raw")
    held(not images.opens(base), f"{images.user} cannot open the base")
    write(images, disk, content, 12 * MIB)

    print("\n# export, and pull by increments meanwhile", flush=True)
    export = hostagent("export", "start", disk)
    (found,) = json.loads(run("nbdinfo", "--json", export["uri"]))["exports"]
    held(found["export-size"] == SIZE, "the export has the disk's size")
    images.same(export["uri"], "raw", content, "and its bytes")
    held(images.opens(base), f"{images.user} can open the base as long as that is needed")

    def between() -> None:
        images.same(export["uri"], "raw", content, "clients read the same between two steps")

    by_increments(disk, between=between, last=lambda: None)
    held(backing(disk) is None, "the image's header names no base any more")
    held(not images.opens(base), f"{images.user} cannot open the base, which nobody needs any more")
    images.same(export["uri"], "raw", content, "clients read the same afterwards")
    run("hostagent", "export", "stop", export["id"])
    base.unlink()
    images.same(disk, "qcow2", content, "the disk stands alone")

    print("\n# copy", flush=True)
    copy = images.folder / "copy.qcow2"
    run("hostagent", "job", "copy", disk, copy, "--finish", "--wait")
    images.same(copy, "qcow2", content, "the copy is the disk's")
    sums = {hostagent("checksum", image, "--storage-user", "root")["checksum"] for image in (disk, copy)}
    held(len(sums) == 1, "hostagent's own checksums agree")

    print("\n# commit", flush=True)
    work = images.overlay("work.qcow2", copy, "qcow2")
    write(images, work, content, 18 * MIB)
    done = hostagent("job", "commit", work, "--pivot", "--wait")
    held(done["state"] == "completed", "the commit is completed")
    images.same(copy, "qcow2", content, "the base has what the overlay had")
    held(not images.opens(work), f"{images.user} cannot open the overlay any more")
    revoke(images)


def by_increments(target: str | Path, *more: str, between: Callable[[], object], last: Callable[[], object]) -> None:
    """A pull, a step at a time; `more` are words of the command, and `last` is done when all is copied."""
    id = hostagent("job", "pull", target, "--increment", "8MiB", *more)["id"]
    seen = 0
    while True:
        found = until("a step", lambda: _stands(job(id)))
        cursor = found["cursor"]
        held(
            seen < cursor["cur"] <= cursor["end"] or found["state"] in ENDED,
            f"the cursor is at {cursor['cur'] // MIB} MiB of {cursor['end'] // MIB}",
        )
        if found["state"] != "waiting":
            break
        held(cursor["cur"] - seen >= min(STEP, cursor["end"] - seen), "a step is at least its increment")
        seen = cursor["cur"]
        between()
        run("hostagent", "job", "next", id)
    last()
    held(settled(id)["revocation"] == "done", "access is settled")


def _stands(found: Json) -> Json | None:
    """Between two steps, ended, or at its end (a guest's disk is not flushed yet)."""
    all_copied = found["cursor"]["end"] > 0 and found["cursor"]["cur"] == found["cursor"]["end"]
    return found if found["state"] in ("waiting", *ENDED) or all_copied else None


def revoke(images: Images) -> None:
    """What an aborted pull left open is taken back by hand."""
    print("\n# revoke", flush=True)
    base, content = images.base("base2.raw")
    disk = images.overlay("disk2.qcow2", base, "raw")
    id = hostagent("job", "pull", disk, "--bandwidth", "1MiB/s")["id"]
    until("the pull runs", lambda: job(id)["state"] == "running")
    run("hostagent", "job", "abort", id)
    until("its end", lambda: _ended(job(id)))
    held(job(id)["state"] == "aborted" and images.opens(base), f"{images.user} keeps the base: the disk stands on it")
    (grant,) = hostagent("grant", "list", "--path", base)["items"]
    run("hostagent", "grant", "revoke", grant["id"])
    held(not images.opens(base), f"{images.user} cannot open the base any more")
    images.same(disk, "qcow2", content, "the disk is what it was")


# The disk of a running guest


def live(images: Images) -> None:
    base, content = images.base("guest-base.raw")
    disk = images.overlay("guest.qcow2", base, "raw")
    with guest(images, disk):
        print("\n# pull of a guest's disk, by increments", flush=True)
        run("virsh", "start", DOMAIN, "--paused")
        until("the agent knows the guest", _known)
        guest_writes(content, 12 * MIB, 0x51)
        # The agent stops QEMU after each step, but does not foresee it: at full speed this would be the only one. And a
        # guest that does not run flushes nothing: QEMU writes the rest when it ends.
        by_increments(
            f"{DOMAIN}/vda", "--bandwidth", "8MiB/s", between=_known, last=lambda: run("virsh", "destroy", DOMAIN)
        )
        held(backing(disk) is None, "the image's header names no base any more")
        held(not images.opens(base), f"{images.user} cannot open the base any more")
        base.unlink()
        images.same(disk, "qcow2", content, "the guest's disk stands alone")

        print("\n# copy, to which the guest goes over", flush=True)
        copy = images.folder / "guest-copy.qcow2"
        run("virsh", "start", DOMAIN, "--paused")
        run("hostagent", "job", "copy", f"{DOMAIN}/vda", copy, "--pivot", "--wait")
        held(str(copy) in run("virsh", "domblklist", DOMAIN), "the guest is on the copy")
        held(not images.opens(disk), f"{images.user} cannot open the disk that it left")

        print("\n# commit of what it wrote since a snapshot", flush=True)
        above = images.folder / "guest-above.qcow2"
        spec = f"vda,file={above}"
        run("virsh", "snapshot-create-as", DOMAIN, "--disk-only", "--no-metadata", "--atomic", "--diskspec", spec)
        guest_writes(content, 18 * MIB, 0x52)
        run("hostagent", "job", "commit", f"{DOMAIN}/vda", "--pivot", "--wait")
        held(str(copy) in run("virsh", "domblklist", DOMAIN), "the guest is on the base of its snapshot")
        held(not images.opens(above), f"{images.user} cannot open the overlay any more")
        run("virsh", "destroy", DOMAIN)
        images.same(copy, "qcow2", content, "all that the guest wrote is there")


@contextlib.contextmanager
def guest(images: Images, disk: Path) -> Iterator[None]:
    """A domain with that disk; there is nothing to boot on it."""
    xml = images.folder / "guest.xml"
    xml.write_text(GUEST.format(name=DOMAIN, disk=disk))
    run("virsh", "define", xml)
    try:
        yield
    finally:
        for verb in ("destroy", "undefine"):
            subprocess.run(["virsh", verb, DOMAIN], capture_output=True, timeout=WAIT, check=False)


def guest_writes(content: bytearray, offset: int, byte: int) -> None:
    """2 MiB through the guest's own device, as if the guest did."""
    command = f'qemu-io -d {DEVICE} "write -P {byte} {offset} {2 * MIB}"'
    said = run("virsh", "qemu-monitor-command", DOMAIN, "--hmp", command)
    held(not said.strip(), f"the guest has written {said.strip()}".rstrip())
    content[offset : offset + 2 * MIB] = bytes([byte]) * (2 * MIB)


def _known() -> bool:
    """Whether the agent is connected to the libvirt that has the guest."""
    done = subprocess.run(
        ["hostagent", "job", "pull", f"{DOMAIN}/vda", "--dry-run"], capture_output=True, timeout=WAIT, check=False
    )
    return done.returncode == 0


# The agent


@contextlib.contextmanager
def agent(folder: Path) -> Iterator[None]:
    """The one that is there, or one of our own."""
    if "HOSTAGENT_SOCKET" not in os.environ and _answers(SOCKET):
        os.environ["HOSTAGENT_SOCKET"] = str(SOCKET)
    if os.environ.get("HOSTAGENT_SOCKET"):
        yield
        return
    runtime = Path(tempfile.mkdtemp(prefix="hs-", dir="/tmp"))  # names of sockets are to be short
    runtime.chmod(0o755)
    environment = {**os.environ, "HOSTAGENT_DATA_START": "false", "HOSTAGENT_DBUS_ADDRESS": "off"}
    if (uri := os.environ.get("LIBVIRT_DEFAULT_URI")) is not None:
        environment["HOSTAGENT_LIBVIRT_URI"] = uri
    command = ["hostagent", "serve", "--config", os.devnull, "--state-dir", str(folder / "state")]
    command += ["--runtime-dir", str(runtime), "--hypervisor-user", _hypervisor_user()]
    print(f"$ {shlex.join(command)} &", flush=True)
    with (folder / "agent.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    os.environ["HOSTAGENT_SOCKET"] = str(runtime / "hostagent.sock")
    try:
        until("the agent answers", lambda: _answers(runtime / "hostagent.sock") or process.poll() is not None)
        yield
    except BaseException:
        print((folder / "agent.log").read_text(errors="replace")[-4000:], file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(runtime, ignore_errors=True)


def _answers(socket: Path) -> bool:
    command = ["hostagent", "status", "--json", "--socket", str(socket)]
    return socket.exists() and subprocess.run(command, capture_output=True, timeout=WAIT, check=False).returncode == 0


def _hypervisor_user() -> str:
    """libvirt's on Debian; on a host without it any that owns no image."""
    for name in ("libvirt-qemu", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise Failed("there is neither a user libvirt-qemu nor nobody")


def end_all(folder: Path) -> None:
    """What a failure left running of ours."""
    for noun, verb, key in (("export", ["stop", "--force"], "image"), ("job", ["abort"], "path")):
        done = subprocess.run(["hostagent", noun, "list", "--json"], capture_output=True, timeout=WAIT, check=False)
        if done.returncode == 0:
            for item in json.loads(done.stdout)["items"]:
                if str(item.get(key, "")).startswith(f"{folder}/"):
                    command = ["hostagent", noun, verb[0], item["id"], *verb[1:]]
                    subprocess.run(command, capture_output=True, timeout=WAIT, check=False)


def main(arguments: list[str]) -> int:
    parts = {"offline": offline, "live": live}
    wanted = arguments or list(parts)
    if unknown := [name for name in wanted if name not in parts]:
        print(f"{unknown[0]!r} is no part; there are: {', '.join(parts)}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("only root can try what another user may open", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="hostagent-smoke-", dir=os.environ.get("TMPDIR", "/var/tmp")))  # noqa: S108
    folder.chmod(0o711)  # the hypervisor user may pass: a refusal is the file's own
    try:
        with agent(folder):
            try:
                images = Images(folder, hostagent("status")["host"]["user"]["name"])
                for name in wanted:
                    print(f"\n## {name}", flush=True)
                    parts[name](images)
            finally:
                end_all(folder)
    except Failed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\nall held")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
