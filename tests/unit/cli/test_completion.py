"""Completions, in the shells themselves: every noun, verb, option and choice of the command line is offered."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from hostagent.cli import completion
from hostagent.cli.main import main, parser
from hostagent.cli.tree import Command, read

TOP = read(parser())
COMMANDS = [command for command in TOP.all()]
WAIT = 60.0

ASK = """
source "$1"
while IFS= read -r line; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *' ' ]] && COMP_WORDS+=('')
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _hostagent
    echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "hostagent"
    path.write_text(completion.bash(TOP))
    return path


def in_bash(script: Path, *lines: str) -> list[list[str]]:
    """What is offered at the end of each line."""
    given = "".join(f"{line}\n" for line in lines)
    command = ["bash", "-c", ASK, "bash", str(script)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=WAIT, check=True)
    assert not done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def typed(command: Command) -> str:
    return " ".join(("hostagent", *command.path))


def test_the_command_line_that_is_read_is_the_whole() -> None:
    paths = {command.path for command in COMMANDS}
    assert {("job", "pull"), ("job", "copy"), ("export", "start"), ("serve",), ("completion",)} <= paths
    assert ("backup",) not in paths, "what is only announced"
    (pull,) = (command for command in COMMANDS if command.path == ("job", "pull"))
    assert {"--base", "--dry-run", "--label", "--json"} <= {flag for word in pull.options for flag in word.flags}


def test_bash_offers_every_noun_verb_and_option(bash_script: Path) -> None:
    groups = [command for command in COMMANDS if command.commands]
    for command, offered in zip(groups, in_bash(bash_script, *(f"{typed(one)} " for one in groups)), strict=True):
        assert offered == [child.path[-1] for child in command.commands]
    for command, offered in zip(COMMANDS, in_bash(bash_script, *(f"{typed(one)} -" for one in COMMANDS)), strict=True):
        assert set(offered) == {flag for word in command.options for flag in word.flags}, command.path


def test_bash_offers_what_a_value_may_be(bash_script: Path) -> None:
    asked = [(typed(command), word.flags[0], word.choices) for command in COMMANDS for word in command.options
             if word.choices]  # fmt: skip
    assert len(asked) > 10
    offered = in_bash(bash_script, *(f"{at} {flag} " for at, flag, _ in asked))
    assert offered == [list(choices) for _, _, choices in asked]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("hostagent jo", ["job"]),
        ("hostagent --socket /run/x job pu", ["pull"]),  # the value of an option is no noun
        ("hostagent --json job job", []),  # nor is what follows one a noun again
        ("hostagent job pull --check = a", ["auto", "always"]),  # readline's words of --check=a
        ("hostagent job pull --check =", ["auto", "always", "never"]),
        ("hostagent job copy --format q", ["qcow2"]),
        ("hostagent completion ", ["bash", "zsh", "fish"]),
        ("hostagent job show ", []),
        ("hostagent nothing ", []),
    ],
)
def test_bash_completes_in_the_place_where_it_is(bash_script: Path, line: str, offered: list[str]) -> None:
    found = in_bash(bash_script, line)[0]
    assert found == offered or (line.endswith("nothing ") and "job" in found)


