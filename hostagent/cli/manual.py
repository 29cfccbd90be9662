"""The manual pages, made from the command line and the settings: `python -m hostagent.cli.manual FOLDER`.

hostagent(1), a page for each noun, and hostagent.toml(5), in man(7).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from hostagent import __version__, config_text, errors
from hostagent.cli.main import parser
from hostagent.cli.tree import Command, Word, read
from hostagent.config import SECTIONS, rules

STATUS = (
    (errors.EXIT_OK, "Done."),
    (errors.EXIT_ERROR, "Something went wrong; stderr says what, and what to do about it."),
    (errors.EXIT_USAGE, "The command line or the request is wrong."),
    (errors.EXIT_NOT_FOUND, "There is no such object."),
    (errors.EXIT_JOB_FAILED, "The job failed or was aborted, or the images differ."),
    (errors.EXIT_TIMEOUT, "It took too long."),
    (errors.EXIT_BUSY, "Something else uses it, or its state does not allow it."),
    (errors.EXIT_DENIED, "Not allowed."),
    (errors.EXIT_UNREACHABLE, "No agent answers."),
    (errors.EXIT_INTERRUPTED, "Interrupted."),
)

SETTINGS = (
    "Settings of hostagent-serve(1) and hostagent-data(1), in TOML. "
    f"{config_text.DEFAULT_FILE} is read first, then the files *.toml in hostagent.d beside it, in name order, then "
    "HOSTAGENT_SECTION_KEY from the environment, then the command line; the last one wins. Sizes are bytes, or text "
    'like "64MiB". `hostagent serve --show-config` prints what is in force, and where it came from.'
)


def pages() -> dict[str, str]:
    """File name → text of each page."""
    top = read(parser())
    names = ["hostagent(1)", *(f"hostagent-{noun.path[0]}(1)" for noun in top.commands), "hostagent.toml(5)"]
    found = {"hostagent.1": _top(top, names), "hostagent.toml.5": _settings()}
    for noun in top.commands:
        found[f"hostagent-{noun.path[0]}.1"] = _noun(noun)
    return {name: "\n".join(lines) + "\n" for name, lines in found.items()}


def _top(top: Command, names: list[str]) -> list[str]:
    lines = [*_head("hostagent", 1), ".SH NAME", f"hostagent {DASH} the agent for disk images on a hypervisor"]
    lines += [".SH SYNOPSIS", *_synopsis(top), ".SH DESCRIPTION", _text(top.description), ".SH COMMANDS"]
    for noun in top.commands:
        verbs = ", ".join(verb.path[-1] for verb in noun.commands)
        lines += _tagged(f".BR hostagent\\-{noun.path[0]} (1)", [noun.help + (f": {verbs}" if verbs else "")])
    lines += [".SH OPTIONS", *_words(top.options)]
    lines.append(".SH EXIT STATUS")
    for status, text in STATUS:
        lines += _tagged(f".B {status}", [text])
    lines.append(".SH ENVIRONMENT")
    lines += _tagged(".B HOSTAGENT_SOCKET", ["The agent's socket, where --socket names none."])
    lines += _tagged(".B HOSTAGENT_URL", ["An agent of another host, where neither --url nor --socket names one."])
    others = ".B HOSTAGENT_CAFILE HOSTAGENT_CERTIFICATE HOSTAGENT_KEY HOSTAGENT_TOKEN_FILE"
    lines += _tagged(others, ["What --cafile, --cert, --key and --token-file say of it."])
    lines += _tagged(".I HOSTAGENT_SECTION_KEY", ["A setting of hostagent.toml(5), as HOSTAGENT_JOBS_WIDTH."])
    lines.append(".SH FILES")
    lines += _tagged(f".I {_text(config_text.DEFAULT_FILE)}", ["Settings; see hostagent.toml(5)."])
    lines += _tagged(".I /var/lib/hostagent", ["The agent's store: jobs, exports, access."])
    lines += _tagged(".I /var/lib/hostagent/audit.jsonl", ["Who changed what (audit.file)."])
    lines += _tagged(".I /var/lib/hostagent/tokens.json", ["Who may use the API by TCP, by hashes of their tokens."])
    lines += _tagged(".I /run/hostagent", ["Its sockets, and those of the exports."])
    return [*lines, ".SH SEE ALSO", *_see(name for name in names if name != "hostagent(1)")]


def _noun(noun: Command) -> list[str]:
    name = f"hostagent-{noun.path[0]}"
    lines = [*_head(name, 1), ".SH NAME", f"{_text(name)} {DASH} {_text(noun.help)}", ".SH SYNOPSIS"]
    lines += [".nh", ".ad l"]
    for number, command in enumerate(noun.commands or (noun,)):
        lines += [*([".br"] if number else []), *_synopsis(command)]
    lines += [".ad", ".hy"]
    lines += [".SH DESCRIPTION", _text(_sentence(noun.description))]
    if noun.commands:
        lines.append(".SH COMMANDS")
    for verb in noun.commands:
        lines += [f".SS {_text(' '.join(verb.path))}", _text(_sentence(verb.description)), *_own(verb)]
    if not noun.commands:
        lines += [".SH OPTIONS", *_own(noun)]
    lines += [".SH COMMON OPTIONS", *_words(word for word in noun.options if word.common)]
    return [*lines, ".SH SEE ALSO", *_see(("hostagent(1)", "hostagent.toml(5)"))]


def _settings() -> list[str]:
    lines = [*_head("hostagent.toml", 5), ".SH NAME", f"hostagent.toml {DASH} settings of the agent for disk images"]
    lines += [".SH SYNOPSIS", f".I {_text(config_text.DEFAULT_FILE)}", ".SH DESCRIPTION", _text(SETTINGS)]
    for section in SECTIONS:
        lines.append(f".SH [{section}]")
        for key, (default, rule) in rules(section).items():
            value = _text(config_text.literal(default, rule))
            lines += _tagged(f'.BR {_text(key)} " = {_argument(value)}"', [config_text.manual(rule)])
    return [*lines, ".SH SEE ALSO", *_see(("hostagent(1)", "hostagent-serve(1)", "hostagent-data(1)"))]


# Parts of a page

DASH = "\\-"


def _head(name: str, section: int) -> list[str]:
    # As in all builds that can be repeated: the time of the source, not of the build.
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())))
    return [f'.TH {name.upper()} {section} {date} "hostagent {__version__}" "hostagent"']


def _synopsis(command: Command) -> list[str]:
    """The program and its words in bold, options that exclude each other together, at the left margin."""
    shown, seen = [], set()
    for word in command.options:
        if word.common or "--help" in word.flags or (word.among is not None and word.among in seen):
            continue
        several = [word] if word.among is None else [w for w in command.options if w.among == word.among]
        if word.among is not None:
            seen.add(word.among)
        text = "|".join(_flag(one) for one in several)
        shown.append(text if word.required else f"[{text}]")
    for word in command.arguments:
        shown.append(f"[\\fI{_text(word.metavar)}\\fR...]" if word.repeats else f"\\fI{_text(word.metavar)}\\fR")
    if command.commands:
        shown.append("\\fICOMMAND\\fR ...")
    words = " ".join(("hostagent", *command.path))
    return [f".B {_text(words)}", *(text.replace(" ", "\\ ") for text in shown)]


def _own(command: Command) -> list[str]:
    words = [word for word in command.options if not word.common and "--help" not in word.flags]
    return list(_words((*command.arguments, *words)))


def _words(words: Iterable[Word]) -> Iterator[str]:
    for word in words:
        tag = _flag(word) if word.flags else f"\\fI{_text(word.metavar)}\\fR"
        says = _sentence(word.help or f"The {word.metavar.lower()}.")
        yield from _tagged(tag, [f"{says} May be repeated." if word.repeats and "repeat" not in says else says])


def _flag(word: Word) -> str:
    flags = ", ".join(f"\\fB{_text(flag)}\\fR" for flag in word.flags)
    return f"{flags} \\fI{_text(word.metavar)}\\fR" if word.metavar else flags


def _tagged(tag: str, paragraphs: Iterable[str]) -> list[str]:
    return [".TP", tag, *map(_text, paragraphs)]


def _see(names: Iterable[str]) -> list[str]:
    parts = [name.removesuffix(")").split("(") for name in names]
    commas = ["," if number + 1 < len(parts) else "" for number in range(len(parts))]
    return [f".BR {_text(name)} ({section}){comma}" for (name, section), comma in zip(parts, commas, strict=True)]


def _sentence(text: str) -> str:
    if text.split()[0].isalpha():  # and not a name, as qemu-img
        text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _text(text: str) -> str:
    """Plain text as roff: what is no ASCII by its number, and no line that begins as a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\`").replace("'", "\\(aq").replace("^", "\\(ha")
    text = text.replace("~", "\\(ti")
    text = "".join(char if char < "\x7f" else f"\\[u{ord(char):04X}]" for char in text)
    return f"\\&{text}" if text.startswith((".", "'")) else text


def _argument(text: str) -> str:
    """Within the quotes of a request's argument."""
    return text.replace('"', "\\(dq")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
