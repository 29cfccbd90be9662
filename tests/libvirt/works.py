"""What the live matrices do to a running guest's disk: each operation once, and the disk that it is done to."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.harness import MIB, Json, overlay, raw_image
from tests.qemu.faults import backing_name

SIZE = 48 * MIB
"""QEMU's mirrors heed no bandwidth for their first 16 MiB: only more can be looked at while it is copied."""
SLOW = MIB
"""Bytes per second: what is to be looked at while it runs lasts for ten seconds or more."""
STEP = 16 * MIB
ALICE = (64051, 64051)

LAYERS = ("top", "high", "low", "base")


@dataclass(frozen=True)
class Work:
    """One job. `drops` are the layers that the chain has lost when it completed, `named` the words of the request that
    are layers. `writes` is the layer (or the `copy`) that fills up; `fails` a layer, and the requests to it that fail."""

    name: str
    operation: str
    drops: tuple[str, ...]
    writes: str
    fails: tuple[str, str]
    completion: str | None = None
    named: tuple[tuple[str, str], ...] = ()
    increment: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def mirrors(self) -> bool:
        """It is ready at some time, and its end is asked for."""
        return self.completion is not None

    @property
    def copies(self) -> bool:
        return self.operation == "copy"

    @property
    def commits(self) -> bool:
        return self.operation == "commit"


BELOW = ("high", "low", "base")
WORKS = (
    Work("pull", "pull", BELOW, "top", ("base", "pread")),
    Work("pull-partial", "pull", ("high",), "top", ("high", "pread"), named=(("base", "low"),)),
    Work("pull-increments", "pull", BELOW, "top", ("base", "pread"), increment=STEP),
    Work("copy-finish", "copy", (), "copy", ("base", "pread"), "finish"),
    Work("copy-pivot", "copy", LAYERS, "copy", ("base", "pread"), "pivot"),
    Work("commit-pivot", "commit", LAYERS[:3], "base", ("base", "pwrite"), "pivot"),
    Work("commit-keep", "commit", (), "base", ("base", "pwrite"), "finish"),
    Work("commit-below", "commit", ("high", "low"), "base", ("base", "pwrite"), named=(("top", "high"),)),
)


class Scene:
    """base.raw ← low.qcow2 ← high.qcow2 ← top.qcow2, each with data of its own, all Alice's and closed to others; and
    `truth`, what the disk reads as. `elsewhere` is a folder for the layer (or copy) that the job writes; `put` brings
    the layer that is to fail to where it can, and says where that is: then it lies in the folder `failing`."""

    def __init__(
        self, folder: Path, work: Work, *, elsewhere: Path | None = None, put: Callable[[Path], Path] | None = None
    ) -> None:
        folder.mkdir(mode=0o755)
        self.folder, self.work = folder, work
        self._elsewhere, self._put = elsewhere, put
        self.failing: Path | None = None
        self.files: dict[str, Path] = {}
        self._add("base", lambda path: raw_image(path, SIZE, SIZE // 4))
        self._add("low", lambda path: self._overlay(path, "base", 0, 2))
        self._add("high", lambda path: self._overlay(path, "low", 1, 20))
        self._add("top", lambda path: self._overlay(path, "high", 10, 34))
        self.copy = (elsewhere if elsewhere and work.writes == "copy" else folder) / "copy.qcow2"
        self.truth = folder.with_name(f"{folder.name}.truth")
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(self.top), str(self.truth)], check=True)
        self.there = {path for folder in {folder, self.copy.parent} for path in folder.iterdir()}

    def _add(self, layer: str, make: Callable[[Path], Path]) -> None:
        suffix = "raw" if layer == "base" else "qcow2"
        folder = self._elsewhere if self._elsewhere and self.work.writes == layer else self.folder
        path = make(folder / f"{layer}.{suffix}")
        os.chown(path, *ALICE)
        if self._put and self.work.fails[0] == layer:
            there = self._put(path)
            path.unlink()
            path, self.failing = there, there.parent
        self.files[layer] = path

    def _overlay(self, path: Path, below: str, begin: int, end: int) -> Path:
        """With a byte of its own in each MiB from `begin` to `end`."""
        base = self.files[below]
        whole = self._put is not None  # it may be moved: then it names its base wherever it is
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", self.format_of(below)]
        if whole:
            subprocess.run([*command, str(path)], check=True)
            path.chmod(0o600)
        else:
            overlay(path, base, self.format_of(below))
        seed = 40 * (1 + LAYERS.index(below))
        writes = [f"write -q -P {seed + n} {n}M 1M" for n in range(begin, end)]
        subprocess.run(["qemu-io", *(word for line in writes for word in ("-c", line)), str(path)], check=True)
        return path

    @staticmethod
    def format_of(layer: str) -> str:
        return "raw" if layer == "base" else "qcow2"

    def remove(self) -> None:
        """Images of a folder that others look through for who stands on theirs."""
        shutil.rmtree(self.folder)
        for path in (self.truth, self.copy, *self.files.values()):
            if path.parent != self.failing:
                path.unlink(missing_ok=True)

    @property
    def top(self) -> Path:
        return self.files["top"]

    def request(self, **more: object) -> Json:
        work = self.work
        wanted: Json = {"operation": work.operation, "target": "web1/vda", "id": str(uuid.uuid4()), **more}
        if work.increment:
            wanted["increment"] = work.increment
        if work.copies:
            wanted["dest"] = str(self.copy)
        return wanted | {word: str(self.files[layer]) for word, layer in work.named}

    @property
    def before(self) -> list[str]:
        return [str(self.files[layer]) for layer in LAYERS]

    @property
    def after(self) -> list[str]:
        """The chain when the job has completed."""
        left = [str(self.files[layer]) for layer in LAYERS if layer not in self.work.drops]
        return left if left else [str(self.copy)]

    @property
    def dropped(self) -> list[Path]:
        return [self.files[layer] for layer in self.work.drops]

    def headers(self, chain: list[str]) -> dict[str, str | None]:
        """What each of a chain's images names as its backing file, by its path."""
        images = [str(path) for layer, path in self.files.items() if layer != "base"] + [str(self.copy)]
        found = {path: backing_name(Path(path)) for path in chain if path in images}
        return {path: str(Path(path).parent / name) if name else None for path, name in found.items()}
