"""What is noticed of files that change under a chain."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hostagent.images.drift import find_drift, stamped
from jobs.model import Chain, FileId, Layer


class Opened:
    """A file of 1000 bytes, open since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"x" * 1000)
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self.fd)
        self.layer = Layer(str(path), "raw", FileId(found.st_dev, found.st_ino), 1000, 4096, length=1000)

    def drift(self, *, written: bool = False, descriptor: bool = True) -> list[tuple[str, bool]]:
        found = find_drift(
            [self.layer],
            lambda file: self.fd if descriptor and file == self.layer.file else None,
            written={self.layer.file} if written else (),
        )
        assert all(one.path == str(self.path) and str(one).startswith(one.path) for one in found)
        return [(" ".join(one.what.split()[:2]), one.lost) for one in found]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    found = Opened(tmp_path / "base.raw")
    yield found
    os.close(found.fd)


def test_a_file_that_stays_as_it_is_and_one_of_unknown_length_say_nothing(opened: Opened) -> None:
    assert opened.drift() == []
    opened.layer = Layer(str(opened.path), "raw", opened.layer.file, 1000, 4096)
    os.truncate(opened.path, 5000)
    assert opened.drift() == []


@pytest.mark.parametrize("descriptor", [True, False])
@pytest.mark.parametrize("written", [True, False])
def test_a_cut_is_a_loss_also_of_a_file_that_we_write(opened: Opened, written: bool, descriptor: bool) -> None:
    os.truncate(opened.path, 999)
    assert opened.drift(written=written, descriptor=descriptor) == [("was cut", True)]


def test_growth_is_told_of_a_file_that_nobody_of_ours_writes(opened: Opened) -> None:
    os.truncate(opened.path, 1001)
    assert opened.drift() == [("grew from", False)]
    assert opened.drift(written=True) == []


def test_a_file_that_lost_its_name_is_told_and_still_measured_by_its_descriptor(opened: Opened) -> None:
    opened.path.unlink()
    assert opened.drift() == [("was deleted", False)]
    os.truncate(f"/proc/self/fd/{opened.fd}", 10)
    assert opened.drift() == [("was cut", True), ("was deleted", False)]
    assert opened.drift(descriptor=False) == [("was deleted", False)]


def test_a_file_that_was_replaced_is_told_and_the_stranger_is_not_measured(opened: Opened) -> None:
    opened.path.rename(opened.path.with_suffix(".aside"))
    opened.path.write_bytes(b"")
    assert opened.drift() == [("was replaced", False)]
    assert opened.drift(descriptor=False) == [("was replaced", False)]


def test_a_link_in_the_place_of_a_file_is_another_file(opened: Opened) -> None:
    aside = opened.path.with_suffix(".aside")
    opened.path.rename(aside)
    opened.path.symlink_to(aside)
    assert opened.drift() == [("was replaced", False)]


def rewrite(opened: Opened, *, at: int = 10**18) -> None:
    os.utime(opened.path, ns=(at, at))


def test_a_file_that_somebody_else_has_written_may_not_hold_what_it_held(opened: Opened) -> None:
    chain = stamped(Chain((opened.layer,)), lambda _: opened.fd)
    assert opened.layer.mtime_ns == 0 and chain.top.mtime_ns == os.fstat(opened.fd).st_mtime_ns
    assert stamped(Chain((replace(opened.layer, length=1),)), lambda _: opened.fd).top.length == 1000
    rewrite(opened)
    assert opened.drift() == []  # of a layer whose time is not known nothing can be said
    opened.layer = chain.top
    assert opened.drift() == [("was written", True)]
    assert opened.drift(written=True) == []
    os.truncate(opened.path, 2000)
    assert opened.drift() == [("was written", True)]
    os.truncate(opened.path, 10)
    assert opened.drift() == [("was cut", True)]
    os.truncate(opened.path, 1000)
    rewrite(opened, at=chain.top.mtime_ns)
    opened.path.chmod(0o640)
    assert opened.drift() == []


def test_a_time_is_taken_of_the_file_itself_and_not_of_a_device(opened: Opened) -> None:
    other = replace(opened.layer, file=FileId(0, 0))
    assert stamped(Chain((other,)), lambda _: opened.fd).top.mtime_ns == 0
    assert stamped(Chain((opened.layer,)), lambda _: None).top.mtime_ns == 0
    device = replace(opened.layer, device=True)
    assert stamped(Chain((device,)), lambda _: opened.fd).top.mtime_ns == 0
