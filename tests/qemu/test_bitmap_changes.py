"""Bitmaps of real images: our reader against qemu-img's word, changes by the real agent, and bits that are counted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from hostagent.images.bitmaps import list_bitmaps
from tests.harness import MIB, AgentProcess, ApiError, Json, check_clean, overlay, raw_image, reachable, user_can_read
from tests.qemu.faults import eventually

pytestmark = pytest.mark.qemu

SIZE = 4 * MIB


def qemu_img(*words: object) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True, timeout=30).stdout


def told(image: Path) -> dict[str, Json]:
    """The bitmaps as qemu-img tells them."""
    found = json.loads(qemu_img("info", "--output=json", image))["format-specific"]["data"].get("bitmaps", [])
    return {bitmap["name"]: bitmap for bitmap in found}


def write(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(image)], check=True, capture_output=True, timeout=30)


def dirty(image: Path, name: str) -> list[tuple[int, int]]:
    """The dirty extents (start, length) of a bitmap, as an NBD client sees them."""
    socket = image.with_suffix(".sock")
    server = subprocess.Popen(
        ["qemu-nbd", "-r", "-t", "-B", name, "-f", "qcow2", "-k", str(socket), str(image)], stderr=subprocess.PIPE
    )
    try:
        assert eventually(socket.exists, timeout=10)
        uri = f"nbd+unix:///?socket={socket}"
        out = subprocess.run(
            ["nbdinfo", f"--map=qemu:dirty-bitmap:{name}", "--json", uri], capture_output=True, check=True, timeout=20
        ).stdout
        return [(one["offset"], one["length"]) for one in json.loads(out) if one["type"]]
    finally:
        server.terminate()
        server.communicate(timeout=10)
        socket.unlink(missing_ok=True)


@contextlib.contextmanager
def writer(image: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the image open for writing."""
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("write 0 64k\n")
        process.stdin.flush()
        while "wrote" not in process.stdout.readline():
            assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


class Bitmaps:
    """The API of one image."""

    def __init__(self, agent: AgentProcess, image: Path) -> None:
        self.agent, self._query = agent, f"path={quote(str(image))}"

    def list(self) -> Json:
        found: Json = self.agent.get(f"/v1/images/bitmaps?{self._query}")
        return found

    def states(self) -> dict[str, str]:
        return {one["name"]: one["state"] for one in self.list()["items"]}

    def add(self, name: str, **more: Any) -> Json:
        found: Json = self.agent.post(f"/v1/images/bitmaps?{self._query}", {"name": name, **more})
        return found

    def remove(self, name: str) -> Json:
        found: Json = self.agent.delete(f"/v1/images/bitmaps?{self._query}&name={quote(name)}")
        return found

    def merge(self, name: str, source_name: str, source: Path | None = None) -> Json:
        body = {"name": name, "source_name": source_name, **({"source": str(source)} if source else {})}
        found: Json = self.agent.post(f"/v1/images/bitmaps/merge?{self._query}", body)
        return found


@pytest.fixture
def top(folder: Path) -> Path:
    return overlay(folder / "top.qcow2", raw_image(folder / "base.raw", SIZE))


@pytest.fixture
def bitmaps(agent: AgentProcess, top: Path) -> Bitmaps:
    return Bitmaps(agent, top)


def refusal(call: Any, *words: Any, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*words, **more)
    return caught.value


def nobody_holds(agent: AgentProcess, image: Path) -> None:
    """No row of a tool is left, and the hypervisor user cannot open what it could not before."""
    assert [one for one in agent.get("/v1/grants")["items"] if one["holder"]["kind"] == "tool"] == []
    if agent.user:
        assert not user_can_read(image, agent.user)


# The reader


@pytest.mark.parametrize("options", ["", "cluster_size=512", "cluster_size=2M", "extended_l2=on,cluster_size=128k"])
def test_we_read_bitmaps_as_qemu_img_does(tmp_path: Path, options: str) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), image, "1G")
    for number, granularity in enumerate(("512", "64K", "2G")):
        qemu_img("bitmap", "--add", "-g", granularity, *(["--disable"] if number else []), image, f"b{number}")
    qemu_img("bitmap", "--add", image, "größe" * 100)
    with image.open("rb") as file:
        ours = list_bitmaps(file.fileno(), most=10)
    assert not ours.lost
    assert {one.name: (one.granularity, one.enabled) for one in ours.items} == {
        name: (one["granularity"], "auto" in one["flags"]) for name, one in told(image).items()
    }
    assert len(ours.items) == 4


