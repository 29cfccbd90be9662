"""`hostagent grant …`: which holder may open which file, in which mode, since when and why."""

from __future__ import annotations

import argparse
from typing import Any

from hostagent.cli import arguments
from hostagent.cli.client import Json, quoted
from hostagent.cli.terminal import Column, Terminal, age, remark
from hostagent.errors import EXIT_OK

SAID = ("pending", "kept", "revoked")
COLUMNS = ("id", "path", "mode", "holder", "access", "state", "reason", Column("age", right=True))


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    noun = nouns.add_parser("grant", help="who may open which file", parents=[common])
    verbs = noun.add_subparsers(dest="verb", metavar="VERB", required=True)
    listing = verbs.add_parser("list", help="grants, and files that could not be closed", parents=[common])
    listing.add_argument("--path", metavar="P", type=arguments.dest, help="only those of this file")
    listing.add_argument("--holder", metavar="H", help="only those of this holder, as job:ID or export:ID")
    listing.add_argument("--given", action="store_true", help="only what the agent itself gave, by an ACL")
    listing.set_defaults(run=_list)
    show = verbs.add_parser("show", help="one grant", parents=[common])
    show.set_defaults(run=_show)
    text = "take a grant back; refused while its holder needs the file"
    revoke = verbs.add_parser("revoke", help=text, description=text, parents=[common])
    revoke.set_defaults(run=_revoke)
    text = "restore the owner that a revocation changed, unless somebody changed it since"
    undo = verbs.add_parser("undo", help=text, description=text, parents=[common])
    undo.set_defaults(run=_undo)
    for parser in (show, revoke, undo):
        parser.add_argument("id", metavar="ID", help="the grant's id")


def _list(args: argparse.Namespace) -> int:
    grants = arguments.connect(args).items("/v1/grants", {"path": args.path, "holder": args.holder})
    if args.given:
        grants = [grant for grant in grants if grant["given"]]
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data({"items": grants})
    elif grants:
        terminal.table(COLUMNS, [_row(grant) for grant in grants])
    else:
        remark("no grants")
    return EXIT_OK


def _row(grant: Json) -> tuple[str, ...]:
    return (
        str(grant["id"]),
        str(grant["path"]),
        str(grant["mode"]),
        holder(grant),
        str(grant["access"]),
        str(grant["state"]),
        _why(grant),
        age(grant.get("since")),
    )


def _why(grant: Json) -> str:
    """Why somebody needs the file; of one that could not be closed what stands in the way."""
    detail = grant.get("detail")
    return f"{grant['reason']}; {detail}" if detail and grant["state"] in SAID else str(grant["reason"])


def holder(grant: Json) -> str:
    found = grant.get("holder") or {}
    name = f" ({found['name']})" if found.get("name") else ""
    return f"{found.get('kind', '')}:{found.get('id', '')}{name}" if found else ""


def _show(args: argparse.Namespace) -> int:
    _print(args, arguments.connect(args).get(_address(args)).data)
    return EXIT_OK


def _revoke(args: argparse.Namespace) -> int:
    _print(args, arguments.connect(args).delete(_address(args)))
    return EXIT_OK


def _undo(args: argparse.Namespace) -> int:
    _print(args, arguments.connect(args).post(f"{_address(args)}/undo"))
    return EXIT_OK


def _print(args: argparse.Namespace, grant: Json) -> None:
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data(grant)
        return
    terminal.heading(f"grant {grant['id']}")
    terminal.fields(
        [
            ("path", str(grant["path"])),
            ("mode", str(grant["mode"])),
            ("holder", holder(grant)),
            ("reason", str(grant["reason"])),
            ("access", str(grant["access"])),
            ("state", str(grant["state"])),
            ("detail", str(grant.get("detail") or "")),
            ("since", f"{grant['since']} ({age(grant['since'])} ago)"),
        ]
    )


def _address(args: argparse.Namespace) -> str:
    return f"/v1/grants/{quoted(args.id)}"
