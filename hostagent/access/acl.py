"""POSIX access ACLs of one file: read, grant one user, undo, and say who lets a user in.

We compute the ACL ourselves because `setfacl -m` recomputes the mask, and a raised mask can give other entries rights
back that somebody had masked away. The invariants:

* a grant gives one user the access asked for and widens nobody else's; where that cannot be, it is refused and nothing
  is changed;
* an undo restores the ACL from before to the byte when nobody changed it in between, else it takes away our entry only;
* everything works on descriptors. A change goes through /proc/self/fd/N, so a path that was swapped is never touched,
  and through one setxattr, so there is no moment with half an ACL.

The pure part is `Acl`, `grant`, `undo`, `allows` and `explain`; `read` and the three `apply_` functions do the I/O.
Access follows the kernel, with its exception: when the mode's group bits (the mask) are 0 the kernel does not look at
the ACL at all. Only the access ACL matters: images are files, and a default ACL is a folder's.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from hostagent.inodes import file_system_type, is_shared
from jobs.errors import JobError

XATTR = "system.posix_acl_access"
VERSION = 2
UNDEFINED_ID = 0xFFFFFFFF
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
READ, WRITE = 4, 2

Need = Literal["r", "rw"]
NEEDS: dict[Need, int] = {"r": READ, "rw": READ | WRITE}
VERBS: dict[Need, str] = {"r": "read", "rw": "read and write"}

REFUSALS = {
    errno.ENOTSUP: ("access_refused", "move the image to ext4 or XFS, or mount its file system with ACLs"),
    errno.EPERM: ("denied", "run the agent as the file's owner or with CAP_FOWNER; lsattr shows an immutable file"),
    errno.EROFS: ("access_refused", "mount the file system read-write"),
    errno.ENOSPC: ("no_space", "free space or inodes on the image's file system"),
    errno.EDQUOT: ("no_space", "raise the quota on the image's file system"),
}


class Entry(NamedTuple):
    """One line of getfacl: `id` is the user or group of a named entry."""

    tag: int
    id: int
    perms: int

    def __str__(self) -> str:
        letters = "".join(letter if self.perms & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        return f"{self.subject}:{letters}"

    @property
    def subject(self) -> str:
        if self.tag == USER:
            return f"user:{user_name(self.id)}"
        if self.tag == GROUP:
            return f"group:{group_name(self.id)}"
        return {USER_OBJ: "user:", GROUP_OBJ: "group:", MASK: "mask:", OTHER: "other:"}[self.tag]


@dataclass(frozen=True, slots=True)
class Acl:
    """An access ACL. `users` and `groups` are (id, permissions); `mask` is None in a minimal ACL, which is the mode."""

    owner: int
    group: int
    other: int
    users: tuple[tuple[int, int], ...] = ()
    groups: tuple[tuple[int, int], ...] = ()
    mask: int | None = None

    @classmethod
    def from_mode(cls, mode: int) -> Acl:
        return cls(owner=mode >> 6 & 7, group=mode >> 3 & 7, other=mode & 7)

    @classmethod
    def parse(cls, data: bytes) -> Acl:
        if len(data) < 4 or (len(data) - 4) % 8 or struct.unpack_from("<I", data)[0] != VERSION:
            raise _unreadable(data)
        entries = [Entry(tag, id, perms) for tag, perms, id in struct.iter_unpack("<HHI", data[4:])]
        single = {entry.tag: entry.perms for entry in entries if entry.tag not in (USER, GROUP)}
        named = sorted((entry for entry in entries if entry.tag in (USER, GROUP)), key=lambda entry: entry[:2])
        known = single.keys() <= {USER_OBJ, GROUP_OBJ, MASK, OTHER} and single.keys() >= {USER_OBJ, GROUP_OBJ, OTHER}
        if not known or len(single) + len(named) != len(entries) or any(entry.perms > 7 for entry in entries):
            raise _unreadable(data)
        if named and MASK not in single:
            raise _unreadable(data)
        return cls(
            owner=single[USER_OBJ],
            group=single[GROUP_OBJ],
            other=single[OTHER],
            users=tuple((entry.id, entry.perms) for entry in named if entry.tag == USER),
            groups=tuple((entry.id, entry.perms) for entry in named if entry.tag == GROUP),
            mask=single.get(MASK),
        )

    def serialize(self) -> bytes:
        """The xattr in the canonical order. The kernel turns a minimal one into mode bits and drops the xattr."""
        lines = (struct.pack("<HHI", entry.tag, entry.perms, entry.id) for entry in self.entries())
        return struct.pack("<I", VERSION) + b"".join(lines)

    def entries(self) -> Iterator[Entry]:
        yield Entry(USER_OBJ, UNDEFINED_ID, self.owner)
        yield from (Entry(USER, uid, perms) for uid, perms in sorted(self.users, key=lambda user: user[0]))
        yield Entry(GROUP_OBJ, UNDEFINED_ID, self.group)
        yield from (Entry(GROUP, gid, perms) for gid, perms in sorted(self.groups, key=lambda group: group[0]))
        if self.mask is not None:
            yield Entry(MASK, UNDEFINED_ID, self.mask)
        yield Entry(OTHER, UNDEFINED_ID, self.other)

    def user(self, uid: int) -> int | None:
        """The permissions of the user's own entry, not masked. The first one counts, as for the kernel."""
        return next((perms for other, perms in self.users if other == uid), None)

    def with_user(self, uid: int, perms: int | None) -> Acl:
        kept = tuple(user for user in self.users if user[0] != uid)
        return replace(self, users=kept if perms is None else tuple(sorted((*kept, (uid, perms)))))

    def masked(self) -> Iterator[Entry]:
        """The entries that the mask limits: the group class."""
        return (entry for entry in self.entries() if entry.tag in (USER, GROUP_OBJ, GROUP))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What decides who may open a file, to the byte. `mode` is the permission bits; `xattr` None for a minimal ACL."""

    mode: int
    uid: int
    gid: int
    xattr: bytes | None

    @property
    def acl(self) -> Acl:
        return Acl.from_mode(self.mode) if self.xattr is None else Acl.parse(self.xattr)

    def same_access(self, other: Snapshot) -> bool:
        """The same ACL to the byte. Owner and set-id bits are another matter: no grant touches them."""
        return self.xattr == other.xattr and self.mode & 0o777 == other.mode & 0o777


class FileSystem(NamedTuple):
    type: str
    shared: bool


# The pure part


def grant(acl: Acl, uid: int, need: Need, *, has: int = 0) -> Acl:
    """The ACL in which `uid` has `need`, and nobody else more than before.

    `has` is what the user may do already, by a group or as anybody: its own entry goes before those for the kernel, so
    the entry must hold it too, or the grant would take it away.
    """
    perms = NEEDS[need] | has
    entry = perms | (acl.user(uid) or 0)
    if acl.mask is None:
        return replace(acl.with_user(uid, entry), mask=acl.group | perms)
    raised = perms & ~acl.mask
    for other in acl.masked():
        if other.perms & raised and (other.tag, other.id) != (USER, uid):
            raise _widens(other, other.perms & acl.mask, user_name(uid), need)
    return replace(acl.with_user(uid, entry), mask=acl.mask | perms)


def undo(current: Acl, given: Acl | None, before: Acl, uid: int) -> Acl:
    """The ACL without what our grant gave: `before` if nobody changed it, else `current` without our entry.

    `given` is None when a crash left it unknown, which counts as changed.

    An entry that the user had before gets its permissions back, but no more than were in effect then: somebody may
    rely on the mask that stands now.
    """
    if current == given:
        return before
    entry = current.user(uid)
    if entry is None:
        return _without_idle_mask(current)
    had = before.user(uid)
    return _without_idle_mask(current.with_user(uid, None if had is None else entry & had & _mask(before)))


def allows(snapshot: Snapshot, uid: int, gids: Collection[int], want: int) -> Entry | None:
    """The entry by which the kernel lets this user open the file, None where it does not. Capabilities aside."""
    acl = snapshot.acl
    if uid == snapshot.uid:
        return _if_enough(Entry(USER_OBJ, UNDEFINED_ID, acl.owner), want, 7)
    if acl.mask == 0:  # the kernel's exception, see above: group bits of 0 say that there is nothing to look up
        acl = Acl(owner=acl.owner, group=0, other=acl.other)
    named = acl.user(uid)
    if named is not None:
        return _if_enough(Entry(USER, uid, named), want, _mask(acl))
    mine = [entry for entry in acl.masked() if _is_group_of(entry, snapshot.gid, gids)]
    if mine:
        return next((entry for entry in mine if _if_enough(entry, want, _mask(acl))), None)
    return _if_enough(Entry(OTHER, UNDEFINED_ID, acl.other), want, 7)


def explain(snapshot: Snapshot, uid: int, gids: Collection[int], want: Need) -> str | None:
    """Why the user can open the file, for people; None when mode and ACL do not explain it."""
    if uid == 0:
        return "the user is root, whom no mode keeps out"
    entry = allows(snapshot, uid, gids, NEEDS[want])
    if entry is None:
        return None
    mode = f"mode {snapshot.mode & 0o7777:04o}"
    if entry.tag == USER_OBJ:
        return f"owned by {user_name(uid)} with {mode}"
    if entry.tag == USER:
        return f"another ACL entry {entry}"
    if entry.tag == GROUP:
        return f"another ACL entry {entry}, and {user_name(uid)} is in that group"
    if entry.tag == GROUP_OBJ:
        return f"{mode} lets group {group_name(snapshot.gid)} {VERBS[want]}"
    return f"{mode} lets everybody {VERBS[want]}"


def _mask(acl: Acl) -> int:
    return 7 if acl.mask is None else acl.mask


def _if_enough(entry: Entry, want: int, mask: int) -> Entry | None:
    return entry if entry.perms & mask & want == want else None


def _is_group_of(entry: Entry, file_gid: int, gids: Collection[int]) -> bool:
    return (entry.tag == GROUP_OBJ and file_gid in gids) or (entry.tag == GROUP and entry.id in gids)


def _without_idle_mask(acl: Acl) -> Acl:
    if acl.users or acl.groups or acl.mask is None:
        return acl
    return Acl(owner=acl.owner, group=acl.group & acl.mask, other=acl.other)


# The file


def read(fd: int) -> Snapshot:
    with _explained(fd):
        info = os.fstat(fd)
        return Snapshot(stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, _get(fd))


def apply_grant(fd: int, uid: int, need: Need, *, gids: Collection[int] = ()) -> tuple[Snapshot, Snapshot]:
    """Let `uid`, whose groups are `gids`, open the file; what stood before, and what stands now (read back)."""
    before = read(fd)
    return before, _let(fd, before, before, uid=uid, need=need, gids=gids)


def apply_change(
    fd: int, uid: int, need: Need, *, before: Snapshot, given: Snapshot | None, gids: Collection[int] = ()
) -> Snapshot:
    """Make a grant that stands (`before`, `given`) one of `need`, in one step: there is no moment without access."""
    current = read(fd)
    return _let(fd, current, _without_grant(current, uid, before, given), uid=uid, need=need, gids=gids)


def apply_undo(fd: int, uid: int, before: Snapshot, given: Snapshot | None) -> Snapshot:
    """Take back what `apply_grant` gave, and return what stands now. Repeating it changes nothing.

    `given` may be None when a crash left it unknown.
    """
    current = read(fd)
    _make(fd, current, _without_grant(current, uid, before, given))
    return read(fd)


def _without_grant(current: Snapshot, uid: int, before: Snapshot, given: Snapshot | None) -> Snapshot:
    if current.same_access(before) or (given is not None and given.same_access(before)):
        return current
    if given is not None and current.same_access(given):
        return replace(current, mode=current.mode & ~0o777 | before.mode & 0o777, xattr=before.xattr)
    return _with_acl(current, undo(current.acl, None, before.acl, uid))


def _let(fd: int, current: Snapshot, base: Snapshot, *, uid: int, need: Need, gids: Collection[int]) -> Snapshot:
    if uid == base.uid:  # the owner's own bits count, no entry
        if allows(base, uid, gids, NEEDS[need]) is None:
            raise _owner_lacks(base, need)
        wanted = base
    else:
        has = sum(bit for bit in (4, 2, 1) if allows(base, uid, gids, bit))
        wanted = _with_acl(base, grant(base.acl, uid, need, has=has))
    _make(fd, current, wanted)
    given = read(fd)
    if given.acl != wanted.acl:
        raise JobError(
            "access_refused",
            f"the ACL of {name(fd)} is not what was just set: somebody else changed it, or the file system did",
            remedy="try again; if it stays so, move the image to ext4, XFS or another file system with POSIX ACLs",
            field="path",
            value=name(fd),
        )
    return given


def _with_acl(snapshot: Snapshot, acl: Acl) -> Snapshot:
    if acl == snapshot.acl:
        return snapshot
    middle = acl.group if acl.mask is None else acl.mask  # as the kernel shows it in the mode
    mode = snapshot.mode & ~0o777 | acl.owner << 6 | middle << 3 | acl.other
    return replace(snapshot, mode=mode, xattr=None if acl.mask is None else acl.serialize())


def _make(fd: int, current: Snapshot, wanted: Snapshot) -> None:
    if current.same_access(wanted):
        return
    with _explained(fd):
        os.setxattr(_proc(fd), XATTR, wanted.xattr or Acl.from_mode(wanted.mode).serialize())


def supports_acl(fd: int) -> bool:
    try:
        os.getxattr(_proc(fd), XATTR)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            return False
        if error.errno != errno.ENODATA:
            raise _refusal(fd, error) from error
    return True


def file_system(fd: int) -> FileSystem:
    """The type as in /proc/mounts; `unknown`, which counts as shared, when the mount is not ours to see."""
    with _explained(fd):
        kind = file_system_type(fd)
    return FileSystem(kind, is_shared(kind))


def user_name(uid: int) -> str:
    return _looked_up(lambda: pwd.getpwuid(uid).pw_name, uid)


def group_name(gid: int) -> str:
    return _looked_up(lambda: grp.getgrgid(gid).gr_name, gid)


def _looked_up(lookup: Callable[[], str], number: int) -> str:
    try:
        return lookup()
    except (KeyError, OverflowError):
        return str(number)


def _proc(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def name(fd: int) -> str:
    try:
        return str(Path(_proc(fd)).readlink())
    except OSError:
        return f"descriptor {fd}"


def _get(fd: int) -> bytes | None:
    try:
        return os.getxattr(_proc(fd), XATTR)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):  # a file system without ACLs still has a mode
            return None
        raise


@contextmanager
def _explained(fd: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refusal(fd, error) from error


def _refusal(fd: int, error: OSError) -> JobError:
    code, remedy = REFUSALS.get(error.errno or 0, ("io_error", None))
    path = name(fd)
    return JobError(code, f"the ACL of {path}: {error.strerror}", remedy=remedy, field="path", value=path)


def _unreadable(data: bytes) -> JobError:
    return JobError("io_error", f"an ACL that is none: {len(data)} bytes, {data[:64].hex()}", remedy="see getfacl")


def _widens(entry: Entry, effective: int, user: str, need: Need) -> JobError:
    now = str(entry._replace(perms=effective)).rsplit(":", 1)[1]
    return JobError(
        "access_refused",
        f"an entry for {user} to {VERBS[need]} would raise the mask and so widen the ACL entry {entry}, now {now}",
        remedy=f"take the masked rights from that entry, setfacl -n -m {entry.subject}:{now} FILE, and try again",
        field="acl",
        value=str(entry),
    )


def _owner_lacks(snapshot: Snapshot, need: Need) -> JobError:
    mode = f"{snapshot.mode & 0o7777:04o}"
    return JobError(
        "access_refused",
        f"{user_name(snapshot.uid)} owns the file with mode {mode}, and no ACL entry can let an owner {VERBS[need]}",
        remedy=f"chmod u+{need} FILE, or chown root FILE",
        field="mode",
        value=mode,
    )
