"""Reads real images, exports and access, and compares them with the model."""

from __future__ import annotations

import importlib
import json
import pwd
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.harness import TEST_USER, AgentProcess, Json, sound
from tests.qemu.faults import PATIENCE, ROOT, backing_name, eventually, storage_daemons
from tests.stories.model import CLUSTER, CLUSTERS, Bitmap, Image, Tree
from tests.stories.tally import Tally

nbd: Any = importlib.import_module("nbd")

_OPENER = "import os, sys\nfor p in sys.argv[1:]:\n try: os.open(p, os.O_RDONLY); print(p)\n except OSError: pass"


def bitmaps_of(image: Image) -> str:
    return f"/v1/images/bitmaps?{urlencode({'path': image.path})}"


def bytes_of(view: list[int]) -> bytes:
    return b"".join(bytes([tag]) * CLUSTER for tag in view)


def read_image(image: Image, scratch: Path) -> bytes:
    command = ["qemu-img", "convert", "-U", "-f", image.format, "-O", "raw", str(image.path), str(scratch)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return scratch.read_bytes()


def read_export(uri: str) -> bytes:
    client = nbd.NBD()
    client.connect_uri(uri)
    found = bytes(client.pread(CLUSTER * CLUSTERS, 0))
    client.shutdown()
    return found


def write_export(uri: str, cluster: int, tag: int) -> None:
    """A guest's write, and its flush: from now on it must never be lost."""
    client = nbd.NBD()
    client.connect_uri(uri)
    client.pwrite(bytes([tag]) * CLUSTER, cluster * CLUSTER)
    client.flush()
    client.shutdown()


def openable(paths: list[Path]) -> set[Path]:
    """Which of these files the hypervisor user can open, tried as that user."""
    user = pwd.getpwnam(TEST_USER)
    command = ["/usr/bin/python3", "-c", _OPENER, *map(str, paths)]
    done = subprocess.run(
        command, user=user.pw_uid, group=user.pw_gid, extra_groups=[], capture_output=True, text=True, check=True
    )
    return {Path(line) for line in done.stdout.splitlines()}


class Seen:
    """What was compared already, and has not changed since: files by size and times, with what they must hold."""

    def __init__(self, tally: Tally) -> None:
        self._known: dict[Path, object] = {}
        self._tally = tally

    def clear(self) -> None:
        self._known.clear()

    def is_known(self, tree: Tree, image: Image) -> bool:
        """Whether there is nothing new to see; from now on there is not."""
        files = [path.stat() for path in tree.chain(image.path)]
        now = [(file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns) for file in files]
        known = (now, image.backing, image.view and tuple(image.view))
        same = self._known.get(image.path) == known
        self._known[image.path] = known
        self._tally.facts["images compared"] += not same
        return same


def check_images(tree: Tree, exports: dict[str, Json], scratch: Path, seen: Seen) -> None:
    """Every image holds what it must, leans on what it must, and is sound."""
    written = {Path(export["path"]): export["uri"] for export in exports.values() if export["writable"]}
    for image in tree.images.values():
        if image.path not in written and seen.is_known(tree, image):
            continue
        if image.format == "qcow2":
            name = image.backing.name if image.backing else None
            found = backing_name(image.path)
            assert (Path(found).name if found else None) == name, (image, found)
            assert image.path in written or sound(image.path), image
        if image.view is not None:
            data = read_export(written[image.path]) if image.path in written else read_image(image, scratch)
            assert data == bytes_of(image.view), f"{image.path} differs at {_first(data, image.view)}"
    for export in exports.values():
        view = tree.images[Path(export["path"])].view
        assert view is None or read_export(export["uri"]) == bytes_of(view), export


def _first(found: bytes, view: list[int]) -> str:
    wrong = [(n, tag, found[n * CLUSTER]) for n, tag in enumerate(view) if found[n * CLUSTER :][:1] != bytes([tag])]
    return f"(cluster, expected, found) {wrong[:4]}, {len(found)} bytes"


def check_access(agent: AgentProcess, tree: Tree, exports: dict[str, Json], jobs: dict[str, Path]) -> None:
    """Exports and the jobs that stand (by id, with their images) hold their chains, images what they may still need,
    nobody else anything; and the files say the same."""
    if not ROOT:
        return

    def settled() -> bool:
        return _as_granted(tree, exports, jobs, agent.get("/v1/grants?limit=1000")["items"])

    assert eventually(settled), (agent.get("/v1/grants")["items"], exports, jobs, tree, openable(list(tree.images)))


def _as_granted(tree: Tree, exports: dict[str, Json], jobs: dict[str, Path], grants: list[Json]) -> bool:
    by_image = [grant for grant in grants if grant["holder"]["kind"] == "image"]
    held = {Path(grant["path"]) for grant in grants}
    living = {
        (grant["holder"]["kind"], grant["holder"]["id"], Path(grant["path"]))
        for grant in grants
        if grant["holder"]["kind"] != "image" and Path(grant["path"]) in tree.images
    }
    users = [*(("export", name, Path(export["path"])) for name, export in exports.items())]
    users += [("job", name, image) for name, image in jobs.items()]
    lawful = {str(path) for path in [*tree.keeps, *tree.gone]}
    known = set(tree.images)
    return (
        living == {(kind, name, path) for kind, name, image in users for path in tree.chain(image)}
        and all(grant["holder"]["id"] in lawful or Path(grant["path"]) not in known for grant in by_image)
        and openable(list(known)) == held & known
    )


def check_events(agent: AgentProcess, jobs: dict[str, str]) -> None:
    """Each job has one terminal event, that of its outcome, and it is the last."""
    ends = {"completed": "completed", "failed": "failed", "aborted": "cancelled"}
    kinds: dict[str, list[str]] = {job: [] for job in jobs}
    for event in agent.events():
        words = event["type"].split(".")
        job = event["data"].get("job")
        if words[2] == "job" and words[3] != "progress" and job in kinds:
            kinds[job].append(words[3])
    for job, state in jobs.items():
        found = [kind for kind in kinds[job] if kind not in ("started", "ready")]
        assert found == [ends[state]] == kinds[job][-1:], (job, state, kinds[job])


def check_bitmaps(agent: AgentProcess, tree: Tree, written: Iterable[Path]) -> None:
    """Each image has the bitmaps that it must, and they are consistent where they must be. Those of a file that clients
    write are in the memory of its storage daemon."""
    for image in tree.images.values():
        if image.format != "qcow2" or image.path in written:
            continue
        found = agent.get(bitmaps_of(image))["items"]
        assert {one["name"] for one in found} == set(image.bitmaps), (image, found)
        for one in found:
            bitmap, broken = image.bitmaps[one["name"]], one["state"] == "inconsistent"
            bitmap.broken = broken if bitmap.broken is None else bitmap.broken
            assert (one["state"] == "inconsistent", one["recording"]) == (bitmap.broken, bitmap.recording), (image, one)


def check_told(bitmap: Bitmap, uri: str, name: str) -> None:
    """The exported bitmap tells of all that it must, and of nothing else if it is exact."""
    command = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri]
    done = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
    found: set[int] = set()
    for extent in json.loads(done.stdout):
        if extent["type"] & 1:
            begin, end = extent["offset"], extent["offset"] + extent["length"]
            found |= set(range(begin // CLUSTER, -(-end // CLUSTER)))
    assert bitmap.bits <= found, f"{name} does not tell of {sorted(bitmap.bits - found)}"
    assert not bitmap.exact or found == bitmap.bits, f"{name} tells of {sorted(found - bitmap.bits)} as well"


def check_nothing_left(agent: AgentProcess, folder: Path) -> None:
    assert eventually(lambda: storage_daemons(agent) == []), "a storage daemon is left"
    assert eventually(lambda: agent.get("/v1/host")["storage_daemons"] == [])
    assert agent.get("/v1/host")["orphans"] == []
    assert eventually(lambda: [*(agent.runtime / "qsd").iterdir(), *(agent.runtime / "nbd").iterdir()] == [])
    assert list(folder.glob(".hostagent*")) == []
