"""The owner part of the ledger's entries: owner.py's rules, applied to the very file of an entry.

The ledger decides and writes down; here is what it then asks of the file, or does to it. Blocking.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from hostagent.access import acl, owner
from hostagent.access.birth import born
from hostagent.access.files import Files, is_former
from hostagent.records import AccessFile, Label, Taken
from jobs.errors import JobError


class Ownership:
    """`uid` is the hypervisor user's; `unknown` gets what libvirt leaves of files whose owner was never seen."""

    def __init__(self, files: Files, *, uid: int, unknown: Label | None, manage_shared: bool) -> None:
        self._files = files
        self._uid = uid
        self._unknown = unknown
        self._manage_shared = manage_shared

    def note(self, entry: AccessFile, labels: Sequence[Label]) -> AccessFile:
        """The entry of a file that domains with these labels need, with the owner that it has without them."""
        with self._files.grasped(entry) as handle:
            here = owner.of(handle)
            noted = owner.noted(entry, here, labels)
            return replace(noted, born=born(handle), rests=here not in noted.labels)

    def protector(self, entry: AccessFile, protected: Collection[str]) -> str | None:
        """Which of the protected files and folders keeps the file."""
        try:
            with self._files.grasped(entry) as handle:
                return owner.protector(handle, entry.path, protected)
        except FileNotFoundError:
            return owner.protector(None, entry.path, protected)

    def plan(self, was: AccessFile) -> Taken | str | None:
        """What to change, or what stands in the way, or None; see owner.plan. FileNotFoundError as Files.opened."""
        held = self._files.held(was.file) is not None
        with self._files.opened(was) as fd:
            plan = owner.plan(fd, was, uid=self._uid, unknown=self._unknown, manage_shared=self._manage_shared)
            if plan is not None and not held and is_former(was.path, was.file):  # an inode number alone is no proof
                return f"a file with its inode number goes by another name now, {acl.name(fd)}: chown it yourself"
            return plan

    def change(self, entry: AccessFile, was: Label, now: Label) -> None:
        """Make the file `now`'s, if it is `was`'s; see owner.change. FileNotFoundError as Files.opened."""
        with self._files.opened(entry) as fd:
            owner.change(fd, was, now)

    def check_undo(self, entry: AccessFile, taken: Taken) -> None:
        """Refuse an undo on what is another file, or somebody else's, by now: image_changed, conflict."""
        try:
            if is_former(entry.path, entry.file):
                raise FileNotFoundError(entry.path)
            with self._files.grasped(entry) as handle:
                here = owner.of(handle)
        except FileNotFoundError:
            raise JobError(
                "image_changed",
                f"{entry.path!r} is not the file any more that it was",
                field="path",
                value=entry.path,
                remedy="see who moved or replaced it; chown it by hand",
            ) from None
        if here not in (taken.was, taken.now):
            raise owner.changed(entry.path, here)
