"""`hostagent token`, and how an agent of another host is named."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hostagent.cli import arguments
from hostagent.cli.main import main, parser
from hostagent.cli.tokens import _moment
from hostagent.errors import EXIT_BUSY, EXIT_NOT_FOUND, EXIT_OK, EXIT_USAGE, AgentError
from hostagent.tls_http import address


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "tokens.json")


def test_a_token_is_shown_once(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "add", "ci", "--scope", "operate", "--expires", "30d", "--file", file]) == EXIT_OK
    said = capsys.readouterr()
    assert said.out.startswith("hostagent.ci.") and said.out.count("\n") == 1 and "not shown again" in said.err
    assert main(["token", "list", "--json", "--file", file]) == EXIT_OK
    shown = capsys.readouterr().out
    (item,) = json.loads(shown)["items"]
    assert (item["name"], item["scope"]) == ("ci", "operate") and "sha256" not in item
    assert main(["token", "list", "--file", file]) == EXIT_OK
    assert said.out.strip() not in shown + capsys.readouterr().out


def test_what_cannot_be_done_is_said(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "add", "ci", "--scope", "read", "--file", file]) == EXIT_OK
    assert main(["token", "add", "ci", "--scope", "read", "--file", file]) == EXIT_BUSY
    assert main(["token", "remove", "other", "--file", file]) == EXIT_NOT_FOUND
    assert main(["token", "add", "A", "--scope", "read", "--file", file]) == EXIT_USAGE
    assert main(["token", "add", "b", "--scope", "root", "--file", file]) == EXIT_USAGE
    assert main(["token", "add", "b", "--scope", "read", "--expires", "soon", "--file", file]) == EXIT_USAGE
    assert main(["token", "remove", "ci", "--file", file]) == EXIT_OK
    assert "remedy" in capsys.readouterr().err


def test_there_is_a_bound(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTAGENT_API_TOKENS", "1")
    assert main(["token", "add", "a", "--scope", "read", "--file", file]) == EXIT_OK
    assert main(["token", "add", "b", "--scope", "read", "--file", file]) == EXIT_BUSY


@pytest.mark.parametrize(("text", "after"), [("1m", 60), ("12h", 43200), ("30d", 2592000), ("2w", 1209600)])
def test_a_time_may_be_said_as_a_span(text: str, after: int) -> None:
    assert abs((_moment(text) - datetime.now(UTC)).total_seconds() - after) < 5


@pytest.mark.parametrize("text", ["2030-01-01T00:00:00Z", "2030-01-01", "2030-01-01T02:00:00+02:00"])
def test_or_as_a_moment(text: str) -> None:
    assert _moment(text) == datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "2001-01-01", "999999w9", "tomorrow"])
def test_anything_else_is_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        _moment(text)


def named(*words: str) -> object:
    return arguments.away(parser().parse_args(["job", "list", *words], argparse.Namespace(**arguments.COMMON_DEFAULTS)))


def test_an_agent_is_named_by_options_or_the_environment_and_a_socket_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named() is None
    assert str(named("--url", "https://a:1")) == "https://a:1"
    monkeypatch.setenv("HOSTAGENT_URL", "https://b:1")
    monkeypatch.setenv("HOSTAGENT_TOKEN_FILE", "/t")
    assert str(named()) == "https://b:1" and named().token_file == "/t"  # type: ignore[attr-defined]
    assert named("--socket", "/s") is None
    with pytest.raises(AgentError):
        named("--socket", "/s", "--url", "https://a:1")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host",
        "https://host",
        "ftp://host:1",
        "https://host:1/x",
        "https://u:p@host:1",
        "https://host:x",
        "https://:1",
    ],
)
def test_an_address_is_a_scheme_a_host_and_a_port(url: str) -> None:
    with pytest.raises(AgentError) as refused:
        address(url)
    assert "u:p" not in refused.value.message
    assert address("https://[::1]:5/") == ("::1", 5, True)


@pytest.mark.parametrize("text", ["", "two words", "\u00e9"])
def test_a_file_without_a_token_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t"
    file.write_text(text)
    assert main(["job", "list", "--url", "http://127.0.0.1:1", "--token-file", str(file)]) == EXIT_USAGE
    assert main(["job", "list", "--url", "http://127.0.0.1:1", "--token-file", str(tmp_path / "none")]) == EXIT_USAGE


def test_one_that_others_may_read_is_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t"
    file.write_text("hostagent.a.b\n")
    file.chmod(0o644)
    main(["job", "list", "--url", "http://127.0.0.1:1", "--token-file", str(file)])
    assert "chmod 0600" in capsys.readouterr().err


# Commands that no agent of another host can be asked for


@pytest.mark.parametrize(
    "words",
    [
        *(["--url", "https://no.such.host:1", "token", verb] for verb in ("list", "remove ci", "add ghost --scope admin")),
        *(["token", verb, "--url", "https://no.such.host:1"] for verb in ("list", "remove ci", "add ghost --scope admin")),
        *(["--token-file", "/t", "token", "list"], ["--socket", "/s", "token", "list"], ["--cert", "/c", "image", "map /x"]),
        *(["--url", "u", "image", verb] for verb in ("inspect /nowhere", "check /nowhere", "map /nowhere")),
        *(["image", "--url", "u", "check /nowhere"], ["--url", "u", "upload", "/nowhere http://h/t"]),
        *(["--cafile", "/c", "download", "http://h/t /nowhere"], ["--url", "u", "completion", "bash"]),
        *(["--url", "u", "serve", "--show-config"], ["--url", "u", "data", "--show-config"], ["--url", "u", "demo"]),
    ],
    ids=" ".join,
)
def test_what_works_on_this_host_alone_refuses_another_before_it_does_anything(
    words: list[str], file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTAGENT_API_TOKENS_FILE", file)
    assert main(" ".join(words).split()) == EXIT_USAGE
    said = capsys.readouterr()
    option = next(word for word in words if word.startswith("--") and word != "--show-config")
    assert said.out == "" and f"hostagent: {option} is for" in said.err and "remedy: leave it out" in said.err
    assert not Path(file).exists()


def test_nor_is_another_hosts_agent_judged_by_a_file_of_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "https://no.such.host:1", "doctor", "--config", "/x"]) == EXIT_USAGE
    said = capsys.readouterr()
    assert said.out == "" and "--config is a file of this host" in said.err


def test_an_agent_in_the_environment_is_for_the_commands_that_ask_one(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTAGENT_URL", "https://no.such.host:1")
    assert main(["token", "add", "ci", "--scope", "read", "--file", file]) == EXIT_OK
    assert capsys.readouterr().out.startswith("hostagent.ci.")
