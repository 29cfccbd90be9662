"""The command line: noun then verb, flags as virsh has them.

stdout is data, stderr is for people, and the exit status comes from the one table of codes. Whatever a command needs
beyond the standard library is imported inside it, so that `--help` and shell completion are instant.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from hostagent import __version__
from hostagent.cli import (
    arguments,
    bitmaps,
    completion,
    data,
    demo,
    doctor,
    drain,
    events_cmd,
    exports,
    grants,
    images,
    jobs,
    later,
    serve,
    status,
    tokens,
    transfers,
)
from hostagent.cli.client import CliError
from hostagent.cli.terminal import complain
from hostagent.errors import CODES, EXIT_ERROR, EXIT_INTERRUPTED, AgentError
from jobs.errors import JobError

NOUNS = (jobs, bitmaps, exports, grants, events_cmd, status, doctor, drain)
HERE = (images, serve)
"""Nouns of what runs here, and asks this host's agent or is it."""
ALONE = (data, transfers, demo, tokens, completion)
"""Nouns of what runs here and asks none."""


class Parser(argparse.ArgumentParser):
    """A command says with its own usage what it does not know, and not with the whole program's."""

    def parse_known_args(self, *given: Any, **named: Any) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(*given, **named)
        if unknown and self._subparsers is None:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def main(argv: Sequence[str] | None = None) -> int:
    _prepare_streams()
    try:
        args = parser().parse_args(argv, argparse.Namespace(**arguments.COMMON_DEFAULTS))
    except SystemExit as end:  # argparse has said what is wrong, or printed the help
        return int(end.code or 0)
    try:
        arguments.refuse_agents(args)
        status = int(args.run(args))
        sys.stdout.flush()  # here, where a reader that has gone away can be dealt with
        return status
    except CliError as error:
        complain(error.message, error.remedy)
        return error.exit
    except (AgentError, JobError) as error:
        complain(error.message, error.remedy)
        return CODES[error.code].exit if error.code in CODES else EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough, as in `hostagent job list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def parser() -> argparse.ArgumentParser:
    common = arguments.common()
    top = Parser(
        prog="hostagent",
        description="Owns what happens to disk images on this host: block jobs, exports, and who may open which file.",
        parents=[common],
    )
    top.add_argument("--version", action="version", version=f"hostagent {__version__}")
    nouns = top.add_subparsers(dest="noun", metavar="NOUN", required=True)
    for module in NOUNS:
        module.register(nouns, common)
    for agents, modules in (("here", HERE), ("none", ALONE)):
        before = set(nouns.choices)
        options = arguments.common(agents=agents)
        for module in modules:
            module.register(nouns, options)
        for noun in nouns.choices.keys() - before:
            nouns.choices[noun].set_defaults(agents=agents)
    later.register(nouns, common)
    return top


def _prepare_streams() -> None:
    """A file name need not be valid text: print what can be printed, escape the rest, never fail on it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
