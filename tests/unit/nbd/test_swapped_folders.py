"""A folder's owner swaps it for a link to somebody else's at any moment: nothing is made or removed there.

The swap is renameat2(2) with RENAME_EXCHANGE, as fast as a thread can; each round is one whole life of a target.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hostagent.nbd import committing, copy_files
from hostagent.nbd.copy_files import part_of
from jobs.errors import JobError
from jobs.model import FileId, Layer, Target

AT_FDCWD, RENAME_EXCHANGE = -100, 2
SECONDS = 1.0
JOB = "a-job"


class Free:
    """A lease that nobody else has."""

    def exclude(self, *, ours: object) -> None: ...

    def share(self, *, ours: object) -> None: ...

    def release(self) -> None: ...


@dataclass
class Place:
    """`x` is the folder and `y` a link to `private`, or the other way round."""

    x: Path
    y: Path
    private: Path

    def swap(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(AT_FDCWD, bytes(self.x), AT_FDCWD, bytes(self.y), RENAME_EXCHANGE) != 0:
            raise OSError(ctypes.get_errno(), "renameat2")

    @contextlib.contextmanager
    def swapping(self) -> Iterator[None]:
        over = threading.Event()

        def swap() -> None:
            while not over.is_set():
                self.swap()
                time.sleep(0.0001)

        thread = threading.Thread(target=swap)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            if self.x.is_symlink():
                self.swap()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = Place(tmp_path / "x", tmp_path / "y", tmp_path / "private")
    found.x.mkdir()
    found.private.mkdir()
    found.y.symlink_to(found.private)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "source", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def layer(path: Path) -> Layer:
    found = path.stat()
    return Layer(str(path), "qcow2", FileId(found.st_dev, found.st_ino), 0, 0)


def target_in(folder: Path) -> Target:
    target = Target(str(folder / "copy.raw"), "raw", made=True)
    return replace(target, part=part_of(target, JOB))


def test_a_copys_file_is_made_named_and_removed_in_its_own_folder_alone(place: Place, source: int) -> None:
    target, made = target_in(place.x), 0
    end = time.monotonic() + SECONDS
    with place.swapping():
        while time.monotonic() < end:
            with contextlib.suppress(JobError, OSError):
                whole = copy_files.make(target, source, 4096)
                made += 1
                with contextlib.suppress(JobError, OSError):
                    copy_files.give_name(whole)
                    copy_files.let_its_name_be_all(whole)
                copy_files.delete(whole, JOB, None)
            assert list(place.private.iterdir()) == []
    assert made, "it was never in the right moment, and nothing was tried"


def test_what_lies_in_another_folder_by_the_same_names_stays(place: Place, source: int) -> None:
    target = target_in(place.x)
    whole = copy_files.make(target, source, 4096)
    decoys = [place.private / name for name in ("copy.raw", Path(str(target.part)).name)]
    for decoy in decoys:
        decoy.write_text("somebody else's")
    place.swap()
    copy_files.delete(whole, JOB, None)
    copy_files.delete(target, JOB, None)
    for act in (copy_files.give_name, lambda one: copy_files.make(one, source, 4096)):
        with pytest.raises(JobError):
            act(whole)
    assert [decoy.read_text() for decoy in decoys] == ["somebody else's"] * 2
    place.swap()
    assert (place.x / decoys[1].name).exists(), "what was not found is not removed"


def test_what_has_another_name_is_not_said_to_be_no_more(place: Place) -> None:
    linked, alone, moved = (place.x / name for name in ("linked", "alone", "moved"))
    for path in (linked, alone, moved):
        path.write_text("a layer")
    layers = [layer(path) for path in (linked, alone, moved)]
    (place.private / "other").hardlink_to(linked)
    moved.rename(place.private / "moved")
    deleted, _ = committing._delete(layers, lambda *_, **__: Free())
    assert deleted == {layers[1].file}


def test_a_commit_deletes_in_the_folder_that_has_its_layer(place: Place) -> None:
    victim = place.private / "layer.qcow2"
    victim.write_text("somebody else's")
    end, deleted = time.monotonic() + SECONDS, 0
    with place.swapping():
        while time.monotonic() < end:
            (real := place.x if not place.x.is_symlink() else place.y)
            with contextlib.suppress(OSError):
                (real / "layer.qcow2").write_text("the layer")
                one = layer(real / "layer.qcow2")
                if one.file == layer(victim).file:
                    victim.write_text("somebody else's")  # it was swapped while we wrote
                    continue
                committing._delete([replace(one, path=str(place.x / "layer.qcow2"))], lambda *_, **__: Free())
                deleted += not (real / "layer.qcow2").exists()
            assert victim.exists()
    assert deleted