def test_bash_offers_files_where_a_path_is_due(bash_script: Path, tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").touch()
    (tmp_path / "folder").mkdir()
    both = [str(tmp_path / "disk.qcow2"), str(tmp_path / "folder")]
    lines = ("job pull", "job pull --base", "image map", "upload", "job copy ./a ./b ./c", "serve --config")
    for offered in in_bash(bash_script, *(f"hostagent {line} {tmp_path}/" for line in lines)):
        assert sorted(offered) == both
    assert in_bash(bash_script, f"hostagent serve --state-dir {tmp_path}/") == [both[1:]]


@pytest.mark.parametrize(
    ("shell", "options", "before", "after"),
    [
        ("bash", ("--norc", "--noprofile", "-i"), ":", "--check always"),
        ("zsh", ("-f", "-i"), "autoload -U compinit; compinit -D -u", "--check=always"),
    ],
)
def test_the_tab_key_completes_in_an_interactive_shell(
    shell: str, options: tuple[str, ...], before: str, after: str, tmp_path: Path
) -> None:
    """Sourced as README says, with the shell's own splitting of words."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed (tools/setup.sh develop)")
    (tmp_path / "completion").write_text(completion.SHELLS[shell](TOP))
    env = {**os.environ, "PS1": "ready> ", "TERM": "dumb", "HOME": str(tmp_path)}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe(shell, [shell, *options], env)
    try:
        setup = f"{before}; source ./completion; hostagent() {{ echo \"ran<$*>\"; }}; echo set''up\n"
        os.write(terminal, setup.encode())
        until(terminal, "setup\r")
        until(terminal, "ready> ")
        os.write(terminal, b"hostagent jo\tpul\t--che\talw\t\n")
        until(terminal, f"ran<job pull {after}>")
        until(terminal, "ready> ")
        os.write(terminal, b"hostagent job pull ./compl\t--check=al\t\n")
        until(terminal, "ran<job pull ./completion --check=always>")
    finally:
        os.close(terminal)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def until(terminal: int, text: str) -> None:
    """Read what the terminal says up to this text."""
    said, end = "", time.monotonic() + WAIT
    while text not in said:
        assert time.monotonic() < end, said
        if select.select([terminal], [], [], 1.0)[0]:
            said += os.read(terminal, 1).decode(errors="replace")  # and not a byte of what follows


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed (tools/setup.sh develop)")
def test_fish_offers_every_noun_verb_option_and_value(tmp_path: Path) -> None:
    script = tmp_path / "hostagent.fish"
    script.write_text(completion.fish(TOP))
    lines = [f"{typed(command)} {end}" for command in COMMANDS for end in ("", "-")]
    lines += ["hostagent job pull --check ", "hostagent --socket /x job pu", "hostagent job pull ./hosta"]
    ask = f"source {script}; while read -l line; complete -C $line | string replace -r '\\t.*' ''; echo ==; end"
    env = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    done = subprocess.run(["fish", "--no-config", "-c", ask], input="\n".join(lines) + "\n", capture_output=True,
                          text=True, timeout=WAIT, cwd=tmp_path, env=env)  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    offered = [set(part.split()) for part in done.stdout.split("==\n")]
    for number, command in enumerate(COMMANDS):
        if command.commands:
            assert offered[2 * number] == {child.path[-1] for child in command.commands}, command.path
        expected = {flag for word in command.options for flag in word.flags if flag.startswith("--")}
        assert expected <= offered[2 * number + 1], command.path
    assert offered[-4:-1] == [{"auto", "always", "never"}, {"pull"}, {"./hostagent.fish"}]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed (tools/setup.sh develop)")
def test_zsh_takes_its_script_and_offers_every_noun_and_verb(tmp_path: Path) -> None:
    (tmp_path / "_hostagent").write_text(completion.zsh(TOP))
    subprocess.run(["zsh", "-n", str(tmp_path / "_hostagent")], check=True, timeout=WAIT)
    groups = [command for command in COMMANDS if command.commands]
    lines = [*(f"{typed(one)} " for one in groups), "hostagent job pull --check=", "hostagent --socket /x job pu"]
    lines += [f"{typed(one)} -" for one in COMMANDS]
    offered = in_zsh(tmp_path, lines)
    for number, command in enumerate(groups):
        assert offered[number] == {child.path[-1] for child in command.commands}, command.path
    assert offered[len(groups)] >= {"auto", "always", "never"}
    assert offered[len(groups) + 1] == {"pull"}
    for command, found in zip(COMMANDS, offered[len(groups) + 2 :], strict=True):
        expected = {flag for word in command.options for flag in word.flags if flag.startswith("--")}
        assert expected <= {one.removesuffix("=") for one in found}, command.path


IN_ZSH = """
autoload -U compinit; fpath=($1 $fpath); compinit -D -u
# What would be offered is written down instead: compadd is the one way to it.
compadd() {
    if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\\ * ]]; then builtin compadd "$@"; return; fi
    typeset -a found
    builtin compadd -O found "$@"
    print -l -- $found >> $OFFERED
}
typed() { BUFFER=; zle -U "$1" }
"""


def in_zsh(folder: Path, lines: list[str]) -> list[set[str]]:
    """What is offered at the end of each line, by the completion system of an interactive zsh."""
    (folder / "setup.zsh").write_text(IN_ZSH)
    env = {**os.environ, "OFFERED": str(folder / "offered"), "TERM": "dumb", "HOME": str(folder), "PS1": "ready> "}
    found = []
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], env)
    try:
        os.write(terminal, f"source {folder}/setup.zsh {folder}; bindkey '^I' complete-word; echo set''up\n".encode())
        until(terminal, "setup\r")
        for line in lines:
            until(terminal, "ready> ")  # typed before, a ^U would be the terminal's own
            Path(env["OFFERED"]).write_text("")
            os.write(terminal, f"{line}\t".encode())
            os.write(terminal, b"\x15echo do''ne\n")
            until(terminal, "done\r")
            found.append(set(Path(env["OFFERED"]).read_text().split()))
    finally:
        os.close(terminal)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return found


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_command_prints_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == completion.SHELLS[shell](TOP)
