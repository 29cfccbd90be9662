"""Our reader against qemu-img's word, and qemu-img run by us on good, leaking and damaged images."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.images.chain import ChainLimits, open_chain
from hostagent.images.header import read_backing
from hostagent.images.qemu_img import CheckResult, QemuImg, RunAs, ToolLimits
from jobs.errors import JobError

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed"),
]
NOBODY = RunAs(65534, 65534)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="running as another user needs root")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not tmp_path: its parents are closed to other users, which the tests here decide for themselves."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        yield Path(path).resolve()


def qemu_img(*arguments: object) -> str:
    command = ["qemu-img", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def create(
    path: Path, size: str = "64M", *, backing: Path | str | None = None, of: str = "qcow2", options: str = ""
) -> Path:
    words = ["create", "-q", "-f", "qcow2"]
    words += ["-o", options] if options else []
    words += ["-b", str(backing), "-F", of] if backing else []
    qemu_img(*words, path, *([] if backing and not size else [size]))
    return path


def written(path: Path, command: str = "write 0 1M") -> Path:
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(path)], check=True, capture_output=True, timeout=30)
    return path


def check(path: Path, *, user: RunAs | None = None, binary: str = "qemu-img", **limits: float) -> CheckResult:
    tool = QemuImg(user=user, limits=ToolLimits(**limits), binary=binary)  # type: ignore[arg-type]
    with open_chain(str(path), limits=ChainLimits()) as opened:
        return asyncio.run(tool.check(opened))


def refusal(path: Path, *, user: RunAs | None = None, binary: str = "qemu-img", **limits: float) -> JobError:
    with pytest.raises(JobError) as caught:
        check(path, user=user, binary=binary, **limits)
    return caught.value


# The reader


OPTIONS = (
    "",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=2M",
    "extended_l2=on,cluster_size=128k",
    "compression_type=zstd",
    "lazy_refcounts=on",
    "refcount_bits=64",
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", ["0", "1", "1000k", "5G", "50G"])
def test_we_read_a_header_as_qemu_img_does(folder: Path, options: str, size: str) -> None:
    base = folder / "base.raw"
    base.write_bytes(b"\0" * 65536)
    top = create(folder / "top.qcow2", size, backing="base.raw", of="raw", options=options)
    with open_chain(str(top), limits=ChainLimits()) as opened:
        ours, header = opened.chain.layers, opened.headers[0]
    told = json.loads(qemu_img("info", "--backing-chain", "--output=json", top))
    assert [layer.virtual_size for layer in ours] == [image["virtual-size"] for image in told]
    assert [layer.format for layer in ours] == [image["format"] for image in told]
    assert [layer.allocated for layer in ours] == [image["actual-size"] for image in told]
    assert ours[0].backing == told[0]["backing-filename"]
    assert ours[1].path == str(base)
    assert header is not None
    assert (header.cluster_size, header.backing_format) == (told[0]["cluster-size"], told[0]["backing-filename-format"])
    assert header.extended_l2 == told[0]["format-specific"]["data"].get("extended-l2", False)


def test_encryption_a_data_file_and_bitmaps_are_seen(folder: Path) -> None:
    secret = ["--object", "secret,id=s,data=x"]
    luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    for attempt in range(5):  # it measures its processor, and gives up where that had no tick meanwhile
        try:
            qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", luks, folder / "luks.qcow2", "1M")
            break
        except subprocess.CalledProcessError as error:
            assert attempt < 4 and "CPU usage" in error.stderr, error.stderr
    create(folder / "data.qcow2", options=f"data_file={folder}/data.raw")
    for name in ("luks.qcow2", "data.qcow2"):
        with pytest.raises(JobError) as caught:
            open_chain(str(folder / name), limits=ChainLimits())
        assert caught.value.code == "not_supported"
    bitmap = create(folder / "bitmap.qcow2")
    qemu_img("bitmap", "--add", bitmap, "b0")
    open_chain(str(bitmap), limits=ChainLimits()).close()


def test_the_backing_name_follows_a_rebase_on_the_same_descriptor(folder: Path) -> None:
    create(folder / "a.qcow2")
    create(folder / "b.qcow2")
    top = create(folder / "top.qcow2", "", backing=folder / "a.qcow2")
    with open_chain(str(top), limits=ChainLimits()) as opened:
        assert read_backing(opened.fds[0]) == str(folder / "a.qcow2")
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "b.qcow2", top)
        assert read_backing(opened.fds[0]) == "b.qcow2"
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", top)
        assert read_backing(opened.fds[0]) is None


def test_the_longest_backing_name_is_read(folder: Path) -> None:
    name = "./" * 400 + "base.qcow2"
    create(folder / "base.qcow2")
    top = create(folder / "top.qcow2")
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name, top)
    with open_chain(str(top), limits=ChainLimits()) as opened:
        assert opened.chain.top.backing == name
        assert opened.chain.paths()[1] == str(folder / "base.qcow2")


# The check


def damage(path: Path, offset: int, number: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(">Q", number))


def first_l2(path: Path) -> int:
    """The offset of the first L2 table, from the L1 table's first entry."""
    with path.open("rb") as file:
        file.seek(40)
        (l1,) = struct.unpack(">Q", file.read(8))
        file.seek(l1)
        (entry,) = struct.unpack(">Q", file.read(8))
        return int(entry) & 0x00FFFFFFFFFFFE00


def test_a_clean_image_passes(folder: Path) -> None:
    assert check(written(create(folder / "a.qcow2"))) == CheckResult(str(folder / "a.qcow2"))


