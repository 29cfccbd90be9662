"""Requests that are wrong whatever the images hold, and the code that each must be refused with."""

from __future__ import annotations

import random
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.harness import Json
from tests.stories import checks
from tests.stories.model import Image
from tests.stories.stage import Stage

Refusal = tuple[str, str, Json | None, str]
"""Method, path, body; and the code."""


def _any(stage: Stage, dice: random.Random, *, overlays: bool = False, apart: Path | None = None) -> Image | None:
    """An image that no client writes."""
    images = [
        image
        for image in stage.tree.images.values()
        if not stage.foresight.written(image.path) and image.path != apart and (image.backing or not overlays)
    ]
    return dice.choice(images) if images else None


def _job(body: Json, code: str) -> Refusal:
    return "POST", "/v1/jobs", body, code


def draining(stage: Stage, dice: random.Random) -> Refusal | None:
    image = _any(stage, dice, overlays=True)
    if image is None or not stage.agent.get("/v1/host")["drain"]["draining"]:
        return None
    return _job({"operation": "pull", "target": str(image.path)}, "draining")


def no_image(stage: Stage, dice: random.Random) -> Refusal:
    return _job({"operation": "pull", "target": str(stage.folder / "none.qcow2")}, "not_found")


def no_job(stage: Stage, dice: random.Random) -> Refusal:
    return "POST", f"/v1/jobs/{uuid.UUID(int=dice.getrandbits(128))}/abort", None, "not_found"


def strange_base(stage: Stage, dice: random.Random) -> Refusal | None:
    """One that is in no chain."""
    image = _any(stage, dice, overlays=True)
    if image is None:
        return None
    body = {"operation": dice.choice(["pull", "commit"]), "target": str(image.path), "base": str(image.path)}
    return _job(body, "invalid")


def taken_name(stage: Stage, dice: random.Random) -> Refusal | None:
    image = _any(stage, dice)
    if image is None:
        return None
    body = {"operation": "copy", "target": str(image.path), "source_format": image.format, "dest": str(image.path)}
    return _job(body, "conflict")


def onto_its_own_chain(stage: Stage, dice: random.Random) -> Refusal | None:
    image = _any(stage, dice, overlays=True)
    if image is None:
        return None
    dest = stage.tree.images[dice.choice(stage.tree.chain(image.path))]
    body = {"operation": "copy", "target": str(image.path), "source_format": image.format, "dest": str(dest.path)}
    return _job(body | {"format": dest.format, "reuse_external": True}, "invalid")


def onto_a_base(stage: Stage, dice: random.Random) -> Refusal | None:
    """A target on which images stand: writing it would change them."""
    bases = [image for image in stage.tree.images.values() if not image.backing and stage.tree.dependents(image.path)]
    if not bases:
        return None
    base = dice.choice(bases)
    sources = [
        image
        for image in stage.tree.images.values()
        if base.path not in stage.tree.chain(image.path) and not stage.foresight.written(image.path)
    ]
    if not sources:
        return None
    image = dice.choice(sources)
    body = {"operation": "copy", "target": str(image.path), "source_format": image.format, "dest": str(base.path)}
    return _job(body | {"format": base.format, "reuse_external": True}, "busy")


def shallow_without_backing(stage: Stage, dice: random.Random) -> Refusal | None:
    images = [one for one in stage.tree.images.values() if not one.backing and not stage.foresight.written(one.path)]
    if not images:
        return None
    image = dice.choice(images)
    body = {"operation": "copy", "target": str(image.path), "source_format": image.format, "shallow": True}
    return _job(body | {"dest": str(stage.name("qcow2"))}, "invalid")


def group_of_one_disk(stage: Stage, dice: random.Random) -> Refusal | None:
    image = _any(stage, dice)
    if image is None:
        return None
    disk = {"target": str(image.path), "source_format": image.format}
    disks = [disk | {"dest": str(stage.name("raw")), "format": "raw"} for _ in range(2)]
    return "POST", "/v1/groups", {"disks": disks}, "invalid"


def bitmap_of_raw(stage: Stage, dice: random.Random) -> Refusal | None:
    images = [image for image in stage.tree.images.values() if image.format == "raw"]
    return ("POST", checks.bitmaps_of(dice.choice(images)), {"name": "one"}, "not_supported") if images else None


def no_bitmap(stage: Stage, dice: random.Random) -> Refusal | None:
    images = [image for image in stage.tree.images.values() if image.format == "qcow2"]
    images = [image for image in images if not stage.foresight.used(image.path)]
    return ("DELETE", f"{checks.bitmaps_of(dice.choice(images))}&name=none", None, "not_found") if images else None


def deleting_what_waits(stage: Stage, dice: random.Random) -> Refusal | None:
    return ("DELETE", f"/v1/jobs/{next(iter(stage.waiting))}", None, "conflict") if stage.waiting else None


def another_by_the_same_id(stage: Stage, dice: random.Random) -> Refusal | None:
    image = _any(stage, dice)
    if image is None or not stage.waiting:
        return None
    name = next(iter(stage.waiting))
    return _job({"operation": "pull", "target": str(image.path), "id": name, "bandwidth": 1}, "conflict")


def other_size(stage: Stage, dice: random.Random) -> Refusal | None:
    image = _any(stage, dice)
    if image is None:
        return None
    dest = stage.home / "small.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(dest), "1M"], check=True)
    body = {"operation": "copy", "target": str(image.path), "source_format": image.format, "dest": str(dest)}
    return _job(body | {"format": "qcow2", "reuse_external": True}, "invalid")


KINDS: list[Callable[[Stage, random.Random], Refusal | None]] = [
    draining,
    no_image,
    no_job,
    strange_base,
    taken_name,
    onto_its_own_chain,
    onto_a_base,
    shallow_without_backing,
    group_of_one_disk,
    bitmap_of_raw,
    no_bitmap,
    deleting_what_waits,
    another_by_the_same_id,
    other_size,
]
REFUSALS = {kind.__name__: kind for kind in KINDS}