# Changes


def test_a_bitmap_is_added_listed_and_removed(agent: AgentProcess, bitmaps: Bitmaps, top: Path) -> None:
    assert bitmaps.list() == {"path": str(top), "items": [], "lost": False, "holders": None}
    bitmaps.add("b0")
    found = bitmaps.add("-x", granularity=512, disabled=True)
    assert found == bitmaps.list()
    assert found["items"] == [
        {"name": "b0", "granularity": 65536, "recording": True, "state": "consistent"},
        {"name": "-x", "granularity": 512, "recording": False, "state": "consistent"},
    ]
    assert set(told(top)) == {"b0", "-x"}
    nobody_holds(agent, top)
    assert [one["name"] for one in bitmaps.remove("b0")["items"]] == ["-x"]
    assert set(told(top)) == {"-x"}
    assert check_clean(top)


def test_an_added_bitmap_records_what_the_next_writer_writes(bitmaps: Bitmaps, top: Path) -> None:
    bitmaps.add("on")
    bitmaps.add("off", disabled=True)
    write(top, "write 1M 64k", "write 3M 1k")
    assert dirty(top, "on") == [(MIB, 65536), (3 * MIB, 65536)]
    assert dirty(top, "off") == []


def test_merging_brings_the_bits_of_both_and_leaves_the_source(bitmaps: Bitmaps, top: Path) -> None:
    bitmaps.add("one")
    write(top, "write 0 64k")
    bitmaps.add("two", granularity=512)
    write(top, "write 2M 512")
    assert dirty(top, "two") == [(2 * MIB, 512)]
    bitmaps.merge("two", "one")
    assert dirty(top, "two") == [(0, 65536), (2 * MIB, 65536)]
    assert dirty(top, "one") == [(0, 65536), (2 * MIB, 65536)]


def test_merging_from_another_image_reads_that_one_alone(
    agent: AgentProcess, bitmaps: Bitmaps, top: Path, folder: Path
) -> None:
    other = overlay(folder / "other.qcow2", folder / "base.raw")
    qemu_img("bitmap", "--add", other, "days")
    write(other, "write 1M 128k")
    before = other.read_bytes()
    bitmaps.add("all")
    bitmaps.merge("all", "days", other)
    assert dirty(top, "all") == [(MIB, 131072)]
    assert other.read_bytes() == before
    nobody_holds(agent, top)
    nobody_holds(agent, other)


def test_the_backing_chain_and_the_data_stay(bitmaps: Bitmaps, top: Path, folder: Path) -> None:
    write(top, "write -P 7 0 1M")
    truth = folder / "truth.raw"
    qemu_img("convert", "-O", "raw", top, truth)
    bitmaps.add("b0")
    bitmaps.add("b1")
    bitmaps.merge("b0", "b1")
    bitmaps.remove("b0")
    assert json.loads(qemu_img("info", "--output=json", top))["backing-filename"] == "base.raw"
    qemu_img("compare", truth, top)


# Refusals


def test_what_cannot_be_done_is_refused_and_changes_nothing(bitmaps: Bitmaps, top: Path, folder: Path) -> None:
    bitmaps.add("b0")
    small = folder / "small.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", small, "1M")
    qemu_img("bitmap", "--add", small, "b0")
    before = top.read_bytes()
    for code, field, call, words in (
        ("conflict", "name", bitmaps.add, ("b0",)),
        ("not_found", "name", bitmaps.remove, ("b1",)),
        ("not_found", "name", bitmaps.merge, ("b1", "b0")),
        ("not_found", "source_name", bitmaps.merge, ("b0", "b1")),
        ("invalid", "source_name", bitmaps.merge, ("b0", "b0")),
        ("invalid", "source_name", bitmaps.merge, ("b0", "b0", top)),
        ("invalid", "source", bitmaps.merge, ("b0", "b0", small)),
    ):
        error = refusal(call, *words)
        assert (error.code, error.body["field"]) == (code, field)
        assert error.body["remedy"]
    for granularity in (1, 256, 1000, 3 << 20):
        assert refusal(bitmaps.add, "b2", granularity=granularity).body["field"] == "granularity"
    assert top.read_bytes() == before


