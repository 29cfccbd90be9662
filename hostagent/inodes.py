"""What kind of thing a path or an open descriptor leads to, before any byte of it is read: the kernel's word alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

DEVICES = "/dev"
GRASP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
"""How a path is taken hold of: opens nothing, follows no final link, has no side effect on any kind of file."""

# Where another host may use the file too, with its own idea of users and of what lies in its caches.
SHARED_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "9p", "virtiofs", "gpfs", "ocfs2", "gfs2", "unknown"}
)

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
)


def kind_name(mode: int) -> str:
    """For people, of what is neither a regular file nor a block device."""
    return next((name for test, name in _KINDS if test(mode)), "a special file")


def device_link(path: str) -> Path | None:
    """The path, its folders resolved, when it is a link to a device, in a folder below /dev that is root's alone."""
    folder, name = os.path.split(path)
    link = Path(os.path.realpath(folder), name)
    if not link.is_relative_to(DEVICES) or not link.is_symlink():
        return None
    owner = link.parent.stat()
    ours = owner.st_uid == 0 and not owner.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return link if ours and link.is_block_device() else None


def real_path(path: str) -> str:
    """Without links; as it is where one of them cannot be read, and then it is the name of no file that we know."""
    try:
        return os.path.realpath(path)
    except OSError:
        return path


def has_no_storage(handle: int) -> bool:
    """Whether the file system is one like /proc and /sys, which have neither blocks nor inodes to give. Reading their
    files may fail, wait, or have effects."""
    system = os.fstatvfs(handle)
    return not system.f_blocks and not system.f_files


def device_node(device: int) -> str | None:
    """The kernel's own node of a block device; None when sysfs does not say."""
    try:
        lines = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/uevent").read_text().splitlines()
    except OSError:
        return None
    name = next((line.removeprefix("DEVNAME=") for line in lines if line.startswith("DEVNAME=")), None)
    return f"{DEVICES}/{name}" if name else None


def file_system_type(fd: int) -> str:
    """As in /proc/mounts; `unknown` when the mount is not ours to see.

    By mount id and not by device number, which a btrfs subvolume does not share with its mount.
    """
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        mount = next((line.split()[1] for line in lines if line.startswith("mnt_id:")), "")
    with open("/proc/self/mountinfo", errors="surrogateescape") as lines:
        fields = next((line.split() for line in lines if line.split(" ", 1)[0] == mount), None)
    return "unknown" if fields is None else fields[fields.index("-") + 1]


def is_shared(kind: str) -> bool:
    """Whether other hosts may use a file system of that type at the same time."""
    return kind in SHARED_FILE_SYSTEMS or kind.startswith("fuse")
