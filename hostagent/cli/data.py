"""`hostagent data`: the data daemon, in the foreground; alone, or as the agent's child."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from hostagent.cli import arguments
from hostagent.errors import EXIT_OK


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    text = "run the data daemon: images over HTTP(S)"
    parser = nouns.add_parser("data", help=text, description=text, parents=[common])
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings (default: /etc/hostagent/hostagent.toml)")
    parser.add_argument("--runtime-dir", metavar="DIR", type=arguments.path, help="agent.runtime_dir")
    parser.add_argument("--inherit", metavar="NAME=FD", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--mark", default="", help=argparse.SUPPRESS)
    parser.add_argument("--show-config", action="store_true", help="print the settings in force, and where from")
    parser.set_defaults(run=_data)


def _data(args: argparse.Namespace) -> int:
    from hostagent import config_text, logs

    overrides = {"agent.runtime_dir": args.runtime_dir} if args.runtime_dir else {}
    settings = config_text.load(file=args.config or config_text.default_file(os.environ), overrides=overrides)
    if args.show_config:
        print(config_text.show(settings), end="")
        return EXIT_OK
    logs.setup(settings.logs.level, settings.logs.format, sys.stderr)
    from hostagent.data.daemon import run

    return run(settings, dict(map(_inherited, args.inherit)), args.mark)


def _inherited(text: str) -> tuple[str, int]:
    """What the agent gives its child."""
    name, _, fd = text.partition("=")
    return name, int(fd)