def test_raw_and_version_2_images_carry_no_bitmaps(agent: AgentProcess, top: Path, folder: Path) -> None:
    assert refusal(Bitmaps(agent, folder / "base.raw").list).code == "not_supported"
    qemu_img("amend", "-f", "qcow2", "-o", "compat=0.10", top)
    error = refusal(Bitmaps(agent, top).add, "b0")
    assert error.code == "not_supported"
    subprocess.run(error.body["remedy"], shell=True, check=True)
    assert Bitmaps(agent, top).add("b0")["items"]


def test_one_over_the_limit_is_refused(tmp_path: Path, folder: Path) -> None:
    image = folder / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    with AgentProcess(tmp_path, {"IMAGES_BITMAPS": "2"}) as agent:
        bitmaps = Bitmaps(agent, image)
        bitmaps.add("b0")
        bitmaps.add("b1")
        assert refusal(bitmaps.add, "b2").code == "limit"
        qemu_img("bitmap", "--add", image, "b2")
        assert "images.bitmaps" in refusal(bitmaps.list).body["remedy"]


# Somebody else


def test_an_exported_image_is_busy_by_name_and_can_be_read(
    agent: AgentProcess, bitmaps: Bitmaps, top: Path, folder: Path
) -> None:
    bitmaps.add("b0")
    export = agent.export(top)
    try:
        for call, words in ((bitmaps.add, ("b1",)), (bitmaps.remove, ("b0",)), (bitmaps.merge, ("b0", "b0"))):
            error = refusal(call, *words)
            assert (error.code, error.body["holders"]) == ("busy", [f"export:{export['id']}"])
        assert bitmaps.states() == {"b0": "consistent"}
    finally:
        agent.delete(f"/v1/exports/{export['id']}")
    bitmaps.add("b1")
    assert set(told(top)) == {"b0", "b1"}


def test_the_base_of_an_exported_image_is_busy_by_name(agent: AgentProcess, folder: Path) -> None:
    base = folder / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, SIZE)
    export = agent.export(overlay(folder / "top.qcow2", base, "qcow2"))
    try:
        assert refusal(Bitmaps(agent, base).add, "b0").body["holders"] == [f"export:{export['id']}"]
    finally:
        agent.delete(f"/v1/exports/{export['id']}")


def test_a_job_keeps_changes_away_and_its_bitmaps_are_said_to_be_in_use(
    agent: AgentProcess, bitmaps: Bitmaps, top: Path
) -> None:
    bitmaps.add("b0")
    job = agent.pull(top, bandwidth=65536)
    agent.until(job["id"], lambda one: one["state"] == "running" and one["cursor"]["cur"] > 0)
    assert refusal(bitmaps.add, "b1").body["holders"] == [f"job:{job['id']}"]
    found = bitmaps.list()
    assert (found["holders"], found["items"][0]["state"]) == ([f"job:{job['id']}"], "in use")
    agent.post(f"/v1/jobs/{job['id']}/abort")
    agent.until_ended(job["id"])
    assert eventually(lambda: bitmaps.states() == {"b0": "consistent"}, timeout=20)  # its daemon ends after the job


def test_a_foreign_writer_keeps_changes_away_by_name(bitmaps: Bitmaps, top: Path) -> None:
    bitmaps.add("b0")
    with writer(top) as process:
        error = refusal(bitmaps.remove, "b0")
        assert (error.code, error.body["holders"]) == ("busy", [f"qemu-io (pid {process.pid})"])
        found = bitmaps.list()
        assert (found["holders"], found["items"][0]["state"]) == ([f"qemu-io (pid {process.pid})"], "in use")


def test_a_bitmap_whose_writer_was_killed_is_inconsistent_and_can_only_be_removed(bitmaps: Bitmaps, top: Path) -> None:
    bitmaps.add("b0")
    with writer(top):
        pass  # and it is killed, with the bitmap in its memory
    assert bitmaps.states() == {"b0": "inconsistent"}
    bitmaps.add("b1")
    assert refusal(bitmaps.merge, "b1", "b0").body["field"] == "source_name"
    error = refusal(bitmaps.merge, "b0", "b1")
    assert (error.code, error.body["field"]) == ("conflict", "name")
    bitmaps.remove("b0")
    assert bitmaps.states() == {"b1": "consistent"}
    assert check_clean(top)


