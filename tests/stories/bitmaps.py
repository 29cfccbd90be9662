"""Stories of bitmaps: added, removed, merged over images, and read as contexts of an export."""

from __future__ import annotations

import random
import uuid

from tests.harness import ApiError
from tests.qemu.faults import eventually
from tests.stories import checks
from tests.stories.foresight import Fate, choose
from tests.stories.model import CLUSTER, Bitmap, Image
from tests.stories.stage import Stage


def handle_bitmap(stage: Stage, dice: random.Random) -> None:
    what = dice.choice(["add", "add", "add", "remove", "merge", "read", "read"])
    images = [image for image in stage.tree.usable() if image.format == "qcow2" and (image.bitmaps or what == "add")]
    if not images:
        return
    foresight = stage.foresight
    fate_of = foresight.read if what == "read" else foresight.change_bitmap
    image, fate = choose(dice, images, lambda image: fate_of(image.path))
    if what == "add":
        _add(stage, dice, image, fate)
        return
    name = dice.choice(list(image.bitmaps))
    stage.tell("bitmap:", what, image.path.name, name, fate)
    if what == "remove":
        _remove(stage, image, name, fate)
    elif what == "merge":
        _merge(stage, dice, image, name)
    else:
        read_bitmap(stage, image, name, fate)


def _add(stage: Stage, dice: random.Random, image: Image, fate: Fate | None) -> None:
    """Of a name of its own: one that other layers have as well would be served merged."""
    name, recording = f"bitmap-{uuid.UUID(int=dice.getrandbits(128))}", dice.random() < 0.8
    stage.tell("bitmap: add", image.path.name, name, fate)
    body = {"name": name, "granularity": CLUSTER, "disabled": not recording}
    if stage.asked("bitmap add", fate, checks.bitmaps_of(image), body):
        image.bitmaps[name] = Bitmap(recording)
        stage.tally.count("bitmap add", "completed")


def _remove(stage: Stage, image: Image, name: str, fate: Fate | None) -> None:
    try:
        stage.agent.delete(f"{checks.bitmaps_of(image)}&name={name}")
    except ApiError as error:
        stage.refused("bitmap remove", fate, error)
    else:
        assert fate is None, (image, fate)
        del image.bitmaps[name]
        stage.tally.count("bitmap remove", "completed")


def _merge(stage: Stage, dice: random.Random, image: Image, name: str) -> None:
    """From any image's bitmap."""
    sources = [(one, other) for one in stage.tree.usable() for other in one.bitmaps if other != name]
    if not sources:
        return
    source, other = dice.choice(sources)
    fate = stage.foresight.change_bitmap(image.path, source.path)
    into, found = image.bitmaps[name], source.bitmaps[other]
    if fate is None and (into.broken or found.broken):
        fate = Fate("refused", "conflict")
    path = checks.bitmaps_of(image).replace("bitmaps?", "bitmaps/merge?")
    body = {"name": name, "source_name": other, "source": str(source.path)}
    if stage.asked("bitmap merge", fate, path, body):
        into.bits |= found.bits
        into.exact = into.exact and found.exact
        stage.tally.count("bitmap merge", "completed")


def read_bitmap(stage: Stage, image: Image, name: str, fate: Fate | None) -> None:
    if fate is None and image.bitmaps[name].broken:
        fate = Fate("refused", "image_corrupt")
    export = stage.asked("bitmap read", fate, "/v1/exports", {"image": str(image.path), "bitmaps": [name]})
    if export:
        checks.check_told(image.bitmaps[name], export["uri"], name)
        assert eventually(lambda: not stage.agent.get(f"/v1/exports/{export['id']}")["clients"])
        stage.agent.delete(f"/v1/exports/{export['id']}")
        stage.tally.count("bitmap read", "completed")
