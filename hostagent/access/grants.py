"""The ACL part of the ledger's entries: what we give the hypervisor user on a file, what we take back, what is proven.

The ledger decides and writes down; here is what it then does to the file. Blocking.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hostagent.access import acl
from hostagent.access.acl import Snapshot
from hostagent.access.birth import born
from hostagent.access.files import Files, reading
from hostagent.access.subject import Mode, Probe, Subject
from hostagent.records import AccessFile
from jobs.errors import JobError
from jobs.ports import AccessVerdict


class Grants:
    """`manage_shared` allows changes on file systems that other hosts have as well."""

    def __init__(self, files: Files, subject: Subject, probe: Probe, *, manage_shared: bool) -> None:
        self._files = files
        self._subject = subject
        self._probe = probe
        self._manage_shared = manage_shared

    def plan(self, entry: AccessFile, need: Mode) -> AccessFile:
        """Whether we must give anything; if so, the entry with the ACL to go back to."""
        with self._files.opened(entry) as fd:
            if self._probe.can_open(fd, need):
                reason = acl.explain(acl.read(fd), self._subject.uid, self._subject.groups, need)
                return replace(entry, reason=reason, born=born(fd))
            system = acl.file_system(fd)
            if system.shared and not self._manage_shared:
                raise JobError(
                    "access_refused",
                    f"{entry.path!r} lies on a shared file system ({system.type}), where access is not changed",
                    field="path",
                    value=entry.path,
                    remedy=f"let {self._subject.name} read it, or set access.shared_filesystems if this host owns it",
                )
            if not acl.supports_acl(fd):
                raise JobError(
                    "access_refused",
                    f"the file system of {entry.path!r} ({system.type}) has no POSIX ACLs",
                    field="path",
                    value=entry.path,
                    remedy=f"let {self._subject.name} read the file, or move it to a file system with ACLs",
                )
            plan = replace(entry, mode=need, before=_encode(acl.read(fd)), given=None, born=born(fd))
            return replace(plan, verdict=AccessVerdict.PENDING)

    def apply(self, entry: AccessFile, need: Mode) -> AccessFile:
        """Give what was planned: the entry with the ACL that the file has now."""
        uid, groups = self._subject.uid, self._subject.groups
        assert entry.before is not None
        with self._files.opened(entry) as fd:
            before, given = _decode(entry.before), _decode(entry.given) if entry.given else None
            if entry.mode != need or given is None or not self._probe.can_open(fd, need):
                given = acl.apply_change(fd, uid, need, before=before, given=given, gids=groups)
            if not self._probe.can_open(fd, need):
                raise JobError(
                    "access_refused",
                    f"{self._subject.name} cannot open {entry.path!r} although its ACL says so",
                    field="path",
                    value=entry.path,
                    remedy="see whether AppArmor or SELinux forbids it (`hostagent doctor`)",
                )
            return replace(entry, mode=need, given=_encode(given), born=born(fd))

    def undo(self, fd: int, entry: AccessFile) -> None:
        """Take back what was given."""
        assert entry.before is not None
        given = _decode(entry.given) if entry.given else None
        acl.apply_undo(fd, self._subject.uid, _decode(entry.before), given)

    def still_open(self, fd: int) -> str | None:
        """Why the user can still open the file, in either mode; None when it cannot."""
        modes: tuple[Mode, ...] = ("r", "rw")
        for mode in modes:
            if self._probe.can_open(fd, mode):
                why = acl.explain(acl.read(fd), self._subject.uid, self._subject.groups, mode)
                return why or f"{self._subject.name} can still open it, and its mode does not say why"
        return None


def still_has(entry: AccessFile) -> bool:
    """Whether the file goes by another name in its folder and has, to the byte, what we gave it: a copy's target gets
    its name late. An inode number that is used again has not."""
    if entry.given is None:
        return False
    files = Files()
    try:
        with files.grasped(entry) as handle, reading(handle) as fd:
            return acl.read(fd) == _decode(entry.given)
    except FileNotFoundError:
        return False


def cleared(entry: AccessFile) -> AccessFile:
    """The entry of a file on which we have given nothing any more."""
    return replace(entry, mode="", before=None, given=None)


def _encode(snapshot: Snapshot) -> dict[str, Any]:
    xattr = None if snapshot.xattr is None else base64.b64encode(snapshot.xattr).decode()
    return {"mode": snapshot.mode, "uid": snapshot.uid, "gid": snapshot.gid, "xattr": xattr}


def _decode(data: Mapping[str, Any]) -> Snapshot:
    xattr = None if data["xattr"] is None else base64.b64decode(data["xattr"])
    return Snapshot(data["mode"], data["uid"], data["gid"], xattr)
