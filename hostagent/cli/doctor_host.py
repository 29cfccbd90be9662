"""What `hostagent doctor` can find out about the host without an agent: programs, users, folders, ACLs, AppArmor."""

from __future__ import annotations

import contextlib
import grp
import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from hostagent.access import acl, owner
from hostagent.cli.finding import Finding, fail, ok, warn
from hostagent.config import Config
from hostagent.drivers.libvirt import PACKAGE, absent, deaf
from jobs.errors import JobError

VERSION_TIMEOUT = 5.0  # seconds for `--version`; a program on a dead network mount never answers
APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
SELINUX = Path("/sys/fs/selinux/enforce")
OLDEST_QEMU = (5, 2)  # the first with nbd exports by block-export-add in qemu-storage-daemon
SAFE_QUERY_QEMU = (10, 2)  # below it query-named-block-nodes can crash QEMU (gitlab qemu issue 3149)
SAFE_CLOSING_QEMU = ((7, 2, 14), (8, 2, 7), (9, 0, 3), (9, 1, 0))
"""The first of each line in which an NBD server is not crashed by clients that stay while it closes (CVE-2024-7409)."""


def findings(config: Config) -> Iterator[Finding]:
    yield from _programs(config)
    yield _libnbd()
    yield _libvirt(config)
    yield _user("hypervisor user", "access.hypervisor_user", config.access.hypervisor_user)
    if config.qsd.user != config.access.hypervisor_user:
        yield _user("storage user", "qsd.user", config.qsd.user)
    yield from _exports_group(config)
    yield _state_folder(config.agent.state_dir)
    yield _runtime_folder(config)
    yield from _acls(config)
    yield from _apparmor(config)
    yield _selinux()


# Programs


def _programs(config: Config) -> Iterator[Finding]:
    for program, key, package in (
        (config.qsd.binary, "qsd.binary", "qemu-system-common (Debian), qemu-img (Fedora, RHEL)"),
        (config.images.qemu_img, "images.qemu_img", "qemu-utils (Debian), qemu-img (Fedora, RHEL)"),
    ):
        yield from _program(program, key, package)


def _program(program: str, key: str, package: str) -> Iterator[Finding]:
    name = Path(program).name
    path = shutil.which(program)
    if path is None:
        yield fail(name, f"{program!r} is not installed", f"install {package}, or set {key}")
        return
    version = _version(path)
    if version is None:
        remedy = f"run `{path} --version`; set {key} if it is another program"
        yield fail(name, f"{path} does not say its version", remedy)
        return
    text = ".".join(map(str, version))
    if version < OLDEST_QEMU:
        yield fail(name, f"{path} is version {text}", "5.2 is the oldest that can do what the agent needs")
        return
    yield ok(name, f"{path}, version {text}")
    if key == "qsd.binary" and version < SAFE_QUERY_QEMU:
        remark = "after a pull query-named-block-nodes, sent by anybody, can crash this version; the agent sends none"
        yield ok(name, remark)
    if key == "qsd.binary" and not _mended(version, SAFE_CLOSING_QEMU):
        remark = "a client that stays connected while an export is stopped can crash this version (CVE-2024-7409)"
        yield warn(name, remark, "update it, unless the distribution has mended this one; stop exports without clients")


def _mended(version: tuple[int, ...], first: Sequence[tuple[int, ...]]) -> bool:
    """Whether a version is of a line that was mended, from there on, or newer than all of these lines."""
    return version >= max(first) or any(version[:2] == one[:2] and version >= one for one in first)


def _version(path: str) -> tuple[int, ...] | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, timeout=VERSION_TIMEOUT, check=False, text=True)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    found = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", done.stdout[:1000])
    return tuple(int(part) for part in found.groups() if part is not None) if found else None


def _libnbd() -> Finding:
    if importlib.util.find_spec("nbd") is None:
        return fail("libnbd", "the Python binding of libnbd is missing", "install python3-libnbd")
    return ok("libnbd", "the Python binding is there")


def _libvirt(config: Config) -> Finding:
    if not config.libvirt.uri:
        return ok("libvirt", "libvirt.uri is empty: live disks are not looked after")
    if (missing := absent()) is not None:
        return warn("libvirt", f"{missing}: live disks are not looked after", 'install it, or set libvirt.uri to ""')
    if (lacks := deaf()) is not None:
        text = f"{lacks}: copies and commits of guests' disks with --finish or --keep-overlay are refused"
        return warn("libvirt", text, f"install {PACKAGE} whole: QEMU's own word, which only that hears, is their proof")
    return ok("libvirt", f"the Python binding is there, for {config.libvirt.uri}")


# Users and folders


def _user(name: str, key: str, user: str) -> Finding:
    if not user:
        return ok(name, f"our own ({_user_name(os.geteuid())}): nothing is granted")
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        remedy = f"install libvirt's QEMU driver, or set {key} (qemu on Fedora and RHEL, libvirt-qemu on Debian)"
        return fail(name, f"the user {user!r} does not exist", remedy)
    if os.geteuid() not in (0, found.pw_uid):
        return fail(name, f"only root can work for the user {user!r}", f'run the agent as root, or set {key} to ""')
    return ok(name, f"{user} (uid {found.pw_uid})")


def _exports_group(config: Config) -> Iterator[Finding]:
    """Without it nobody but root reaches an export, and so the data daemon none."""
    if os.geteuid() != 0 or not config.data.start:
        return
    name = config.api.socket_group
    try:
        grp.getgrnam(name)
    except KeyError:
        text = f"there is no group {name!r} (api.socket_group), so the data daemon reaches no export"
        yield warn("group", text, f"groupadd --system {name}, and restart the agent")
    else:
        yield ok("group", f"{name} may use the API and the exports")


