"""Nouns that have their place on the command line already, and a clear answer instead of a usage error."""

from __future__ import annotations

import argparse
from typing import Any

from hostagent.cli.client import CliError

NOUNS = {
    "backup": "pull-mode backups of live guests",
    "checkpoint": "backup checkpoints",
    "transfer": "image transfers",
}


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    for noun, text in NOUNS.items():
        text = f"{text} (not supported yet)"
        parser = nouns.add_parser(noun, help=text, description=text, parents=[common])
        parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
        parser.set_defaults(run=_not_yet)


def _not_yet(args: argparse.Namespace) -> int:
    raise CliError("not_supported", f"`hostagent {args.noun}` is not supported yet", remedy="see `hostagent --help`")
