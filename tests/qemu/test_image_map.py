"""`image map` and the progress of `image check`: against what was written, and with images and tools that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from hostagent.images.chain import ChainLimits, open_chain
from hostagent.images.extents import Extent, Map
from hostagent.images.tool import ToolLimits
from jobs.errors import JobError
from tests.harness import MIB, overlay, raw_image
from tests.qemu.faults import eventually

pytestmark = pytest.mark.qemu

K64 = 65536


def write(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(image)], check=True, capture_output=True, timeout=30)


def extents(
    image: Path,
    *,
    format: str | None = None,
    binary: str = "qemu-img",
    output: int = MIB,
    timeout: float = 30,
    **more: int | None,
) -> list[Extent]:
    tool = Map(user=None, limits=ToolLimits(timeout=timeout), binary=binary, output=output)
    with open_chain(str(image), limits=ChainLimits(), format=format) as opened:
        return asyncio.run(tool.extents(opened, **more))  # type: ignore[arg-type]


def refusal(image: Path, **more: object) -> JobError:
    with pytest.raises(JobError) as caught:
        extents(image, **more)  # type: ignore[arg-type]
    return caught.value


@pytest.fixture
def top(folder: Path) -> Path:
    """1 MiB: 64 KiB of data in the top, 64 KiB of zeros, then the middle's data and the base's."""
    base = raw_image(folder / "base.raw", MIB, data=MIB // 2)
    middle = overlay(folder / "middle.qcow2", base)
    image = overlay(folder / "top.qcow2", middle, "qcow2")
    write(middle, "write -P 1 128k 64k")
    write(image, "write -P 2 0 64k", "write -z 64k 64k")
    return image


def test_each_extent_is_told_with_its_file(top: Path, folder: Path) -> None:
    base = str(folder / "base.raw")
    assert extents(top) == [
        Extent(0, K64, 0, False, True, str(top)),
        Extent(K64, K64, 0, True, False, str(top)),
        Extent(2 * K64, K64, 1, False, True, str(folder / "middle.qcow2")),
        Extent(3 * K64, 5 * K64, 2, False, True, base),
        Extent(8 * K64, 8 * K64, 2, True, False, base),
    ]


def test_a_part_is_told_alone(top: Path) -> None:
    assert [(one.start, one.length) for one in extents(top, start=K64, length=K64)] == [(K64, K64)]


def test_a_raw_image_and_what_no_file_has(folder: Path) -> None:
    raw = raw_image(folder / "a.raw", MIB, data=K64)
    assert extents(raw, format="raw")[0] == Extent(0, K64, 0, False, True, str(raw))
    empty = folder / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(empty), "1M"], check=True)
    assert extents(empty) == [Extent(0, MIB, 0, True, False, None)]


def test_the_files_are_those_that_were_opened_whatever_the_names_lead_to_by_then(top: Path, folder: Path) -> None:
    tool = Map(user=None, limits=ToolLimits(), binary="qemu-img", output=MIB)
    with open_chain(str(top), limits=ChainLimits()) as opened:
        (folder / "base.raw").rename(folder / "away.raw")
        raw_image(folder / "base.raw", MIB, data=0)
        assert [one.data for one in asyncio.run(tool.extents(opened))] == [True, False, True, True, False]


def test_a_map_that_is_too_long_is_refused_whole(top: Path) -> None:
    error = refusal(top, output=100)
    assert error.code == "limit"
    assert error.remedy and "--length" in error.remedy


def test_an_image_that_somebody_writes_is_busy(top: Path) -> None:
    writer = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(top)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write("write 0 64k\n")
        writer.stdin.flush()
        while "wrote" not in writer.stdout.readline():
            assert writer.poll() is None
        assert refusal(top).code == "busy"
    finally:
        writer.communicate("quit\n", timeout=10)


@pytest.mark.parametrize(
    ("body", "code"), [("exec sleep 60", "timeout"), ("kill -SEGV $$", "limit"), ("exit 1", "image_invalid")]
)
def test_a_tool_that_hangs_crashes_or_fails_is_an_error(top: Path, folder: Path, body: str, code: str) -> None:
    program = folder / "tool.sh"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    assert refusal(top, binary=str(program), timeout=1.0).code == code


@pytest.mark.parametrize(
    "said",
    [
        "", "no JSON", "7", "[7]", '["x"]', "[{}]", "\\377",
        '[{"start": 0, "length": 1, "depth": 9, "zero": false, "data": true}]',
        '[{"start": 0, "length": 1, "depth": -1, "zero": false, "data": true}]',
        '[{"start": "0", "length": 1, "depth": 0, "zero": false, "data": true}]',
    ],
)  # fmt: skip
def test_a_tool_that_answers_something_else_is_an_error(top: Path, folder: Path, said: str) -> None:
    program = folder / "tool.sh"
    program.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    program.chmod(0o755)
    error = refusal(top, binary=str(program))
    assert error.code == "unavailable" and "cannot be understood" in error.message


@pytest.mark.parametrize(
    ("start", "length", "field"),
    [(MIB, None, "start"), (1 << 62, 1, "start"), (0, 0, "length"), (K64, MIB, "length"), (0, MIB + 1, "length")],
)
def test_a_range_that_the_disk_does_not_have_is_refused(top: Path, start: int, length: int | None, field: str) -> None:
    error = refusal(top, start=start, length=length)
    assert (error.code, error.field) == ("invalid", field)
    assert extents(top, start=MIB - K64, length=K64), "up to the end is no error"


def cli(*words: object) -> list[str]:
    return [sys.executable, "-m", "hostagent.cli.main", *map(str, words)]


ENVIRONMENT = {**os.environ, "HOSTAGENT_QSD_USER": "root", "HOSTAGENT_ACCESS_HYPERVISOR_USER": "root"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="a plain user's tools run as itself: nothing to choose")


@as_root
def test_the_command_prints_a_table_or_json(top: Path) -> None:
    out = subprocess.run(cli("image", "map", top), env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in out.splitlines()] == ["START", "0", "65536", "131072", "196608", "524288"]
    words = cli("image", "map", top, "--start", "64K", "--length", "64K", "--json")
    found = json.loads(subprocess.run(words, env=ENVIRONMENT, capture_output=True, check=True).stdout)
    assert found == {
        "path": str(top),
        "virtual_size": MIB,
        "extents": [{"start": K64, "length": K64, "depth": 0, "zero": True, "data": False, "path": str(top)}],
    }


@as_root
def test_a_check_on_a_terminal_says_at_which_layer_it_is(top: Path, folder: Path) -> None:
    """The check waits until the bar was seen."""
    program, go = folder / "slow.sh", folder / "go"
    program.write_text(f'#!/bin/sh\nwhile ! [ -e {go} ]; do sleep 0.02; done\nexec qemu-img "$@"\n')
    program.chmod(0o755)
    ours, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "HOSTAGENT_IMAGES_QEMU_IMG": str(program), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(cli("image", "check", top), env=environment, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    os.set_blocking(ours, False)
    seen = bytearray()

    def looks() -> bool:
        with contextlib.suppress(BlockingIOError):
            seen.extend(os.read(ours, 65536))
        return b"layer 1 of 3" in seen

    try:
        assert eventually(looks, timeout=20)
        assert b"0 %" in seen
        go.touch()
        os.set_blocking(ours, True)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert b"\x1b" not in out
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)