def test_changes_at_the_same_time_are_done_one_by_one_or_refused(bitmaps: Bitmaps, top: Path) -> None:
    outcomes: dict[str, str] = {}

    def add(name: str) -> None:
        try:
            bitmaps.add(name)
            outcomes[name] = "done"
        except ApiError as error:
            outcomes[name] = str(error.code)

    threads = [threading.Thread(target=add, args=(f"b{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(outcomes.values()) <= {"done", "busy"}
    done = {name for name, outcome in outcomes.items() if outcome == "done"}
    assert done
    assert bitmaps.states() == dict.fromkeys(done, "consistent")


# A tool that hangs, and an agent that dies


@pytest.fixture
def slow(folder: Path) -> Iterator[Path]:
    """A qemu-img that waits until `go` is there, and a file with its pid."""
    program = folder / "slow.sh"
    go, pid = folder / "go", folder / "pid"
    pid.touch()
    pid.chmod(0o666)
    program.write_text(f'#!/bin/sh\necho $$ > {pid}\nwhile ! [ -e {go} ]; do sleep 0.02; done\nexec qemu-img "$@"\n')
    program.chmod(0o755)
    yield program
    go.touch()


def test_a_change_that_takes_too_long_goes_on_and_holds_what_it_needs(tmp_path: Path, folder: Path, slow: Path) -> None:
    image = folder / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    image.chmod(0o600)
    settings = {"IMAGES_QEMU_IMG": str(slow), "IMAGES_BITMAP_TIMEOUT": "0.3"}
    with reachable(tmp_path), AgentProcess(tmp_path, settings) as agent:
        bitmaps = Bitmaps(agent, image)
        error = refusal(bitmaps.add, "b0")
        assert (error.code, error.status) == ("timeout", 504)
        assert refusal(bitmaps.add, "b1").body["holders"] == ["another change of its bitmaps"]
        assert eventually(lambda: (folder / "pid").read_text(), timeout=20)  # it runs, so its grant is given
        (grant,) = [one for one in agent.get("/v1/grants")["items"] if one["holder"]["kind"] == "tool"]
        assert (grant["path"], grant["mode"]) == (str(image), "rw")
        assert refusal(agent.delete, f"/v1/grants/{grant['id']}").code == "busy"
        (folder / "go").touch()
        assert eventually(lambda: bitmaps.states() == {"b0": "consistent"}, timeout=20)
        nobody_holds(agent, image)


def test_an_agent_that_is_killed_gives_back_at_its_next_start(tmp_path: Path, folder: Path, slow: Path) -> None:
    image = folder / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    image.chmod(0o600)
    settings = {"IMAGES_QEMU_IMG": str(slow), "IMAGES_BITMAP_TIMEOUT": "0.3"}
    with reachable(tmp_path), AgentProcess(tmp_path, settings) as agent:
        assert refusal(Bitmaps(agent, image).add, "b0").code == "timeout"
        assert eventually(lambda: (folder / "pid").read_text(), timeout=20)
        agent.kill()
        pid = int((folder / "pid").read_text())
        os.kill(pid, signal.SIGKILL)  # before it has opened the image
        agent.start()
        nobody_holds(agent, image)
        assert Bitmaps(agent, image).states() == {}


def test_a_qemu_img_that_is_ended_is_said_so_with_what_it_left(tmp_path: Path, folder: Path) -> None:
    image = folder / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    program = folder / "ends.sh"
    program.write_text("#!/bin/sh\nkill -KILL $$\n")
    program.chmod(0o755)
    with AgentProcess(tmp_path, {"IMAGES_QEMU_IMG": str(program)}) as agent:
        error = refusal(Bitmaps(agent, image).add, "b0")
        assert error.code == "limit"
        assert "SIGKILL" in str(error)
        assert Bitmaps(agent, image).states() == {}


def test_a_qemu_img_that_does_nothing_and_says_nothing_is_not_believed(tmp_path: Path, folder: Path) -> None:
    image = folder / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    with AgentProcess(tmp_path, {"IMAGES_QEMU_IMG": "/bin/true"}) as agent:
        assert refusal(Bitmaps(agent, image).add, "b0").code == "unproven"
