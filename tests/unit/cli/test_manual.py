"""The manual pages: clean for man, and with every noun, verb, option, exit status and setting."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hostagent import errors
from hostagent.cli import manual
from hostagent.cli.main import parser
from hostagent.cli.tree import read
from hostagent.config import SECTIONS, rules

TOP = read(parser())
PAGES = manual.pages()
shown = pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed (tools/setup.sh develop)")


def plain(page: str) -> str:
    """A page's source without its markup."""
    text = re.sub(r"\\f[BIR]", "", PAGES[page]).replace("\\-", "-").replace("\\ ", " ")
    return re.sub(r"^\.BR? ", "", text, flags=re.MULTILINE)


def test_there_is_a_page_for_each_noun_and_one_for_the_settings() -> None:
    nouns = {f"hostagent-{noun.path[0]}.1" for noun in TOP.commands}
    assert set(PAGES) == {"hostagent.1", "hostagent.toml.5", *nouns}
    for noun in nouns:
        assert noun.removesuffix(".1") in plain("hostagent.1")


@pytest.mark.parametrize("noun", TOP.commands, ids=lambda noun: noun.path[0])
def test_a_page_has_each_verb_and_each_option_with_its_value(noun: manual.Command) -> None:
    text = plain(f"hostagent-{noun.path[0]}.1")
    for command in noun.all():
        assert f"hostagent {' '.join(command.path)}\n" in text or command is noun
        for word in (*command.options, *command.arguments):
            if "--help" not in word.flags:
                assert re.search(rf"^{re.escape(' '.join(filter(None, (', '.join(word.flags), word.metavar))))}$",
                                 text, re.MULTILINE), (command.path, word)  # fmt: skip


def test_the_settings_page_has_each_setting_with_its_default_and_manual() -> None:
    text = " ".join(plain("hostagent.toml.5").split())
    for section in SECTIONS:
        assert f".SH [{section}]" in text
        for key, (_, rule) in rules(section).items():
            assert f'{key} " = ' in text
            assert " ".join(manual._text(rule.manual).replace("\\-", "-").split()) in text


def test_every_exit_status_is_explained() -> None:
    known = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {status for status, _ in manual.STATUS} == known


@shown
@pytest.mark.parametrize("page", PAGES)
def test_man_finds_nothing_to_warn_of(page: str, tmp_path: Path) -> None:
    (tmp_path / page).write_text(PAGES[page])
    env = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MANROFFSEQ": ""}
    command = ["man", "--warnings", "-l", str(tmp_path / page)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "NAME\n" in done.stdout and "\n       hostagent" in done.stdout


@shown
def test_man_would_warn(tmp_path: Path) -> None:
    (tmp_path / "wrong.1").write_text(".TH WRONG 1\n.SH NAME\nwrong \\- x\n.NOSUCH\n\\fQx\n")
    done = subprocess.run(["man", "--warnings", "-l", str(tmp_path / "wrong.1")], capture_output=True, text=True)
    assert "NOSUCH" in done.stderr


def test_the_pages_are_the_same_for_the_same_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    manual.main(tmp_path)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == manual.pages()
    assert all(" 2023-11-14 " in text.splitlines()[0] for text in found.values())
