"""What stands on what, by a sysfs of our own."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostagent.access import stacking


def device(sys: Path, name: str, number: str, *, parent: str | None = None, slaves: tuple[str, ...] = ()) -> None:
    """A device of the kernel's tree, as `/sys/devices` and `/sys/dev/block` have it."""
    place = sys / "devices" / (parent or "") / name
    (place / "slaves").mkdir(parents=True)
    (place / "uevent").write_text(f"MAJOR=1\nDEVNAME={name}\n")
    if parent:
        (place / "partition").write_text("1\n")
    for slave in slaves:
        (place / "slaves" / slave).symlink_to(next((sys / "devices").rglob(slave)))
    (sys / "dev/block").mkdir(parents=True, exist_ok=True)
    (sys / "dev/block" / number).symlink_to(place)


@pytest.fixture
def sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stacking, "SYS", tmp_path)
    device(tmp_path, "sda", "8:0")
    device(tmp_path, "sda2", "8:2", parent="sda")
    device(tmp_path, "loop7", "7:7")
    (tmp_path / "devices/loop7/loop").mkdir()
    (tmp_path / "devices/loop7/loop/backing_file").write_text("/images/pv.raw\n")
    device(tmp_path, "dm-0", "253:0", slaves=("sda2", "loop7"))
    device(tmp_path, "dm-1", "253:1", slaves=("dm-0",))
    return tmp_path


@pytest.mark.parametrize(
    ("number", "below"),
    [
        ("8:0", []),
        ("8:2", ["/dev/sda"]),
        ("7:7", ["/images/pv.raw"]),
        ("253:1", ["/dev/dm-0", "/dev/loop7", "/images/pv.raw", "/dev/sda2", "/dev/sda"]),
        ("9:9", []),
    ],
    ids=["disk", "partition", "loop", "volume on a volume", "unknown"],
)
def test_all_that_a_device_stands_on_is_found(sys: Path, number: str, below: list[str]) -> None:
    assert [str(path) for path in stacking._below(sys / "dev/block" / number, stacking.DEPTH)] == below


def test_a_file_stands_on_nothing_and_nothing_on_it(sys: Path) -> None:
    file = sys / "pv.raw"
    file.touch()
    with file.open("rb") as stream:
        assert (stacking.stands_on(stream.fileno()), stacking.loops_on(stream.fileno())) == ([], [])


def test_a_loop_device_on_a_file_is_found_by_identity(sys: Path) -> None:
    file, other = sys / "disk.raw", sys / "other" / "disk.raw"
    other.parent.mkdir()
    file.touch()
    other.touch()
    for name, backing in (("loop0", file), ("loop1", other), ("loop2", Path("/nowhere/disk.raw"))):
        (sys / "block" / name / "loop").mkdir(parents=True)
        (sys / "block" / name / "loop/backing_file").write_text(f"{backing}\n")
    with file.open("rb") as stream:
        assert stacking.loops_on(stream.fileno()) == [Path("/dev/loop0")]
