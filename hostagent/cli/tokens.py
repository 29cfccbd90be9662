"""`hostagent token`: who may use the API by TCP. It works on the agent's file, on the agent's host. The agent, which
needs not run, knows a new token at once, and one that is gone within a second (api.identity_interval)."""

from __future__ import annotations

import argparse
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hostagent.cli import arguments
from hostagent.cli.client import CliError
from hostagent.cli.terminal import Terminal, remark
from hostagent.errors import EXIT_OK

if TYPE_CHECKING:
    from hostagent.tokens import Token

SCOPES = ("read", "operate", "admin")  # as hostagent.tokens has them, which is not loaded for each command
UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    text = "who may use the API by TCP"
    verbs = nouns.add_parser("token", help=text, description=text, parents=[common]).add_subparsers(
        dest="verb", metavar="VERB", required=True
    )
    add = _verb(verbs, common, "add", _add, "make a token, and show it this once")
    add.add_argument("name", metavar="NAME", help="whose it is: small letters, digits and -")
    add.add_argument("--scope", choices=SCOPES, required=True, help="what it may do; each may what those before it may")
    add.add_argument("--expires", metavar="TIME", type=_moment, help="30d, 12h, or a time such as 2030-01-01T00:00:00Z")
    _verb(verbs, common, "list", _list, "all of them; a token itself is kept nowhere")
    remove = _verb(verbs, common, "remove", _remove, "from now on it is good for nothing, also where it is in use")
    remove.add_argument("name", metavar="NAME")


def _verb(verbs: Any, common: argparse.ArgumentParser, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, parents=[common])
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings (default: /etc/hostagent/hostagent.toml)")
    parser.add_argument("--file", metavar="FILE", type=arguments.path, help="instead of api.tokens_file")
    parser.set_defaults(run=run)
    return parser


def _add(args: argparse.Namespace) -> int:
    from hostagent import tokens

    path, most = _place(args)
    token, text = tokens.new(args.name, tokens.Scope.of(args.scope), args.expires)
    with tokens.changing(path) as found:
        if any(one.name == token.name for one in found):
            remedy = f"choose another name, or first: hostagent token remove {token.name}"
            raise CliError("conflict", f"there is a token {token.name!r} already", remedy=remedy)
        if len(found) >= most:
            raise CliError("limit", f"there are {len(found)} tokens", remedy="remove one, or raise api.tokens")
        found.append(token)
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data({**_plain(token), "token": text})
        return EXIT_OK
    print(text)
    until = f"until {token.expires:%Y-%m-%d %H:%M} UTC" if token.expires else "until it is removed"
    remark(f"{token.name} may {args.scope} {until}. Keep it, in a file of mode 0600: it is not shown again.")
    return EXIT_OK


def _list(args: argparse.Namespace) -> int:
    from hostagent import tokens

    found = sorted(tokens.read(_place(args)[0]), key=lambda token: token.name)
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data({"items": [_plain(token) for token in found]})
        return EXIT_OK
    rows = [(t.name, t.scope.word, f"{t.created:%Y-%m-%d}", _until(t)) for t in found]
    terminal.table(("name", "scope", "created", "expires"), rows)
    return EXIT_OK


def _remove(args: argparse.Namespace) -> int:
    from hostagent import tokens

    with tokens.changing(_place(args)[0]) as found:
        left = [token for token in found if token.name != args.name]
        if len(left) == len(found):
            raise CliError("not_found", f"there is no token {args.name!r}", remedy="see `hostagent token list`")
        found[:] = left
    return EXIT_OK


def _place(args: argparse.Namespace) -> tuple[Path, int]:
    """The file, and how many tokens it may have."""
    from hostagent import config_text

    settings = config_text.load(file=args.config or config_text.default_file(os.environ))
    return (Path(args.file) if args.file else settings.api.tokens_file), settings.api.tokens


def _plain(token: Token) -> dict[str, str | None]:
    return {
        "name": token.name,
        "scope": token.scope.word,
        "created": token.created.isoformat(),
        "expires": token.expires.isoformat() if token.expires else None,
    }


def _until(token: Token) -> str:
    if token.expires is None:
        return "never"
    return "is over" if token.over(datetime.now(UTC)) else f"{token.expires:%Y-%m-%d %H:%M} UTC"


def _moment(text: str) -> datetime:
    """When a token ends to be good."""
    now = datetime.now(UTC).replace(microsecond=0)
    try:
        if found := re.fullmatch(r"(\d{1,6})([mhdw])", text):
            return now + timedelta(seconds=int(found[1]) * UNITS[found[2]])
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        message = f"{text!r} is no time: write 30d, 12h, or 2030-01-01T00:00:00Z"
        raise argparse.ArgumentTypeError(message) from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if moment <= now:
        raise argparse.ArgumentTypeError(f"{text!r} is over already")
    return moment.astimezone(UTC)
