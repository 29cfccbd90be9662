"""The names of a group's target: one is always left that leads to the copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostagent.nbd import copy_files
from jobs.model import FileId, Target


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """Decided: it has its own name, and still the unfinished file's."""
    part = tmp_path / ".hostagent-job"
    part.write_bytes(b"copied")
    name = tmp_path / "copy.qcow2"
    name.hardlink_to(part)
    found = part.stat()
    return Target(str(name), "qcow2", made=True, part=str(part), file=FileId(found.st_dev, found.st_ino))


def test_the_unfinished_files_name_goes_when_the_own_one_is_there(target: Target) -> None:
    assert target.part is not None
    for _ in range(2):
        copy_files.let_its_name_be_all(target)
        assert not Path(target.part).exists()
        assert Path(target.path).read_bytes() == b"copied"


@pytest.mark.parametrize("replaced", [False, True])
def test_it_stays_when_somebody_took_the_own_one(target: Target, replaced: bool) -> None:
    assert target.part is not None
    Path(target.path).unlink()
    if replaced:
        Path(target.path).write_bytes(b"somebody else's")
    copy_files.let_its_name_be_all(target)
    assert Path(target.part).read_bytes() == b"copied"
    assert Path(target.path).exists() == replaced
