"""`hostagent completion SHELL`: what the shell needs to complete this command line, made from the command line itself.

The words are in the script: completing asks no agent, and starts no Python.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from typing import Any

from hostagent.cli.tree import Command, Word, read
from hostagent.errors import EXIT_OK


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    text = "print what completes this command line in a shell"
    more = f"{text}: `source <(hostagent completion bash)`, or `hostagent completion fish | source`."
    parser = nouns.add_parser("completion", help=text, description=more, parents=[common])
    parser.add_argument("shell", choices=tuple(SHELLS), help="whose")
    parser.set_defaults(run=_completion)


def _completion(args: argparse.Namespace) -> int:
    from hostagent.cli.main import parser

    print(SHELLS[args.shell](read(parser())), end="")
    return EXIT_OK


def _valued(top: Command) -> list[str]:
    """All options that take a value. An option means the same to all commands that have it, as far as that goes."""
    return sorted({flag for command in top.all() for word in command.options if word.metavar for flag in word.flags})


# bash

ANY = "[0-9]*"
BASH = """\
# bash completion of hostagent
_hostagent_words()
{
    case $1 in
%(words)s
    esac
}

_hostagent_value()
{
    case $1 in
%(values)s
    esac
}

_hostagent()
{
    local at= skip= word i said=0 current=${COMP_WORDS[COMP_CWORD]} kind=
    COMPREPLY=()
    # An `=` is a word of its own here: --option=value is three.
    [[ $current == '=' ]] && current=
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $word == '=' ]]; then
            continue
        elif [[ -n $skip ]]; then
            skip=
        elif [[ $word == -* ]]; then
            case $word in
                %(valued)s) skip=$word ;;
            esac
        elif [[ " $(_hostagent_words "$at") " == *" $word "* ]]; then
            at+=${at:+ }$word
        else
            said=$((said + 1))
        fi
    done
    if [[ -n $skip ]]; then
        kind=$(_hostagent_value "$at $skip")
    elif [[ $current == -* ]]; then
        kind=$(_hostagent_words "$at --")
    else
        kind="$(_hostagent_words "$at") $(_hostagent_value "$at $said")"
    fi
    case $kind in
        *@file*) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
        *@folder*) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -d -- "$current") ;;
        *) mapfile -t COMPREPLY < <(compgen -W "$kind" -- "$current") ;;
    esac
}

complete -F _hostagent hostagent
"""


def bash(top: Command) -> str:
    words, values = [], []
    for command in top.all():
        at = " ".join(command.path)
        if command.commands:
            words.append(_case(at, [child.path[-1] for child in command.commands]))
        words.append(_case(f"{at} --", [flag for word in command.options for flag in word.flags]))
        for number, word in _expected(command):
            if kind := _bash_kind(word):
                values.append(_case(f"{at} {number}", [kind]))
        for word in command.options:
            if kind := _bash_kind(word):
                values += [_case(f"{at} {flag}", [kind]) for flag in word.flags]
    return BASH % {"words": "\n".join(words), "values": "\n".join(values), "valued": "|".join(_valued(top))}


def _case(pattern: str, words: Iterable[str]) -> str:
    quoted = _quoted(pattern.removesuffix(ANY)) + (ANY if pattern.endswith(ANY) else "")
    return f"        {quoted}) echo {_quoted(' '.join(words))} ;;"


def _bash_kind(word: Word) -> str:
    if not word.metavar:
        return ""
    return " ".join(word.choices) or ("@file" if word.files else "@folder" if word.folders else "")


def _expected(command: Command) -> list[tuple[str, Word]]:
    """What may stand at which place (from 0; a pattern for the rest) after the command."""
    return [(ANY if word.repeats else str(n), word) for n, word in enumerate(command.arguments)]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# zsh


def zsh(top: Command) -> str:
    """One function for each command; that of a noun goes on to its verbs'."""
    parts = ["#compdef hostagent\n# zsh completion of hostagent"]
    parts += [_zsh_function(command) for command in top.all()]
    # As a file of $fpath it is the function's body; sourced, it is bound by compdef.
    parts.append('if [[ $zsh_eval_context[-1] == loadautofunc ]]; then\n    _hostagent "$@"\nelse\n'
                 "    compdef _hostagent hostagent\nfi")  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _zsh_function(command: Command) -> str:
    specs = [spec for word in command.options for spec in _zsh_option(word)]
    if not command.commands:
        specs += [_zsh_argument(word) for word in command.arguments]
        return f"{_zsh_name(command)}() {{\n    _arguments -s {_zsh_lines(specs)}\n}}"
    specs += [_quoted("1: :->command"), _quoted("*:: :->rest")]
    known = _zsh_lines([_quoted(f"{child.path[-1]}:{_zsh_text(child.help)}") for child in command.commands])
    calls = "\n".join(f"                {child.path[-1]}) {_zsh_name(child)} ;;" for child in command.commands)
    return (
        f"{_zsh_name(command)}() {{\n"
        "    local curcontext=$curcontext context state state_descr line\n"
        "    typeset -A opt_args\n"
        f"    _arguments -C {_zsh_lines(specs)}\n"
        "    case $state in\n"
        f"        command)\n            local -a known=({known})\n            _describe command known ;;\n"
        f"        rest)\n            case $line[1] in\n{calls}\n            esac ;;\n"
        "    esac\n}"
    )


