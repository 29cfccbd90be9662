"""The command line as data, read from its parser: what manual pages and completions are made from."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hostagent.cli import later

FILES = frozenset({"FILE", "PATH", "P", "TARGET", "T", "DEST", "IMAGE", "IMAGE2"})
FOLDERS = frozenset({"DIR"})
"""What stands for a path, as a metavariable or a part of one."""


@dataclass(frozen=True, slots=True)
class Word:
    """An option (`flags`), or a positional argument (none). `metavar` is empty where an option has no value; `among`
    is the number of the group of which only one may be said; `common` is every command's."""

    flags: tuple[str, ...]
    metavar: str
    help: str
    choices: tuple[str, ...] = ()
    repeats: bool = False
    required: bool = False
    common: bool = False
    among: int | None = None

    @property
    def files(self) -> bool:
        return bool(FILES.intersection(re.split(r"[^A-Z0-9]+", self.metavar)))

    @property
    def folders(self) -> bool:
        return self.metavar in FOLDERS


@dataclass(frozen=True, slots=True)
class Command:
    """`path` is what is written after the program's name: nothing, a noun, a noun and its verb."""

    path: tuple[str, ...]
    help: str
    description: str
    options: tuple[Word, ...]
    arguments: tuple[Word, ...]
    commands: tuple[Command, ...]

    def all(self) -> Iterator[Command]:
        """This one and all below it."""
        yield self
        for command in self.commands:
            yield from command.all()


def read(parser: argparse.ArgumentParser, path: tuple[str, ...] = (), help: str = "") -> Command:
    """Without what is only announced (`later`), and without what its help hides."""
    among = {
        id(action): n for n, group in enumerate(parser._mutually_exclusive_groups) for action in group._group_actions
    }
    common = {id(action) for group in parser._action_groups if group.title == "common options"
              for action in group._group_actions}  # fmt: skip
    options: list[Word] = []
    arguments: list[Word] = []
    commands: list[Command] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            said = {choice.dest: choice.help or "" for choice in action._choices_actions}
            commands = [
                read(child, (*path, name), said.get(name, ""))
                for name, child in action.choices.items()
                if path or name not in later.NOUNS
            ]
        elif action.help != argparse.SUPPRESS:
            word = _word(parser, action, common=id(action) in common, among=among.get(id(action)))
            (options if word.flags else arguments).append(word)
    description = parser.description or help
    return Command(path, help, description, tuple(options), tuple(arguments), tuple(commands))


def _word(parser: argparse.ArgumentParser, action: argparse.Action, *, common: bool, among: int | None) -> Word:
    choices = tuple(map(str, action.choices or ()))
    metavar = "" if action.nargs == 0 else str(action.metavar or ("|".join(choices) or action.dest.upper()))
    return Word(
        flags=tuple(action.option_strings),
        metavar=metavar,
        help=parser._get_formatter()._expand_help(action) if action.help else "",
        choices=choices,
        repeats=action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction),
        required=action.required,
        common=common,
        among=among,
    )
