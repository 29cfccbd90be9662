"""What must become of a request, from the model alone: None where it must be obeyed, else the refusal that must come.

`refused` is the answer to the request; `failed` a job that is accepted and finds, when it begins, that somebody uses
what it needs for itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.stories.model import Tree


@dataclass(frozen=True)
class Fate:
    outcome: str
    code: str


T = TypeVar("T")
REFUSED, FAILED = Fate("refused", "busy"), Fate("failed", "busy")


@dataclass(frozen=True)
class Use:
    """A chain that somebody has open: an export, or a job that waits; `apart` has a storage daemon for itself."""

    top: Path
    files: frozenset[Path]
    writer: bool = False
    apart: bool = False
    job: bool = False
    part_on: Path | None = None
    """What a job's unfinished file stands on: it counts among the images there."""


@dataclass(frozen=True)
class Foresight:
    tree: Tree
    uses: Sequence[Use]

    def used(self, path: Path) -> bool:
        return any(path in use.files for use in self.uses)

    def written(self, path: Path) -> bool:
        """Whether clients may write the image, or one that it stands on."""
        chain = self.tree.chain(path)
        return any(use.writer and use.top in chain for use in self.uses)

    # Jobs

    def copy(self, image: Path) -> Fate | None:
        taken = any(use.job and use.top == image for use in self.uses)
        return REFUSED if self.written(image) or taken else None

    def pull(self, image: Path) -> Fate | None:
        return self.copy(image) or self._alone(image, {image})

    def commit(self, image: Path, top: Path, base: Path, *, delete: bool) -> Fate | None:
        chain = self.tree.chain(image)
        first, last = chain.index(top), chain.index(base)
        touched = chain[first + (0 if delete else 1) : last + 1]
        parts = [use.part_on for use in self.uses]
        if any(path in parts or self.tree.outside(path, chain) for path in touched):
            return REFUSED
        return self.copy(image) or self._alone(image, set(chain[first - 1 if first else 1 : last + 1]))

    def _alone(self, image: Path, files: set[Path]) -> Fate | None:
        others = [use for use in self.uses if use.files & files and (use.top != image or use.apart)]
        if any(use.apart for use in others):
            return REFUSED
        return FAILED if others else None

    # Exports and bitmaps

    def read(self, image: Path) -> Fate | None:
        return REFUSED if self.written(image) else None

    def write(self, image: Path) -> Fate | None:
        return REFUSED if self.used(image) or self.written(image) or self.tree.dependents(image) else None

    def excused(self, image: Path) -> bool:
        """Whether another image, whose last job did not complete, may still keep access to this one."""
        kept = [*self.tree.keeps.items(), *self.tree.gone.items()]
        return any(image in files for holder, files in kept if holder != image)

    def change_bitmap(self, image: Path, source: Path | None = None) -> Fate | None:
        taken = self.used(image) or (source is not None and source != image and self.written_now(source))
        return REFUSED if taken else None

    def written_now(self, path: Path) -> bool:
        return any(use.writer and use.top == path for use in self.uses)


def choose(dice: random.Random, among: Sequence[T], fate: Callable[[T], Fate | None]) -> tuple[T, Fate | None]:
    """Mostly one that must be obeyed, now and then one that must not."""
    fates = [(one, fate(one)) for one in among]
    good = [(one, found) for one, found in fates if found is None]
    return dice.choice(good if good and dice.random() < 0.9 else fates)
