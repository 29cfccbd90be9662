"""The figures for people: one row for each target, what stands beside it below, and how to get them again."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tests.bench.figure import Figure, Result


def machine() -> str:
    """What the numbers depend on."""
    version = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=True).stdout
    qemu = version.split("version ")[1].split()[0]
    load = os.getloadavg()[0]
    return (
        f"QEMU {qemu}, Linux {platform.release()}, {os.cpu_count()} processors, "
        f"load {load:.2f} at the start, {'root' if os.geteuid() == 0 else 'a plain user'}"
    )


def show(console: Console, figures: Sequence[Figure], where: str) -> None:
    table = Table(title="Figures (medians; runs of both sides alternate)", title_justify="left", show_lines=True)
    table.add_column("figure", no_wrap=True)
    for heading in ("measured", "peer"):
        table.add_column(heading)
    for heading in ("target", "reached"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("met", no_wrap=True)
    for figure in figures:
        for result in figure.results:
            measured = f"{figure.measured}: [bold]{result.what}[/] ({figure.runs} runs)"
            table.add_row(figure.name, measured, figure.peer, _target(result), _reached(result), _met(result))
    console.print(table)
    for figure in figures:
        if figure.details:
            said = ", ".join(f"{key} {value:.1f}" for key, value in figure.details.items())
            console.print(f"{figure.name}: {said}", soft_wrap=True, highlight=False)
        for why in sorted({result.why for result in figure.results if result.why}):
            console.print(f"{figure.name}: not measured, {why}", soft_wrap=True, highlight=False)
    console.print(where, soft_wrap=True, highlight=False)
    names = " ".join(figure.name for figure in figures)
    again = f"again: .venv/bin/python -m tests.bench {names} (--runs N, --json, --strict, --folder DIR)"
    console.print(again, soft_wrap=True, highlight=False)


def _target(result: Result) -> str:
    return f"{'≥' if result.at_least else '≤'} {result.target:g} {result.unit}"


def _reached(result: Result) -> str:
    return "not measured" if result.reached is None else f"{result.reached:.2f} {result.unit}"


def _met(result: Result) -> str:
    return {True: "[green]yes[/]", False: "[red]NO[/]", None: "-"}[result.met]
