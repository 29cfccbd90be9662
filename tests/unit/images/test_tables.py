"""What is read of an image's tables here, against what qemu-img says of the same image."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hostagent.images import covered
from hostagent.images.header import read_header
from hostagent.images.tables import CLUSTERS_MOST, unmentioned
from hostagent.images.tool import Tool, ToolLimits
from jobs.errors import JobError
from jobs.model import FileId, Layer

KIB = 1024
SIZE = 8 * KIB * KIB

WRITES = st.lists(
    st.tuples(
        st.sampled_from(["write -P 7", "write -z", "write -z -u", "discard", "write -c -P 9"]),
        st.integers(0, SIZE // 512 - 1),
        st.integers(1, 1500),
    ),
    max_size=12,
)
RANGES = st.lists(st.integers(0, SIZE // 512 + 64), min_size=2, max_size=12, unique=True).map(
    lambda cuts: [(512 * begin, 512 * end) for begin, end in zip(*[iter(sorted(cuts))] * 2, strict=False)]
)


def image(folder: Path, cluster: int, compat: str, more: str = "", size: int = SIZE) -> Path:
    path = folder / "image.qcow2"
    path.unlink(missing_ok=True)
    base = folder / "base.raw"
    if not base.exists():
        base.write_bytes(b"\1" * SIZE)
    options = f"cluster_size={cluster},compat={compat}{more}"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", path, str(size)]
    subprocess.run(command, check=True)
    return path


def write(path: Path, cluster: int, writes: list[tuple[str, int, int]]) -> None:
    commands = []
    for what, sector, sectors in writes:
        begin, length = 512 * sector, 512 * sectors
        if "-c" in what:  # whole clusters, and one at a time
            begin, length = begin // cluster * cluster, cluster
        length = min(length, SIZE - begin)
        commands += ["-c", f"{what} {begin} {length}"]
    if commands:  # one that QEMU refuses (a compressed cluster that is there) changes nothing
        subprocess.run(["qemu-io", "-f", "qcow2", *commands, path], check=False, capture_output=True)


def said(path: Path, ranges: list[tuple[int, int]]) -> tuple[int | None, int]:
    """What we say, and what qemu-img does."""
    found = path.stat()
    layer = Layer(str(path), "qcow2", FileId(found.st_dev, found.st_ino), SIZE, 0)
    fd = os.open(path, os.O_RDONLY)
    try:
        tool = Tool(user=None, limits=ToolLimits(), binary="qemu-img")
        return unmentioned(fd, ranges), asyncio.run(covered.lacking(tool, ranges, [layer], [fd]))
    finally:
        os.close(fd)


@example(512, "v3", [("write -c -P 9", 64, 1), ("write -P 7", 64, 1), ("write -c -P 9", 0, 1)], [(0, 512)])
@given(cluster=st.sampled_from([512, 4096, 65536]), compat=st.sampled_from(["v2", "v3"]), writes=WRITES, ranges=RANGES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_we_and_qemu_img_say_the_same(
    tmp_path: Path, cluster: int, compat: str, writes: list[tuple[str, int, int]], ranges: list[tuple[int, int]]
) -> None:
    path = image(tmp_path, cluster, compat)
    write(path, cluster, writes)
    ours, theirs = said(path, ranges)
    assert ours == (None if marked_corrupt(path) else theirs)


def marked_corrupt(path: Path) -> bool:
    """QEMU 7.2 marks an image so at some writes of compressed clusters; then we say nothing."""
    with path.open("rb") as file:
        header = read_header(file.fileno())
    assert header is not None
    return header.corrupt


def test_of_what_is_not_plain_nothing_is_said(tmp_path: Path) -> None:
    path = image(tmp_path, 65536, "v3", ",extended_l2=on")
    write(path, 65536, [("write -P 7", 0, 8)])
    assert said(path, [(0, SIZE)]) == (None, SIZE - 4 * KIB)
    path = image(tmp_path, 512, "v3", size=512 * (CLUSTERS_MOST + 1))
    assert said(path, [(0, 512)])[0] is None
    data = tmp_path / "data"
    path = image(tmp_path, 65536, "v3", f",data_file={data}")
    assert said(path, [(0, 512)])[0] is None
    with (tmp_path / "base.raw").open("rb") as raw:
        assert unmentioned(raw.fileno(), [(0, 512)]) is None


def test_tables_that_are_not_there_are_not_guessed(tmp_path: Path) -> None:
    path = image(tmp_path, 65536, "v3")
    write(path, 65536, [("write -P 7", 0, 128)])
    whole = path.read_bytes()
    path.write_bytes(whole[: 4 * 65536])  # header, refcounts, L1; without its table of the second level
    fd = os.open(path, os.O_RDONLY)
    try:
        assert unmentioned(fd, [(0, 65536)]) is None
        path.write_bytes(whole[:100])
        with pytest.raises(JobError):
            unmentioned(fd, [(0, 65536)])
    finally:
        os.close(fd)
