"""Stories of copies: to a new file, onto an image that is there, to NBD, in groups, and those that stay ready."""

from __future__ import annotations

import random
import uuid
from pathlib import Path

from tests.harness import ApiError, Json
from tests.qemu.faults import PATIENCE
from tests.qemu.remote_storage import nbd_server
from tests.stories import checks
from tests.stories.foresight import Fate
from tests.stories.model import CLUSTER, CLUSTERS, Image
from tests.stories.stage import BANDWIDTH, Between, Stage


def copy(stage: Stage, dice: random.Random, image: Image, fate: Fate | None) -> None:
    kind = dice.choice(["new", "new", "existing", "remote"])
    if kind == "remote":
        _to_nbd(stage, dice, image, fate)
        return
    shallow = image.backing is not None and dice.random() < 0.5
    format = "qcow2" if shallow else dice.choice(["qcow2", "raw"])
    backing = stage.tree.images[image.backing] if shallow and image.backing else None
    dest = stage.empty(format, backing) if kind == "existing" else stage.name(format)
    completion = dice.choice(["pivot", "finish"])
    body = _body(image, dest, format, shallow) | {"completion": completion, "reuse_external": kind == "existing"}
    what = "copy onto an image" if kind == "existing" else "copy"
    jobs = stage.work(what, "/v1/jobs", body, fate, Between.chosen(dice))
    if jobs and jobs[0]["state"] == "completed":
        stage.tree.copied(image.path, dest, shallow=shallow, format=format)
    elif kind == "existing":
        dest.unlink()  # what it holds is worth nothing, and was said to be unless it is what it was
        assert jobs is None or jobs[0]["dest"]["state"] in ("unusable", "untouched"), jobs
    else:
        assert not dest.exists(), jobs


def _to_nbd(stage: Stage, dice: random.Random, image: Image, fate: Fate | None) -> None:
    with nbd_server(stage.home, CLUSTER * CLUSTERS) as (uri, remote, _):
        body = {"operation": "copy", "target": str(image.path), "dest": uri, "source_format": image.format}
        body |= {"format": "raw", "completion": "finish"}
        jobs = stage.work("copy to NBD", "/v1/jobs", body, fate, Between.chosen(dice))
        if jobs and jobs[0]["state"] == "completed":
            assert image.view is not None
            assert remote.read_bytes() == checks.bytes_of(image.view), f"the copy of {image.path} differs"


def copy_group(stage: Stage, dice: random.Random, images: list[Image]) -> None:
    shallow = all(image.backing for image in images) and dice.random() < 0.5
    formats = ["qcow2" if shallow else dice.choice(["qcow2", "raw"]) for _ in images]
    dests = [stage.name(format) for format in formats]
    disks = []
    for image, dest, format in zip(images, dests, formats, strict=True):
        body = _body(image, dest, format, shallow)
        disks.append({key: body[key] for key in ("target", "dest", "format", "source_format")})
    request: Json = {"disks": disks, "shallow": shallow, "completion": dice.choice(["pivot", "finish"])}
    jobs = stage.work("group of copies", "/v1/groups", request, None, Between.chosen(dice))
    assert jobs is not None
    for image, dest, format, job in zip(images, dests, formats, jobs, strict=True):
        if job["state"] == "completed":
            stage.tree.copied(image.path, dest, shallow=shallow, format=format)
        else:
            assert not dest.exists(), job


def start_waiting(stage: Stage, dice: random.Random, image: Image) -> None:
    """A copy that is ready and stays so over whatever comes next."""
    shallow = image.backing is not None and dice.random() < 0.5
    format = "qcow2" if shallow else image.format
    body = _body(image, stage.name(format), format, shallow) | {"id": str(uuid.uuid4())}
    stage.tell("copy that waits", body)
    stage.asked("copy that waits", None, "/v1/jobs", body)
    stage.agent.until(body["id"], lambda job: job["state"] == "ready", 2 * PATIENCE)
    stage.waiting[body["id"]] = body


def end_waiting(stage: Stage, dice: random.Random) -> None:
    name, body = stage.waiting.popitem()
    between = Between.chosen(dice)
    how = "abort" if between.what == "abort" else dice.choice(["pivot", "finish"])
    stage.tell("copy that waits ends:", body, how, between)
    if between.kills_daemons:
        stage.kill_daemons(agent=between.what == "kill both")
    path = f"/v1/jobs/{name}/{'abort' if how == 'abort' else 'complete'}"
    try:
        stage.agent.post(path, None if how == "abort" else {"completion": how})
    except ApiError as error:
        assert error.code == "conflict" and between.kills_daemons, error
    if between.what.startswith("kill agent"):
        stage.kill_agent()
    (job,) = stage.until_ended([name], how)
    assert between.what != "abort" or job["state"] == "aborted", job
    stage.judge("copy that waits", [job], None, between)
    source, dest = Path(body["target"]), Path(body["dest"])
    if job["state"] == "completed":
        stage.tree.copied(source, dest, shallow=body["shallow"], format=body["format"])
    else:
        assert not dest.exists(), job


def _body(image: Image, dest: Path, format: str, shallow: bool) -> Json:
    body: Json = {"operation": "copy", "target": str(image.path), "dest": str(dest), "format": format}
    return body | {"source_format": image.format, "shallow": shallow, "bandwidth": BANDWIDTH}
