"""Files that libvirt made the hypervisor user's own, and left so: when and to whom they are given back.

libvirt changes the owner of all that a domain opens, and restores it for the writable top only: a base stays owned by,
and writable for, every guest of that user, long after the last domain that needed it. Here is what must be true of a
file before its owner is changed, and the change itself; the ledger has made sure before that no row needs the file and
that the user has it nowhere open.

Everything works on descriptors: what a path leads to by now is another matter. What cannot be decided safely is an
obstacle, a sentence for people, and the file stays as it is: its ownership is libvirt's work, not ours.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from hostagent.access import acl
from hostagent.records import AccessFile, Label, Taken
from jobs.errors import JobError

REMEMBERED = "trusted.libvirt.security.ref_dac"
"""libvirt's count of the domains for which it remembers a file's owner; it restores the file itself. It has one for
what a disk writes, and none for the layers below. One of before the host's last start it does not heed."""

MOST_LABELS = 16
"""Labels of one file that are remembered, the newest: domains may have labels of their own."""


def of(fd: int) -> Label:
    """Who has the file. Any descriptor will do, also an O_PATH one."""
    found = os.fstat(fd)
    return Label(found.st_uid, found.st_gid)


def parse(text: str) -> Label:
    """USER:GROUP, names or numbers. KeyError when the host knows no such user or group."""
    user, colon, group = text.partition(":")
    if not colon:
        raise KeyError(text)
    uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    return Label(uid, int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid)


def named(label: Label) -> str:
    return f"{acl.user_name(label.uid)}:{acl.group_name(label.gid)}"


def noted(entry: AccessFile, found: Label, labels: Collection[Label]) -> AccessFile:
    """The entry of a file that domains with these labels need. An owner that is none of the labels is the file's own:
    libvirt has not changed it yet, or has restored it. One that turns out to be a domain's, known later, was none."""
    known = tuple(dict.fromkeys((*entry.labels, *labels)))[-MOST_LABELS:]
    seen = entry.owner if found in known else found
    return replace(entry, labels=known, owner=None if seen in known else seen)


def plan(fd: int, entry: AccessFile, *, uid: int, unknown: Label | None, manage_shared: bool) -> Taken | str | None:
    """What to change, or what stands in the way, or None where the owner is not libvirt's doing (any more).

    `uid` is the hypervisor user's: for no other one could be proven that the file is closed.
    """
    info, here = os.fstat(fd), of(fd)
    if here not in entry.labels or info.st_nlink == 0:
        return None
    back = entry.owner or unknown
    left = f"libvirt left it owned by {named(here)}"
    if here.uid != uid:
        return f"{left}, which is not the hypervisor user: chown it yourself"
    if not stat.S_ISREG(info.st_mode):
        return f"{left}; devices belong to udev: `udevadm trigger` gives them their owner again"
    if info.st_nlink > 1:
        return f"{left}, and it has {info.st_nlink} names (hard links) that others may need: chown it yourself"
    system = acl.file_system(fd)
    if system.shared and not manage_shared:
        return f"{left}, and another host's guest may need it: it is on a shared file system ({system.type})"
    if _remembered(fd):
        note = f"{left} and has noted at the file that it gives it back itself when its last domain ends"
        return f"{note}; if none is left, remove the note: setfattr -x {REMEMBERED}"
    if back is None:
        return f"{left}, and who had it before is not known: chown it, or set access.unknown_owner"
    if back.uid == uid:
        return f"{left}, and its owner before, {named(back)}, is the hypervisor user as well: chown it yourself"
    return Taken(here, back)


def change(fd: int, was: Label, now: Label) -> None:
    """Make the file `now`'s, if it is `was`'s: JobError conflict when somebody changed it meanwhile. Repeatable."""
    here = of(fd)
    if here == now:
        return
    if here != was:
        raise changed(acl.name(fd), here)
    try:
        os.fchown(fd, now.uid, now.gid)
    except OSError as error:
        code = "denied" if error.errno == errno.EPERM else "io_error"
        remedy = "run the agent with CAP_CHOWN; lsattr shows an immutable file"
        message = f"the owner of {acl.name(fd)} cannot be changed: {error.strerror}"
        raise JobError(code, message, remedy=remedy) from error
    if (here := of(fd)) != now:
        raise changed(acl.name(fd), here)


def changed(path: str, here: Label) -> JobError:
    return JobError(
        "conflict",
        f"{path!r} belongs to {named(here)} by now: somebody else changed its owner",
        remedy="see who did (ausearch, the history of who administers it); chown it by hand if that is wrong",
        field="path",
        value=path,
    )


def protector(fd: int | None, path: str, protected: Collection[str]) -> str | None:
    """Which of the protected files and folders this file is, or lies in, by its path or its present name."""
    names = {path} if fd is None else {path, acl.name(fd)}
    for one in protected:
        if any(Path(name).is_relative_to(place) for name in names for place in (one, os.path.realpath(one))):
            return one
        if fd is not None and _is_same(one, fd):
            return one
    return None


def _is_same(path: str, fd: int) -> bool:
    try:
        there = os.stat(path)  # noqa: PTH116
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(fd))


def _remembered(fd: int) -> bool:
    try:
        return bool(os.getxattr(f"/proc/self/fd/{fd}", REMEMBERED).strip(b"\0 0"))
    except OSError:  # not there; or not to be seen without CAP_SYS_ADMIN, as in the packaged service
        return False
