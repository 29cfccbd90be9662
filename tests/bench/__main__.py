"""`python -m tests.bench [NAME…] [--runs N] [--json] [--strict] [--folder DIR]`.

Images and agents live in a folder of their own, which is gone afterwards, as is every process that was started. The
exit status is 0 even where a target is missed, because a busy machine misses some; `--strict` makes that 1.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from tests.bench import (
    copy_overhead,
    crowd,
    data_crowd,
    data_extents,
    data_file,
    data_nbd,
    data_requests,
    data_revocation,
    data_upload,
    export_start,
    history,
    idle,
    increments,
    live_copy,
    live_idle,
    live_pull,
    pull_overhead,
    revocation,
)
from tests.bench.figure import Figure
from tests.bench.stage import Stage
from tests.bench.table import machine, show

WIDTH = 140
"""Columns of the table in a file or a log."""

FIGURES: dict[str, Callable[[Stage], Figure]] = {
    module.NAME: module.measure
    for module in (
        pull_overhead,
        increments,
        revocation,
        export_start,
        copy_overhead,
        idle,
        live_pull,
        live_copy,
        live_idle,
        crowd,
        history,
        data_file,
        data_nbd,
        data_upload,
        data_requests,
        data_revocation,
        data_crowd,
        data_extents,
    )
}
FIGURES[data_requests.CHECKSUM] = data_requests.checksum
USUAL = [name for name in FIGURES if name not in (crowd.NAME, history.NAME)]
"""Without a name on the command line. The others need some minutes, and hundreds of processes."""


def main(argv: Sequence[str]) -> int:
    arguments = _arguments(argv)
    signal.signal(signal.SIGTERM, _leave)
    people = Console(stderr=True)
    where = machine()
    figures = []
    with people.status("") as status:
        for name in arguments.names or USUAL:
            with tempfile.TemporaryDirectory(prefix="hostagent-bench-", dir=arguments.folder) as folder:
                figures.append(FIGURES[name](Stage(Path(folder), arguments.runs, status.update)))
    if arguments.json:
        print(json.dumps({"machine": where, "figures": [figure.as_json() for figure in figures]}, indent=2))
    else:
        show(Console() if sys.stdout.isatty() else Console(width=WIDTH), figures, where)
    missed = any(result.met is False for figure in figures for result in figure.results)
    return 1 if missed and arguments.strict else 0


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # as an exception, so that everything is cleared away


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Figures against named peers.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join(FIGURES)}; default: {', '.join(USUAL)}"
    )
    parser.add_argument("--runs", type=_positive, help="instead of each figure's own number")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--strict", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--folder", type=Path, help="where images and stores are made (default: the temporary folder)")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in FIGURES:
            parser.error(f"no figure {name!r}: there are {', '.join(FIGURES)}")
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of runs")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
