"""A bitmap of one name in several layers is served as the union of them; what would tell of too little is refused."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.harness import AgentProcess, ApiError, overlay
from tests.qemu.faults import HASTE, ROOT, Pair, eventually, send, storage_daemons
from tests.qemu.test_bitmap_exports import BLOCK, bitmap, content_of, dirty, left_in_use, nbd, write
from tests.qemu.test_exports import assert_no_grants, content, refusal, show, stop

pytestmark = pytest.mark.qemu


class Layers:
    """top ← middle ← lower ← base, the three upper ones with a bitmap `daily` since they were made, and data since."""

    def __init__(self, images: Pair, *, granularity: tuple[int, int, int] = (BLOCK, BLOCK, BLOCK)) -> None:
        self.images, self.lower = images, images.top
        self._begin(self.lower, granularity[0], 1, 2)
        self.middle = overlay(images.folder / "middle.qcow2", self.lower, "qcow2")
        self._begin(self.middle, granularity[1], 2, 5)
        self.top = overlay(images.folder / "upper.qcow2", self.middle, "qcow2")
        self._begin(self.top, granularity[2], 9)

    @property
    def all(self) -> list[Path]:
        return [self.top, self.middle, self.lower, self.images.base]

    @staticmethod
    def _begin(image: Path, granularity: int, *blocks: int) -> None:
        bitmap(image, "daily", "--add", f"--granularity={granularity}")
        write(image, *blocks)


@pytest.fixture
def layers(images: Pair) -> Layers:
    return Layers(images)


def refused(agent: AgentProcess, image: Path, **spec: Any) -> ApiError:
    """The refusal, which has changed no file of the folder and left nothing behind."""
    before = {path: path.read_bytes() for path in image.parent.iterdir()}
    daemons = storage_daemons(agent)
    error = refusal(agent, "POST", "/v1/exports", {"image": str(image), "bitmaps": ["daily"], **spec})
    assert (error.body["field"], bool(error.body["remedy"])) == ("bitmaps", True)
    assert {path: path.read_bytes() for path in image.parent.iterdir()} == before
    assert storage_daemons(agent) == daemons
    return error


def test_the_union_is_served_beside_the_data_and_no_image_is_changed(agent: AgentProcess, layers: Layers) -> None:
    bitmap(layers.top, "hourly")
    write(layers.top, 12)
    truth = content_of(layers.top)
    before = [path.read_bytes() for path in layers.all]
    export = agent.export(layers.top, bitmaps=["daily", "hourly"])
    assert dirty(export["uri"], "daily") == {1, 2, 5, 9, 12}
    assert dirty(export["uri"], "hourly") == {12}
    assert content(export["uri"]) == truth
    stop(agent, export)
    assert [path.read_bytes() for path in layers.all] == before
    assert_no_grants(agent, layers.images)


def test_it_begins_where_the_lowest_bitmap_is(agent: AgentProcess, layers: Layers) -> None:
    bitmap(layers.lower, "daily", "--remove")
    export = agent.export(layers.top, bitmaps=["daily"])
    assert dirty(export["uri"], "daily") == {2, 5, 9}
    stop(agent, export)
    export = agent.export(layers.middle, bitmaps=["daily"])
    assert dirty(export["uri"], "daily") == {2, 5}
    stop(agent, export)
    export = agent.export(layers.top, bitmaps=["daily"], shallow=True)
    assert dirty(export["uri"], "daily") == {9}
    stop(agent, export)


def test_bitmaps_of_other_granularities_are_merged_into_the_finest(agent: AgentProcess, images: Pair) -> None:
    layers = Layers(images, granularity=(4 * BLOCK, BLOCK, BLOCK // 2))
    write(layers.top, 20)
    export = agent.export(layers.top, bitmaps=["daily"])
    assert dirty(export["uri"], "daily") == {0, 1, 2, 3, 5, 9, 20}
    stop(agent, export)


def test_what_clients_ask_of_it_is_what_the_top_answers(agent: AgentProcess, layers: Layers) -> None:
    """Writing is refused; so is CACHE, which a filter may not turn into a copy-up, and which must end nobody."""
    export, plain = agent.export(layers.top, bitmaps=["daily"]), agent.export(layers.top)
    before = [path.read_bytes() for path in layers.all]
    client = nbd.NBD()
    client.connect_uri(export["uri"])
    with pytest.raises(nbd.Error):
        client.cache(BLOCK, 0)
    assert client.is_read_only()
    client.shutdown()
    assert allocation(export["uri"]) == allocation(plain["uri"])
    assert show(agent, export)["state"] == "running"
    for one in (export, plain):
        stop(agent, one)
    assert [path.read_bytes() for path in layers.all] == before


def allocation(uri: str) -> bytes:
    return subprocess.run(["nbdinfo", "--map", uri], capture_output=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("missing", ["top", "middle"])
def test_a_layer_without_it_above_one_that_has_it_is_named(agent: AgentProcess, layers: Layers, missing: str) -> None:
    gap: Path = getattr(layers, missing)
    bitmap(gap, "daily", "--remove")
    error = refused(agent, layers.top)
    assert (error.code, str(gap) in error.body["detail"]) == ("conflict", True)


def test_one_that_was_left_in_use_is_named(agent: AgentProcess, layers: Layers) -> None:
    bitmap(layers.middle, "daily", "--remove")
    left_in_use(layers.middle, "daily")
    error = refused(agent, layers.top)
    assert (error.code, str(layers.middle) in error.body["detail"]) == ("image_corrupt", True)


@pytest.mark.parametrize("layer", ["top", "middle", "lower"])
def test_one_that_does_not_record_is_named(agent: AgentProcess, layers: Layers, layer: str) -> None:
    image: Path = getattr(layers, layer)
    bitmap(image, "daily", "--disable")
    error = refused(agent, layers.top)
    assert (error.code, str(image) in error.body["detail"]) == ("conflict", True)


def test_a_disk_that_was_resized_between_is_refused(agent: AgentProcess, layers: Layers) -> None:
    subprocess.run(["qemu-img", "resize", "-q", str(layers.top), "+1M"], check=True)
    error = refused(agent, layers.top)
    assert (error.code, str(layers.lower) in error.body["detail"] or str(layers.middle) in error.body["detail"]) == (
        "not_supported",
        True,
    )


def test_a_layer_below_that_lost_its_bitmaps_may_have_had_it(agent: AgentProcess, layers: Layers) -> None:
    """Autoclear bit 0, at byte 88 of the header, is cleared by whoever knows no bitmaps and writes."""
    with layers.lower.open("r+b") as image:
        os.pwrite(image.fileno(), b"\0" * 8, 88)
    error = refused(agent, layers.top)
    assert (error.code, str(layers.lower) in error.body["detail"]) == ("conflict", True)
    bitmap(layers.lower, "other")
    bitmap(layers.lower, "other", "--remove")  # what the remedy says
    export = agent.export(layers.top, bitmaps=["daily"])
    assert dirty(export["uri"], "daily") == {2, 5, 9}
    stop(agent, export)


def test_it_cannot_be_written(agent: AgentProcess, layers: Layers) -> None:
    assert refused(agent, layers.top, writable=True).code == "invalid"


def test_it_outlives_the_agent_and_nothing_of_it_outlives_the_export(tmp_path: Path, layers: Layers) -> None:
    with AgentProcess(tmp_path, HASTE) as agent:
        files = set(files_of(agent))
        export = agent.export(layers.top, bitmaps=["daily"])
        agent.kill()
        agent.start()
        assert show(agent, export)["state"] == "running"
        assert dirty(export["uri"], "daily") == {1, 2, 5, 9}
        stop(agent, export)
        assert eventually(lambda: storage_daemons(agent) == [])
        assert set(files_of(agent)) == files
        if ROOT:
            assert agent.get("/v1/grants")["items"] == []
        export = agent.export(layers.top, bitmaps=["daily"])
        send(signal.SIGKILL, export["pid"])
        assert eventually(lambda: show(agent, export)["state"] == "lost")
        again = agent.export(layers.top, bitmaps=["daily"])
        assert dirty(again["uri"], "daily") == {1, 2, 5, 9}
        stop(agent, again)


def files_of(agent: AgentProcess) -> list[Path]:
    """What the agent keeps in its runtime folder for storage daemons."""
    return [path for name in ("qsd", "nbd") for path in (agent.runtime / name).rglob("*")]
