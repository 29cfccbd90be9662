"""Downloads of a read-only qcow2 image behind a storage daemon: by NBD, and from the image's own files where the ticket
names them. nbdcopy to nowhere beside it: there is no HTTP in that."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.bench.arena import SIZE, Arena, Case, arena, cheaper, details, digest, faster, in_turns
from tests.bench.figure import Figure
from tests.bench.stage import Stage
from tests.data.exports import Qsd
from tests.harness import raw_image

NAME = "data-nbd"
RUNS = 7


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    with arena(stage, "ours", "stock", "tuned", "ours-tls", "stock-tls") as place:
        image, like = _image(place.folder)

        def cases(open_: ExitStack) -> list[Case]:
            place.anew()
            export = open_.enter_context(Qsd(image, "qcow2", read_only=True))
            return list(_cases(place, export, image, like))

        found = in_turns(stage, NAME, cases, runs)
    return Figure(
        name=NAME,
        measured=f"download of a {SIZE >> 30} GiB qcow2 image, CPU of server and storage daemon",
        peer="ovirt-imageio 2.5.1, stock and tuned, from the same storage daemon; nbdcopy",
        runs=runs,
        results=(
            faster(found, "mapped 1", "stock 1", 3.0, "mapped"),
            cheaper(found, "mapped 1", "stock 1", 0.25, "mapped"),
            faster(found, "mapped 4", "stock 4", 3.0, "mapped, 4 connections"),
            faster(found, "ours 1", "stock 1", 2.0, "NBD"),
            faster(found, "ours 1", "tuned 1", 1.3, "NBD"),
            cheaper(found, "ours 1", "stock 1", 0.5, "NBD"),
            faster(found, "ours-tls 1", "stock-tls 1", 1.8, "NBD, TLS"),
            cheaper(found, "ours-tls 1", "stock-tls 1", 0.75, "NBD, TLS"),
            faster(found, "ours 1", "nbdcopy", 0.8, "NBD"),
        ),
        details=details(found),
    )


def _image(folder: Path) -> tuple[Path, str]:
    content, image = raw_image(folder / "content.raw", SIZE), folder / "image.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(content), str(image)], check=True)
    like = digest(content)
    content.unlink()
    return image, like


def _cases(place: Arena, export: Qsd, image: Path, like: str) -> Iterator[Case]:
    mapped = {"image": {"path": str(image), "format": "qcow2"}}
    for name in place.daemons:
        for number in (1, 4):
            label = f"{name} {number}"
            yield place.download(name, export.url, label=label, connections=number, storage=export, like=like)
    for name in ("ours", "stock"):
        yield place.download(name, export.url, label=f"{name} unix", unix=True, storage=export, like=like)
    for label, name, number in (("mapped 1", "ours", 1), ("mapped 4", "ours", 4), ("mapped-tls 1", "ours-tls", 1)):
        yield place.download(
            name, export.url, label=label, connections=number, storage=export, ticket=mapped, like=like
        )
    yield Case("nbdcopy", lambda: _nbdcopy(export), export.pid)


def _nbdcopy(export: Qsd) -> float:
    began = time.perf_counter()
    subprocess.run(["nbdcopy", f"nbd+unix:///{export.NAME}?socket={export.socket}", "null:"], check=True)
    return time.perf_counter() - began
