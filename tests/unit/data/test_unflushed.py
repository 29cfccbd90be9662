"""What a failed flush has lost of a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostagent.data.backends.unflushed import Unflushed
from hostagent.errors import AgentError


@pytest.fixture
def fd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a file whose next flush fails, and none after it."""
    failures = [OSError(28, "No space left on device")]

    def once(fd: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(os, "fdatasync", once)
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1000))
    return os.open(path, os.O_RDWR)


def write(state: Unflushed, *ranges: tuple[int, int]) -> None:
    for begin, end in ranges:
        with state.writing(begin, end):
            pass


def refused(state: Unflushed, fd: int) -> bool:
    try:
        state.sync(fd, "disk.raw")
    except AgentError as error:
        assert error.code == "no_space"
        return True
    return False


def test_of_too_many_ranges_all_between_them_is_lost(fd: int) -> None:
    state = Unflushed()
    many = [(number * 2, number * 2 + 1) for number in range(66_000)]
    write(state, *many)
    assert refused(state, fd)
    write(state, *many)
    assert refused(state, fd)
    write(state, (0, 132_000))
    assert not refused(state, fd)
    os.close(fd)


def test_what_nobody_is_known_to_have_written_is_all_of_the_file(fd: int) -> None:
    state = Unflushed()
    assert refused(state, fd)
    write(state, (0, 999))
    assert refused(state, fd)
    write(state, (999, 1000))
    assert not refused(state, fd)
    os.close(fd)


def test_a_write_that_fails_gives_nothing_back(fd: int) -> None:
    state = Unflushed()
    write(state, (0, 10))
    assert refused(state, fd)
    with pytest.raises(OSError, match="again"), state.writing(0, 10):
        raise OSError(5, "again")
    assert refused(state, fd)
    os.truncate(fd, 0)
    assert not refused(state, fd), "what the file has no more is not lost"
    os.close(fd)