def test_a_raw_image_has_nothing_to_check(folder: Path) -> None:
    raw = folder / "a.raw"
    raw.write_bytes(b"\0" * 512)
    tool = QemuImg(user=None, limits=ToolLimits())
    with open_chain(str(raw), limits=ChainLimits(), format="raw") as opened:
        assert asyncio.run(tool.check(opened)) == CheckResult(str(raw), supported=False)


def test_leaks_are_a_warning(folder: Path) -> None:
    image = written(create(folder / "a.qcow2"))
    damage(image, first_l2(image), 0)
    result = check(image)
    assert result.leaks == 1
    assert result.warning and "1 leaked" in result.warning


def test_corruption_is_refused_with_a_remedy(folder: Path) -> None:
    image = written(create(folder / "a.qcow2"))
    l2 = first_l2(image)
    damage(image, l2 + 8, (1 << 63) | l2)
    error = refusal(image)
    assert (error.code, error.value) == ("image_corrupt", str(image))
    assert error.remedy and "restore" in error.remedy


def test_an_image_that_is_cut_off_is_refused_by_its_path(folder: Path) -> None:
    image = written(create(folder / "a.qcow2"))
    os.truncate(image, 70000)
    error = refusal(image)
    assert error.code in ("image_corrupt", "image_invalid")
    assert str(image) in error.message and "/proc/self" not in error.message


def test_the_backing_file_is_not_opened(folder: Path) -> None:
    create(folder / "base.qcow2")
    top = written(create(folder / "top.qcow2", "", backing="base.qcow2"))
    tool = QemuImg(user=None, limits=ToolLimits())
    with open_chain(str(top), limits=ChainLimits()) as opened:
        (folder / "base.qcow2").unlink()
        assert asyncio.run(tool.check(opened)).warning is None


def test_any_layer_can_be_checked(folder: Path) -> None:
    base = written(create(folder / "base.qcow2"))
    damage(base, first_l2(base), 0)
    top = create(folder / "top.qcow2", "", backing="base.qcow2")
    tool = QemuImg(user=None, limits=ToolLimits())
    with open_chain(str(top), limits=ChainLimits()) as opened:
        assert asyncio.run(tool.check(opened, layer=0)).leaks == 0
        assert asyncio.run(tool.check(opened, layer=1)).leaks == 1


def test_an_image_that_somebody_writes_is_busy(folder: Path) -> None:
    image = create(folder / "a.qcow2")
    writer = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write("write 0 64k\n")
        writer.stdin.flush()
        while "wrote" not in writer.stdout.readline():
            pass
        error = refusal(image)
    finally:
        writer.communicate("quit\n", timeout=10)
    assert error.code == "busy"


@pytest.mark.root
@needs_root
def test_another_user_checks_what_its_permissions_allow_and_no_more(folder: Path) -> None:
    image = create(folder / "a.qcow2")
    os.chmod(folder, 0o700)  # the folder is closed to that user, which must not matter
    os.chmod(image, 0o600)
    refused = refusal(image, user=NOBODY)
    assert refused.code == "denied"
    if shutil.which("setfacl"):
        give, take = re.findall("`(setfacl [^`]+)`", str(refused.remedy))
        subprocess.run(shlex.split(give), check=True)
        assert check(image, user=NOBODY).warning is None
        subprocess.run(shlex.split(take), check=True)
        assert refusal(image, user=NOBODY).code == "denied"
    os.chmod(image, 0o604)
    assert check(image, user=NOBODY).warning is None


@pytest.mark.root
@needs_root
def test_the_tool_runs_as_that_user_under_its_limits_and_sees_only_a_handle(folder: Path) -> None:
    facts = "$(id -u) $(id -g) $(id -G) $(ulimit -t) $(ulimit -v) $(pwd)"
    handle = 'fd=${3##*/fd/}; fd=${fd%%\\"*}; flags=$(sed -n "s/^flags:[[:space:]]*//p" /proc/$$/fdinfo/$fd)'
    spy = script(folder, f'{handle}; echo "{facts} $flags" >&2; exit 1')
    error = refusal(create(folder / "a.qcow2"), user=NOBODY, binary=spy, cpu=7, memory=1 << 28)
    facts_seen, _, flags = error.message.rpartition(" ")
    assert facts_seen.endswith("65534 65534 65534 7 262144 /")
    assert int(flags, 8) & os.O_PATH


def test_a_check_that_takes_too_long_is_ended(folder: Path) -> None:
    spy = script(folder, f"echo $$ > {folder}/pid; exec sleep 60")
    os.chmod(folder, 0o777)
    started = time.monotonic()
    error = refusal(create(folder / "a.qcow2"), binary=spy, timeout=0.5)
    assert time.monotonic() - started < 5
    assert error.code == "timeout"
    assert "images.check_timeout" in error.message
    assert error.remedy and "--check never" in error.remedy
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


def test_a_check_that_burns_its_cpu_time_is_ended_by_the_kernel(folder: Path) -> None:
    spy = script(folder, "while :; do :; done")
    error = refusal(create(folder / "a.qcow2"), binary=spy, cpu=1)
    assert error.code == "limit"
    assert error.remedy and "images.tool_cpu" in error.remedy


def test_a_flood_of_output_is_cut_and_does_not_block(folder: Path) -> None:
    spy = script(folder, "head -c 20000000 /dev/zero | tr '\\0' x >&2; exit 2")
    error = refusal(create(folder / "a.qcow2"), binary=spy, output=1000)
    assert error.code == "image_corrupt"


def test_a_missing_tool_is_unavailable_with_the_package_to_install(folder: Path) -> None:
    error = refusal(create(folder / "a.qcow2"), binary="no-such-qemu-img")
    assert error.code == "unavailable"
    assert error.remedy == "install qemu-utils"


def script(folder: Path, body: str) -> str:
    """A stand-in for the program: what it prints last on stderr comes back in the error."""
    path = folder / "tool.sh"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)