def _state_folder(folder: Path) -> Finding:
    name = "state folder"
    found = _folder(name, folder, "the agent makes it when it starts")
    if isinstance(found, Finding):
        return found
    if found.st_mode & 0o077:
        remedy = f"chmod 0700 {folder}"
        return warn(name, f"{folder} has mode {_mode(found)}: others can read what is stored in it", remedy)
    if acl_kind := _shared_kind(folder):
        remedy = "set agent.state_dir to a folder on a local disk"
        return fail(name, f"{folder} is on {acl_kind}: SQLite's WAL needs a local file system", remedy)
    return ok(name, f"{folder}, mode {_mode(found)}")


def _runtime_folder(config: Config) -> Finding:
    name, folder = "runtime folder", config.agent.runtime_dir
    found = _folder(name, folder, "the agent makes it when it starts")
    if isinstance(found, Finding):
        return found
    if found.st_mode & 0o022:
        return fail(name, f"{folder} has mode {_mode(found)}: others can replace its sockets", f"chmod 0755 {folder}")
    if config.access.hypervisor_user and not found.st_mode & 0o011:
        text = f"{folder} has mode {_mode(found)}: the group of the API's socket cannot reach it"
        return warn(name, text, f"chmod 0755 {folder}")
    return ok(name, f"{folder}, mode {_mode(found)}")


def _folder(name: str, folder: Path, if_missing: str) -> os.stat_result | Finding:
    """The folder's stat if it is a folder of ours."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return ok(name, f"{folder} is not there yet: {if_missing}")
    except OSError as error:
        return fail(name, f"{folder}: {error.strerror}", "run the doctor as the agent's user")
    if not stat.S_ISDIR(found.st_mode):
        return fail(name, f"{folder} is not a folder", "move it away")
    if found.st_uid not in (0, os.geteuid()):
        return fail(name, f"{folder} belongs to {_user_name(found.st_uid)}", f"chown it to {_user_name(os.geteuid())}")
    return found


# Access control


def _acls(config: Config) -> Iterator[Finding]:
    """Try a grant and its undoing on a nameless file in each pool."""
    if not config.access.hypervisor_user:
        yield ok("access control", "not needed: nothing is granted")
        return
    for pool in config.images.pools:
        yield _acl(Path(pool))
    yield _unknown_owner(config)


def _unknown_owner(config: Config) -> Finding:
    """Who gets what libvirt leaves the hypervisor user's own."""
    name, text = "unknown owners", config.access.unknown_owner
    if not text:
        return ok(name, "files that libvirt leaves and whose owner was not seen are only reported")
    remedy = "set access.unknown_owner to root:root, or to nothing: then such files are only reported"
    try:
        label = owner.parse(text)
    except KeyError:
        return fail(name, f"{text!r} is not USER:GROUP, both known on this host", remedy)
    with contextlib.suppress(KeyError):  # that there is no such user is said by another check
        if label.uid == pwd.getpwnam(config.access.hypervisor_user).pw_uid:
            return warn(name, f"{text} is the hypervisor user: what libvirt leaves stays open to all guests", remedy)
    return ok(name, f"files that libvirt leaves and whose owner was not seen go to {text}")


def _acl(folder: Path) -> Finding:
    name = "access control"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            kind = acl.file_system(file.fileno())
            if kind.shared:
                text = f"{folder} is on {kind.type}: access there is only reported, not changed"
                return warn(name, text, 'if this host alone uses it: access.shared_filesystems = "manage"')
            stranger = 65534 if os.geteuid() != 65534 else 65533  # any user but us; the file is gone after the test
            before, given = acl.apply_grant(file.fileno(), stranger, "r")
            if not acl.apply_undo(file.fileno(), stranger, before, given).same_access(before):
                return fail(name, f"{folder} ({kind.type}): a grant could not be undone", "use ext4 or XFS")
    except FileNotFoundError:
        return warn(name, f"{folder} is not there", "make it, or correct images.pools")
    except OSError as error:
        return warn(
            name, f"{folder}: no test file could be made: {error.strerror}", "run the doctor as the agent's user"
        )
    except JobError as error:
        return fail(name, f"{folder}: {error.message}", error.remedy)
    return ok(name, f"{folder} ({kind.type}): a grant can be given and taken back to the byte")


def _shared_kind(folder: Path) -> str | None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kind = acl.file_system(fd)
    finally:
        os.close(fd)
    return kind.type if kind.shared else None


def _apparmor(config: Config) -> Iterator[Finding]:
    try:
        enabled = APPARMOR.read_text().strip() == "Y"
    except OSError:
        enabled = False
    if not enabled:
        yield ok("AppArmor", "not enabled")
        return
    lines = "\n".join(
        (
            "add to /etc/apparmor.d/local/abstractions/libvirt-qemu (untested), for guests that are started then:",
            f"  {config.agent.runtime_dir}/nbd/*.sock rw,",
            "units/apparmor/libvirt-qemu says more (/usr/share/doc/hostagent/examples/apparmor/ of the package)",
        )
    )
    yield warn("AppArmor", "enabled: guests may not be able to reach the agent's NBD sockets", lines)


def _selinux() -> Finding:
    try:
        enforcing = SELINUX.read_text().strip() == "1"
    except OSError:
        return ok("SELinux", "not enabled")
    if not enforcing:
        return ok("SELinux", "permissive: it forbids nothing")
    text = "enforcing: it also decides what guests and storage daemons may open, which was not tested"
    remedy = "see `ausearch -m avc -ts recent` when an image or a socket is refused; images of libvirt are virt_image_t"
    return warn("SELinux", text, remedy)


def _mode(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):04o}"


def _user_name(uid: int) -> str:
    return acl.user_name(uid)
