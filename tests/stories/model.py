"""What every image must contain and lean on, whatever was done to it.

An image reads as one tag for each cluster. The view of an image is stored, not computed through its chain: who writes an
image owns it alone, so no other image's view ever changes with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

CLUSTER = 64 * 1024
CLUSTERS = 32


@dataclass
class Image:
    """`view` is None when a commit that did not complete may have written it: only what stands on it has a meaning."""

    path: Path
    format: str
    backing: Path | None
    view: list[int] | None


@dataclass
class Tree:
    images: dict[Path, Image] = field(default_factory=dict)
    keeps: set[Path] = field(default_factory=set)
    """Images whose last job did not complete: they may keep access to what is below them."""

    def chain(self, path: Path) -> list[Path]:
        """The image and all that is below it, top first."""
        found = []
        at: Path | None = path
        while at is not None:
            found.append(at)
            at = self.images[at].backing
        return found

    def dependents(self, path: Path) -> list[Path]:
        return [image.path for image in self.images.values() if image.backing == path]

    def forget(self, paths: list[Path]) -> None:
        for path in paths:
            del self.images[path]
            self.keeps.discard(path)

    def pulled(self, top: Path, base: Path | None) -> None:
        self.images[top].backing = base

    def copied(self, source: Path, dest: Path, *, shallow: bool) -> None:
        image = self.images[source]
        backing = image.backing if shallow else None
        view = None if image.view is None else list(image.view)
        self.images[dest] = Image(dest, image.format, backing, view)

    def committed(self, top: Path, base: Path) -> None:
        """`base` reads as `top` does; what lies between has lost its meaning."""
        view = self.images[top].view
        self.images[base].view = None if view is None else list(view)
        for path in self.between(top, base):
            self.images[path].view = None

    def torn(self, top: Path, base: Path) -> None:
        for path in [*self.between(top, base), base]:
            self.images[path].view = None

    def between(self, top: Path, base: Path) -> list[Path]:
        chain = self.chain(top)
        return chain[1 : chain.index(base)]
