"""Uploads through NBD into a qcow2 image whose metadata is there, flushed at the end."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path

from tests.bench.arena import SIZE, Case, arena, cheaper, details, faster, in_turns
from tests.bench.figure import Figure
from tests.bench.stage import Stage
from tests.data.exports import Qsd

NAME = "data-upload"
RUNS = 7
OPTIONS = "preallocation=metadata"


def measure(stage: Stage) -> Figure:
    runs = stage.count(RUNS)
    with arena(stage, "ours", "stock", "tuned") as place:

        def cases(open_: ExitStack) -> list[Case]:
            place.anew()
            export = open_.enter_context(Qsd(_image(place.folder), "qcow2"))
            return [
                place.upload(name, export.url, label=f"{name} {number}", connections=number, storage=export)
                for name in place.daemons
                for number in (1, 4)
            ]

        found = in_turns(stage, NAME, cases, runs)
    return Figure(
        name=NAME,
        measured=f"upload of {SIZE >> 30} GiB into a qcow2 image, CPU of server and storage daemon",
        peer="ovirt-imageio 2.5.1, stock and tuned, to the same storage daemon",
        runs=runs,
        results=(
            faster(found, "ours 1", "stock 1", 1.3, "NBD"),
            cheaper(found, "ours 1", "stock 1", 0.8, "NBD"),
            faster(found, "ours 4", "stock 4", 1.3, "NBD, 4 connections"),
        ),
        details=details(found),
    )


def _image(folder: Path) -> Path:
    image = folder / "target.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", OPTIONS, str(image), str(SIZE)]
    subprocess.run(command, check=True)
    return image
