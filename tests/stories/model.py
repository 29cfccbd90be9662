"""What every image must contain and lean on, and what its bitmaps must tell of, whatever was done to it.

An image reads as one tag for each cluster. The view of an image is stored, not computed through its chain: who writes an
image owns it alone, so no other image's view ever changes with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

CLUSTER = 64 * 1024
CLUSTERS = 32


@dataclass
class Bitmap:
    """`bits` are clusters that it must tell of; those alone, if `exact`. `broken` is None when a storage daemon was
    killed that may have had it open for writing: then the image says whether it is consistent."""

    recording: bool
    bits: set[int] = field(default_factory=set)
    exact: bool = True
    broken: bool | None = False


@dataclass
class Image:
    """`view` is None when a commit that did not complete may have written it: only what stands on it has a meaning."""

    path: Path
    format: str
    backing: Path | None
    view: list[int] | None
    bitmaps: dict[str, Bitmap] = field(default_factory=dict)


@dataclass
class Tree:
    images: dict[Path, Image] = field(default_factory=dict)
    keeps: dict[Path, set[Path]] = field(default_factory=dict)
    """Images of which a job did not complete, and what lay below them: they may keep access to that."""
    gone: dict[Path, set[Path]] = field(default_factory=dict)
    """Those of them that were deleted behind the agent's back."""

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

    def outside(self, path: Path, chain: list[Path]) -> list[Path]:
        """The images beside this chain that stand on one of its members."""
        return [one for one in self.dependents(path) if one not in chain]

    def between(self, top: Path, base: Path) -> list[Path]:
        chain = self.chain(top)
        return chain[1 : chain.index(base)]

    def usable(self, *, overlays: bool = False) -> list[Image]:
        """Those that read as something."""
        return [i for i in self.images.values() if i.view is not None and (i.backing or not overlays)]

    def leaves(self) -> list[Path]:
        return [path for path in self.images if not self.dependents(path)]

    def forget(self, paths: list[Path], *, by_agent: bool = False) -> None:
        """They were deleted. What others delete, the agent sees when it next looks."""
        for path in paths:
            del self.images[path]
            if (files := self.keeps.pop(path, None)) and not by_agent:
                self.gone[path] = files

    # What happens

    def ended(self, path: Path, *, completed: bool, shorter: bool) -> None:
        """The end of a job on this image, of whose chain it may have taken something."""
        if completed and shorter:
            self.keeps.pop(path, None)
        elif not completed:
            self.keeps.setdefault(path, set()).update(self.chain(path)[1:])

    def written(self, path: Path, cluster: int, tag: int) -> None:
        image = self.images[path]
        assert image.view is not None
        image.view[cluster] = tag
        for bitmap in image.bitmaps.values():
            if bitmap.recording:
                bitmap.bits.add(cluster)

    def doubted(self, path: Path) -> None:
        """The storage daemon that may have had the image open for writing was killed."""
        for bitmap in self.images[path].bitmaps.values():
            bitmap.broken = bitmap.broken or None

    def pulling(self, top: Path) -> None:
        """A pull may write zeros, of which a bitmap tells."""
        self._blur(top)

    def pulled(self, top: Path, base: Path | None) -> None:
        self.images[top].backing = base

    def copied(self, source: Path, dest: Path, *, shallow: bool, format: str) -> None:
        image = self.images[source]
        view = None if image.view is None else list(image.view)
        self.images[dest] = Image(dest, format, image.backing if shallow else None, view)

    def committed(self, top: Path, base: Path) -> None:
        """`base` reads as `top` does, and its bitmaps tell of it; what lies between has lost its meaning."""
        old, new = self.images[base], self.images[top].view
        assert new is not None
        if old.view is not None:
            changed = {n for n in range(CLUSTERS) if old.view[n] != new[n]}
            for bitmap in old.bitmaps.values():
                bitmap.bits |= changed if bitmap.recording else set()
        old.view = list(new)
        self._blur(base)
        for path in self.between(top, base):
            self.images[path].view = None

    def torn(self, top: Path, base: Path) -> None:
        self._blur(base)
        for path in [*self.between(top, base), base]:
            self.images[path].view = None

    def _blur(self, path: Path) -> None:
        for bitmap in self.images[path].bitmaps.values():
            bitmap.exact = bitmap.exact and not bitmap.recording
