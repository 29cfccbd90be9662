"""The judges of stories can fail: each deliberate mistake, made to a real image or its access, is found."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness import TEST_USER, Json
from tests.qemu.faults import ROOT
from tests.stories import checks
from tests.stories.foresight import REFUSED, Fate
from tests.stories.model import CLUSTER, Bitmap, Image
from tests.stories.stage import Between, Stage
from tests.stories.tally import FLOORS, TEN_MINUTES, Tally

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    found = Stage(Tally())
    try:
        found.overlay(found.base())
        yield found
    finally:
        found.close()


@pytest.fixture
def image(stage: Stage) -> Image:
    """An overlay of its own, which stands on the first base."""
    return stage.overlay(next(iter(stage.tree.images.values())))


def look(stage: Stage) -> None:
    checks.check_images(stage.tree, stage.exports, stage.home / "read.raw", stage.seen)


def qemu(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def found(stage: Stage, image: Image, judge: Callable[[], None]) -> None:
    """The judge finds the mistake, and nothing once the image is gone."""
    with pytest.raises(AssertionError):
        judge()
    image.path.unlink()
    stage.tree.forget([image.path])
    judge()


def test_wrong_bytes_and_bytes_that_changed_after_a_look(stage: Stage, image: Image) -> None:
    look(stage)
    qemu("qemu-io", "-c", f"write -P 255 {7 * CLUSTER} 512", image.path)
    found(stage, image, lambda: look(stage))


def test_another_backing_file_with_the_same_bytes(stage: Stage, image: Image) -> None:
    assert image.backing is not None
    twin = stage.folder / "twin.raw"
    twin.write_bytes(image.backing.read_bytes())
    qemu("qemu-img", "rebase", "-u", "-b", twin.name, "-F", "raw", image.path)
    found(stage, image, lambda: look(stage))


def test_damaged_metadata_that_is_never_read(stage: Stage, image: Image) -> None:
    image.view = None
    with image.path.open("r+b") as file:  # the refcount of the header's own cluster
        file.seek(2 * CLUSTER)
        file.write(bytes(8))
    found(stage, image, lambda: look(stage))


def test_a_bitmap_that_is_missing_unknown_or_inconsistent(stage: Stage, image: Image) -> None:
    def judge() -> None:
        checks.check_bitmaps(stage.agent, stage.tree, ())

    image.bitmaps["one"] = Bitmap(recording=True)
    with pytest.raises(AssertionError):
        judge()
    qemu("qemu-img", "bitmap", "--add", image.path, "one")
    judge()
    image.bitmaps["one"].broken = True
    with pytest.raises(AssertionError):
        judge()
    image.bitmaps.clear()
    found(stage, image, judge)


def test_a_bitmap_that_tells_of_too_little_or_too_much(stage: Stage, image: Image) -> None:
    qemu("qemu-img", "bitmap", "--add", "-g", CLUSTER, image.path, "one")
    qemu("qemu-io", "-c", f"write {3 * CLUSTER} 512", image.path)
    export = stage.agent.export(image.path, bitmaps=["one"])
    checks.check_told(Bitmap(recording=True, bits={3}), export["uri"], "one")
    checks.check_told(Bitmap(recording=True, exact=False), export["uri"], "one")
    for wrong in (Bitmap(recording=True, bits={3, 4}, exact=False), Bitmap(recording=True)):
        with pytest.raises(AssertionError):
            checks.check_told(wrong, export["uri"], "one")
    stage.agent.delete(f"/v1/exports/{export['id']}")
    image.path.unlink()
    stage.tree.forget([image.path])


@pytest.mark.skipif(not ROOT, reason="needs another user, and so root")
def test_a_file_that_stayed_open_and_one_that_was_closed_too_early(
    stage: Stage, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "eventually", lambda true: true())  # what is wrong now stays so
    exports: dict[str, Json] = {}

    def judge() -> None:
        checks.check_access(stage.agent, stage.tree, exports, {})

    judge()
    qemu("setfacl", "-m", f"u:{TEST_USER}:r", image.path)
    with pytest.raises(AssertionError):
        judge()
    qemu("setfacl", "-b", image.path)
    export = stage.agent.export(image.path)
    with pytest.raises(AssertionError):  # an export that nobody asked for
        judge()
    exports[export["id"]] = export
    judge()
    qemu("setfacl", "-b", image.path)
    with pytest.raises(AssertionError):
        judge()
    stage.agent.delete(f"/v1/exports/{export['id']}")
    exports.clear()
    image.path.unlink()
    stage.tree.forget([image.path])


def test_an_end_without_its_event_or_with_another(stage: Stage, image: Image) -> None:
    job = stage.agent.until_ended(stage.agent.pull(image.path)["id"])
    checks.check_events(stage.agent, {job["id"]: "completed"})
    for wrong in ({job["id"]: "aborted"}, {"one that never was": "completed"}):
        with pytest.raises(AssertionError):
            checks.check_events(stage.agent, wrong)
    image.path.unlink()
    stage.tree.forget([image.path])


def test_an_end_that_was_not_foreseen(stage: Stage) -> None:
    job: Json = {"id": "1", "state": "failed", "error": {"code": "io_error"}, "revocation": "none", "target": "/none"}
    job |= {"completion": None}
    for fate, between in ((None, Between()), (Fate("failed", "busy"), Between()), (None, Between("abort"))):
        with pytest.raises(AssertionError):
            stage.judge("pull", [job], fate, between)
    with pytest.raises(AssertionError):  # a completed one that had to find somebody in its way
        stage.judge("pull", [job | {"state": "completed"}], Fate("failed", "busy"), Between("kill both"))


def test_a_request_that_was_obeyed_and_must_not_be_and_the_other_way_round(stage: Stage, image: Image) -> None:
    body = {"image": str(image.path)}
    with pytest.raises(AssertionError, match="was obeyed"):
        stage.asked("export", REFUSED, "/v1/exports", body)
    for fate in (None, replace(REFUSED, code="busy")):
        with pytest.raises(AssertionError):
            stage.asked("export", fate, "/v1/exports", {"image": str(Path("/none.qcow2"))})


def test_a_run_that_did_too_little_is_no_evidence() -> None:
    tally = Tally()
    assert len(tally.shortcomings(TEN_MINUTES)) == len(FLOORS) + 1
    for kind, least in FLOORS.items():
        for _ in range(least):
            tally.count(kind, "completed")
    assert tally.shortcomings(TEN_MINUTES) == []
    for _ in range(sum(FLOORS.values()) + 1):
        tally.count("pull", "refused busy")
    assert len(tally.shortcomings(TEN_MINUTES)) == 1
