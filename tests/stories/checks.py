"""Reads real images, exports and access, and compares them with the model."""

from __future__ import annotations

import importlib
import pwd
import subprocess
from pathlib import Path
from typing import Any

from tests.harness import TEST_USER, AgentProcess, Json
from tests.qemu.faults import PATIENCE, ROOT, backing_name, eventually, sound, storage_daemons
from tests.stories.model import CLUSTER, CLUSTERS, Image, Tree

nbd: Any = importlib.import_module("nbd")

_OPENER = "import os, sys\nfor p in sys.argv[1:]:\n try: os.open(p, os.O_RDONLY); print(p)\n except OSError: pass"


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


def check_images(tree: Tree, exports: dict[str, Json], scratch: Path) -> None:
    """Every image holds what it must, leans on what it must, and is sound."""
    written = {Path(export["image"]): export["uri"] for export in exports.values() if export["writable"]}
    for image in tree.images.values():
        if image.format == "qcow2":
            name = image.backing.name if image.backing else None
            seen = backing_name(image.path)
            assert (Path(seen).name if seen else None) == name, (image, seen)
            assert image.path in written or sound(image.path), image
        if image.view is not None:
            found = read_export(written[image.path]) if image.path in written else read_image(image, scratch)
            assert found == bytes_of(image.view), f"{image.path} differs at {_first(found, image.view)}"
    for export in exports.values():
        view = tree.images[Path(export["image"])].view
        assert view is None or read_export(export["uri"]) == bytes_of(view), export


def _first(found: bytes, view: list[int]) -> str:
    wrong = [(n, tag, found[n * CLUSTER]) for n, tag in enumerate(view) if found[n * CLUSTER :][:1] != bytes([tag])]
    return f"(cluster, expected, found) {wrong[:4]}, {len(found)} bytes"


def check_access(agent: AgentProcess, tree: Tree, exports: dict[str, Json]) -> None:
    """Exports hold their chains, images what they may still need, nobody else anything; and the files say the same."""
    if not ROOT:
        return
    used = {path for export in exports.values() for path in tree.chain(Path(export["image"]))}

    def settled() -> bool:
        grants = agent.get("/v1/grants")["items"]
        return all(grant["holder"]["kind"] != "job" for grant in grants) and _as_granted(tree, used, grants)

    assert eventually(settled), (agent.get("/v1/grants")["items"], used, tree.keeps, openable(list(tree.images)))


def _as_granted(tree: Tree, used: set[Path], grants: list[Json]) -> bool:
    by_image = [grant for grant in grants if grant["holder"]["kind"] == "image"]
    held = {Path(grant["path"]) for grant in grants}
    of_exports = {Path(grant["path"]) for grant in grants if grant["holder"]["kind"] == "export"}
    lawful = {str(path) for path in tree.keeps}
    known = set(tree.images)
    return (
        of_exports & known == used
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


def check_nothing_left(agent: AgentProcess, folder: Path) -> None:
    assert eventually(lambda: storage_daemons(agent) == []), "a storage daemon is left"
    assert eventually(lambda: agent.get("/v1/host")["storage_daemons"] == [])
    assert agent.get("/v1/host")["orphans"] == []
    assert eventually(lambda: [*(agent.runtime / "qsd").iterdir(), *(agent.runtime / "nbd").iterdir()] == [])
    assert list(folder.glob(".hostagent*")) == []
