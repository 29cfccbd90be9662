"""Dirty bitmaps as contexts of exports: what changed, byte for byte, and which bitmaps are refused."""

from __future__ import annotations

import importlib
import json
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, check_clean, overlay
from tests.qemu.faults import HASTE, PATIENCE, Pair, eventually, send, signal
from tests.qemu.test_exports import assert_no_grants, content, refusal, show, stop

nbd: Any = importlib.import_module("nbd")

pytestmark = pytest.mark.qemu

BLOCK = 64 * 1024


def bitmap(image: Path, name: str, *words: str) -> None:
    subprocess.run(["qemu-img", "bitmap", *(words or ("--add",)), str(image), name], check=True, capture_output=True)


def write(image: Path, *blocks: int) -> None:
    commands = [word for n in blocks for word in ("-c", f"write -q -P 7 {n * BLOCK} {BLOCK}")]
    subprocess.run(["qemu-io", *commands, str(image)], check=True)


def dirty(uri: str, name: str) -> set[int]:
    """The blocks that the bitmap says are dirty."""
    command = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri]
    done = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
    found: set[int] = set()
    for extent in json.loads(done.stdout):
        if extent["type"] & 1:
            begin, end = extent["offset"], extent["offset"] + extent["length"]
            found |= set(range(begin // BLOCK, -(-end // BLOCK)))
    return found


def left_in_use(image: Path, name: str) -> None:
    """A bitmap whose writer was killed."""
    bitmap(image, name)
    process = subprocess.Popen(["qemu-io", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"write 0 64k\n")
    process.stdin.flush()
    assert process.stdout.readline()
    process.kill()
    process.communicate()


def test_bitmaps_are_served_beside_the_data(agent: AgentProcess, images: Pair) -> None:
    bitmap(images.top, "first")
    write(images.top, 1, 5)
    bitmap(images.top, "second")
    write(images.top, 9)
    expected = content_of(images.top)
    export = agent.export(images.top, bitmaps=["first", "second"])
    assert export["bitmaps"] == ["first", "second"]
    assert dirty(export["uri"], "first") == {1, 5, 9}
    assert dirty(export["uri"], "second") == {9}
    assert content(export["uri"]) == expected
    plain = agent.export(images.top)
    again = agent.export(images.top, bitmaps=["second"])
    assert dirty(again["uri"], "second") == {9}
    with pytest.raises(subprocess.CalledProcessError):
        dirty(again["uri"], "first")
    for one in (export, plain, again):
        stop(agent, one)
    assert_no_grants(agent, images)


def content_of(image: Path) -> bytes:
    raw = image.with_suffix(".content")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)
    data = raw.read_bytes()
    raw.unlink()
    return data


def test_a_bitmap_of_a_layer_below_tells_nothing_of_the_layer_above(agent: AgentProcess, images: Pair) -> None:
    """It was served once, and a backup that relied on it missed what was written above."""
    bitmap(images.top, "below")
    write(images.top, 3)
    above = overlay(images.folder / "above.qcow2", images.top, "qcow2")
    request = {"image": str(above), "bitmaps": ["below"]}
    assert refusal(agent, "POST", "/v1/exports", request).code == "conflict"
    assert refusal(agent, "POST", "/v1/exports", {**request, "shallow": True}).code == "not_found"
    export = agent.export(images.top, bitmaps=["below"])
    assert dirty(export["uri"], "below") == {3}
    stop(agent, export)


def test_a_writable_export_goes_on_recording_and_keeps_it(agent: AgentProcess, images: Pair) -> None:
    bitmap(images.top, "log")
    write(images.top, 2)
    export = agent.export(images.top, writable=True, bitmaps=["log"])
    client = nbd.NBD()
    client.connect_uri(export["uri"])
    client.pwrite(b"n" * BLOCK, 6 * BLOCK)
    client.shutdown()
    assert dirty(export["uri"], "log") == {2, 6}
    stop(agent, export)
    assert check_clean(images.top)
    export = agent.export(images.top, bitmaps=["log"])
    assert dirty(export["uri"], "log") == {2, 6}
    stop(agent, export)


def test_a_bitmap_that_cannot_be_served_is_named_and_nothing_is_started(agent: AgentProcess, images: Pair) -> None:
    left_in_use(images.top, "broken")
    bitmap(images.top, "good")
    before = images.top.read_bytes()
    for names, code, named in (
        (["nothing"], "not_found", "nothing"),
        (["good", "broken"], "image_corrupt", "broken"),
    ):
        error = refusal(agent, "POST", "/v1/exports", {"image": str(images.top), "bitmaps": names})
        assert (error.code, error.body["field"], error.body["value"]) == (code, "bitmaps", repr(named)), error.body
        assert error.body["remedy"]
        assert str(images.top) not in {daemon["image"] for daemon in agent.get("/v1/host")["storage_daemons"]}
    assert images.top.read_bytes() == before
    raw = {"image": str(images.base), "format": "raw", "bitmaps": ["good"]}
    assert refusal(agent, "POST", "/v1/exports", raw).code == "not_found"
    assert_no_grants(agent, images)


def test_a_job_that_writes_and_a_bitmap_export_are_in_each_others_way(agent: AgentProcess, images: Pair) -> None:
    bitmap(images.top, "log")
    export = agent.export(images.top, bitmaps=["log"])
    error = refusal(agent, "POST", "/v1/jobs", {"operation": "pull", "target": str(images.top)})
    assert (error.code, export["id"] in error.body["detail"]) == ("busy", True), error.body
    stop(agent, export)
    job = agent.pull(images.top, bandwidth=MIB)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
    error = refusal(agent, "POST", "/v1/exports", {"image": str(images.top), "bitmaps": ["log"]})
    assert (error.code, job["id"] in error.body["detail"]) == ("busy", True), error.body
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    assert agent.until_ended(job["id"])["state"] == "completed"
    stop(agent, agent.export(images.top, bitmaps=["log"]))


def test_a_copy_with_a_pivot_leaves_the_bitmap_export_on_the_image_that_has_it(
    agent: AgentProcess, images: Pair
) -> None:
    bitmap(images.top, "log")
    write(images.top, 4)
    expected = content_of(images.top)
    export = agent.export(images.top, bitmaps=["log"])
    copy = {"operation": "copy", "target": str(images.top), "completion": "pivot"}
    job = agent.post("/v1/jobs", {**copy, "dest": str(images.folder / "copy.qcow2")})
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert dirty(export["uri"], "log") == {4}
    assert content(export["uri"]) == expected
    stop(agent, export)


def test_it_outlives_the_agent_and_its_daemon_may_die(tmp_path: Path, images: Pair) -> None:
    bitmap(images.top, "log")
    write(images.top, 8)
    with AgentProcess(tmp_path, HASTE) as agent:
        request = {"id": str(uuid.uuid4()), "image": str(images.top), "bitmaps": ["log"]}
        export = agent.post("/v1/exports", request)
        agent.kill()
        agent.start()
        assert show(agent, export)["bitmaps"] == ["log"]
        assert dirty(export["uri"], "log") == {8}
        assert agent.call("POST", "/v1/exports", request)[0] == 200
        assert refusal(agent, "POST", "/v1/exports", {**request, "bitmaps": []}).code == "conflict"
        send(signal.SIGKILL, export["pid"])
        assert eventually(lambda: show(agent, export)["state"] == "lost")
        stop(agent, agent.export(images.top, bitmaps=["log"]))
