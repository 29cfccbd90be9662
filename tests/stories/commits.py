"""Stories of commits: of the image itself, with and without its overlay kept, and of layers below it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from tests.harness import Json
from tests.stories.foresight import choose
from tests.stories.model import Image
from tests.stories.stage import Between, Stage

KINDS = ("pivot", "finish", "below")


class Ends(NamedTuple):
    """An image, and the layers of its chain that go down into which."""

    kind: str
    image: Image
    upper: Path
    low: Path


def commit(stage: Stage, dice: random.Random) -> None:
    among = [ends for kind in KINDS for ends in _possible(stage, kind)]
    if not among:
        return
    delete, foresight = dice.random() < 0.5, stage.foresight
    ends, fate = choose(
        dice,
        among,
        lambda one: foresight.commit(one.image.path, one.upper, one.low, delete=delete and one.kind != "finish"),
    )
    kind, image, upper, low = ends
    delete = delete and kind != "finish"
    prune = bool(stage.tree.images[low].bitmaps) and dice.random() < 0.3
    body: Json = {"operation": "commit", "target": str(image.path), "base": str(low), "prune_bitmaps": prune}
    body |= {"top": str(upper)} if kind == "below" else {"completion": kind}
    body |= {"delete": True} if delete else {}
    between = Between.chosen(dice)
    what = "commit below" if kind == "below" else f"commit, {kind}"
    jobs = stage.work(what, "/v1/jobs", body, fate, between)
    if jobs is None:
        return
    if between.kills_daemons:
        for path in (low, image.path) if kind == "below" else (low,):
            stage.tree.doubted(path)
    if jobs[0]["state"] == "completed":
        _completed(stage, kind, image, upper, low, delete=delete)
    elif fate is None or jobs[0]["error"] is None or jobs[0]["error"]["code"] != fate.code:
        stage.tree.torn(upper, low)  # one that never began has changed nothing
    if prune:
        _pruned(stage, low, completed=jobs[0]["state"] == "completed")


def _possible(stage: Stage, kind: str) -> list[Ends]:
    found: list[Ends] = []
    for image in stage.tree.images.values():
        chain = stage.tree.chain(image.path)
        upper = 1 if kind == "below" else 0
        if image.view is not None and len(chain) > upper + 1 and stage.tree.images[chain[upper]].view is not None:
            found += [Ends(kind, image, chain[upper], low) for low in chain[upper + 1 :]]
    return found


def _completed(stage: Stage, kind: str, image: Image, upper: Path, low: Path, *, delete: bool) -> None:
    tree = stage.tree
    dropped = [] if kind == "finish" else [upper, *tree.between(upper, low)]
    tree.committed(upper, low)
    if kind == "below":
        tree.pulled(image.path, low)
    assert [path for path in dropped if path.exists()] == ([] if delete else dropped)
    if upper in dropped and not tree.dependents(upper):
        for path in dropped:
            path.unlink(missing_ok=True)
        stage.follow()
        tree.forget(dropped, by_agent=delete)
    else:
        assert not delete  # who stands on it keeps it


def _pruned(stage: Stage, low: Path, *, completed: bool) -> None:
    """The base's bitmaps are gone, or may be, where it is not known how far the commit came."""
    base = stage.tree.images[low]
    if completed:
        base.bitmaps.clear()
        return
    found = {one["name"] for one in stage.bitmaps(base)}
    assert found in (set(), set(base.bitmaps)), (base, found)
    base.bitmaps = {name: bitmap for name, bitmap in base.bitmaps.items() if name in found}
