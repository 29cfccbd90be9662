"""`hostagent serve`: the agent itself, in the foreground, under systemd or not."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from hostagent.cli import arguments
from hostagent.config import Config
from hostagent.errors import EXIT_OK

SETTINGS = {
    "state_dir": "agent.state_dir",
    "runtime_dir": "agent.runtime_dir",
    "hypervisor_user": "access.hypervisor_user",
}


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    text = "run the agent"
    parser = nouns.add_parser("serve", help=text, description=text, parents=[common])
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings (default: /etc/hostagent/hostagent.toml)")
    parser.add_argument("--state-dir", metavar="DIR", type=arguments.path, help="agent.state_dir")
    parser.add_argument("--runtime-dir", metavar="DIR", type=arguments.path, help="agent.runtime_dir")
    parser.add_argument("--hypervisor-user", metavar="USER", help="access.hypervisor_user")
    parser.add_argument("--show-config", action="store_true", help="print the settings in force, and where from")
    parser.add_argument("--check-config", action="store_true", help="only say whether the settings can be used")
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from hostagent import config_text, logs

    overrides = {key: getattr(args, name) for name, key in SETTINGS.items() if getattr(args, name) is not None}
    if args.socket:
        overrides["api.socket"] = arguments.path(args.socket)

    def load() -> Config:
        return config_text.load(file=args.config or config_text.default_file(os.environ), overrides=overrides)

    settings = load()
    if args.check_config:
        return EXIT_OK
    if args.show_config:
        print(config_text.show(settings), end="")
        return EXIT_OK
    logs.setup(settings.logs.level, settings.logs.format, sys.stderr)
    from hostagent.daemon import run

    return run(settings, load)
