"""Changes to an image's bitmaps: what each needs to find, what qemu-img is told, and what must be there afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hostagent.images.bitmaps import GRANULARITY_BITS, NAME_MAX, Bitmap, BitmapList
from hostagent.images.header import is_plain, shown
from jobs.errors import JobError


class Change(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> list[str]:
        """What qemu-img bitmap is told, before the image's name."""

    def refuse(self, found: BitmapList, source: BitmapList, most: int) -> None:
        """Raise what stands against the change; `source` is the list that a merge takes its bitmap from, `found` itself
        when that is the same image."""

    def is_done(self, found: BitmapList) -> bool:
        """Whether the image says that it was done."""


@dataclass(frozen=True, slots=True)
class Add:
    """`granularity` in bytes, None as QEMU chooses; `recording` is whether it notes the next guest's writes."""

    name: str
    granularity: int | None = None
    recording: bool = True

    @property
    def arguments(self) -> list[str]:
        words = ["--add"] + ([] if self.recording else ["--disable"])
        return words + ([f"--granularity={self.granularity}"] if self.granularity else [])

    def refuse(self, found: BitmapList, source: BitmapList, most: int) -> None:
        if not is_plain(self.name) or not 1 <= len(self.name.encode(errors="surrogateescape")) <= NAME_MAX:
            remedy = f"1 to {NAME_MAX} bytes of UTF-8 without control characters"
            raise JobError("invalid", f"{shown(self.name)} is no name", field="name", value=self.name, remedy=remedy)
        if self.granularity and self.granularity not in (1 << bits for bits in GRANULARITY_BITS):
            remedy = "a power of two from 512 to 2 GiB, in bytes"
            message = f"the granularity cannot be {self.granularity}"
            raise JobError("invalid", message, field="granularity", value=self.granularity, remedy=remedy)
        if found.find(self.name):
            remedy = "remove it first, or choose another name"
            message = f"the image has a bitmap {self.name!r} already"
            raise JobError("conflict", message, field="name", value=self.name, remedy=remedy)
        if len(found.items) >= most:
            remedy = "remove those that nobody needs, or raise images.bitmaps"
            raise JobError("limit", f"the image has {len(found.items)} bitmaps already", remedy=remedy)

    def is_done(self, found: BitmapList) -> bool:
        new = found.find(self.name)
        return (
            new is not None
            and not new.in_use
            and new.enabled == self.recording
            and self.granularity in (None, new.granularity)
        )


@dataclass(frozen=True, slots=True)
class Remove:
    """Also of one that is inconsistent: nothing else can be done with it."""

    name: str

    @property
    def arguments(self) -> list[str]:
        return ["--remove"]

    def refuse(self, found: BitmapList, source: BitmapList, most: int) -> None:
        _existing(found, self.name, "name")

    def is_done(self, found: BitmapList) -> bool:
        return found.find(self.name) is None


@dataclass(frozen=True, slots=True)
class Merge:
    """The bits of the bitmap `source_name`, of the same or another image, come into `name` as well."""

    name: str
    source_name: str

    @property
    def arguments(self) -> list[str]:
        return [f"--merge={self.source_name}"]

    def refuse(self, found: BitmapList, source: BitmapList, most: int) -> None:
        if source is found and self.name == self.source_name:
            remedy = "name another bitmap, or another image"
            message = "a bitmap cannot be merged into itself"
            raise JobError("invalid", message, field="source_name", value=self.name, remedy=remedy)
        _usable(_existing(found, self.name, "name"), "name")
        _usable(_existing(source, self.source_name, "source_name"), "source_name")

    def is_done(self, found: BitmapList) -> bool:
        new = found.find(self.name)
        return new is not None and not new.in_use


def _existing(found: BitmapList, name: str, field: str) -> Bitmap:
    bitmap = found.find(name)
    if bitmap is None:
        remedy = "see `hostagent bitmap list`; `hostagent bitmap add` makes one"
        raise JobError("not_found", f"the image has no bitmap {shown(name)}", field=field, value=name, remedy=remedy)
    return bitmap


def _usable(bitmap: Bitmap, field: str) -> None:
    if bitmap.in_use:
        raise JobError(
            "conflict",
            f"the bitmap {bitmap.name!r} is inconsistent: who wrote to the image ended without saving it",
            field=field,
            value=bitmap.name,
            remedy="remove it, and begin anew with a full backup",
        )