def _zsh_lines(specs: Iterable[str]) -> str:
    return "".join(f" \\\n        {spec}" for spec in specs).lstrip(" ")


def _zsh_name(command: Command) -> str:
    return "_".join(("_hostagent", *command.path))


def _zsh_option(word: Word) -> Iterable[str]:
    others = "" if word.repeats or len(word.flags) < 2 else f"({' '.join(word.flags)})"
    for flag in word.flags:
        equals = "=" if word.metavar and flag.startswith("--") else ""
        value = f":{_zsh_text(word.metavar)}:{_zsh_action(word)}" if word.metavar else ""
        yield _quoted(f"{others}{'*' if word.repeats else ''}{flag}{equals}[{_zsh_text(word.help)}]{value}")


def _zsh_argument(word: Word) -> str:
    return _quoted(f"{'*' if word.repeats else ''}:{_zsh_text(word.metavar)}:{_zsh_action(word)}")


def _zsh_action(word: Word) -> str:
    if word.choices:
        return f"({' '.join(word.choices)})"
    return "_files" if word.files else "_files -/" if word.folders else " "


def _zsh_text(text: str) -> str:
    return re.sub(r"([\[\]:\\])", r"\\\1", text)


# fish

FISH = """\
# fish completion of hostagent
function __hostagent_words --description 'the nouns, verbs and arguments before the cursor'
    set -l skip
    for word in (commandline -opc)[2..-1]
        if set -q skip[1]
            set -e skip
        else if string match -q -- '-*' $word
            contains -- $word %(valued)s; and set skip $word
        else
            echo $word
        end
    end
end

function __hostagent_at --description 'whether the command before the cursor is this one, or one below it'
    set -l words (__hostagent_words)
    test (count $words) -ge (count $argv); or return 1
    test (count $argv) -eq 0; or test "$words[1..$(count $argv)]" = "$argv"
end

function __hostagent_is --description 'whether the command before the cursor is this one, and nothing follows yet'
    __hostagent_at $argv; and test (count (__hostagent_words)) -eq (count $argv)
end

complete -c hostagent -f
"""


def fish(top: Command) -> str:
    lines = []
    for command in top.all():
        at = " ".join(command.path)
        for child in command.commands:
            lines.append(_fish_line(f"__hostagent_is {at}", f"-a {child.path[-1]}", child.help))
        for word in command.options:
            flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in word.flags)
            exactly = "is" if command.commands else "at"
            lines.append(_fish_line(f"__hostagent_{exactly} {at}", f"{flags}{_fish_value(word)}", word.help))
        for word in command.arguments:
            if word.choices or word.files:
                what = f"-a {_quoted(' '.join(word.choices))}" if word.choices else "-F"
                lines.append(_fish_line(f"__hostagent_at {at}", what, ""))
    return FISH % {"valued": " ".join(_valued(top))} + "\n".join(lines) + "\n"


def _fish_value(word: Word) -> str:
    if not word.metavar:
        return ""
    if word.choices:
        return f" -x -a {_quoted(' '.join(word.choices))}"
    if word.folders:
        return " -x -a '(__fish_complete_directories)'"
    return " -r -F" if word.files else " -x"


def _fish_line(condition: str, what: str, help: str) -> str:
    said = " -d '" + help.replace("\\", "\\\\").replace("'", "\\'") + "'" if help else ""
    return f"complete -c hostagent -n '{condition.strip()}' {what}{said}"


SHELLS: dict[str, Callable[[Command], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
