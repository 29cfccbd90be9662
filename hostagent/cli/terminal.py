"""What people and programs see: data on stdout, remarks on stderr, and never a byte that a file name smuggled in.

A terminal gets rich's tables and colours; anything else gets the same words in plain aligned columns, uncut. Each text
that came from outside goes through `escape`: a path with an escape sequence in it is shown, not obeyed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from hostagent.logs import escape

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {
    "completed": "green", "ready": "green", "ok": "green", "running": "cyan", "starting": "cyan",
    "paused": "yellow", "waiting": "cyan", "aborted": "yellow", "aborting": "yellow", "warn": "yellow",
    "failed": "bold red", "unknown": "bold red", "fail": "bold red", "lost": "bold red", "unresponsive": "bold red",
    "kept": "yellow", "pending": "yellow", "stopping": "yellow", "remedy": "bold",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    right: bool = False


class Terminal:
    def __init__(self, *, json: bool = False, color: bool = True) -> None:
        self.json = json
        self._color = color and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.rich = sys.stdout.isatty() and not json
        self._console: Console | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Terminal:
        return cls(json=args.json, color=not args.no_color)

    def data(self, value: Any) -> None:
        """JSON on stdout: what a program reads."""
        print(json.dumps(value, indent=2))

    def line(self, text: str, style: str = "") -> None:
        """One line on stdout; all of it in `style`, on a terminal."""
        if self.rich and style:
            from rich.text import Text

            self.console.print(Text(escape(text), style=STYLES.get(style, style)), soft_wrap=True)
        else:
            print(escape(text))

    def heading(self, text: str) -> None:
        self.line(text, "bold")

    def fields(self, pairs: Iterable[tuple[str, str]], *, indent: int = 2) -> None:
        """Names and values, the values aligned. A value that is a known state has its colour."""
        shown = [(name, value) for name, value in pairs if value != ""]
        width = max((len(name) for name, _ in shown), default=0)
        for name, value in shown:
            label = f"{' ' * indent}{name:<{width}}  "
            if self.rich:
                from rich.text import Text

                text = Text(label, style="dim")
                text.append(escape(value), style=_style(value, name))
                self.console.print(text, soft_wrap=True)
            else:
                print(label + escape(value))

    def table(self, columns: Sequence[str | Column], rows: Sequence[Sequence[str]]) -> None:
        heads = [column if isinstance(column, Column) else Column(column) for column in columns]
        cells = [[escape(cell) for cell in row] for row in rows]
        if self.rich:
            self._rich_table(heads, cells)
            return
        lines = [[head.title.upper() for head in heads], *cells]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        for line in lines:
            columns_of_line = zip(line, widths, heads, strict=True)
            padded = (f"{cell:>{width}}" if head.right else f"{cell:<{width}}" for cell, width, head in columns_of_line)
            print("  ".join(padded).rstrip())

    @property
    def console(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(no_color=not self._color, highlight=False, markup=False, emoji=False)
        return self._console

    def progress_console(self) -> Console:
        """The console of a progress bar: stderr, so that stdout stays data."""
        from rich.console import Console

        return Console(stderr=True, no_color=not self._color, highlight=False, markup=False, emoji=False)

    def _rich_table(self, heads: list[Column], cells: list[list[str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
        for head in heads:
            justify: Literal["left", "right"] = "right" if head.right else "left"
            # An id is there to be copied: the other columns fold.
            whole = head.title in ("id", "job", "export", "holder")
            table.add_column(head.title.upper(), justify=justify, overflow="fold", no_wrap=whole)
        for row in cells:
            table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        self.console.print(table)


def remark(text: str) -> None:
    """A line for people, on stderr."""
    print(escape(text), file=sys.stderr)


def complain(message: str, remedy: str | None = None) -> None:
    remark(f"hostagent: {message}")
    if remedy:
        remark(f"  remedy: {remedy}")


def counted(number: int, noun: str) -> str:
    """`1 warning`, `2 warnings`, `0 warnings`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def age(time: str | None) -> str:
    """How long ago an RFC 3339 time was."""
    from hostagent.sizes import format_duration

    if not time:
        return ""
    try:
        then = datetime.fromisoformat(time)
    except ValueError:
        return time
    return format_duration(max(0.0, (datetime.now(UTC) - then.astimezone(UTC)).total_seconds()))


def _style(value: str, name: str = "") -> str:
    return STYLES.get(value) or STYLES.get(name, "")
