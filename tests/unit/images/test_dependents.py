"""Who stands on a file: every way to name a base, and everything in a folder that is no image."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hostagent.images import dependents
from hostagent.images.dependents import Dependent, ScanLimits, find_dependents
from jobs.errors import JobError
from jobs.model import FileId

Craft = Callable[..., bytes]


class Disks:
    """Two folders: `here` with the base, and `there`."""

    def __init__(self, home: Path, craft: Craft) -> None:
        self.home, self._craft = home, craft
        self.here, self.there = home / "here", home / "there"
        for folder in (self.here, self.there):
            folder.mkdir(parents=True)
        self.base = self.here / "base.raw"
        self.base.write_bytes(b"\0" * 4096)

    def image(self, path: Path, backing: str | None = None) -> Path:
        format = None if backing is None else b"raw"
        path.write_bytes(self._craft(backing=None if backing is None else backing.encode(), backing_format=format))
        return path

    def found(self, *folders: Path, skip: tuple[Path, ...] = (), limits: ScanLimits | None = None) -> list[Dependent]:
        return find_dependents(
            {identity(self.base)},
            folders=folders or (self.here,),
            limits=limits or ScanLimits(),
            skip={identity(path) for path in skip},
        )

    def paths(self, *folders: Path, skip: tuple[Path, ...] = ()) -> set[str]:
        return {one.path for one in self.found(*folders, skip=skip)}

    def refusal(self, limits: ScanLimits | None = None) -> JobError:
        with pytest.raises(JobError) as caught:
            self.found(limits=limits)
        return caught.value


@pytest.fixture
def disks(tmp_path: Path, craft: Craft) -> Disks:
    return Disks(tmp_path.resolve(), craft)


def identity(path: Path) -> FileId:
    found = path.stat()
    return FileId(found.st_dev, found.st_ino)


def test_nobody_stands_on_a_base_that_no_header_names(disks: Disks) -> None:
    disks.image(disks.here / "alone.qcow2")
    disks.image(disks.here / "other.qcow2", "other.raw")
    (disks.here / "other.raw").write_bytes(b"\0" * 512)
    assert disks.found() == []


@pytest.mark.parametrize(
    "name", ["base.raw", "./base.raw", "../here/base.raw", "{here}/base.raw", "{there}/../here/base.raw"]
)
def test_a_sibling_is_found_however_it_names_the_base(disks: Disks, name: str) -> None:
    top = disks.image(disks.here / "top.qcow2", name.format(here=disks.here, there=disks.there))
    assert disks.found() == [Dependent(str(top), identity(disks.base))]


def test_a_relative_name_starts_at_the_images_own_folder(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    disks.image(disks.there / "top.qcow2", "base.raw")
    monkeypatch.chdir(disks.here)
    assert disks.found(disks.there) == []


def test_a_base_that_is_named_through_links_is_found(disks: Disks) -> None:
    (disks.home / "link").symlink_to(disks.here)
    (disks.there / "alias.raw").symlink_to(disks.base)
    one = disks.image(disks.there / "one.qcow2", str(disks.home / "link" / "base.raw"))
    two = disks.image(disks.there / "two.qcow2", "alias.raw")
    assert disks.paths(disks.there) == {str(one), str(two)}


def test_a_folder_that_is_named_through_a_link_is_searched_once_and_told_by_its_true_name(disks: Disks) -> None:
    top = disks.image(disks.here / "top.qcow2", "base.raw")
    link = disks.home / "link"
    link.symlink_to(disks.here)
    assert disks.found(link, disks.here) == [Dependent(str(top), identity(disks.base))]


def test_only_the_named_folders_are_searched_and_not_what_lies_below(disks: Disks) -> None:
    below = disks.here / "below"
    below.mkdir()
    deep = disks.image(below / "deep.qcow2", "../base.raw")
    away = disks.image(disks.there / "away.qcow2", "../here/base.raw")
    assert disks.paths(disks.here) == set()
    assert disks.paths(disks.here, disks.there) == {str(away)}
    assert disks.paths(below) == {str(deep)}


def test_several_bases_are_told_apart(disks: Disks) -> None:
    second = disks.here / "second.raw"
    second.write_bytes(b"\0" * 512)
    disks.image(disks.here / "a.qcow2", "base.raw")
    disks.image(disks.here / "b.qcow2", "second.raw")
    files = {identity(disks.base), identity(second)}
    found = find_dependents(files, folders=[disks.here], limits=ScanLimits())
    assert {(Path(one.path).name, one.on) for one in found} == {
        ("a.qcow2", identity(disks.base)),
        ("b.qcow2", identity(second)),
    }


def test_those_to_skip_are_skipped_by_their_inode(disks: Disks) -> None:
    one = disks.image(disks.here / "one.qcow2", "base.raw")
    two = disks.image(disks.here / "two.qcow2", "base.raw")
    one.rename(disks.here / "renamed.qcow2")
    assert disks.paths(skip=(disks.here / "renamed.qcow2",)) == {str(two)}


def test_an_image_to_skip_may_be_invalid(disks: Disks) -> None:
    bad = disks.here / "bad.qcow2"
    bad.write_bytes(b"QFI\xfb" + b"\xff" * 200)
    assert disks.found(skip=(bad,)) == []


def test_a_file_whose_header_cannot_be_trusted_may_hide_that_it_stands_on_the_base(disks: Disks) -> None:
    bad = disks.here / "bad.qcow2"
    bad.write_bytes(b"QFI\xfb" + b"\xff" * 200)
    error = disks.refusal()
    assert (error.code, error.value) == ("image_invalid", str(bad))
    assert error.remedy and str(bad) in error.remedy


def test_what_is_no_image_and_a_base_that_is_gone_say_nothing(disks: Disks) -> None:
    (disks.here / "notes.txt").write_text("QFI is no magic by itself")
    (disks.here / "empty").touch()
    disks.image(disks.here / "lost.qcow2", "gone.raw")
    os.mkfifo(disks.here / "fifo")
    (disks.here / "link.qcow2").symlink_to(disks.image(disks.there / "top.qcow2", "../here/base.raw"))
    (disks.here / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(disks.here / "socket"))
        assert disks.found() == []  # and the FIFO, which has no writer, does not hold it up


def test_a_folder_that_does_not_exist_holds_nobody(disks: Disks) -> None:
    assert disks.found(disks.home / "no-pool") == []


def test_a_folder_that_cannot_be_searched_is_an_error(disks: Disks) -> None:
    with pytest.raises(JobError) as caught:
        disks.found(disks.base)
    assert caught.value.code == "denied"


def test_images_that_vanish_during_the_search_are_left_out(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gave out the names of all of them before the first is read."""
    for number in range(3):
        disks.image(disks.here / f"{number}.qcow2", "base.raw")
    real = dependents.read_header

    def read_and_delete_the_others(fd: int) -> object:
        own = os.fstat(fd)
        for path in disks.here.glob("*.qcow2"):
            if path.stat().st_ino != own.st_ino:
                path.unlink()
        return real(fd)

    disks.base.rename(disks.there / "base.raw")  # so that the first header read is an image's
    disks.base.symlink_to(disks.there / "base.raw")
    monkeypatch.setattr(dependents, "read_header", read_and_delete_the_others)
    assert len(disks.found()) == 1


def test_a_folder_with_more_entries_than_the_limit_is_refused(disks: Disks) -> None:
    for number in range(5):
        (disks.here / f"{number}.txt").touch()
    assert disks.found(limits=ScanLimits(entries=6)) == []  # the base is the sixth
    error = disks.refusal(ScanLimits(entries=5))
    assert error.code == "limit"
    assert error.remedy and "images.scan_entries" in error.remedy


def test_a_search_that_takes_too_long_is_given_up(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seconds = dependents.read_header, iter(range(0, 1000, 7))
    monkeypatch.setattr(dependents, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    for number in range(5):
        disks.image(disks.here / f"{number}.qcow2")
    read: list[int] = []
    monkeypatch.setattr(dependents, "read_header", lambda fd: (read.append(fd), real(fd))[1])
    error = disks.refusal(ScanLimits(timeout=20.0))
    assert error.code == "timeout"
    assert error.remedy and "images.scan_timeout" in error.remedy
    assert len(read) == 2  # at 7 s and at 14 s
