"""`hostagent image map URL`: what a data daemon says that an image has where."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hostagent.cli.terminal import Column, Terminal, remark
from hostagent.cli.ticket_url import options, url
from hostagent.errors import EXIT_OK

if TYPE_CHECKING:
    from hostagent import client

COLUMNS = (Column("start", right=True), Column("length", right=True), "kind")


def show(args: argparse.Namespace) -> int:
    from hostagent import client

    found = client.extents(
        url(args.path), options(args), dirty=args.dirty, start=args.start, length=args.length, tell=remark
    )
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data({"extents": [_object(one, dirty=args.dirty) for one in found]})
        return EXIT_OK
    terminal.table(COLUMNS, [(str(one.start), str(one.length), _kind(one)) for one in found])
    return EXIT_OK


def _object(one: client.Extent, *, dirty: bool) -> dict[str, int | bool]:
    found: dict[str, int | bool] = {"start": one.start, "length": one.length, "zero": one.zero}
    return found | ({"dirty": one.dirty} if dirty else {"hole": one.hole})


def _kind(one: client.Extent) -> str:
    kind = "hole" if one.hole else "zero" if one.zero else "data"
    return f"{kind}, dirty" if one.dirty else kind
