"""Bitmaps of several layers that are younger than the data of their layers: the union tells of that data, too."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, overlay
from tests.qemu.faults import HASTE, Pair, storage_daemons
from tests.qemu.test_bitmap_exports import BLOCK, bitmap, content_of, dirty, nbd, write
from tests.qemu.test_bitmap_merging import Layers, refused
from tests.qemu.test_exports import assert_no_grants, content, refusal, stop

pytestmark = pytest.mark.qemu


@pytest.fixture
def late(images: Pair) -> Path:
    """An overlay that was written (block 5) before its bitmap was added, on one that has the bitmap from the first."""
    bitmap(images.top, "daily")
    write(images.top, 1)
    top = overlay(images.folder / "late.qcow2", images.top, "qcow2")
    write(top, 5)
    bitmap(top, "daily")
    write(top, 9)
    return top


def bytes_of(images: Pair) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in images.folder.iterdir()}


def test_what_was_written_before_the_bitmap_was_added_is_in_the_union(
    agent: AgentProcess, images: Pair, late: Path
) -> None:
    """It was missing once: an incremental backup lost block 5."""
    truth, before = content_of(late), bytes_of(images)
    export = agent.export(late, bitmaps=["daily"])
    assert dirty(export["uri"], "daily") == {1, 5, 9}
    assert content(export["uri"]) == truth
    stop(agent, export)
    assert bytes_of(images) == before
    assert_no_grants(agent, images)


def test_a_full_copy_and_what_is_dirty_since_are_the_disk(agent: AgentProcess, images: Pair) -> None:
    backup = bytearray(content_of(images.top))
    bitmap(images.top, "daily")
    write(images.top, 1)
    top = overlay(images.folder / "late.qcow2", images.top, "qcow2")
    write(top, 5, 30)
    bitmap(top, "daily")
    write(top, 9)
    truth = content_of(top)
    export = agent.export(top, bitmaps=["daily"])
    disk = content(export["uri"])
    for block in dirty(export["uri"], "daily"):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        backup[part] = disk[part]
    assert backup == truth
    stop(agent, export)


def test_the_lowest_layers_own_data_is_as_its_bitmap_says(agent: AgentProcess, images: Pair) -> None:
    """It is what the last backup has; and between the lowest and the top every layer counts, a zeroed cluster too."""
    write(images.top, 20)
    bitmap(images.top, "daily")
    write(images.top, 1)
    middle = overlay(images.folder / "middle.qcow2", images.top, "qcow2")
    write(middle, 3)
    subprocess.run(["qemu-io", "-c", f"write -q -z {4 * BLOCK} {BLOCK}", str(middle)], check=True)
    bitmap(middle, "daily")
    top = overlay(images.folder / "upper.qcow2", middle, "qcow2")
    write(top, 7)
    bitmap(top, "daily")
    export = agent.export(top, bitmaps=["daily"])
    assert dirty(export["uri"], "daily") == {1, 3, 4, 7}
    stop(agent, export)
    export = agent.export(middle, bitmaps=["daily"])
    assert dirty(export["uri"], "daily") == {1, 3, 4}
    stop(agent, export)


def test_several_bitmaps_are_each_completed_from_their_own_lowest_layer(
    agent: AgentProcess, images: Pair, late: Path
) -> None:
    """With one client at a time, which the agent's own connections are, too."""
    bitmap(late, "hourly")
    upper = overlay(images.folder / "upper.qcow2", late, "qcow2")
    write(upper, 12)
    for name in ("daily", "hourly"):
        bitmap(upper, name)
    export = agent.export(upper, bitmaps=["daily", "hourly"], max_clients=1)
    assert dirty(export["uri"], "daily") == {1, 5, 9, 12}
    assert dirty(export["uri"], "hourly") == {12}
    stop(agent, export)


def test_of_finer_grains_than_clusters_whole_clusters_count(agent: AgentProcess, images: Pair) -> None:
    bitmap(images.top, "daily", "--add", "--granularity=4096")
    top = overlay(images.folder / "late.qcow2", images.top, "qcow2")
    subprocess.run(["qemu-io", "-c", f"write -q {5 * BLOCK + 4096} 4096", str(top)], check=True)
    bitmap(top, "daily", "--add", "--granularity=4096")
    subprocess.run(["qemu-io", "-c", f"write -q {5 * BLOCK + 8192} 4096", str(top)], check=True)
    export = agent.export(top, bitmaps=["daily"])
    assert extents(export["uri"], "daily") == [(5 * BLOCK, BLOCK)]
    stop(agent, export)


def extents(uri: str, name: str) -> list[tuple[int, int]]:
    """The dirty ranges, as offset and length in bytes."""
    client, found = nbd.NBD(), []
    client.add_meta_context(f"qemu:dirty-bitmap:{name}")
    client.connect_uri(uri)

    def note(_: str, offset: int, entries: list[int], __: Any) -> int:
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            if flags & 1:
                found.append((offset, length))
            offset += length
        return 0

    client.block_status(client.get_size(), 0, note)
    client.shutdown()
    return found


def test_a_look_that_takes_too_long_refuses_the_export(tmp_path: Path, images: Pair) -> None:
    """A disk of 1 PiB takes a million questions, even though nothing is allocated."""
    grain = f"--granularity={1024 * MIB}"
    lower = images.folder / "huge.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", str(lower), "1P"], check=True)
    bitmap(lower, "daily", "--add", grain)
    top = overlay(images.folder / "over.qcow2", lower, "qcow2")
    bitmap(top, "daily", "--add", grain)
    with AgentProcess(tmp_path, {**HASTE, "EXPORTS_MERGE_TIMEOUT": "1"}) as agent:
        error = refusal(agent, "POST", "/v1/exports", {"image": str(top), "bitmaps": ["daily"]})
        assert storage_daemons(agent) == []
        assert (error.code, "exports.merge_timeout" in error.body["detail"]) == ("timeout", True)


def test_one_of_a_layer_below_alone_is_refused(agent: AgentProcess, images: Pair) -> None:
    bitmap(images.top, "daily")
    top = overlay(images.folder / "late.qcow2", images.top, "qcow2")
    write(top, 5)
    error = refused(agent, top)
    assert (error.code, str(top) in error.body["detail"]) == ("conflict", True)


def test_layers_that_recorded_all_are_as_exact_as_before(agent: AgentProcess, images: Pair) -> None:
    layers = Layers(images)
    export = agent.export(layers.top, bitmaps=["daily"])
    assert dirty(export["uri"], "daily") == {1, 2, 5, 9}
    stop(agent, export)
