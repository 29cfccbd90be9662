"""`hostagent bitmap …`: the dirty bitmaps that a qcow2 image carries."""

from __future__ import annotations

import argparse
from typing import Any

from hostagent.cli import arguments
from hostagent.cli.client import Json
from hostagent.cli.terminal import Column, Terminal, remark
from hostagent.errors import EXIT_OK
from hostagent.sizes import format_size

ADDRESS = "/v1/images/bitmaps"
COLUMNS = ("name", Column("granularity", right=True), "recording", "state")


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    noun = nouns.add_parser("bitmap", help="dirty bitmaps of an offline qcow2 image", parents=[common])
    verbs = noun.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, parents=[common])
        parser.add_argument("image", metavar="IMAGE", type=arguments.target, help="the image's path")
        if name != "list":
            parser.add_argument("name", metavar="NAME", help="the bitmap's name")
        parser.set_defaults(run=run)
        return parser

    verb("list", _list, "the bitmaps of an image")
    add = verb("add", _add, "a new, empty bitmap")
    add.add_argument("--granularity", metavar="SIZE", type=arguments.size, help="bytes that one bit stands for")
    add.add_argument("--disabled", action="store_true", help="does not record what the next guest writes")
    verb("remove", _remove, "remove a bitmap, also one that is inconsistent")
    merge = verb("merge", _merge, "add the bits of another bitmap to this one; the other stays as it is")
    merge.add_argument("--from", metavar="NAME2", dest="source_name", required=True, help="the bitmap to merge")
    merge.add_argument("--source", metavar="IMAGE2", type=arguments.target, help="the image that has it, if another")


def _list(args: argparse.Namespace) -> int:
    return _show(args, arguments.connect(args).get(ADDRESS, _image(args)).data)


def _add(args: argparse.Namespace) -> int:
    body = {"name": args.name, "granularity": args.granularity, "disabled": args.disabled or None}
    return _show(args, arguments.connect(args).post(ADDRESS, _said(body), _image(args)))


def _remove(args: argparse.Namespace) -> int:
    return _show(args, arguments.connect(args).delete(ADDRESS, {**_image(args), "name": args.name}))


def _merge(args: argparse.Namespace) -> int:
    body = {"name": args.name, "source_name": args.source_name, "source": args.source}
    return _show(args, arguments.connect(args).post(f"{ADDRESS}/merge", _said(body), _image(args)))


def _image(args: argparse.Namespace) -> Json:
    return {"path": args.image}


def _said(body: Json) -> Json:
    return {key: value for key, value in body.items() if value is not None}


def _show(args: argparse.Namespace, found: Json) -> int:
    """What the image has; after a change, what it has now."""
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data(found)
        return EXIT_OK
    if found["items"]:
        terminal.table(COLUMNS, [_row(bitmap) for bitmap in found["items"]])
    else:
        remark("no bitmaps")
    if found["holders"] is not None:
        who = ", ".join(found["holders"]) or "somebody"
        remark(f"{who} writes to the image: its bitmaps are in memory there, and this may be old")
    if found["lost"]:
        remark("a program that knows no bitmaps changed the image: those that it had are gone")
    return EXIT_OK


def _row(bitmap: Json) -> tuple[str, ...]:
    recording = "yes" if bitmap["recording"] else "no"
    return (str(bitmap["name"]), format_size(bitmap["granularity"]), recording, str(bitmap["state"]))
